// needs: ptx layout formats
// out[r] = table[token(r)], widened to float. One thread widens eight elements.

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a table row
constexpr u32 WEIGHT = 1; // format of the table
constexpr u32 TOKENS = 49152; // rows of the table
// constants-end

constexpr u32 THREADS = 128;

// Blocks: [COLUMNS / 8 / THREADS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const u32* rows, const u32* requests, const void* table, float4* out) { // out [rows, COLUMNS]
    release_next();
    // The rows may have been drafted by the kernel before.
    wait_for_previous();
    const u32 at = blockIdx.x * THREADS + threadIdx.x;
    const u32 row = blockIdx.y;
    if (at >= COLUMNS / 8 || row >= requests[0]) return;
    const u32 token = rows[row * ROW_WORDS + ROW_TOKEN];
    if (token >= TOKENS) return;
    const Eight values = load_eight(WEIGHT, table, (u64)token * COLUMNS + 8 * at);
    float4* to = out + row * (COLUMNS / 4) + 2 * at;
    to[0] = make_float4(values.x[0], values.x[1], values.x[2], values.x[3]);
    to[1] = make_float4(values.x[4], values.x[5], values.x[6], values.x[7]);
}
