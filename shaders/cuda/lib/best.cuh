// The best token of a block: largest key, ties to the lowest id.
//
// A token and its key are one number, so that the best of two is the larger: the key, then ~id. 0 is no token.
//
// Needs ptx, layout.

// A NaN among the logits beats every token: no number has this key.
constexpr u32 NAN_KEY = 0xffffffffu;
constexpr u64 NAN_WINS = (u64)NAN_KEY << 32;

// Orders numbers as unsigned words: key(a) < key(b) iff a < b. Both zeros have one key; no number has key 0 or
// NAN_KEY. Not for NaN.
__device__ __forceinline__ u32 order_key(float x) {
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// By its bits: no option of the compiler changes that.
__device__ __forceinline__ bool is_nan(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }

// Four logits of a row of END from token 4 * group on, -infinity past its end.
template <u32 END>
__device__ __forceinline__ float4 four_logits(const float* row, u32 group) {
    if (END % 4 == 0) return ((const float4*)row)[group];
    // Rows are not aligned, and the last group is not full.
    const float* x = row + 4 * group;
    const u32 n = END - 4 * group;
    const float none = __uint_as_float(0xff800000u);
    return make_float4(x[0], n > 1 ? x[1] : none, n > 2 ? x[2] : none, n > 3 ? x[3] : none);
}

__device__ __forceinline__ u64 token_with_key(u32 key, u32 token) { return (u64)key << 32 | (u32)~token; }
__device__ __forceinline__ u32 key_of(u64 best) { return (u32)(best >> 32); }

// As top-k ranks tokens: a NaN is below every number.
__device__ __forceinline__ u64 ranked(float x, u32 token) { return token_with_key(is_nan(x) ? 0 : order_key(x), token); }

// NONE for a NaN and for no token.
__device__ __forceinline__ u32 token_of(u64 best) { return key_of(best) == NAN_KEY ? NONE : ~(u32)best; }

__device__ __forceinline__ u64 better(u64 a, u64 b) { return a > b ? a : b; }

// Of each group of LANES neighbours in a warp, a power of two.
template <u32 LANES>
__device__ __forceinline__ u64 best_of_lanes(u64 mine) {
#pragma unroll
    for (u32 lanes = LANES / 2; lanes > 0; lanes /= 2) mine = better(mine, __shfl_xor_sync(FULL_WARP, mine, lanes));
    return mine;
}

__device__ __forceinline__ u64 best_of_warp(u64 mine) { return best_of_lanes<32>(mine); }

// The best of tokens `first` .. that are below `end`.
__device__ __forceinline__ u64 best_ranked(const float logits[4], u32 first, u32 end) {
    u64 best = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) best = better(best, first + i < end ? ranked(logits[i], first + i) : 0);
    return best;
}

// The best of all threads, for all threads. `shared` has a place for each of the WARPS warps.
template <u32 WARPS>
__device__ __forceinline__ u64 best_of_block(u64 mine, u64* shared) {
    mine = best_of_warp(mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    return best_of_warp(threadIdx.x % 32 < WARPS ? shared[threadIdx.x % 32] : 0);
}
