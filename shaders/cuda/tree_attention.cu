// needs: ptx formats pieces wgmma layout paged chunks tiles accumulator parts
// Tree attention on tensor cores: every node of every tree attends to the committed prefix and to its own ancestors.
//
// The query rows of a request (node) and the query heads that share a kv head are packed: row = node row * GROUP + head of
// the group, up to M of them a *unit* (request, kv head, slab of M rows), so that a key is loaded once for all of them.
// The keys of a unit are its slots 0 .. prefix + nodes, in tiles of 64. The long prefix knows nothing of trees; only tiles
// that reach past it test the ancestor words.
//
//     schedule    units are cut into chunks of tiles so that all clusters of the grid have about the same to do
//     producer    one warp copies the tiles of this block's share into a ring in shared memory: keys and values by turns,
//                 each let go as soon as it is used
//     consumers   GROUPS groups of four warps. A group owns up to 64 rows; groups with the same rows take the tiles in
//                 turn. A warp owns 16 rows and its part of the tile's keys:
//                     scores  = q · kᵀ
//                     weights = 2^(scores - running maximum)
//                     output  = output * rescale + weights · v
//                 The products are the warp's own (mma), or the whole group's (wgmma)
//     merge       each block of a cluster finishes some of the rows: warps leave their partial results in its shared memory.
//                 Where a unit has several chunks, the one that arrives last adds them up, from the workspace
//
// Scores and sums are f32. Rounded to the cache's format are q and the weights, for the tensor cores, and partial results
// that other warps add up: what blocks send each other is what one request waits for.

// constants-begin
constexpr u32 HEAD_DIM = 64;
constexpr u32 KV_HEADS = 3;
constexpr u32 PAGE_SIZE = 16;
constexpr u32 CACHE = 1; // format of the cache: 1 bf16, 2 f16
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = true;
constexpr u32 GROUP = 3; // query heads that share a kv head
constexpr u32 M = 64; // packed rows of a unit: 16, 32, 64 or 128
constexpr u32 SLABS = 1; // units that a request of all the pass's rows needs for each kv head
constexpr float SCALE = 0.125f; // of the scores
constexpr u32 GROUPS = 1; // groups of four consumer warps
constexpr bool WGMMA = true; // products by whole groups, of 64 rows
constexpr u32 STAGES = 10; // tiles of keys or of values in the ring, twice a multiple of the groups that take turns
constexpr u32 CLUSTER = 16; // blocks that share a chunk
constexpr u32 BLOCKS = 2; // of a multiprocessor: this kernel's and the next one's
constexpr bool BULK = true; // bulk copies, or else 16-byte ones
constexpr u32 MIN_CHUNK = 32; // fewer tiles are not worth a merge through the workspace
constexpr u32 MAX_REQUESTS = 1;
constexpr bool STATIC_TREE = false; // one tree for all requests, its ancestor words in TREE
constexpr u32 TREE_WORDS = 8;
__device__ constexpr u32 TREE[] = {0x0}; // [nodes, TREE_WORDS]
// constants-end

// Registers move between groups of four warps, from the producer's to the consumers': where they do, three warps idle.
constexpr bool MOVES_REGISTERS = WGMMA && (GROUPS == 2 || BLOCKS == 2);
constexpr u32 THREADS = CONSUMERS + (WGMMA ? 128 : 32);

// Shared memory, in this order.
struct Shared {
    unsigned char ring[STAGES][TILE_BYTES]; // keys of a tile, its values, keys of the next ..
    Parts parts;
    u64 full[STAGES];
    u64 empty[STAGES];
    u64 received; // parts
    u32 ancestors[KEY_GROUPS][M][ANCESTOR_WORDS + 1]; // of each row's node; groups that take turns load their own
    u32 arrived; // chunks that came before this one
    Request known[KNOWN_REQUESTS];
};

// Where in the ring the keys (OF_V 0) or values (OF_V 1) of a block's tile are, and in which phase, by how many tiles came
// before it. Groups that take turns never see each other's phases: each stage belongs to one of them.
static_assert(STAGES % (2 * KEY_GROUPS) == 0, "a stage belongs to one group, and to keys or values");
// A masked tile's values are waited for while those of the tile before are still in use.
static_assert(!WGMMA || STAGES >= 4 * KEY_GROUPS, "a group needs room for two tiles");
__device__ __forceinline__ u32 stage_of(u32 turn, u32 of_v) { return (2 * turn + of_v) % STAGES; }
__device__ __forceinline__ u32 phase_of(u32 turn) { return 2 * turn / STAGES & 1; }

// ---- consumers

// Ancestor words of the unit's rows, for the groups that share its tiles.
__device__ __forceinline__ void load_ancestors(u32 (*ancestors)[ANCESTOR_WORDS + 1], const u32* rows, const Request& request,
                                               u32 first, u32 thread) {
    const u32 last = request.n_rows * GROUP - 1;
    for (u32 i = thread; i < M * ANCESTOR_WORDS; i += ROW_GROUPS * 128) {
        const u32 word = i % ANCESTOR_WORDS, row = request.first_row + min(first + i / ANCESTOR_WORDS, last) / GROUP;
        const u32* from = rows + row * ROW_WORDS;
        u32 bits;
        if (STATIC_TREE) bits = word < TREE_WORDS ? TREE[from[ROW_NODE] * TREE_WORDS + word] : 0;
        else bits = from[ROW_ANCESTORS + word];
        ancestors[i / ANCESTOR_WORDS][word] = bits;
    }
}

// Zeros the values of a tile that no row of the unit sees. The groups that share the tile do it together.
__device__ __forceinline__ void clear_unseen(unsigned char* values, const u32 (*ancestors)[ANCESTOR_WORDS + 1], int first_node,
                                             u32 key_group, u32 thread) {
    const u32 threads = ROW_GROUPS * 128;
    u64 all = 0;
    for (u32 row = thread % 32; row < M; row += 32) all |= window(ancestors[row], first_node);
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) all |= __shfl_xor_sync(FULL_WARP, all, step);
    for (u32 i = thread; i < TILE * HALVES * 8; i += threads) {
        const u32 key = i / 8 % TILE;
        if (!(all >> key & 1)) *(uint4*)(values + i * 16) = make_uint4(0, 0, 0, 0);
    }
    fence_async();
    named_barrier(2 + key_group, threads);
}

// ---- merge

// A chunk's results of the rows that its blocks have, and where they go.
struct Finish {
    const Item& item;
    const Request& request;
    float* partials;
    u32* counters;
    float* out;

    __device__ float* partial(u32 chunk) const { return partials + (u64)(item.cut - item.chunk + chunk) * PARTIAL; }

    __device__ void write(u32 row, u32 n, const Piece& piece) const {
        const u32 packed = item.slab * M + row;
        const u64 at = (u64)(request.first_row + packed / GROUP) * HEADS + item.head * GROUP + packed % GROUP;
        const float inverse = 1.0f / piece.sum;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            float* to = out + at * HEAD_DIM + piece_element(n, j);
            *(float2*)to = make_float2(piece.out.x[2 * j] * inverse, piece.out.x[2 * j + 1] * inverse);
        }
    }

    // A whole chunk's result: that of the row, or one of several.
    __device__ void take(u32 row, u32 n, const Piece& piece) const {
        if (item.chunks == 1) write(row, n, piece);
        else store_partial(partial(item.chunk), row, n, piece);
    }

    // The last of the unit's chunks adds up this block's rows, which are the same in all of them. The counter is left at
    // zero for the next launch.
    __device__ void add_chunks(Shared& shared, u32 rank, u32 n_rows, u32 thread) const {
        u32* counter = counters + ((item.request * KV_HEADS + item.head) * SLABS + item.slab) * CLUSTER + rank;
        named_barrier(1, CONSUMERS);
        if (thread == 0) {
            __threadfence();
            shared.arrived = arrive(counter);
            __threadfence();
            if (shared.arrived == item.chunks - 1) *counter = 0;
        }
        named_barrier(1, CONSUMERS);
        if (shared.arrived != item.chunks - 1) return;
        for (u32 i = thread; i / PIECES * CLUSTER + rank < n_rows; i += CONSUMERS) {
            const u32 row = i / PIECES * CLUSTER + rank, n = i % PIECES;
            Piece sum;
#pragma unroll 4
            for (u32 chunk = 0; chunk < item.chunks; chunk++) sum.add(load_partial(partial(chunk), row, n));
            write(row, n, sum);
        }
    }
};

// ---- the kernel

// What all roles of a block go by.
struct Block {
    Shared& shared;
    Schedule schedule;
    const u32* rows;
    const u32* requests;
    u32 clusters;
    u32 thread, lane, warp;

    // The first item, or the next. Whole warps call it.
    __device__ bool next(u32& index, Item& item) const {
        const bool found = schedule.find(index, lane, item);
        index += clusters;
        if (found) share(item);
        return found;
    }
};

// Threads arrive at the cluster's barrier when they have begun, and when they have read the parts of a chunk; they wait for
// all others before they send those of the next.
__device__ __forceinline__ void cluster_turn() {
    cluster_wait();
    cluster_arrive();
}

// One warp runs ahead of the consumers, into the next chunk too.
__device__ __forceinline__ void produce(const Block& block, const u32* pages, const u16* k_cache, const u16* v_cache) {
    u32 turn = 0; // tiles of this block so far
    bool waited = false;
    Item item;
    for (u32 index = blockIdx.x / CLUSTER; block.next(index, item);) {
        if (block.warp == CONSUMERS / 32) {
            const Request request = block.schedule.request(item.request);
            const u32* table = pages + item.request * PAGES_PER_REQUEST;
            const u32 n_pages = divide_up(request.keys, PAGE_SIZE);
            u32 known = 0;
            for (u32 tile = item.tile; tile < item.end; tile++, turn++) {
                const u32 nth = (tile - item.tile) % KNOWN_TILES, first = tile * PAGES;
                if (nth == 0) known = table[min(first + block.lane, n_pages - 1)];
                // The kernel before this one writes the tree's keys, and none of the prefix.
                if (!waited && (tile + 1) * TILE > request.prefix) {
                    wait_for_previous();
                    waited = true;
                }
                for (u32 of_v = 0; of_v < 2; of_v++) {
                    const u32 stage = stage_of(turn, of_v);
                    mbarrier_wait(&block.shared.empty[stage], phase_of(turn) ^ 1);
                    copy_tile(block.shared.ring[stage], &block.shared.full[stage], min(PAGES, n_pages - first), nth * PAGES,
                              known, item.head, of_v ? v_cache : k_cache, block.lane);
                }
            }
        }
        if (CLUSTER > 1) cluster_turn();
    }
    if (CLUSTER > 1) cluster_wait();
}

// A consumer warp's tiles of a chunk: its group's turns among the block's.
struct Tiled {
    const Block& block;
    const Request& request;
    u32 first_tile, first_turn; // of the chunk
    u32 key_group, first_row, first_key, team_thread;

    __device__ unsigned char* keys(u32 turn) const { return block.shared.ring[stage_of(turn, 0)]; }
    __device__ unsigned char* values(u32 turn) const { return block.shared.ring[stage_of(turn, 1)]; }
    __device__ u32 tile(u32 turn) const { return first_tile + turn - first_turn; }
    __device__ bool is_masked(u32 turn) const { return (tile(turn) + 1) * TILE > request.prefix; }

    __device__ void wait(u32 turn, u32 of_v) const {
        mbarrier_wait(&block.shared.full[stage_of(turn, of_v)], phase_of(turn));
    }

    // Waits for the tile's keys. If it is masked, says what the lane's rows see, and what all rows do.
    __device__ void open(u32 turn, u64 sees[2], u64& any) const {
        wait(turn, 0);
        if (!is_masked(turn)) return;
        const int node = (int)(tile(turn) * TILE + first_key) - (int)request.prefix;
        for (u32 i = 0; i < 2; i++)
            sees[i] = window(block.shared.ancestors[key_group][first_row + block.lane / 4 + 8 * i], node);
        if (WGMMA) {
            wait(turn, 1);
            clear_unseen(values(turn), block.shared.ancestors[key_group], node, key_group, team_thread);
            return;
        }
        any = sees[0] | sees[1];
#pragma unroll
        for (u32 step = 4; step < 32; step *= 2) any |= __shfl_xor_sync(FULL_WARP, any, step);
    }

    // The producer may overwrite the keys, or the values.
    __device__ void close(u32 turn, u32 of_v) const {
        __syncwarp();
        if (block.lane == 0) mbarrier_arrive(&block.shared.empty[stage_of(turn, of_v)]);
    }
};

// Products by the warp itself, one tile after the other. Without rows of its own it passes the tiles on.
__device__ __forceinline__ void add_tiles(Accumulator& acc, const Tiled& tiles, u32 turn, u32 end, bool has_rows) {
    const u32 first_key = tiles.first_key, lane = tiles.block.lane;
    for (; turn < end; turn += KEY_GROUPS) {
        u64 sees[2] = {}, any = 0;
        float score[WARP_KEYS / 8][4];
        tiles.open(turn, sees, any);
        if (has_rows) acc.score_keys(score, tiles.keys(turn), first_key, lane);
        tiles.close(turn, 0);
        const bool is_masked = tiles.is_masked(turn);
        if (has_rows) {
            if (is_masked) acc.weigh<true>(score, sees, lane);
            else acc.weigh<false>(score, sees, lane);
            acc.rescale_out();
        }
        tiles.wait(turn, 1);
        if (has_rows) {
            if (is_masked) acc.add_values<true>(score, tiles.values(turn), first_key, any, lane);
            else acc.add_values<false>(score, tiles.values(turn), first_key, any, lane);
        }
        tiles.close(turn, 1);
    }
}

// Two groups that have rows of the same tiles multiply by turns: one weighs its scores while the other's products are
// under way. Left alone they fall into step, and the tensor cores idle while both weigh.
struct Turns {
    bool two; // or one group alone
    u32 group;

    static constexpr u32 FIRST_BARRIER = 4; // one a group

    __device__ void begin() const {
        if (two && group == 1) named_barrier_arrive(FIRST_BARRIER, 256);
    }
    __device__ void take() const {
        if (two) named_barrier(FIRST_BARRIER + group, 256);
    }
    // The last turn is the second group's, and passed on to nobody.
    __device__ void pass(bool is_last) const {
        if (two && !(group == 1 && is_last)) named_barrier_arrive(FIRST_BARRIER + (group ^ 1), 256);
    }
};

// Products by the group: a tile's scores are under way while the values of the one before it are added.
__device__ __forceinline__ void add_tiles_together(Accumulator& acc, const Tiled& tiles, u32 turn, u32 end, const Turns& turns) {
    if (turn >= end) return;
    const u32 lane = tiles.block.lane;
    if (turn + KEY_GROUPS < end) turns.begin();
    float score[TILE / 8][4];
    u32 weights[TILE / 16][4];
    u64 sees[2] = {}, any = 0;
    tiles.open(turn, sees, any);
    acc.start_scores(score, tiles.keys(turn));
    wgmma_wait<0>();
    tiles.close(turn, 0);
    if (tiles.is_masked(turn)) acc.weigh<true>(score, sees, lane);
    else acc.weigh<false>(score, sees, lane);
#pragma unroll
    for (u32 n = 0; n < TILE / 16; n++) Accumulator::narrow(weights[n], score + 2 * n);
    for (u32 next = turn + KEY_GROUPS; next < end; turn = next, next += KEY_GROUPS) {
        tiles.open(next, sees, any);
        turns.take();
        acc.start_scores(score, tiles.keys(next));
        tiles.wait(turn, 1);
        acc.start_values(weights, tiles.values(turn));
        turns.pass(next + KEY_GROUPS >= end);
        wgmma_wait<1>();
        tiles.close(next, 0);
        if (tiles.is_masked(next)) acc.weigh<true>(score, sees, lane);
        else acc.weigh<false>(score, sees, lane);
        wgmma_wait<0>();
        tiles.close(turn, 1);
        acc.rescale_out();
#pragma unroll
        for (u32 n = 0; n < TILE / 16; n++) Accumulator::narrow(weights[n], score + 2 * n);
    }
    tiles.wait(turn, 1);
    acc.start_values(weights, tiles.values(turn));
    wgmma_wait<0>();
    tiles.close(turn, 1);
}

__device__ __forceinline__ void consume(const Block& block, const float* q, float* partials, u32* counters, float* out) {
    Shared& shared = block.shared;
    const u32 thread = block.thread, lane = block.lane, warp = block.warp;
    const u32 row_group = warp / 4 % ROW_GROUPS, key_group = warp / 4 / ROW_GROUPS;
    const u32 first_row = row_group * 64 + warp % ROW_WARPS * 16, key_warp = warp / ROW_WARPS % KEY_WARPS;
    const u32 team_thread = thread % (ROW_GROUPS * 128);
    u32 turn = 0; // tiles of this block so far
    u32 received = 0; // phases of the barrier
    bool waited = false, again = false;
    Item item;
    for (u32 index = blockIdx.x / CLUSTER; block.next(index, item); again = true) {
        const Request request = block.schedule.request(item.request);
        const u32 first_packed = item.slab * M;
        if (again) named_barrier(1, CONSUMERS); // all warps are done with the ancestors and the parts of the chunk before
        load_ancestors(shared.ancestors[key_group], block.rows, request, first_packed, team_thread);
        if (!waited) {
            wait_for_previous();
            waited = true;
        }
        Accumulator acc;
        acc.clear();
        // Without a row of its own a warp has nothing to do; a group that multiplies together needs all its warps.
        const bool has_rows = first_packed + (WGMMA ? row_group * 64 : first_row) < request.n_rows * GROUP;
        if (has_rows) acc.load_queries(q, request, item.head, first_packed + first_row, lane);
        named_barrier(2 + key_group, ROW_GROUPS * 128); // the ancestors are there
        const Tiled tiles = {block, request, item.tile, turn, key_group, first_row, key_warp * WARP_KEYS, team_thread};
        const u32 mine = turn + (key_group + KEY_GROUPS - turn % KEY_GROUPS) % KEY_GROUPS;
        turn += item.end - item.tile;
        const Turns turns = {ROW_GROUPS == 2 && first_packed + 64 < request.n_rows * GROUP, row_group};
        if (WGMMA && has_rows) add_tiles_together(acc, tiles, mine, turn, turns);
        else add_tiles(acc, tiles, mine, turn, has_rows);
        acc.add_up_sums();

        const u32 n_rows = min(M, request.n_rows * GROUP - first_packed), rank = cluster_rank_or_zero();
        const Finish result = {item, request, partials, counters, out};
        if (PARTS == 1) { // nobody else has results of these rows
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 row = first_row + lane / 4 + 8 * i;
#pragma unroll
                for (u32 n = 0; n < PIECES / 4; n++) {
                    if (row < n_rows) result.take(row, n * 4 + lane % 4, piece_of(acc, i, n));
                }
            }
        } else {
            if (CLUSTER > 1) cluster_wait(); // all blocks have read the parts of the chunk before
            const u32 part = (rank * KEY_GROUPS + key_group) * KEY_WARPS + key_warp;
            if (has_rows) leave_parts(acc, shared.parts, &shared.received, part, first_row, n_rows, lane);
            if (CLUSTER == 1) {
                named_barrier(1, CONSUMERS);
            } else if (rank < n_rows) {
                if (thread == 0) mbarrier_expect(&shared.received, divide_up(n_rows - rank, CLUSTER) * PARTS * PART_BYTES);
                mbarrier_wait(&shared.received, received++ & 1);
            }
            for (u32 i = thread / SHARES; i / PIECES * CLUSTER + rank < n_rows; i += CONSUMERS / SHARES) {
                const Piece piece = merge_parts(shared.parts, i / PIECES, i % PIECES, lane);
                if (lane % SHARES == 0) result.take(i / PIECES * CLUSTER + rank, i % PIECES, piece);
            }
            __syncwarp();
            if (CLUSTER > 1) cluster_arrive();
        }
        if (item.chunks > 1) result.add_chunks(shared, rank, n_rows, thread);
    }
    if (CLUSTER > 1) cluster_wait();
    if (!waited) wait_for_previous();
}

// Grid: clusters * CLUSTER blocks. `q` and `out` are [rows, HEADS, HEAD_DIM]; the caches one layer.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    tree_attention(const u32* __restrict__ rows, const u32* __restrict__ requests, const u32* __restrict__ pages,
                   const float* __restrict__ q, const u16* __restrict__ k_cache, const u16* __restrict__ v_cache,
                   float* partials, u32* counters, float* __restrict__ out) {
    release_next();
    DYNAMIC_SHARED(memory);
    Shared& shared = *(Shared*)memory;
    const u32 thread = threadIdx.x, lane = thread % 32;
    if (thread == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            mbarrier_init(&shared.full[s], BULK ? 1 : 32);
            mbarrier_init(&shared.empty[s], ROW_GROUPS * 4);
        }
        mbarrier_init(&shared.received, 1);
        fence_barrier_init();
    }
    const u32 clusters = gridDim.x / CLUSTER;
    Block block = {shared, {rows, requests, shared.known}, rows, requests, clusters, thread, lane, thread / 32};
    block.schedule.plan(clusters, lane);
    __syncthreads();
    // No block writes to the shared memory of another one that has not begun.
    if (CLUSTER > 1) cluster_arrive();
    if (thread >= CONSUMERS) {
        if (MOVES_REGISTERS) give_registers<56>();
        produce(block, pages, k_cache, v_cache);
    } else {
        if (MOVES_REGISTERS) take_registers<GROUPS == 1 ? 200 : 224>();
        consume(block, q, partials, counters, out);
    }
}
