// needs: ptx layout batch
// Grows a tree for every request, best first, through the trellis of its block: of all paths the NODES - 1 most likely,
// which are a tree. Where there is room for one request, as many of its nodes become rows of the next pass as pay, and the
// tree ends once no further nodes can: none survives likelier than the last. Where there is room for several, the host
// chooses among the nodes of all trees, and a tree ends before a node that is too unlikely to be chosen.
//
// A warp takes node after node: of all nodes' best children that are not in the tree yet, the best. Children come sorted,
// so that a taken child makes way for its next sibling and brings its own first child: a slot for each node is enough.
// Ties go to the parent that was taken first. One block takes one request. As runtime/src/draft/best_first.rs.

// constants-begin
constexpr u32 NODES = 4; // most nodes of a tree, root included, up to 64
constexpr u32 K = 64; // candidates of a depth
constexpr u32 ROWS = 7; // of a block
constexpr u32 FIRST = 0; // row of a block that predicts depth 1
constexpr bool MAKES_ROWS = true; // of the one request that there is room for
constexpr float LEAST = 0.02f; // survival of a node where the host makes up the rows
__device__ constexpr u32 COSTS[] = {0x3f800000, 0x3f8ccccd, 0x3f99999a, 0x3fa66666}; // of 1, 2 .. rows: bits of floats
// constants-end

constexpr u32 THREADS = 512;
constexpr u32 DEPTH = ROWS - FIRST;
constexpr u32 LOOKS = 4; // nodes between looks at what may pay
constexpr u32 NEAR = K < 8 ? K : 8; // children of a parent that are in shared memory
static_assert(NODES >= 2 && NODES <= 64, "a lane has two slots");
static_assert(K <= 64 && DEPTH <= 16, "a slot is one word");

constexpr u32 STATE_LIMIT = 0;
constexpr u32 STATE_NODES = 1;
constexpr u32 STATE_ROWS = 2;
constexpr u32 STATE_TOKENS = 4;
constexpr u32 STATE_LINKS = STATE_TOKENS + NODES;
constexpr u32 STATE_SURVIVAL = STATE_TOKENS + 4 * NODES;
constexpr u32 STATE_WORDS = STATE_SURVIVAL + NODES;

struct Tree {
    float survival[NODES];
    u32 parent[NODES];
    u32 place[NODES]; // (depth - 1) * K + candidate; of the root 0
    u32 n_nodes;
    u32 n_rows; // nodes that pay
};

// The trellis of one request: row `parent`, depth of the children * K + candidate of the parent, has its children by rank.
struct Trellis {
    const float* value;
    const u32* order;
    float near_value[DEPTH * K * NEAR];
    unsigned char near_order[DEPTH * K * NEAR];

    __device__ void load(u32 depth) {
        for (u32 i = threadIdx.x; i < depth * K * NEAR; i += THREADS) {
            const u32 at = i / NEAR * K + i % NEAR;
            near_value[i] = value[at];
            near_order[i] = (unsigned char)order[at];
        }
    }
    __device__ float probability(u32 parent, u32 rank) const {
        return rank < NEAR ? near_value[parent * NEAR + rank] : value[parent * K + rank];
    }
    __device__ u32 candidate(u32 parent, u32 rank) const {
        return rank < NEAR ? near_order[parent * NEAR + rank] : order[parent * K + rank];
    }
};

// Survivals are ordered as their bits are. 0: no child.
__device__ __forceinline__ u32 key_of(float survival) { return survival > 0.0f ? __float_as_uint(survival) : 0; }

// A slot: its node, the place whose children the node's are, and the rank of the next of them. Slots are ordered by node.
__device__ __forceinline__ u32 slot_of(u32 node, u32 parent) { return node << 20 | parent << 8; }
__device__ __forceinline__ u32 node_of(u32 slot) { return slot >> 20; }
__device__ __forceinline__ u32 parent_of(u32 slot) { return slot >> 8 & 0xfff; }
__device__ __forceinline__ u32 rank_of(u32 slot) { return slot & 0xff; }

// What trees that end with a lane's nodes, `lane` and `lane + 32`, are expected to bring and cost.
struct Worth {
    float tokens[2];
    float cost[2];
    float per_cost[2]; // rounded

    // Whether a tree larger than `node` may bring more for its cost than all up to there, if its nodes were as likely as
    // that one.
    __device__ bool may_grow(u32 node, float survival, float expected) const {
        constexpr float ROUNDING = 1.00001f;
        const float mine = fmaxf(tokens[0] * per_cost[0], tokens[1] * per_cost[1]);
        const float best = __uint_as_float(__reduce_max_sync(FULL_WARP, key_of(mine)));
        bool may = false;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 larger = threadIdx.x + 32 * half;
            const float hoped = expected + (float)(int)(larger - node) * survival;
            may |= larger > node && larger < NODES && hoped * ROUNDING > best * cost[half];
        }
        return __any_sync(FULL_WARP, may);
    }

    // The node with the most tokens for the cost.
    __device__ u32 best() const {
        const u32 key[2] = {key_of(tokens[0] / cost[0]), key_of(tokens[1] / cost[1])};
        const u32 most = __reduce_max_sync(FULL_WARP, max(key[0], key[1]));
        return __reduce_min_sync(FULL_WARP, key[0] == most ? threadIdx.x : key[1] == most ? threadIdx.x + 32 : NONE);
    }
};

// By one warp.
__device__ void grow(u32 max_depth, const Trellis& trellis, Tree& tree) {
    const u32 lane = threadIdx.x;
    // Those of nodes `lane` and `lane + 32`.
    u32 slot[2] = {slot_of(0, 0), NONE}, key[2] = {0, 0};
    if (lane == 0) {
        if (max_depth > 0) key[0] = key_of(trellis.probability(0, 0));
        tree.survival[0] = 1.0f;
        tree.parent[0] = tree.place[0] = 0;
    }
    __syncwarp();
    const u32 least = MAKES_ROWS ? 1 : key_of(LEAST);
    Worth worth = {};
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        worth.cost[half] = lane + 32 * half < NODES ? __uint_as_float(COSTS[lane + 32 * half]) : 1.0f;
        worth.per_cost[half] = 1.0f / worth.cost[half];
    }
    float expected = 1.0f;
    if (lane == 0) worth.tokens[0] = expected;
    u32 n_nodes = 1;
    while (n_nodes < NODES) {
        const u32 best = __reduce_max_sync(FULL_WARP, max(key[0], key[1]));
        if (best < least) break;
        const u32 node = n_nodes++;
        const u32 taken = __reduce_min_sync(FULL_WARP, key[0] == best ? slot[0] : key[1] == best ? slot[1] : NONE);
        const u32 above = node_of(taken), parent = parent_of(taken), rank = rank_of(taken);
        const float survival = __uint_as_float(best);
        const u32 depth = parent / K, candidate = trellis.candidate(parent, rank);
        const u32 place = (depth + 1) * K + candidate;
        float child = 0.0f, sibling = 0.0f;
        if (depth + 1 < max_depth) child = survival * trellis.probability(place, 0);
        if (rank + 1 < K) sibling = tree.survival[above] * trellis.probability(parent, rank + 1);
        expected += survival;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (above == lane + 32 * half) key[half] = key_of(sibling), slot[half] = taken + 1;
            if (node == lane + 32 * half) key[half] = key_of(child), slot[half] = slot_of(node, place), worth.tokens[half] = expected;
        }
        if (lane == 0) {
            tree.survival[node] = survival;
            tree.parent[node] = above;
            tree.place[node] = depth * K + candidate;
        }
        __syncwarp();
        if (MAKES_ROWS && node % LOOKS == 0 && !worth.may_grow(node, survival, expected)) break;
    }
    const u32 n_rows = MAKES_ROWS ? worth.best() + 1 : n_nodes;
    if (lane == 0) {
        tree.n_nodes = n_nodes;
        tree.n_rows = n_rows;
    }
}

// The tree for the host, and the rows of it. A thread has a node.
__device__ void write(u32* rows, u32 request, u32 prefix, const u32* ids, u32* state, const Tree& tree) {
    const u32 node = threadIdx.x;
    if (node >= tree.n_nodes) return;
    const u32 depth = node == 0 ? 0 : tree.place[node] / K + 1;
    if (node > 0) state[STATE_TOKENS + node] = ids[tree.place[node]];
    const u32 token = state[STATE_TOKENS + node];
    state[STATE_LINKS + node] = tree.parent[node];
    state[STATE_SURVIVAL + node] = __float_as_uint(tree.survival[node]);
    if (!MAKES_ROWS || node >= tree.n_rows) return;
    u64 ancestors = 1ull;
    for (u32 above = node; above > 0; above = tree.parent[above]) ancestors |= 1ull << above;
    uint4* words = (uint4*)(rows + node * ROW_WORDS);
    words[0] = make_uint4(token, prefix + depth, request, node);
    words[1] = make_uint4((u32)ancestors, (u32)(ancestors >> 32), 0, 0);
    words[2] = make_uint4(0, 0, 0, 0);
}

// Blocks: [requests].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    grow_trellis(u32* rows, u32* requests, const u32* ids, // [rows, K]
                 const float* values, const u32* order, // [requests * DEPTH, K, K]
                 u32* state) { // [requests, STATE_WORDS]
    __shared__ Trellis trellis;
    __shared__ Tree tree;
    wait_for_previous();
    const u32 request = blockIdx.x;
    u32* words = requests + HEADER_WORDS + request * REQUEST_WORDS;
    // Without a block nothing is to be done: `open_block` has said that there are no rows and no nodes.
    if (request >= requests[1] || words[REQUEST_ROWS] == 0) return;
    const u32 prefix = words[REQUEST_PREFIX], block_row = words[REQUEST_FIRST_ROW];
    state += request * STATE_WORDS;
    // The bonus token takes one place; a node deeper than the rest could never be emitted.
    const u32 max_depth = min(DEPTH, state[STATE_LIMIT] - prefix - 2);
    if (threadIdx.x == 0) {
        trellis.value = values + (u64)request * DEPTH * K * K;
        trellis.order = order + (u64)request * DEPTH * K * K;
    }
    __syncthreads();
    trellis.load(max_depth);
    __syncthreads();
    if (threadIdx.x < 32) grow(max_depth, trellis, tree);
    __syncthreads();
    write(rows, request, prefix, ids + (block_row + FIRST) * K, state, tree);
    if (threadIdx.x == 0) {
        state[STATE_NODES] = tree.n_nodes;
        state[STATE_ROWS] = tree.n_rows;
        if (MAKES_ROWS) requests[0] = words[REQUEST_ROWS] = tree.n_rows;
    }
}
