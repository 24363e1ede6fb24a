// needs: ptx layout batch best
// Grows a tree for every request, best first, through the trellis of its block: of all paths the NODES - 1 most likely,
// which are a tree. As many of its nodes become rows of the next pass as pay.
//
// Level by level: the places of a depth are those of its candidates behind kept places of the depth before that are
// among the KEPT most likely of all so far. A path's probability only falls, so that what is dropped is never missed.
//
// One block takes the requests one after the other, for their rows are consecutive. As
// runtime/src/draft/best_first.rs.

// constants-begin
constexpr u32 NODES = 4; // most nodes of a tree, root included, up to 64
constexpr u32 K = 64; // candidates of a depth
constexpr u32 ROWS = 7; // of a block
constexpr u32 FIRST = 0; // row of a block that predicts depth 1
__device__ constexpr u32 COSTS[] = {0x3f800000, 0x3f8ccccd, 0x3f99999a, 0x3fa66666}; // of 1, 2 .. rows: bits of floats
// constants-end

constexpr u32 THREADS = 1024;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 DEPTH = ROWS - FIRST;
constexpr u32 KEPT = NODES - 1;
constexpr u32 PLACES = DEPTH * KEPT;
constexpr u32 OWNED = (KEPT * K + THREADS - 1) / THREADS; // candidates of a thread
static_assert(NODES >= 2 && NODES <= 64 && PLACES <= THREADS, "sizes of a tree");

constexpr u32 STATE_LIMIT = 0;
constexpr u32 STATE_NODES = 1;
constexpr u32 STATE_ROWS = 2;
constexpr u32 STATE_TOKENS = 4;
constexpr u32 STATE_LINKS = STATE_TOKENS + NODES;
constexpr u32 STATE_WORDS = STATE_TOKENS + 4 * NODES;

struct Block {
    u32 counts[WARPS];
    u32 count;
    u64 bests[WARPS];
    float survival[PLACES]; // of depth d from place d * KEPT on; 0: no place
    u32 candidate[PLACES];
    u32 parent[PLACES]; // place
    u32 node[PLACES];
    float ranked[NODES]; // survivals of nodes 1 .., descending
};

__device__ u32 sum_of_block(u32 mine, Block& block) {
    mine = __reduce_add_sync(FULL_WARP, mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) block.counts[threadIdx.x / 32] = mine;
    __syncthreads();
    return __reduce_add_sync(FULL_WARP, block.counts[threadIdx.x % 32]);
}

// How many before this thread, in order of threads; and all.
__device__ u32 place_among(u32 mine, u32& total, Block& block) {
    u32 before = mine;
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(FULL_WARP, before, step);
        if (threadIdx.x % 32 >= step) before += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) block.counts[threadIdx.x / 32] = before;
    __syncthreads();
    const u32 lane = threadIdx.x % 32, of_warp = block.counts[lane];
    total = __reduce_add_sync(FULL_WARP, of_warp);
    return before - mine + __reduce_add_sync(FULL_WARP, lane < threadIdx.x / 32 ? of_warp : 0);
}

// The places of one depth, behind those of the depth before.
__device__ void grow_level(u32 depth, const float* trellis, Block& block) {
    const u32 t = threadIdx.x;
    float value[OWNED];
    u32 parent[OWNED];
    const float kept = t < depth * KEPT ? block.survival[t] : 0.0f;
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) {
        const u32 at = t + n * THREADS, i = at / K, j = at % K;
        value[n] = 0.0f;
        if (depth == 0) {
            parent[n] = 0;
            if (i == 0) value[n] = trellis[j];
        } else {
            parent[n] = (depth - 1) * KEPT + min(i, KEPT - 1);
            const float above = i < KEPT ? block.survival[parent[n]] : 0.0f;
            if (above > 0.0f) value[n] = above * trellis[(depth * K + block.candidate[parent[n]]) * K + j];
        }
    }
    // The value of the KEPT-th most likely of all: the largest that so many reach, bit by bit.
    u32 bound = 0;
    for (u32 bit = 0x40000000u; bit > 0; bit >>= 1) {
        const float least = __uint_as_float(bound | bit);
        u32 reach = kept >= least;
#pragma unroll
        for (u32 n = 0; n < OWNED; n++) reach += value[n] >= least;
        if (sum_of_block(reach, block) >= KEPT) bound |= bit;
    }
    const float least = __uint_as_float(max(bound, 1u));
    u32 mine = 0, total = 0;
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) mine += value[n] >= least;
    u32 place = place_among(mine, total, block);
    if (t < KEPT) block.survival[depth * KEPT + t] = 0.0f;
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) {
        if (!(value[n] >= least)) continue;
        if (place < KEPT) {
            block.survival[depth * KEPT + place] = value[n];
            block.candidate[depth * KEPT + place] = (t + n * THREADS) % K;
            block.parent[depth * KEPT + place] = parent[n];
        }
        place++;
    }
    __syncthreads();
}

// Ids of the NODES - 1 most likely places, by falling survival, parents before children. Returns how many nodes there are.
__device__ u32 rank(Block& block) {
    const u32 t = threadIdx.x;
    if (t < NODES) block.ranked[t] = 0.0f;
    __syncthreads();
    const float mine = t < PLACES ? block.survival[t] : 0.0f;
    u32 n_better = 0;
    if (mine > 0.0f) {
        for (u32 other = 0; other < PLACES; other++) {
            const float theirs = block.survival[other];
            n_better += theirs > mine || (theirs == mine && other < t);
        }
    }
    const bool is_node = mine > 0.0f && n_better < KEPT;
    if (t < PLACES) block.node[t] = is_node ? n_better + 1 : NODES;
    if (is_node) block.ranked[n_better] = mine;
    return 1 + sum_of_block(is_node, block);
}

// How many nodes are worth a row each: those with the most expected tokens for the cost of a pass.
__device__ u32 choose(u32 n_nodes, Block& block) {
    u64 mine = 0;
    if (threadIdx.x < n_nodes) {
        float expected = 1.0f;
        for (u32 n = 0; n < threadIdx.x; n++) expected += block.ranked[n];
        mine = token_with_key(order_key(expected / __uint_as_float(COSTS[threadIdx.x])), threadIdx.x);
    }
    return token_of(best_of_block<WARPS>(mine, block.bests)) + 1;
}

// The rows of the first `n_rows` nodes, and the tree for the host.
__device__ void write(u32* rows, u32 request, u32 prefix, u32 root, u32 n_rows, const u32* ids, u32* state,
                      const Block& block) {
    const u32 t = threadIdx.x;
    const bool is_root = t == THREADS - 1;
    const u32 node = is_root ? 0 : t < PLACES ? block.node[t] : NODES;
    if (node >= n_rows) return;
    const u32 depth = is_root ? 0 : t / KEPT + 1;
    const u32 token = is_root ? root : ids[(t / KEPT) * K + block.candidate[t]];
    u64 ancestors = 1ull | 1ull << node;
    if (depth > 1) {
        u32 place = t;
        for (u32 d = depth; d > 1; d--) {
            place = block.parent[place];
            ancestors |= 1ull << block.node[place];
        }
    }
    state[STATE_TOKENS + node] = token;
    state[STATE_LINKS + node] = depth > 1 ? block.node[block.parent[t]] : 0;
    uint4* words = (uint4*)(rows + node * ROW_WORDS);
    words[0] = make_uint4(token, prefix + depth, request, node);
    words[1] = make_uint4((u32)ancestors, (u32)(ancestors >> 32), 0, 0);
    words[2] = make_uint4(0, 0, 0, 0);
}

// Blocks: one.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grow_trellis(u32* rows, u32* requests, const u32* ids, // [rows, K]
                 const float* trellis, // [requests * DEPTH, K, K]
                 u32* state) { // [requests, STATE_WORDS]
    __shared__ Block block;
    wait_for_previous();
    u32 first_row = 0;
    for (u32 request = 0; request < requests[1]; request++, state += STATE_WORDS) {
        u32* words = requests + HEADER_WORDS + request * REQUEST_WORDS;
        const u32 prefix = words[REQUEST_PREFIX], block_row = words[REQUEST_FIRST_ROW];
        u32 n_nodes = 0, n_rows = 0;
        if (words[REQUEST_ROWS] > 0) {
            // The bonus token takes one place; a node deeper than the rest could never be emitted.
            const u32 max_depth = min(DEPTH, state[STATE_LIMIT] - prefix - 2);
            if (threadIdx.x < PLACES) block.survival[threadIdx.x] = 0.0f;
            __syncthreads();
            for (u32 depth = 0; depth < max_depth; depth++) {
                grow_level(depth, trellis + (u64)request * DEPTH * K * K, block);
            }
            n_nodes = rank(block);
            n_rows = choose(n_nodes, block);
            write(rows + first_row * ROW_WORDS, request, prefix, state[STATE_TOKENS], n_rows,
                  ids + (block_row + FIRST) * K, state, block);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            words[REQUEST_FIRST_ROW] = first_row;
            words[REQUEST_ROWS] = n_rows;
            state[STATE_NODES] = n_nodes;
            state[STATE_ROWS] = n_rows;
        }
        first_row += n_rows;
    }
    if (threadIdx.x == 0) requests[0] = first_row;
}
