// needs: ptx layout
// Grows a tree of a fixed shape by one level: node n of the next level takes the next best token after its parent.
//
// A draft model has just run the nodes FIRST .. BEGIN of every request, one level, and ranked their continuations. The
// nodes BEGIN .. END of the next one get their tokens, positions and ancestors from their parents. They are rows of the
// target's pass, `tree`, which holds a whole tree for each request; and, unless they are leaves of the last level, the
// rows of the draft's next pass, whose slots are the same nodes' slots in its own cache. One block takes one request.

// constants-begin
constexpr u32 FIRST = 1; // the level that has run
constexpr u32 BEGIN = 4; // the next level
constexpr u32 END = 10;
constexpr u32 K = 8; // ranked continuations of a row
constexpr bool RUNS = true; // whether the draft runs the next level
__device__ constexpr u32 PARENTS[] = {1, 1, 2, 2, 3, 3}; // of the next level's nodes
// constants-end

constexpr u32 THREADS = 256;
static_assert(END - BEGIN <= THREADS, "one thread makes one node");

// Blocks: [requests].
extern "C" __global__ void __launch_bounds__(THREADS)
    grow(const u32* ids, const u32* requests, u32* tree, // ids [rows of the draft, K], the target's requests and rows
         u32* draft_requests, u32* draft_rows) {
    wait_for_previous();
    const u32 request = blockIdx.x, i = threadIdx.x;
    if (request >= requests[1]) return;
    if (RUNS && i == 0) {
        u32* words = draft_requests + HEADER_WORDS + request * REQUEST_WORDS;
        words[REQUEST_FIRST_ROW] = request * (END - BEGIN);
        words[REQUEST_ROWS] = END - BEGIN;
        if (request == 0) draft_requests[0] = requests[1] * (END - BEGIN);
    }
    if (i >= END - BEGIN) return;

    const u32 parent = PARENTS[i], node = BEGIN + i;
    u32 rank = 0; // among the parent's children
    for (u32 other = 0; other < i; other++) rank += PARENTS[other] == parent;
    u32* nodes = tree + requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_FIRST_ROW] * ROW_WORDS;
    u32* to = nodes + node * ROW_WORDS;
    u32* draft_to = draft_rows + (request * (END - BEGIN) + i) * ROW_WORDS;
    for (u32 word = 0; word < ROW_WORDS; word++) {
        u32 value = nodes[parent * ROW_WORDS + word];
        if (word == ROW_TOKEN) value = ids[(request * (BEGIN - FIRST) + parent - FIRST) * K + rank];
        if (word == ROW_POSITION) value++;
        if (word == ROW_NODE) value = node;
        if (word == ROW_ANCESTORS + node / 32) value |= 1u << node % 32;
        to[word] = value;
        if (RUNS) draft_to[word] = value;
    }
}
