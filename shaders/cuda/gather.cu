// needs: ptx
// out[r] = states[sources[r]]

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row
// constants-end

constexpr u32 THREADS = 128;

// Blocks: [COLUMNS / 4 / THREADS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const u32* requests, const u32* sources, const float* states, float* out) { // states, out [rows, COLUMNS]
    release_next();
    const u32 row = blockIdx.y, at = 4 * (blockIdx.x * THREADS + threadIdx.x);
    wait_for_previous();
    if (row >= requests[0] || at >= COLUMNS) return;
    *(float4*)(out + row * COLUMNS + at) = *(const float4*)(states + sources[row] * COLUMNS + at);
}
