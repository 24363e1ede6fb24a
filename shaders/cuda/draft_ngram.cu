// needs: ptx layout batch best
// The n-gram drafter on the device: observes what the last round accepted, then proposes a tree for every request, of
// what followed the last few tokens when they occurred before. As runtime/src/draft/ngram.rs, which explains it; what
// it proposes changes the speed, never the tokens.
//
// One block takes the requests one after the other, for their rows are consecutive. For each:
//
//     observe   accepted tokens go to the history, and what became of the last proposal into the hit rates
//     match     earlier occurrences of the end of the history, all at once; the longest, then the latest, are followed
//     merge     continuation j shares its first tokens with an earlier one, its *owner* at that depth: what it owns are
//               new nodes. Each node's survival is the product of the hit rates on its path
//     choose    nodes are ranked by survival, parents before children; as many are verified as pay
//     write     rows, and the proposal for the next round to observe, also the nodes that are not verified
//
// history  [requests, HISTORY]: the tokens so far. The cache holds all but the last one, which is the next root: so
//          prefix + 1 tokens are valid
// state    [requests, STATE_WORDS], see below; zeros are a request that is finished and that nothing is known of
// accepted is that of the last round, of a tree that this kernel drafted. Before the first round of a request its count
//          is 0
//
// To start a request the host writes its history, prefix and limit, and zeros the count of accepted. It reads what
// became of a round, and the next tree, from the state. The history never grows past the limit, and no row lies further
// than NODES slots behind it. A request that has reached it gets no rows, so that accept and commit find nothing to do.

// constants-begin
constexpr u32 HISTORY = 8192; // tokens a request may have, a multiple of 4
constexpr u32 NODES = 32; // most nodes of a tree, root included, up to 64; 1 drafts nothing
constexpr u32 DEPTH = 16; // tokens taken from one occurrence
constexpr float ROW_COST = 0.02f; // of a further row, relative to a pass of one row
// constants-end

constexpr u32 THREADS = 1024;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 MAX_MATCH = 12; // longest match that is told apart from longer ones
constexpr u32 FOLLOWED = 8;
constexpr u32 CLASSES = 12; // of nodes: first continuations by length of match, then further siblings
constexpr u32 PLACES = FOLLOWED * DEPTH; // a token of a continuation each
static_assert(NODES <= 64 && PLACES <= THREADS && HISTORY % 4 == 0, "sizes of a draft");

// Hit rates before anything is measured, and trials that they count for; trials after which the past fades.
__device__ constexpr float PRIORS[CLASSES] = {0.08f, 0.2f,  0.35f, 0.55f, 0.7f,  0.85f,
                                              0.04f, 0.08f, 0.12f, 0.15f, 0.15f, 0.1f};
constexpr float PRIOR_TRIALS = 4.0f;
constexpr float MEMORY_TRIALS = 64.0f;

// Words of a request's state, as kernel-gen/src/layout.rs has them.
constexpr u32 STATE_LIMIT = 0; // tokens that the history may have
constexpr u32 STATE_NODES = 1; // of the last proposal, verified or not
constexpr u32 STATE_ROWS = 2; // nodes of it that are verified
constexpr u32 STATE_ACCEPTED = 3; // nodes that the round before accepted
constexpr u32 STATE_TOKENS = 4; // [NODES] of the proposal
constexpr u32 STATE_LINKS = STATE_TOKENS + NODES; // [NODES]: parent, class << 8, depth << 16
constexpr u32 STATE_PATH = STATE_LINKS + NODES; // [NODES] that the round before accepted
constexpr u32 STATE_DRAWN = STATE_PATH + NODES; // [NODES]: the draws along the path
constexpr u32 STATE_HITS = STATE_DRAWN + NODES; // float [CLASSES]
constexpr u32 STATE_TRIALS = STATE_HITS + CLASSES; // float [CLASSES]
constexpr u32 STATE_WORDS = STATE_TRIALS + CLASSES;

struct Block {
    u32 maxima[WARPS];
    u64 bests[WARPS];
    u32 hits[CLASSES];
    u32 trials[CLASSES];
    float rates[CLASSES];
    u32 recent[MAX_MATCH]; // the last tokens, the latest first
    u32 matches[FOLLOWED]; // length << 27 | index of what followed
    u32 tokens[FOLLOWED][DEPTH];
    u32 common[FOLLOWED][FOLLOWED]; // tokens that two continuations begin with
    u32 owners[FOLLOWED][DEPTH]; // the first continuation with the same tokens up to here
    u32 classes[FOLLOWED][DEPTH];
    float survivals[PLACES]; // 0: no node
    float ranked[NODES]; // survivals of nodes 1 .., in descending order
    u32 nodes[FOLLOWED][DEPTH]; // ids of nodes
};

// A place is a token of a continuation.
struct Place {
    u32 continuation;
    u32 depth; // of the token; its node is one deeper than the root's
};

__device__ __forceinline__ Place place_of_thread() { return {threadIdx.x / DEPTH, threadIdx.x % DEPTH}; }

// Class of a node whose context, the path included, matches over `matched` tokens.
__device__ __forceinline__ u32 class_of(u32 matched, bool is_first) {
    const u32 by_length = (matched > 1) + (matched > 2) + (matched > 3) + (matched > 5) + (matched > 8);
    return is_first ? by_length : by_length + CLASSES / 2;
}

__device__ u32 max_of_block(u32 mine, Block& block) {
    mine = __reduce_max_sync(FULL_WARP, mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) block.maxima[threadIdx.x / 32] = mine;
    __syncthreads();
    return __reduce_max_sync(FULL_WARP, block.maxima[threadIdx.x % 32]);
}

// Appends the accepted tokens, tells the host of them, and counts for all children of accepted nodes whether their token
// was drawn.
__device__ void observe(const u32* accepted, u32* end_of_history, u32* state, Block& block) {
    const u32 t = threadIdx.x;
    const u32 n = accepted[0];
    const u32 *path = accepted + ACCEPTED_PATH, *drawn = accepted + ACCEPTED_TOKENS;
    if (t < CLASSES) block.hits[t] = block.trials[t] = 0;
    if (t == 0) state[STATE_ACCEPTED] = n;
    if (t < n) {
        end_of_history[t] = drawn[t];
        state[STATE_PATH + t] = path[t];
        state[STATE_DRAWN + t] = drawn[t];
    }
    __syncthreads();
    if (t > 0 && t < NODES && t < state[STATE_NODES]) {
        const u32 link = state[STATE_LINKS + t];
        const u32 parent = link & 0xff, its_class = link >> 8 & 0xff, parent_depth = (link >> 16) - 1;
        if (parent_depth < n && path[parent_depth] == parent) {
            atomicAdd(&block.trials[its_class], 1u);
            if (state[STATE_TOKENS + t] == drawn[parent_depth]) atomicAdd(&block.hits[its_class], 1u);
        }
    }
    __syncthreads();
    if (t < CLASSES) {
        float hits = __uint_as_float(state[STATE_HITS + t]) + (float)block.hits[t];
        float trials = __uint_as_float(state[STATE_TRIALS + t]) + (float)block.trials[t];
        if (trials >= MEMORY_TRIALS) {
            hits *= 0.5f;
            trials *= 0.5f;
        }
        state[STATE_HITS + t] = __float_as_uint(hits);
        state[STATE_TRIALS + t] = __float_as_uint(trials);
        block.rates[t] = (hits + PRIORS[t] * PRIOR_TRIALS) / (trials + PRIOR_TRIALS);
    }
    __syncthreads();
}

// The best match below `limit` that ends in one of this thread's tokens; 0 if there is none.
__device__ u32 match_of_thread(const u32* history, u32 length, u32 limit, const Block& block) {
    u32 best = 0;
#pragma unroll 2
    for (u32 first = 4 * threadIdx.x; first + 1 < length; first += 4 * THREADS) {
        const uint4 four = *(const uint4*)(history + first);
        const u32 tokens[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 at = first + i; // the last token itself is no earlier occurrence
            if (tokens[i] != block.recent[0] || at + 1 >= length) continue;
            u32 matched = 1;
            while (matched < MAX_MATCH && matched <= at && history[at - matched] == block.recent[matched]) matched++;
            const u32 match = matched << 27 | (at + 1);
            if (match < limit) best = max(best, match);
        }
    }
    return best;
}

// Fills `matches`, the best first, and returns how many there are.
__device__ u32 match(const u32* history, u32 length, Block& block) {
    if (threadIdx.x < MAX_MATCH && threadIdx.x < length) {
        block.recent[threadIdx.x] = history[length - 1 - threadIdx.x];
    }
    __syncthreads();
    u32 mine = match_of_thread(history, length, ~0u, block);
    for (u32 n = 0; n < FOLLOWED; n++) {
        const u32 best = max_of_block(mine, block);
        if (best == 0) return n;
        if (threadIdx.x == 0) block.matches[n] = best;
        if (mine == best) mine = match_of_thread(history, length, best, block);
    }
    return FOLLOWED;
}

// Tokens of the continuations and who owns them.
__device__ void merge(const u32* history, u32 length, u32 n_followed, Block& block) {
    const u32 t = threadIdx.x;
    const auto [j, d] = place_of_thread();
    __syncthreads();
    if (j < n_followed) {
        // An occurrence that overlaps the history's end repeats itself.
        const u32 at = block.matches[j] & 0x7ffffffu;
        block.tokens[j][d] = history[at + d % (length - at)];
    }
    __syncthreads();
    const u32 a = t / FOLLOWED, b = t % FOLLOWED;
    if (a < n_followed && b < n_followed) {
        u32 n = 0;
        while (n < DEPTH && block.tokens[a][n] == block.tokens[b][n]) n++;
        block.common[a][b] = n;
    }
    __syncthreads();
    if (j < n_followed) {
        u32 owner = 0;
        while (block.common[owner][j] <= d) owner++;
        block.owners[j][d] = owner;
    }
    __syncthreads();
}

// Survival of all nodes, and their ids: one more than how many come before. Returns how many there are, root included.
__device__ u32 rank(u32 n_followed, u32 max_depth, Block& block) {
    const u32 t = threadIdx.x;
    const auto [j, d] = place_of_thread();
    if (j < n_followed) {
        // The first token that a later continuation owns has a sibling before it.
        const bool is_first = j == 0 || (d > 0 && block.owners[j][d - 1] == j);
        block.classes[j][d] = class_of((block.matches[j] >> 27) + d, is_first);
    }
    __syncthreads();
    float survival = 0.0f;
    if (j < n_followed && block.owners[j][d] == j && d < max_depth) {
        survival = 1.0f;
        for (u32 i = 0; i <= d; i++) survival *= block.rates[block.classes[block.owners[j][i]][i]];
    }
    if (t < PLACES) block.survivals[t] = survival;
    if (t < NODES) block.ranked[t] = 0.0f;
    const u32 n_nodes = 1 + __syncthreads_count(survival > 0.0f);
    if (survival > 0.0f) {
        u32 n_before = 0;
        for (u32 other = 0; other < n_followed * DEPTH; other++) {
            const float its = block.survivals[other];
            n_before += its > survival || (its == survival && other < t);
        }
        block.nodes[j][d] = n_before + 1;
        if (n_before + 1 < NODES) block.ranked[n_before + 1] = survival;
    }
    __syncthreads();
    return min(n_nodes, NODES);
}

// How many nodes to verify: what a pass is expected to give, over what it costs, is largest.
__device__ u32 choose(u32 n_nodes, Block& block) {
    const u32 node = threadIdx.x;
    u64 mine = 0;
    if (node < n_nodes) {
        float expected = 1.0f;
        for (u32 i = 1; i <= node; i++) expected += block.ranked[i];
        const float worth = expected / (1.0f + ROW_COST * (float)node);
        mine = token_with_key(__float_as_uint(worth), node);
    }
    return token_of(best_of_block<WARPS>(mine, block.bests)) + 1;
}

__device__ void write_row(u32* row, u32 token, u32 position, u32 request, u32 node, u64 ancestors) {
    uint4* words = (uint4*)row;
    words[0] = make_uint4(token, position, request, node);
    words[1] = make_uint4((u32)ancestors, (u32)(ancestors >> 32), 0, 0);
    words[2] = make_uint4(0, 0, 0, 0);
}

// The rows of the first `n_rows` nodes, and the whole proposal. The place of a node is that of its owner.
__device__ void write(u32* rows, u32 request, u32 prefix, u32 root, u32 n_rows, u32 n_followed, u32* state,
                      const Block& block) {
    const auto [j, d] = place_of_thread();
    if (threadIdx.x == THREADS - 1) {
        write_row(rows, root, prefix, request, 0, 1);
        state[STATE_TOKENS] = root;
        state[STATE_LINKS] = 0;
    }
    if (j >= n_followed || block.survivals[threadIdx.x] == 0.0f || block.nodes[j][d] >= NODES) return;
    const u32 node = block.nodes[j][d], token = block.tokens[j][d];
    const u32 parent = d == 0 ? 0 : block.nodes[block.owners[j][d - 1]][d - 1];
    state[STATE_TOKENS + node] = token;
    state[STATE_LINKS + node] = parent | block.classes[j][d] << 8 | (d + 1) << 16;
    if (node >= n_rows) return;
    u64 ancestors = 1;
    for (u32 i = 0; i <= d; i++) ancestors |= 1ull << block.nodes[block.owners[j][i]][i];
    write_row(rows + node * ROW_WORDS, token, prefix + d + 1, request, node, ancestors);
}

// One round of one request: returns how many rows it has from `rows` on.
__device__ u32 draft(u32* rows, u32* requests, u32 request, const u32* accepted, u32* history, u32* state,
                     Block& block) {
    const u32 prefix = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX] + accepted[0];
    const u32 length = prefix + 1;
    observe(accepted, history + length - accepted[0], state, block);

    const u32 limit = min(state[STATE_LIMIT], HISTORY);
    u32 n_nodes = 0, n_rows = 0;
    if (length < limit) {
        // The bonus token takes one place; a node deeper than the rest could never be emitted.
        const u32 max_depth = limit - length - 1;
        const u32 n_followed = NODES > 1 ? match(history, length, block) : 0;
        merge(history, length, n_followed, block);
        n_nodes = rank(n_followed, max_depth, block);
        n_rows = choose(n_nodes, block);
        write(rows, request, prefix, history[prefix], n_rows, n_followed, state, block);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        state[STATE_NODES] = n_nodes;
        state[STATE_ROWS] = n_rows;
        requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX] = prefix;
    }
    return n_rows;
}

// Blocks: one.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    draft_ngram(u32* rows, u32* requests, const u32* accepted, u32* history, u32* state) {
    __shared__ Block block;

    wait_for_previous();
    u32 first_row = 0;
    for (u32 request = 0; request < requests[1]; request++) {
        const u32 n_rows = draft(rows + first_row * ROW_WORDS, requests, request, accepted + request * ACCEPTED_WORDS,
                                 history + request * HISTORY, state + request * STATE_WORDS, block);
        if (threadIdx.x == 0) {
            requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_FIRST_ROW] = first_row;
            requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_ROWS] = n_rows;
            requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_GIVEN] = 0;
        }
        first_row += n_rows;
    }
    if (threadIdx.x == 0) requests[0] = first_row;
}
