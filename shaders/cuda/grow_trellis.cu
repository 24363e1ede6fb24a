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
constexpr u32 SLOTS = KEPT + 17; // places of a depth: a few more than needed, since the bound is known to seven bits only
constexpr u32 PLACES = DEPTH * SLOTS;
constexpr u32 OWNED = (SLOTS * K + THREADS - 1) / THREADS; // candidates of a thread
constexpr u32 OWNED_PLACES = (PLACES + THREADS - 1) / THREADS;
constexpr u32 RANKED = KEPT + 65; // places that are ranked in the end
static_assert(NODES >= 2 && NODES <= 64 && RANKED <= THREADS, "sizes of a tree");

constexpr u32 STATE_LIMIT = 0;
constexpr u32 STATE_NODES = 1;
constexpr u32 STATE_ROWS = 2;
constexpr u32 STATE_TOKENS = 4;
constexpr u32 STATE_LINKS = STATE_TOKENS + NODES;
constexpr u32 STATE_WORDS = STATE_TOKENS + 4 * NODES;

struct Block {
    u32 counts[WARPS][2];
    u64 bests[WARPS];
    float survival[PLACES]; // of depth d from place d * SLOTS on; 0: no place
    u32 candidate[PLACES];
    u32 parent[PLACES]; // place
    u32 node[PLACES];
    u32 list[RANKED]; // places
    float ranked[NODES]; // survivals of nodes 1 .., descending
};

// Sums over all threads. The halves of `a` and their sums stay below 2^16.
__device__ uint2 sums_of_block(u32 a, u32 b, Block& block) {
    a = __reduce_add_sync(FULL_WARP, a);
    b = __reduce_add_sync(FULL_WARP, b);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        block.counts[threadIdx.x / 32][0] = a;
        block.counts[threadIdx.x / 32][1] = b;
    }
    __syncthreads();
    const u32 warp = threadIdx.x % 32;
    return make_uint2(__reduce_add_sync(FULL_WARP, block.counts[warp][0]),
                      __reduce_add_sync(FULL_WARP, block.counts[warp][1]));
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
    if (threadIdx.x % 32 == 31) block.counts[threadIdx.x / 32][0] = before;
    __syncthreads();
    const u32 lane = threadIdx.x % 32, of_warp = block.counts[lane][0];
    total = __reduce_add_sync(FULL_WARP, of_warp);
    return before - mine + __reduce_add_sync(FULL_WARP, lane < threadIdx.x / 32 ? of_warp : 0);
}

// What the KEPT-th largest of all values is at least, to seven bits: two bits at a time, the largest that so many reach.
template <u32 N>
__device__ float bound_of(const float (&values)[N], Block& block) {
    u32 bound = 0;
    for (u32 shift = 28; shift >= 16; shift -= 2) {
        u32 two = 0, three = 0; // how many reach the bound with 1 and 2 added, in halves; and with 3
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            const u32 bits = __float_as_uint(values[n]);
            two += (bits >= (bound | 1u << shift)) + (bits >= (bound | 2u << shift)) * 65536u;
            three += bits >= (bound | 3u << shift);
        }
        const uint2 reach = sums_of_block(two, three, block);
        const u32 digit = reach.y >= KEPT ? 3 : reach.x / 65536 >= KEPT ? 2 : reach.x % 65536 >= KEPT ? 1 : 0;
        bound |= digit << shift;
    }
    return __uint_as_float(max(bound, 1u));
}

// The places of one depth, behind those of the depth before. Returns what a place must reach to be one of the tree.
__device__ float grow_level(u32 depth, const float* trellis, Block& block) {
    const u32 t = threadIdx.x;
    float value[OWNED + OWNED_PLACES]; // of candidates, and of places that there are
    u32 parent[OWNED];
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) {
        const u32 at = t + n * THREADS, i = at / K, j = at % K;
        value[n] = 0.0f;
        parent[n] = 0;
        if (depth == 0) {
            if (i == 0) value[n] = trellis[j];
        } else if (i < SLOTS) {
            parent[n] = (depth - 1) * SLOTS + i;
            const float above = block.survival[parent[n]];
            if (above > 0.0f) value[n] = above * trellis[(depth * K + block.candidate[parent[n]]) * K + j];
        }
    }
#pragma unroll
    for (u32 n = 0; n < OWNED_PLACES; n++) {
        const u32 at = t + n * THREADS;
        value[OWNED + n] = at < depth * SLOTS ? block.survival[at] : 0.0f;
    }
    const float least = bound_of(value, block);
    u32 mine = 0, total = 0;
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) mine += value[n] >= least;
    u32 place = place_among(mine, total, block);
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) {
        if (!(value[n] >= least)) continue;
        if (place < SLOTS) {
            block.survival[depth * SLOTS + place] = value[n];
            block.candidate[depth * SLOTS + place] = (t + n * THREADS) % K;
            block.parent[depth * SLOTS + place] = parent[n];
        }
        place++;
    }
    __syncthreads();
    return least;
}

// Ids of the NODES - 1 most likely places, by falling survival, parents before children. Returns how many
// places were looked at.
__device__ u32 rank(float least, Block& block) {
    const u32 t = threadIdx.x;
    u32 mine = 0, total = 0;
#pragma unroll
    for (u32 n = 0; n < OWNED_PLACES; n++) {
        const u32 at = t + n * THREADS;
        if (at < PLACES) block.node[at] = NODES;
        mine += at < PLACES && block.survival[at] >= least;
    }
    if (t < NODES) block.ranked[t] = 0.0f;
    // Places of several threads come in order of depth as long as each owns one: OWNED_PLACES is 1 for usual sizes.
    u32 at = place_among(mine, total, block);
#pragma unroll
    for (u32 n = 0; n < OWNED_PLACES; n++) {
        const u32 place = t + n * THREADS;
        if (place < PLACES && block.survival[place] >= least && at < RANKED) block.list[at++] = place;
    }
    __syncthreads();
    total = min(total, RANKED);
    if (t < total) {
        const u32 place = block.list[t];
        const float survival = block.survival[place];
        u32 n_better = 0;
        for (u32 i = 0; i < total; i++) {
            const u32 other = block.list[i];
            const float theirs = block.survival[other];
            n_better += theirs > survival || (theirs == survival && other < place);
        }
        if (n_better < KEPT) {
            block.node[place] = n_better + 1;
            block.ranked[n_better] = survival;
        }
    }
    __syncthreads();
    return total;
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
__device__ void write(u32* rows, u32 request, u32 prefix, u32 root, u32 n_rows, u32 n_listed, const u32* ids,
                      u32* state, const Block& block) {
    const u32 t = threadIdx.x;
    const bool is_root = t == RANKED;
    const u32 own = t < n_listed ? block.list[t] : 0;
    const u32 node = is_root ? 0 : t < n_listed ? block.node[own] : NODES;
    if (node >= n_rows) return;
    const u32 depth = is_root ? 0 : own / SLOTS + 1;
    const u32 token = is_root ? root : ids[(own / SLOTS) * K + block.candidate[own]];
    u64 ancestors = 1ull | 1ull << node;
    if (depth > 1) {
        u32 place = own;
        for (u32 d = depth; d > 1; d--) {
            place = block.parent[place];
            ancestors |= 1ull << block.node[place];
        }
    }
    state[STATE_TOKENS + node] = token;
    state[STATE_LINKS + node] = depth > 1 ? block.node[block.parent[own]] : 0;
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
            for (u32 place = threadIdx.x; place < PLACES; place += THREADS) block.survival[place] = 0.0f;
            __syncthreads();
            float least = __uint_as_float(1);
            for (u32 depth = 0; depth < max_depth; depth++) {
                least = grow_level(depth, trellis + (u64)request * DEPTH * K * K, block);
            }
            const u32 n_listed = rank(least, block);
            n_nodes = 1 + min(n_listed, KEPT);
            n_rows = choose(n_nodes, block);
            write(rows + first_row * ROW_WORDS, request, prefix, state[STATE_TOKENS], n_rows, n_listed,
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
