// needs: ptx layout
// Grows a tree by the last level of its shape: each node takes the best token after its parent that its elder siblings
// have not taken.
//
// The pass before ran the level above, the nodes ABOVE .. BEGIN of every request, and ranked their continuations. The
// nodes BEGIN .. END become the rows of the next pass, and their tokens are kept by node, for the host to read the tree
// when it is grown. All else that a row holds follows from the shape, by walking up from the node.
//
// One block takes one request, one thread one node.

// constants-begin
constexpr u32 K = 8; // ranked continuations of a row
constexpr u32 DEPTH = 2; // of the new level
constexpr u32 ABOVE = 1; // first node of the level above
constexpr u32 BEGIN = 4; // first node of the new one
constexpr u32 END = 10;
__device__ constexpr u32 PARENTS[] = {0, 0, 0, 0, 1, 1, 2, 2, 3, 3}; // of every node
// constants-end

constexpr u32 THREADS = MAX_NODES;
constexpr u32 NODES = END - BEGIN; // of the new level
static_assert(END <= MAX_NODES, "one thread makes one node");

// Blocks: [requests].
extern "C" __global__ void __launch_bounds__(THREADS)
    grow(const u32* ids, // [requests * (BEGIN - ABOVE), K]
         u32* rows, u32* requests, u32* tokens) { // the batch, [requests, MAX_NODES]
    wait_for_previous();
    const u32 request = blockIdx.x, n_requests = requests[1];
    if (request >= n_requests) return;
    u32* words = requests + HEADER_WORDS + request * REQUEST_WORDS;
    if (threadIdx.x == 0) {
        words[REQUEST_FIRST_ROW] = request * NODES;
        words[REQUEST_ROWS] = NODES;
        if (request == 0) requests[0] = n_requests * NODES;
    }
    if (threadIdx.x >= NODES) return;

    const u32 node = BEGIN + threadIdx.x, parent = PARENTS[node];
    u32 rank = 0; // among the parent's children
    for (u32 elder = BEGIN; elder < node; elder++) rank += PARENTS[elder] == parent;
    const u32 token = ids[(request * (BEGIN - ABOVE) + parent - ABOVE) * K + rank];
    tokens[request * MAX_NODES + node] = token;

    u32 row[ROW_WORDS] = {};
    row[ROW_TOKEN] = token;
    row[ROW_POSITION] = words[REQUEST_PREFIX] + DEPTH;
    row[ROW_REQUEST] = request;
    row[ROW_NODE] = node;
    row[ROW_ANCESTORS] = 1; // the root
    for (u32 n = node; n > 0; n = PARENTS[n]) row[ROW_ANCESTORS + n / 32] |= 1u << n % 32;
    for (u32 word = 0; word < ROW_WORDS; word++) rows[(request * NODES + threadIdx.x) * ROW_WORDS + word] = row[word];
}
