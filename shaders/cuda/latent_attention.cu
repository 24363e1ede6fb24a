// needs: ptx formats pieces wgmma layout paged chunks tiles latents
// Attention in the space of latents, on tensor cores: out[r, h] = softmax(q[r, h] · K * SCALE) · K[..LATENT]. All heads of all rows
// of a request have the same keys, whose first elements are their values: a tile is read once for both.
//
// Query rows are packed, row = node row * GROUP + head, M of them a *unit* (request, slab). Units are cut into chunks of tiles of 64
// keys so that all blocks have about the same to do; only tiles that reach past the prefix test the ancestor words.
//
//     producer    one warp copies the tiles of this block's chunks into a ring in shared memory
//     consumers   eight warps. They share the columns of outputs, since those of 512 columns would not fit a warp's registers:
//                     scores  = q · kᵀ
//                     weights = 2^(scores - base)                   to shared memory
//                     output  = output * rescale + weights · tile[..LATENT]
//                 Groups of four warps multiply 64 rows (wgmma): the first makes the weights, of all keys. Or each warp multiplies 16
//                 rows (mma): it makes the weights of its share of the keys, and the maxima of all meet in shared memory
//     merge       where a unit has several chunks, they go to the workspace, and `merge_latents` adds them up
//
// Scores and sums are f32; queries and weights are rounded to the cache's format, for the tensor cores.

// constants-begin
constexpr u32 HEAD_DIM = 576; // of a latent and its key
constexpr u32 KV_HEADS = 1;
constexpr u32 PAGE_SIZE = 16;
constexpr u32 CACHE = 1; // format of the cache: 1 bf16, 2 f16
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = true;
constexpr u32 LATENT = 512;
constexpr u32 GROUP = 16; // heads
constexpr u32 M = 64; // packed rows of a unit: 16, or 64 where groups of warps multiply
constexpr float SCALE = 0.0721687824f; // of the scores
constexpr u32 STAGES = 2; // tiles in the ring
constexpr bool BULK = true; // bulk copies, or else 16-byte ones
constexpr u32 MIN_CHUNK = 4; // fewer tiles are not worth a merge through the workspace
constexpr u32 MAX_REQUESTS = 1;
constexpr u32 CLUSTER = 1; // blocks that share a chunk
// constants-end

constexpr u32 WARPS = 8;
constexpr u32 CONSUMERS = WARPS * 32; // threads
constexpr bool WGMMA = M == 64;
// Registers move between groups of four warps, from the producer's to the consumers': three warps idle where they do.
constexpr u32 THREADS = CONSUMERS + (WGMMA ? 128 : 32);
constexpr u32 ROW_WARPS = M / 16;
constexpr u32 COLUMN_WARPS = WARPS / ROW_WARPS; // that have the same rows, and columns of their own
constexpr u32 WARP_COLUMNS = LATENT / COLUMN_WARPS;
constexpr u32 KEY_WARPS = WGMMA ? 1 : WARPS; // that have the same rows, and keys of their own
constexpr u32 WARP_KEYS = TILE / KEY_WARPS;
constexpr u32 PARTS = WGMMA ? 2 : 1; // of a tile, that are let go of one by one
constexpr float SLACK = 8.0f; // a maximum may be so far above the base before what was added is rescaled, in powers of two
constexpr u32 NODES = (M - 1) / GROUP + 2; // most nodes that a unit's rows are of
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(M == 16 || M == 64, "eight warps share the rows and keys of a tile, groups of four have 64 rows");
static_assert(HEAD_DIM % 64 == 0 && WARP_COLUMNS % 64 == 0, "a tile comes in pieces of 64 elements");

struct Shared {
    unsigned char ring[STAGES][TILE_BYTES];
    unsigned char queries[HALVES][M][128]; // chunks permuted as in a tile
    unsigned char weights[M][TILE * 2]; // the same
    u64 full[STAGES];
    u64 empty[STAGES][PARTS];
    float maxima[KEY_WARPS][M]; // of the keys that each warp has
    float sums[KEY_WARPS][M];
    float rescales[M];
    Request known[KNOWN_REQUESTS];
    u32 ancestors[NODES][ANCESTOR_WORDS];
};

__device__ __forceinline__ void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    if (CACHE == 1) mma_bf16(d, a, b0, b1);
    else mma_f16(d, a, b0, b1);
}

// What both roles of a block go by.
struct Block {
    Shared& shared;
    Schedule schedule;
    const u32* rows;
    const u32* requests;
    u32 thread, lane, warp;

    // The first item, or the next. Whole warps call it.
    __device__ bool next(u32& index, Item& item) const {
        const bool found = schedule.find(index, lane, item);
        index += gridDim.x;
        return found;
    }
};

__device__ __forceinline__ void produce(const Block& block, const u32* pages, const u16* cache) {
    u32 turn = 0; // tiles of this block so far
    bool waited = false;
    Item item;
    for (u32 index = blockIdx.x; block.next(index, item);) {
        const Request request = block.schedule.request(item.request);
        const u32 first_page = item.request * PAGES_PER_REQUEST, n_pages = divide_up(request.keys, PAGE_SIZE);
        u32 known = 0;
        for (u32 tile = item.tile; tile < item.end; tile++, turn++) {
            const u32 nth = tile % KNOWN_TILES, first = tile * PAGES, stage = turn % STAGES;
            if (nth == 0 || tile == item.tile) known = pages[first_page + min(first - nth * PAGES + block.lane, n_pages - 1)];
            // A kernel shortly before this one writes the tree's keys, and none of the prefix.
            if (!waited && (tile + 1) * TILE > request.prefix) {
                wait_for_previous();
                waited = true;
            }
            for (u32 part = 0; part < PARTS; part++) {
                mbarrier_wait(&block.shared.empty[stage][part], (turn / STAGES & 1) ^ 1);
                copy_tile<PARTS>(block.shared.ring[stage], &block.shared.full[stage], min(PAGES, n_pages - first), nth * PAGES,
                                 known, 0, cache, block.lane, part);
            }
        }
    }
}

// A consumer warp at work on a chunk. Results lie as products leave them: rows lane / 4 and lane / 4 + 8 of the warp's 16, pairs
// of columns.
struct Worker {
    const Block& block;
    const Request& request;
    u32 first_packed; // row of the unit
    float out[WARP_COLUMNS / 8][4];
    float base[2]; // of weights: about the largest score so far, times log2 e
    float sum[2]; // of the weights of this lane's keys

    // Accumulators are cleared when the queries are loaded, which needs registers too.
    __device__ Worker(const Block& block, const Request& request, u32 first_packed)
        : block(block), request(request), first_packed(first_packed) {}

    __device__ u32 column_warp() const { return block.warp / ROW_WARPS; }
    __device__ u32 key_warp() const { return WGMMA ? 0 : block.warp; }
    __device__ bool has_keys() const { return !WGMMA || column_warp() == 0; }
    __device__ u32 first_row() const { return block.warp % ROW_WARPS * 16; }
    __device__ u32 own_row(u32 i) const { return first_row() + block.lane / 4 + 8 * i; }
    __device__ u32 n_rows() const { return min(M, request.n_rows * GROUP - first_packed); }

    // Which of the unit's nodes a row is of. Rows past the end see what the last one does, and are not written.
    __device__ u32 node(u32 row) const { return (first_packed + min(row, n_rows() - 1)) / GROUP - first_packed / GROUP; }

    __device__ void clear() {
#pragma unroll
        for (u32 n = 0; n < WARP_COLUMNS / 8; n++)
            for (u32 i = 0; i < 4; i++) out[n][i] = 0.0f;
        for (u32 i = 0; i < 2; i++) base[i] = NEVER, sum[i] = 0.0f;
    }

    __device__ void load(const float* q) const {
        Shared& shared = block.shared;
        for (u32 i = block.thread; i < NODES * ANCESTOR_WORDS; i += CONSUMERS) {
            const u32 node = min(first_packed / GROUP + i / ANCESTOR_WORDS, request.n_rows - 1);
            shared.ancestors[0][i] = block.rows[(request.first_row + node) * ROW_WORDS + ROW_ANCESTORS + i % ANCESTOR_WORDS];
        }
        wait_for_previous();
        const float* from = q + ((u64)request.first_row * GROUP + first_packed) * HEAD_DIM;
#pragma unroll 18
        for (u32 i = block.thread; i < M * HEAD_DIM / 8; i += CONSUMERS) {
            const u32 row = i / (HEAD_DIM / 8), chunk = i % (HEAD_DIM / 8);
            float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
            if (row < n_rows()) a = ((const float4*)from)[2 * i], b = ((const float4*)from)[2 * i + 1];
            *(uint4*)(shared.queries[chunk / 8][row] + (chunk % 8 ^ row % 8) * 16) =
                make_uint4(narrow_pair(CACHE, a.x, a.y), narrow_pair(CACHE, a.z, a.w), narrow_pair(CACHE, b.x, b.y),
                           narrow_pair(CACHE, b.z, b.w));
        }
    }

    // Of the warp's rows and keys, by its group together.
    __device__ void score_keys_together(float score[WARP_KEYS / 8][4], const unsigned char* tile) const {
        static_assert(!WGMMA || sizeof(block.shared.queries[0]) == HALF_BYTES, "pieces of queries and keys are as far apart");
        const u64 queries = wgmma_matrix(block.shared.queries, 0, 1024), keys = wgmma_matrix(tile, 0, 1024);
        wgmma_fence();
#pragma unroll
        for (u32 kk = 0; kk < HEAD_DIM / 16; kk++) {
            const u32 at = kk / 4 * HALF_BYTES + kk % 4 * 32;
            if (CACHE == 1) wgmma_shared_rows64(score, wgmma_further(queries, at), wgmma_further(keys, at), kk > 0);
            else wgmma_shared_rows64_f16(score, wgmma_further(queries, at), wgmma_further(keys, at), kk > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
    }

    // The same by the warp alone.
    __device__ void score_keys(float score[WARP_KEYS / 8][4], const unsigned char* tile) const {
        const u32 lane = block.lane;
#pragma unroll
        for (u32 n = 0; n < WARP_KEYS / 8; n++)
            for (u32 i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll 2
        for (u32 kk = 0; kk < HEAD_DIM / 32; kk++) { // 32 elements
            u32 a[2][4];
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 row = first_row() + lane % 16, chunk = 4 * kk + 2 * half + lane / 16;
                ldmatrix_x4(a[half], block.shared.queries[chunk / 8][row] + (chunk % 8 ^ row % 8) * 16);
            }
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 8; n++) {
                u32 b[4];
                ldmatrix_x4(b, place(tile, key_warp() * WARP_KEYS + n * 8 + lane % 8, 4 * kk + lane / 8));
                mma(score[n], a[0], b[0], b[1]);
                mma(score[n], a[1], b[2], b[3]);
            }
        }
    }

    // Keys that a row does not see never count.
    __device__ void mask(float score[WARP_KEYS / 8][4], int first_node) const {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u64 sees = window(block.shared.ancestors[node(own_row(i))], first_node + (int)(key_warp() * WARP_KEYS));
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (u32 j = 0; j < 2; j++)
                    if (!(sees >> (n * 8 + block.lane % 4 * 2 + j) & 1)) score[n][2 * i + j] = NEVER;
        }
    }

    // The values of keys that no row sees may be anything, NaN too, which zero times would not remove.
    __device__ void clear_unseen(unsigned char* tile, int first_node) const {
        u64 all = 0;
        for (u32 node = 0; node < NODES; node++) all |= window(block.shared.ancestors[node], first_node);
        for (u32 i = block.thread; i < TILE * LATENT / 8; i += WGMMA ? 128 : CONSUMERS) {
            if (!(all >> (i / 8 % TILE) & 1)) *(uint4*)(tile + i * 16) = make_uint4(0, 0, 0, 0);
        }
    }

    // The largest score of a row among this warp's keys.
    __device__ float largest(const float score[WARP_KEYS / 8][4], u32 i) const {
        float top = NEVER;
#pragma unroll
        for (u32 n = 0; n < WARP_KEYS / 8; n++) top = fmaxf(top, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        return fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2)) * (SCALE * LOG2_E);
    }

    // Scores become weights, and go where all warps find them. `most` is the largest of the row's scores. Returns what was added
    // before is to be rescaled by.
    __device__ float weigh(const float score[WARP_KEYS / 8][4], u32 i, float most) {
        float rescale = 1.0f;
        if (most > base[i] + SLACK) {
            rescale = exp2_approx(base[i] - most);
            base[i] = most;
        }
        sum[i] *= rescale;
        const float minus = base[i] == NEVER ? 0.0f : -base[i]; // a row that has seen no key yet keeps its zeros
        const u32 row = own_row(i);
#pragma unroll
        for (u32 n = 0; n < WARP_KEYS / 8; n++) {
            const float a = exp2_approx(fmaf(score[n][2 * i], SCALE * LOG2_E, minus));
            const float b = exp2_approx(fmaf(score[n][2 * i + 1], SCALE * LOG2_E, minus));
            sum[i] += a + b;
            const u32 chunk = key_warp() * (WARP_KEYS / 8) + n;
            *(u32*)(block.shared.weights[row] + (chunk % 8 ^ row % 8) * 16 + block.lane % 4 * 4) = narrow_pair(CACHE, a, b);
        }
        return rescale;
    }

    __device__ void rescale(const float by[2]) {
        if (!__any_sync(FULL_WARP, by[0] != 1.0f || by[1] != 1.0f)) return;
#pragma unroll
        for (u32 n = 0; n < WARP_COLUMNS / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[n][i] *= by[i / 2];
    }

    // Of all keys, in the warp's columns, by its group together. The columns of each product are a part of the tile.
    __device__ void add_values_together(const unsigned char* tile, u64* empty) {
        constexpr u32 COLUMNS = WARP_COLUMNS / PARTS;
        static_assert(!WGMMA || COLUMNS == 128, "products are of 128 columns");
        const u64 weights = wgmma_matrix(block.shared.weights, 0, 1024);
        const u64 values = wgmma_matrix(tile + column_warp() * (WARP_COLUMNS / 64) * HALF_BYTES, HALF_BYTES, 1024);
        wgmma_fence();
#pragma unroll
        for (u32 n = 0; n < WARP_COLUMNS; n += COLUMNS) {
#pragma unroll
            for (u32 kk = 0; kk < TILE / 16; kk++) {
                const u64 of_keys = wgmma_further(weights, kk * 32);
                const u64 of_columns = wgmma_further(values, n / 64 * HALF_BYTES + kk * 16 * 128);
                if (CACHE == 1) wgmma_shared_columns128(out + n / 8, of_keys, of_columns, true);
                else wgmma_shared_columns128_f16(out + n / 8, of_keys, of_columns, true);
            }
            wgmma_commit();
        }
        wgmma_wait<1>();
        leave(empty[0]);
        wgmma_wait<0>();
        leave(empty[1]);
    }

    // The same by the warp alone.
    __device__ void add_values(const unsigned char* tile) {
        const u32 lane = block.lane;
#pragma unroll
        for (u32 kk = 0; kk < TILE / 16; kk++) {
            u32 a[4];
            const u32 row = first_row() + lane % 16, chunk = 2 * kk + lane / 16;
            ldmatrix_x4(a, block.shared.weights[row] + (chunk ^ row % 8) * 16);
#pragma unroll
            for (u32 d = 0; d < WARP_COLUMNS / 16; d++) {
                u32 b[4];
                const u32 value = column_warp() * (WARP_COLUMNS / 8) + 2 * d + lane / 16;
                ldmatrix_x4_trans(b, place(tile, kk * 16 + lane / 8 % 2 * 8 + lane % 8, value));
                mma(out[2 * d], a, b[0], b[1]);
                mma(out[2 * d + 1], a, b[2], b[3]);
            }
        }
    }

    __device__ void add_tile(unsigned char* tile, u32 first_key, u64* empty) {
        const bool is_masked = first_key + TILE > request.prefix;
        const int first_node = (int)first_key - (int)request.prefix;
        float score[WARP_KEYS / 8][4], by[2];
        score_keys(score, tile);
        if (is_masked) mask(score, first_node);
        for (u32 i = 0; i < 2; i++) {
            const float most = largest(score, i);
            if (block.lane % 4 == 0) block.shared.maxima[key_warp()][own_row(i)] = most;
        }
        named_barrier(1, CONSUMERS); // all maxima are there, and nobody reads keys or the weights before any more
        if (is_masked) clear_unseen(tile, first_node);
        for (u32 i = 0; i < 2; i++) {
            float top = NEVER;
#pragma unroll
            for (u32 w = 0; w < KEY_WARPS; w++) top = fmaxf(top, block.shared.maxima[w][own_row(i)]);
            by[i] = weigh(score, i, top);
        }
        named_barrier(1, CONSUMERS); // all weights are
        rescale(by);
        add_values(tile);
        if (BULK) fence_async(); // what was cleared is overwritten by copies
        leave(empty[0]);
    }

    // The same by groups. The first may be at work on a tile's weights while the second still adds values of the one before.
    __device__ void add_tile_together(unsigned char* tile, u32 first_key, u64* empty) {
        constexpr u32 WEIGHTS = 1, ROOM = 2; // barriers
        float* rescales = block.shared.rescales;
        if (has_keys()) {
            const bool is_masked = first_key + TILE > request.prefix;
            const int first_node = (int)first_key - (int)request.prefix;
            float score[WARP_KEYS / 8][4];
            score_keys_together(score, tile);
            if (is_masked) mask(score, first_node);
            const float most[2] = {largest(score, 0), largest(score, 1)};
            named_barrier(ROOM, CONSUMERS); // nobody reads keys or the weights before any more
            if (is_masked) clear_unseen(tile, first_node);
            for (u32 i = 0; i < 2; i++) {
                const float by = weigh(score, i, most[i]);
                if (block.lane % 4 == 0) rescales[own_row(i)] = by;
            }
            fence_async();
        } else {
            named_barrier_arrive(ROOM, CONSUMERS);
        }
        named_barrier(WEIGHTS, CONSUMERS);
        const float by[2] = {rescales[own_row(0)], rescales[own_row(1)]};
        rescale(by);
        add_values_together(tile, empty);
    }

    // The warp is done with a part of a tile.
    __device__ void leave(u64& empty) const {
        __syncwarp();
        if (block.lane == 0) mbarrier_arrive(&empty);
    }

    // The sums of whole rows meet in shared memory.
    __device__ void leave_sums() const {
        Shared& shared = block.shared;
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float of_row = sum[i];
            of_row += __shfl_xor_sync(FULL_WARP, of_row, 1);
            of_row += __shfl_xor_sync(FULL_WARP, of_row, 2);
            if (has_keys() && block.lane % 4 == 0) shared.sums[key_warp()][own_row(i)] = of_row;
        }
        named_barrier(1, CONSUMERS);
    }

    // What the chunk found is the result, or one of several.
    __device__ void write(const Item& item, uint4* partials, float* results) const {
        leave_sums();
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            const u32 row = own_row(i);
            float of_row = 0.0f;
            for (u32 w = 0; w < KEY_WARPS; w++) of_row += block.shared.sums[w][row];
            if (row >= n_rows()) continue;
            const float by = of_row > 0.0f ? 1.0f / of_row : 0.0f;
            float* result = results + ((u64)request.first_row * GROUP + first_packed + row) * LATENT;
            uint4* partial = partials + (u64)item.cut * PARTIAL;
#pragma unroll
            for (u32 n = 0; n < WARP_COLUMNS / 32; n++) {
                const u32 piece = column_warp() * (WARP_COLUMNS / 8) + n * 4 + block.lane % 4;
                float2 pairs[4];
#pragma unroll
                for (u32 k = 0; k < 4; k++) pairs[k] = make_float2(out[4 * n + k][2 * i] * by, out[4 * n + k][2 * i + 1] * by);
                const auto narrow = [](float2 pair) { return narrow_pair(CACHE, pair.x, pair.y); };
                if (item.chunks > 1) {
                    partial[partial_place(row, piece)] = make_uint4(narrow(pairs[0]), narrow(pairs[1]), narrow(pairs[2]), narrow(pairs[3]));
                } else {
                    // Neighbours exchange pairs, so that each has four columns of every second block of eight.
                    const u32 neighbours = 3u << (block.lane & ~1u), is_odd = block.lane % 2;
#pragma unroll
                    for (u32 k = 0; k < 4; k += 2) {
                        const float2 mine = is_odd ? pairs[k + 1] : pairs[k], give = is_odd ? pairs[k] : pairs[k + 1];
                        const float2 got = make_float2(__shfl_xor_sync(neighbours, give.x, 1), __shfl_xor_sync(neighbours, give.y, 1));
                        const float4 four = is_odd ? make_float4(got.x, got.y, mine.x, mine.y) : make_float4(mine.x, mine.y, got.x, got.y);
                        *(float4*)(result + piece_element(piece & ~1u, k + is_odd)) = four;
                    }
                }
            }
            if (item.chunks > 1 && column_warp() == 0 && block.lane % 4 == 0)
                ((float2*)(partial + M * PIECES))[row] = make_float2(base[i], of_row);
        }
    }
};

__device__ __forceinline__ void consume(const Block& block, const float* q, uint4* partials, float* out) {
    Shared& shared = block.shared;
    u32 turn = 0; // tiles of this block so far
    Item item;
    for (u32 index = blockIdx.x; block.next(index, item);) {
        const Request request = block.schedule.request(item.request);
        Worker worker(block, request, item.slab * M);
        named_barrier(1, CONSUMERS); // all warps are done with the queries and the sums of the chunk before
        worker.load(q);
        worker.clear();
        if (WGMMA) fence_async();
        named_barrier(1, CONSUMERS);
        for (u32 tile = item.tile; tile < item.end; tile++, turn++) {
            const u32 stage = turn % STAGES;
            mbarrier_wait(&shared.full[stage], turn / STAGES & 1);
            if (WGMMA) worker.add_tile_together(shared.ring[stage], tile * TILE, shared.empty[stage]);
            else worker.add_tile(shared.ring[stage], tile * TILE, shared.empty[stage]);
        }
        worker.write(item, partials, out);
    }
}

// Blocks: as many as run at once. `q` is [rows, GROUP, HEAD_DIM], `out` [rows, GROUP, LATENT]; the cache one layer.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    latent_attention(const u32* __restrict__ rows, const u32* __restrict__ requests, const u32* __restrict__ pages,
                     const float* __restrict__ q, const u16* __restrict__ cache, uint4* partials,
                     float* __restrict__ out) {
    release_next();
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    const u32 thread = threadIdx.x, lane = thread % 32;
    if (thread == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            mbarrier_init(&shared.full[s], BULK ? 1 : 32);
            for (u32 part = 0; part < PARTS; part++) mbarrier_init(&shared.empty[s][part], WARPS);
        }
        fence_barrier_init();
    }
    Block block = {shared, {rows, requests, shared.known}, rows, requests, thread, lane, thread / 32};
    block.schedule.plan(gridDim.x, lane);
    __syncthreads();
    if (thread >= CONSUMERS) {
        if (WGMMA) give_registers<40>();
        if (block.warp == WARPS) produce(block, pages, cache);
    } else {
        if (WGMMA) take_registers<232>();
        consume(block, q, partials, out);
    }
    wait_for_previous();
}
