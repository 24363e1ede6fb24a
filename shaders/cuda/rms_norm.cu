// needs: ptx layout vectors
// out[r] = x[r] / rms(x[r]) * gamma. One block takes a row.

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row
constexpr float EPS = 1e-5f;
// constants-end

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / 32;

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const u32* requests, const float* x, const float* gamma, float* out) { // x, out [rows, COLUMNS]
    release_next();
    __shared__ float sums[WARPS];
    const u32 row = blockIdx.x;
    wait_for_previous();
    if (row >= requests[0]) return;
    const float4* from = (const float4*)(x + row * COLUMNS);
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < COLUMNS / 4; i += THREADS) squares = add_squares(from[i], squares);
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(FULL_WARP, squares, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.0f;
    for (u32 warp = 0; warp < WARPS; warp++) squares += sums[warp];
    const float factor = 1.0f / sqrtf(squares / COLUMNS + EPS);
    float4* to = (float4*)(out + row * COLUMNS);
    for (u32 i = threadIdx.x; i < COLUMNS / 4; i += THREADS) {
        const float4 v = mul4(from[i], factor), by = ((const float4*)gamma)[i];
        to[i] = make_float4(v.x * by.x, v.y * by.y, v.z * by.z, v.w * by.w);
    }
}
