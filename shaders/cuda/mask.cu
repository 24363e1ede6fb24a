// needs: ptx
// logits[r] = -infinity where row r must not draw a token: its bit in `allowed` is not set. A warp takes one word's tokens at
// a time.

// constants-begin
constexpr u32 VOCAB = 49152;
// constants-end

constexpr u32 THREADS = 256;
constexpr u32 TURNS = 4; // tokens of a thread
constexpr u32 ALLOWED_WORDS = (VOCAB + 31) / 32;

// Blocks: [VOCAB / THREADS / TURNS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    mask(const u32* requests, const u32* allowed, float* logits) { // [rows, ALLOWED_WORDS], [rows, VOCAB]
    release_next();
    wait_for_previous();
    const u32 row = blockIdx.y;
    if (row >= requests[0]) return;
    const u32 first = blockIdx.x * TURNS * THREADS + threadIdx.x;
    for (u32 token = first; token < min(first + TURNS * THREADS, VOCAB); token += THREADS) {
        const u32 word = allowed[row * ALLOWED_WORDS + token / 32];
        if (!(word >> token % 32 & 1)) logits[(u64)row * VOCAB + token] = __uint_as_float(0xff800000u);
    }
}
