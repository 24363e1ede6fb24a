// needs: ptx layout batch
// Begins a block behind the committed text of every request, for a parallel drafter to fill: the prefix grows by what the
// last round accepted, the host's report is told of it, and the rows become those of a block: the last token and masks,
// which all see each other; or rows that read the hidden state of the last accepted node.
//
// One block takes all requests at once, for their rows are consecutive: where a request's begin, those before it say. A
// thread looks at a request; when all have looked, threads write whatever there is to write, in turn.
//
// state  [requests, STATE_WORDS], as kernel-gen/src/layout.rs has a report. To start a request the host writes its
//        limit, its last token as that of node 0, and zeros the count of accepted. A request that has reached its
//        limit gets no rows

// constants-begin
constexpr u32 REQUESTS = 1; // most of them
constexpr u32 NODES = 16; // of a report
constexpr u32 ROWS = 7; // of a block
constexpr bool READS_STATE = false; // a row's node is the row of the last accepted one
constexpr u32 MASK = 16; // the token of all rows but the first
// constants-end

constexpr u32 THREADS = REQUESTS == 1 ? 64 : 1024;
constexpr u32 WARPS = (REQUESTS + 31) / 32; // that look at requests
static_assert(REQUESTS <= THREADS, "one thread looks at a request");
static_assert(ROWS <= 64, "what a row sees is one 64-bit word");

constexpr u32 STATE_LIMIT = 0;
constexpr u32 STATE_NODES = 1;
constexpr u32 STATE_ROWS = 2;
constexpr u32 STATE_ACCEPTED = 3;
constexpr u32 STATE_TOKENS = 4;
constexpr u32 STATE_PATH = STATE_TOKENS + 2 * NODES;
constexpr u32 STATE_DRAWN = STATE_PATH + NODES;
constexpr u32 STATE_WORDS = STATE_DRAWN + 2 * NODES;

// Where a request stands after the last round.
struct Standing {
    u32 n_accepted;
    u32 prefix;
    u32 root; // the last token
    u32 node; // of all rows, if they read a state
    bool is_open; // gets a block
};

struct Requests {
    Standing standing[REQUESTS];
    u32 open[REQUESTS]; // those that get a block, in order
    u32 n_open[WARPS]; // of a warp's requests
};

// Everything is read at once, whether the request is there or not: a round waits for it.
__device__ __forceinline__ Standing look(const u32* words, const u32* accepted, const u32* report, bool is_request) {
    const u32 n = accepted[0], limit = report[STATE_LIMIT], first_row = words[REQUEST_FIRST_ROW];
    Standing its = {n, words[REQUEST_PREFIX] + n, report[STATE_TOKENS], 0, false};
    its.is_open = is_request && its.prefix + 1 < limit;
    if (is_request && n > 0) {
        its.root = accepted[ACCEPTED_TOKENS + n - 1];
        its.node = first_row + accepted[ACCEPTED_PATH + n - 1];
    }
    return its;
}

__device__ __forceinline__ void write_row(u32* row, u32 i, u32 request, const Standing& its) {
    constexpr u64 SEEN = ~0ull >> (64 - ROWS); // the whole block
    uint4* words = (uint4*)row;
    words[0] = make_uint4(i == 0 || READS_STATE ? its.root : MASK, its.prefix + i, request, READS_STATE ? its.node : i);
    words[1] = make_uint4((u32)SEEN, (u32)(SEEN >> 32), 0, 0);
    words[2] = make_uint4(0, 0, 0, 0);
}

// Blocks: one.
extern "C" __global__ void __launch_bounds__(THREADS)
    open_block(u32* rows, u32* requests, const u32* accepted, u32* state) {
    __shared__ Requests all;
    wait_for_previous();
    const u32 t = threadIdx.x, lane = t % 32, warp = t / 32, n_requests = requests[1];
    u32 *words = requests + HEADER_WORDS + t * REQUEST_WORDS, *report = state + t * STATE_WORDS;
    const bool is_request = t < n_requests;
    Standing mine = {};
    if (t < REQUESTS) mine = look(words, accepted + t * ACCEPTED_WORDS, report, is_request);
    const u32 open = __ballot_sync(FULL_WARP, mine.is_open);
    if (warp < WARPS && lane == 0) all.n_open[warp] = __popc(open);
    __syncthreads(); // all have read what threads change

    u32 n_before = __popc(open & ((1u << lane) - 1)), n_open = 0;
    for (u32 other = 0; other < WARPS; other++) {
        if (other < warp) n_before += all.n_open[other];
        n_open += all.n_open[other];
    }
    if (is_request) {
        words[REQUEST_PREFIX] = mine.prefix;
        words[REQUEST_FIRST_ROW] = n_before * ROWS;
        words[REQUEST_ROWS] = mine.is_open ? ROWS : 0;
        report[STATE_NODES] = report[STATE_ROWS] = 0;
        report[STATE_ACCEPTED] = mine.n_accepted;
        report[STATE_TOKENS] = mine.root;
        all.standing[t] = mine;
        if (mine.is_open) all.open[n_before] = t;
    }
    if (t == 0) requests[0] = n_open * ROWS;
    __syncthreads();

#pragma unroll 1
    for (u32 i = t; i < n_requests * NODES; i += THREADS) {
        const u32 request = i / NODES, node = i % NODES;
        if (node >= all.standing[request].n_accepted) continue;
        const u32* its = accepted + request * ACCEPTED_WORDS;
        state[request * STATE_WORDS + STATE_PATH + node] = its[ACCEPTED_PATH + node];
        state[request * STATE_WORDS + STATE_DRAWN + node] = its[ACCEPTED_TOKENS + node];
    }
#pragma unroll 1
    for (u32 row = t; row < n_open * ROWS; row += THREADS) {
        const u32 request = all.open[row / ROWS];
        write_row(rows + row * ROW_WORDS, row % ROWS, request, all.standing[request]);
    }
}
