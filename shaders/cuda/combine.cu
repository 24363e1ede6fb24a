// needs: ptx vectors
// residual[r] += sum over j of weights[r, j] * x[r, j], by ascending j.

// constants-begin
constexpr u32 WIDTH = 2048; // elements of a row of the residual
constexpr u32 CHOSEN = 6; // rows of x of each
// constants-end

constexpr u32 THREADS = 128;

// Blocks: [WIDTH / 4 / THREADS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    combine(const u32* requests, const float* x, // [rows, CHOSEN, WIDTH]
            const float* weights, float* residual) { // [rows, CHOSEN], [rows, WIDTH]
    release_next();
    const u32 row = blockIdx.y, at = 4 * (blockIdx.x * THREADS + threadIdx.x);
    wait_for_previous();
    if (row >= requests[0] || at >= WIDTH) return;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (u32 j = 0; j < CHOSEN; j++) {
        const float w = weights[row * CHOSEN + j];
        const float4 v = load_row4<WIDTH>(x + (row * CHOSEN + j) * WIDTH, at);
        sum = make_float4(fmaf(w, v.x, sum.x), fmaf(w, v.y, sum.y), fmaf(w, v.z, sum.z), fmaf(w, v.w, sum.w));
    }
    float* to = residual + row * WIDTH;
    store_row4<WIDTH>(to, at, add4(load_row4<WIDTH>(to, at), sum));
}
