// needs: ptx layout batch ancestors formats paged
// Attention in the space of latents: out[r, h] = softmax(q[r, h] · K * SCALE) · K[..LATENT]. All heads have the same keys, whose
// first elements are their values.
//
// One block takes a row and some heads. Key i of a row is slot i while i < prefix, and from there on the slot of the
// (i - prefix)-th node of its path; no other slot is read. Keys come in position order, TILE at a time, by copies that are a
// tile ahead:
//
//     scores  = query · key                            slices of the elements, dealt to half warps: a lane a key, all heads
//     weights = exp(scores - running maximum)          a thread a head and key, which adds up the slices
//     output  = output * rescale + weights · value     a thread eight elements of a few heads
//
// What is added to what depends on positions alone: not on the heads of a block, nor on whatever shares the pass.

// constants-begin
constexpr u32 HEAD_DIM = 576; // of a latent and its key
constexpr u32 KV_HEADS = 1;
constexpr u32 PAGE_SIZE = 16;
constexpr u32 CACHE = 1; // format of the cache
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = false;
constexpr u32 LATENT = 512;
constexpr u32 HEADS = 4; // of a block
constexpr float SCALE = 0.0721687824f; // of the scores
constexpr u32 SHARED_BYTES = 49696;
// constants-end

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 TILE = 16; // keys
constexpr u32 SLICES = 2 * WARPS;
static_assert(HEADS * TILE <= THREADS, "one thread has the score of a head and key");

constexpr u32 ELEMENTS = 16 / bytes_of(CACHE); // of what a thread copies at once
constexpr u32 CHUNKS = HEAD_DIM / ELEMENTS; // of a key
// Of a key in shared memory: an odd number of chunks, so that lanes read their keys without bank conflicts.
constexpr u32 STRIDE = (CHUNKS | 1) * ELEMENTS;
constexpr u32 TILE_BYTES = TILE * STRIDE * bytes_of(CACHE);

constexpr u32 COLUMNS = LATENT / 8; // eights of elements of an output
constexpr u32 AT_ONCE = THREADS / COLUMNS; // heads that threads have eights of at once
constexpr u32 MINE = (HEADS + AT_ONCE - 1) / AT_ONCE; // heads of a thread
static_assert(LATENT % 8 == 0 && COLUMNS <= THREADS, "one thread has an eight of a head");

struct Shared {
    unsigned char tiles[2][TILE_BYTES];
    float queries[HEADS][HEAD_DIM];
    float scores[WARPS][HEADS][TILE]; // of two slices each
    float weights[HEADS][TILE];
    float rescales[HEADS];
    float sums[HEADS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launch gives less shared memory than the block needs");

// Blocks: [heads / HEADS, rows].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    plain_latents(const u32* rows, const u32* requests, const u32* pages, const float* q, // [rows, heads, HEAD_DIM]
                     const void* cache, float* out) { // one layer, [rows, heads, LATENT]
    release_next();
    DYNAMIC_SHARED(dynamic);
    Shared& shared = *(Shared*)dynamic;
    const u32 t = threadIdx.x, row = blockIdx.y;
    const u32 first_head = row * gridDim.x * HEADS + blockIdx.x * HEADS; // of the heads of all rows
    const bool is_row = row < requests[0];
    const u32 request = is_row ? rows[row * ROW_WORDS + ROW_REQUEST] : 0;
    const u32 prefix = read_request(requests, request).prefix;
    const Ancestors ancestors = is_row ? read_ancestors(rows, row) : Ancestors{};
    const u32 keys = prefix + path_length(ancestors);
    wait_for_previous();
    if (!is_row) return;

    const auto request_tile = [&](u32 begin, u32 buffer) {
        const u32 key = t / (THREADS / TILE), position = begin + key;
        if (position < keys) {
            const u32 slot = position < prefix ? position : prefix + node_on_path(ancestors, position - prefix);
            const u64 block = cache_block(pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE], 0);
            for (u32 chunk = t % (THREADS / TILE); chunk < CHUNKS; chunk += THREADS / TILE) {
                const u64 from = block + cache_place(slot % PAGE_SIZE, chunk * ELEMENTS);
                unsigned char* to = shared.tiles[buffer] + key * STRIDE * bytes_of(CACHE) + chunk * 16;
                cp_async16(to, (const unsigned char*)cache + from * bytes_of(CACHE), true);
            }
        }
        cp_async_commit();
    };
    request_tile(0, 0);
    for (u32 i = t; i < HEADS * HEAD_DIM; i += THREADS) {
        shared.queries[0][i] = q[(u64)first_head * HEAD_DIM + i] * SCALE;
    }

    const float never = __uint_as_float(0xff800000u); // -infinity
    const u32 key = t % TILE, slice = t / TILE; // for scores; for weights, the slice's number is a head's
    const u32 head = min(slice, HEADS - 1);
    const u32 column = t % COLUMNS, head_of_column = t / COLUMNS;
    Eight output[MINE] = {};
    float maximum = never, sum = 0.0f; // the sum of this thread's weights
    for (u32 begin = 0, buffer = 0; begin < keys; begin += TILE, buffer ^= 1) {
        const u32 n = min(TILE, keys - begin);
        const void* tile = shared.tiles[buffer];
        cp_async_wait<0>();
        // The tile is there, and nobody reads the one before any more.
        __syncthreads();
        request_tile(begin + TILE, buffer ^ 1);

        float scores[HEADS] = {};
        for (u32 eight = slice; eight < HEAD_DIM / 8; eight += SLICES) {
            const Eight k = load_eight(CACHE, tile, key * STRIDE + 8 * eight);
#pragma unroll
            for (u32 h = 0; h < HEADS; h++) {
                const Eight of_query = load_eight(F32, shared.queries[h], 8 * eight);
#pragma unroll
                for (u32 i = 0; i < 8; i++) scores[h] = fmaf(k.x[i], of_query.x[i], scores[h]);
            }
        }
#pragma unroll
        for (u32 h = 0; h < HEADS; h++) {
            scores[h] += __shfl_xor_sync(FULL_WARP, scores[h], 16);
            if (t % 32 < TILE) shared.scores[t / 32][h][key] = scores[h];
        }
        __syncthreads();

        float score = 0.0f;
        for (u32 warp = 0; warp < WARPS; warp++) score += shared.scores[warp][head][key];
        if (key >= n) score = never;
        float largest = score;
#pragma unroll
        for (u32 lanes = TILE / 2; lanes > 0; lanes /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
        }
        largest = fmaxf(largest, maximum);
        const float rescale = expf(maximum - largest);
        const float weight = key < n ? expf(score - largest) : 0.0f;
        sum = fmaf(sum, rescale, weight);
        maximum = largest;
        if (slice < HEADS) {
            shared.weights[slice][key] = weight;
            if (key == 0) shared.rescales[slice] = rescale;
        }
        __syncthreads();

        if (head_of_column >= AT_ONCE) continue;
#pragma unroll
        for (u32 m = 0; m < MINE; m++) {
            const float by = shared.rescales[min(head_of_column + m * AT_ONCE, HEADS - 1)];
#pragma unroll
            for (u32 i = 0; i < 8; i++) output[m].x[i] *= by;
        }
        for (u32 of_tile = 0; of_tile < n; of_tile++) {
            const Eight value = load_eight(CACHE, tile, of_tile * STRIDE + 8 * column);
#pragma unroll
            for (u32 m = 0; m < MINE; m++) {
                const float by = shared.weights[min(head_of_column + m * AT_ONCE, HEADS - 1)][of_tile];
#pragma unroll
                for (u32 i = 0; i < 8; i++) output[m].x[i] = fmaf(by, value.x[i], output[m].x[i]);
            }
        }
    }

#pragma unroll
    for (u32 lanes = TILE / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
    if (slice < HEADS && key == 0) shared.sums[slice] = sum;
    __syncthreads();
    if (head_of_column >= AT_ONCE) return;
#pragma unroll
    for (u32 m = 0; m < MINE; m++) {
        const u32 h = head_of_column + m * AT_ONCE;
        if (h >= HEADS) break;
        float4* to = (float4*)(out + (u64)(first_head + h) * LATENT + 8 * column);
        const float* x = output[m].x;
        const float total = shared.sums[h];
        to[0] = make_float4(x[0] / total, x[1] / total, x[2] / total, x[3] / total);
        to[1] = make_float4(x[4] / total, x[5] / total, x[6] / total, x[7] / total);
    }
}
