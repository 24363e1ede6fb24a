// Number formats of weights and caches, widened to float where they are used.
//
// 16-bit elements lie two in a word, the element of lower index in the low half. A format is always a constant: after
// inlining, nothing is left of the branches.
//
// Needs ptx.

constexpr u32 F32 = 0;
constexpr u32 BF16 = 1;
constexpr u32 F16 = 2;

__device__ constexpr u32 bytes_of(u32 format) { return format == F32 ? 4 : 2; }

__device__ __forceinline__ float2 widen_pair(u32 format, u32 word) {
    if (format == BF16) return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    return make_float2(widen_f16((u16)word), widen_f16((u16)(word >> 16)));
}

// Rounded to nearest, ties to even; `low` in the low half.
__device__ __forceinline__ u32 narrow_pair(u32 format, float low, float high) {
    return format == BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

// Eight consecutive elements.
struct Eight {
    float x[8];
};

__device__ __forceinline__ Eight widen_eight(u32 format, uint4 words) {
    const float2 a = widen_pair(format, words.x), b = widen_pair(format, words.y);
    const float2 c = widen_pair(format, words.z), d = widen_pair(format, words.w);
    return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

// Elements `at` .. `at + 8` of an array; `at` is a multiple of 8, the array is aligned to 16 bytes.
__device__ __forceinline__ Eight load_eight(u32 format, const void* array, u64 at) {
    if (format != F32) return widen_eight(format, ((const uint4*)array)[at / 8]);
    const float4 low = ((const float4*)array)[at / 4], high = ((const float4*)array)[at / 4 + 1];
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}
