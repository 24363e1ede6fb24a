// needs: ptx layout batch ancestors formats paged
// Tree attention for what the tensor-core kernel does not take: any head size, cache format, page size and group.
//
// One block takes a row and a query head. Key i of a row is slot i while i < prefix, and from there on the slot of the
// (i - prefix)-th node of its path; no other slot is read. Keys come in position order:
//
//     for each tile of THREADS positions:
//         scores  = query · key                        one thread a position
//         weights = exp(scores - running maximum)
//         output  = output * rescale + weights · value   one thread eight elements, positions dealt to key groups
//
// What is added to what depends on positions alone, so a node of a tree gets the same sums as the same token decoded
// plainly, whatever shares the pass.

// constants-begin
constexpr u32 HEAD_DIM = 64;
constexpr u32 KV_HEADS = 3;
constexpr u32 PAGE_SIZE = 16;
constexpr u32 CACHE = 0; // format of the cache
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = false;
constexpr u32 GROUP = 3; // query heads that share a kv head
constexpr float SCALE = 0.125f; // of the scores
// constants-end

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 COLUMNS = HEAD_DIM / 8; // eights of elements of an output
constexpr u32 KEY_GROUPS = THREADS / COLUMNS;
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= THREADS, "one thread finishes an element");

// Blocks: [heads, rows].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    plain_attention(const u32* rows, const u32* requests, const u32* pages, const float* q, // [rows, heads, HEAD_DIM]
                    const void* k_cache, const void* v_cache, float* out) { // out [rows, heads, HEAD_DIM]
    release_next();
    __shared__ __align__(16) float query[HEAD_DIM];
    __shared__ float weights[THREADS];
    __shared__ u32 places[THREADS]; // page * PAGE_SIZE + slot of the page, of each key of the tile
    __shared__ float parts[WARPS];
    __shared__ float outputs[KEY_GROUPS][HEAD_DIM];

    const u32 t = threadIdx.x, row = blockIdx.y;
    const u32 kv_head = blockIdx.x / GROUP;
    const bool is_row = row < requests[0];
    const u32 request = is_row ? rows[row * ROW_WORDS + ROW_REQUEST] : 0;
    const u32 prefix = read_request(requests, request).prefix;
    const Ancestors ancestors = is_row ? read_ancestors(rows, row) : Ancestors{};
    const u32 keys = prefix + path_length(ancestors);
    wait_for_previous();
    if (!is_row) return;

    const u64 vector = ((u64)row * gridDim.x + blockIdx.x) * HEAD_DIM;
    if (t < HEAD_DIM) query[t] = q[vector + t] * SCALE;
    __syncthreads();

    const auto element_of = [&](u32 place, u32 d) {
        return cache_block(place / PAGE_SIZE, kv_head) + cache_place(place % PAGE_SIZE, d);
    };
    const float never = __uint_as_float(0xff800000u); // -infinity
    const u32 column = t % COLUMNS, key_group = t / COLUMNS;
    Eight output = {};
    float maximum = never, sum = 0.0f; // the sum of this thread's weights
    for (u32 begin = 0; begin < keys; begin += THREADS) {
        const u32 position = begin + t;
        float score = never;
        if (position < keys) {
            const u32 slot = position < prefix ? position : prefix + node_on_path(ancestors, position - prefix);
            const u32 place = pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE] * PAGE_SIZE + slot % PAGE_SIZE;
            places[t] = place;
            score = 0.0f;
            for (u32 d = 0; d < HEAD_DIM; d += 8) {
                const Eight key = load_eight(CACHE, k_cache, element_of(place, d));
#pragma unroll
                for (u32 i = 0; i < 8; i++) score = fmaf(key.x[i], query[d + i], score);
            }
        }

        float largest = score;
#pragma unroll
        for (u32 lanes = 16; lanes > 0; lanes /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
        }
        if (t % 32 == 0) parts[t / 32] = largest;
        __syncthreads();
        for (u32 warp = 0; warp < WARPS; warp++) largest = fmaxf(largest, parts[warp]);
        largest = fmaxf(largest, maximum);
        const float rescale = expf(maximum - largest);
        const float weight = position < keys ? expf(score - largest) : 0.0f;
        weights[t] = weight;
        sum = fmaf(sum, rescale, weight);
        maximum = largest;
        __syncthreads();

        if (key_group < KEY_GROUPS) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) output.x[i] *= rescale;
            const u32 n = min(THREADS, keys - begin);
            for (u32 key = key_group; key < n; key += KEY_GROUPS) {
                const Eight value = load_eight(CACHE, v_cache, element_of(places[key], 8 * column));
#pragma unroll
                for (u32 i = 0; i < 8; i++) output.x[i] = fmaf(weights[key], value.x[i], output.x[i]);
            }
        }
        __syncthreads();
    }

    if (key_group < KEY_GROUPS) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) outputs[key_group][8 * column + i] = output.x[i];
    }
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
    if (t % 32 == 0) parts[t / 32] = sum;
    __syncthreads();
    if (t < HEAD_DIM) {
        float total = 0.0f, x = 0.0f;
        for (u32 warp = 0; warp < WARPS; warp++) total += parts[warp];
        for (u32 group = 0; group < KEY_GROUPS; group++) x += outputs[group][t];
        out[vector + t] = x / total;
    }
}
