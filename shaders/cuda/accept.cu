// needs: ptx layout batch ancestors
// accepted[b] = the deepest path of request b whose tokens equal the draws at their parents, and what follows each node.
//
// One block takes one request, thread t its node t. A node is matched if its token is the draw at its parent or if it is
// given (the root always is), accepted if all nodes of its path are matched: no bit in ancestors & ~matched. No walk is
// needed, and nothing is compiled in: the rows carry the tree.

// constants-begin
// constants-end

constexpr u32 THREADS = 256;
static_assert(THREADS == MAX_NODES, "one thread takes one node");

// Blocks: [requests].
extern "C" __global__ void __launch_bounds__(THREADS)
    accept(const u32* rows, const u32* requests, const u32* draws, // draws [rows]
           u32* accepted) { // [requests, ACCEPTED_WORDS]
    release_next();
    __shared__ u32 matched[THREADS / 32];
    __shared__ u32 deepest[THREADS / 32]; // path length, then 255 - node

    const u32 node = threadIdx.x;
    const bool is_request = blockIdx.x < requests[1];
    const Request request = is_request ? read_request(requests, blockIdx.x) : Request{};
    const bool is_node = node < request.n_rows;
    const u32 row = request.first_row + node;
    const Ancestors ancestors = is_node ? read_ancestors(rows, row) : Ancestors{};
    const u32 token = is_node ? rows[row * ROW_WORDS + ROW_TOKEN] : NONE;
    wait_for_previous();
    if (!is_request) return;

    bool is_match = false;
    if (is_node) {
        const u32 parent = parent_of(ancestors, node);
        const bool is_given = parent == NONE || node < request.given;
        is_match = is_given || (token != NONE && token == draws[request.first_row + parent]);
    }
    const u32 ballot = __ballot_sync(FULL_WARP, is_match);
    if (node % 32 == 0) matched[node / 32] = ballot;
    __syncthreads();

    bool is_accepted = is_node;
    for (u32 word = 0; word < ANCESTOR_WORDS; word++) is_accepted &= (ancestors.words[word] & ~matched[word]) == 0;
    u32 best = is_accepted ? path_length(ancestors) * MAX_NODES + (MAX_NODES - 1 - node) : 0;
    for (u32 lanes = 16; lanes > 0; lanes /= 2) best = max(best, __shfl_xor_sync(FULL_WARP, best, lanes));
    if (node % 32 == 0) deepest[node / 32] = best;
    __syncthreads();
    for (u32 warp = 0; warp < THREADS / 32; warp++) best = max(best, deepest[warp]);

    u32* count = accepted + blockIdx.x * ACCEPTED_WORDS;
    u32* path = count + ACCEPTED_PATH;
    u32* tokens = count + ACCEPTED_TOKENS;
    const u32 n_path = best / MAX_NODES;
    const u32 end = MAX_NODES - 1 - best % MAX_NODES;
    if (node == 0) count[0] = n_path;
    if (node >= n_path) path[node] = tokens[node] = 0;
    if (n_path > 0 && is_node && is_ancestor(rows, request.first_row + end, node)) {
        const u32 depth = depth_on_path(read_ancestors(rows, request.first_row + end), node);
        path[depth] = node;
        // Where a node is given, the draw before it may be another token.
        if (depth > 0) tokens[depth - 1] = token;
        if (node == end) tokens[depth] = draws[row];
    }
}
