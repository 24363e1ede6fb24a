// needs: ptx layout formats paged rope vectors
// What latent attention keeps of a row, into the cache at the row's slot: y[..LATENT] normed, then the rest of y turned by the
// row's position. One block takes a row.

// constants-begin
constexpr u32 HEAD_DIM = 576; // of a latent and its key
constexpr u32 KV_HEADS = 1;
constexpr u32 LATENT = 512;
constexpr u32 POSITIONS = 2048; // that the rope table has
constexpr float EPS = 1e-6f; // of the latent's norm
constexpr u32 CACHE = 1; // format of the cache
constexpr u32 PAGE_SIZE = 16;
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = false;
// constants-end

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 HALF = (HEAD_DIM - LATENT) / 2; // of a key
static_assert(LATENT % 8 == 0 && HALF % 4 == 0, "four neighbours stay together");

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    latent(const u32* rows, const u32* requests, const u32* pages,
           const float* y, // [rows, HEAD_DIM]
           const float* norm, // [LATENT]
           const float* rope, // [POSITIONS, HALF, 2]: cos, sin
           void* cache) { // one layer
    release_next();
    __shared__ float sums[WARPS];
    const u32 row = blockIdx.x, t = threadIdx.x;
    const bool is_row = row < requests[0];
    const u32* words = rows + row * ROW_WORDS;
    const u32 request = is_row ? words[ROW_REQUEST] : 0;
    const u32 prefix = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX];
    wait_for_previous();
    if (!is_row) return;
    const u32 position = words[ROW_POSITION], slot = prefix + words[ROW_NODE];

    const float* from = y + row * HEAD_DIM;
    float squares = 0.0f;
    for (u32 d = 4 * t; d < LATENT; d += 4 * THREADS) squares = add_squares(*(const float4*)(from + d), squares);
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(FULL_WARP, squares, lanes);
    if (t % 32 == 0) sums[t / 32] = squares;
    __syncthreads();
    squares = 0.0f;
    for (u32 warp = 0; warp < WARPS; warp++) squares += sums[warp];
    const float factor = 1.0f / sqrtf(squares / LATENT + EPS);

    const u64 block = cache_block(pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE], 0);
    for (u32 d = 4 * t; d < LATENT; d += 4 * THREADS) {
        const float4 v = mul4(*(const float4*)(from + d), factor), by = *(const float4*)(norm + d);
        const float4 kept = make_float4(v.x * by.x, v.y * by.y, v.z * by.z, v.w * by.w);
        store_cached(cache, block, slot % PAGE_SIZE, d, kept);
    }
    for (u32 d = 4 * t; d < HALF; d += 4 * THREADS) {
        const float* key = from + LATENT + d;
        const Pairs turned = turn({*(const float4*)key, *(const float4*)(key + HALF)}, load_turn<HALF>(rope, position, d));
        store_cached(cache, block, slot % PAGE_SIZE, LATENT + d, turned.first);
        store_cached(cache, block, slot % PAGE_SIZE, LATENT + d + HALF, turned.second);
    }
}
