// needs: ptx layout batch formats paged
// Moves the accepted rows next to the prefix: slot L + path[i] to slot L + i, in every layer and head, of both caches
// or, where keys are their own values, of one.
//
// One block takes one head, layer and request, and so many path entries at a time, in ascending order: it reads them
// all, then writes. Path ids ascend and path[i] >= i, so what a turn writes is no source of a later one.

// constants-begin
constexpr u32 HEAD_DIM = 64;
constexpr u32 KV_HEADS = 3;
constexpr u32 PAGE_SIZE = 16;
constexpr u32 CACHE = 1; // format of the caches
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = true; // the order of a block of the cache
constexpr u32 POOL_PAGES = 512; // pages of a layer
constexpr u32 CACHES = 2;
constexpr u32 THREADS = 128;
// constants-end

constexpr u32 ELEMENTS = 16 / bytes_of(CACHE); // of what a thread moves at once
constexpr u32 CHUNKS = HEAD_DIM / ELEMENTS; // of a vector
constexpr u32 TURN = THREADS / (CACHES * CHUNKS); // path entries moved together
static_assert(TURN > 0, "a key and its value need no more than the block's threads");

// Blocks: [KV_HEADS, layers, requests].
extern "C" __global__ void __launch_bounds__(THREADS)
    commit(const u32* requests, const u32* pages, const u32* accepted, uint4* k_cache, uint4* v_cache) {
    const u32 head = blockIdx.x, request = blockIdx.z;
    const bool is_request = request < requests[1];
    const u32 prefix = is_request ? read_request(requests, request).prefix : 0;
    wait_for_previous();
    if (!is_request) return;

    const u64 layer = (u64)blockIdx.y * POOL_PAGES * KV_HEADS * PAGE_SIZE * HEAD_DIM;
    uint4* cache = threadIdx.x % (CACHES * CHUNKS) < CHUNKS ? k_cache : v_cache;
    const u32 chunk = threadIdx.x % CHUNKS;
    const u32 entry = threadIdx.x / (CACHES * CHUNKS);
    const u32* path = accepted + request * ACCEPTED_WORDS + ACCEPTED_PATH;
    const u32 n_path = accepted[request * ACCEPTED_WORDS];
    for (u32 turn = 1; turn < n_path; turn += TURN) {
        const u32 i = turn + entry;
        const u32 node = entry < TURN && i < n_path ? path[i] : i;
        uint4 moved = {};
        if (node != i) {
            moved = cache[(layer + cache_element(pages, request, prefix + node, head, chunk * ELEMENTS)) / ELEMENTS];
        }
        __syncthreads();
        if (node != i) {
            cache[(layer + cache_element(pages, request, prefix + i, head, chunk * ELEMENTS)) / ELEMENTS] = moved;
        }
    }
}
