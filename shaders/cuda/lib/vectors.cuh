// Arithmetic of four neighbours, and rows that are read and written four elements at a time.

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ __forceinline__ float4 mul4(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
// a · a + sum, one product after the other.
__device__ __forceinline__ float add_squares(float4 a, float sum) {
    return fmaf(a.w, a.w, fmaf(a.z, a.z, fmaf(a.y, a.y, fmaf(a.x, a.x, sum))));
}

// Elements at .. at + 4 of a row of WIDTH elements, as far as it has them.
template <u32 WIDTH>
__device__ __forceinline__ float4 load_row4(const float* row, u32 at) {
    if (WIDTH % 4 == 0) return at < WIDTH ? *(const float4*)(row + at) : make_float4(0, 0, 0, 0);
    return make_float4(at < WIDTH ? row[at] : 0, at + 1 < WIDTH ? row[at + 1] : 0, at + 2 < WIDTH ? row[at + 2] : 0,
                       at + 3 < WIDTH ? row[at + 3] : 0);
}

template <u32 WIDTH>
__device__ __forceinline__ void store_row4(float* row, u32 at, float4 v) {
    if (WIDTH % 4 == 0) {
        if (at < WIDTH) *(float4*)(row + at) = v;
        return;
    }
    if (at < WIDTH) row[at] = v.x;
    if (at + 1 < WIDTH) row[at + 1] = v.y;
    if (at + 2 < WIDTH) row[at + 2] = v.z;
    if (at + 3 < WIDTH) row[at + 3] = v.w;
}
