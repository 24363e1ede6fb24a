// needs: ptx layout batch
// Begins a block behind the committed text of every request, for a parallel drafter to fill: the prefix grows by what the
// last round accepted, the host's report is told of it, and the rows become those of a block: the last token and masks,
// which all see each other; or rows that read the hidden state of the last accepted node.
//
// state  [requests, STATE_WORDS], as kernel-gen/src/layout.rs has a report. To start a request the host writes its
//        limit, its last token as that of node 0, and zeros the count of accepted. A request that has reached its
//        limit gets no rows

// constants-begin
constexpr u32 NODES = 16; // of a report
constexpr u32 ROWS = 7; // of a block
constexpr bool READS_STATE = false; // a row's node is the last accepted one
constexpr u32 MASK = 16; // the token of all rows but the first
// constants-end

constexpr u32 THREADS = 64;
static_assert(ROWS <= THREADS && NODES <= THREADS, "one thread writes a row, one a node of the path");

constexpr u32 STATE_LIMIT = 0;
constexpr u32 STATE_NODES = 1;
constexpr u32 STATE_ROWS = 2;
constexpr u32 STATE_ACCEPTED = 3;
constexpr u32 STATE_TOKENS = 4;
constexpr u32 STATE_PATH = STATE_TOKENS + 2 * NODES;
constexpr u32 STATE_DRAWN = STATE_PATH + NODES;
constexpr u32 STATE_WORDS = STATE_DRAWN + 2 * NODES;

// Blocks: one.
extern "C" __global__ void __launch_bounds__(THREADS)
    open_block(u32* rows, u32* requests, const u32* accepted, u32* state) {
    wait_for_previous();
    const u32 t = threadIdx.x;
    u32 first_row = 0;
    for (u32 request = 0; request < requests[1]; request++, accepted += ACCEPTED_WORDS, state += STATE_WORDS) {
        u32* words = requests + HEADER_WORDS + request * REQUEST_WORDS;
        const u32 n = accepted[0], prefix = words[REQUEST_PREFIX] + n;
        const u32 root = n > 0 ? accepted[ACCEPTED_TOKENS + n - 1] : state[STATE_TOKENS];
        const u32 n_rows = prefix + 1 < state[STATE_LIMIT] ? ROWS : 0;
        __syncthreads(); // all have read what one thread changes
        if (t < min(n, NODES)) {
            state[STATE_PATH + t] = accepted[ACCEPTED_PATH + t];
            state[STATE_DRAWN + t] = accepted[ACCEPTED_TOKENS + t];
        }
        if (t == 0) {
            words[REQUEST_PREFIX] = prefix;
            words[REQUEST_FIRST_ROW] = first_row;
            words[REQUEST_ROWS] = n_rows;
            state[STATE_TOKENS] = root;
            state[STATE_NODES] = state[STATE_ROWS] = 0;
            state[STATE_ACCEPTED] = n;
        }
        if (t < n_rows) {
            u32 row[ROW_WORDS] = {};
            row[ROW_TOKEN] = t == 0 || READS_STATE ? root : MASK;
            row[ROW_POSITION] = prefix + t;
            row[ROW_REQUEST] = request;
            row[ROW_NODE] = !READS_STATE ? t : n > 0 ? accepted[ACCEPTED_PATH + n - 1] : 0;
            for (u32 node = 0; node < ROWS; node++) row[ROW_ANCESTORS + node / 32] |= 1u << node % 32;
            for (u32 word = 0; word < ROW_WORDS; word++) rows[(first_row + t) * ROW_WORDS + word] = row[word];
        }
        first_row += n_rows;
    }
    if (t == 0) requests[0] = first_row;
}
