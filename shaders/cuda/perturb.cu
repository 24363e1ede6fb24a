// needs: ptx layout batch philox best score vectors
// logits[r] = logits[r] / temperature + gumbel: what `draw` ranks at the row's position. One thread takes four tokens.

// constants-begin
constexpr u32 VOCAB = 49152;
// constants-end

constexpr u32 THREADS = 128;

// Blocks: [VOCAB / 4 / THREADS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    perturb(const u32* rows, const u32* requests, float* logits) { // logits [rows, VOCAB]
    release_next();
    wait_for_previous();
    const u32 group = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (4 * group >= VOCAB || row >= requests[0]) return;
    const u32* words = rows + row * ROW_WORDS;
    const Noise noise = noise_of(read_request(requests, words[ROW_REQUEST]), words[ROW_POSITION]);
    if (noise.is_silent) return;
    float* x = logits + (u64)row * VOCAB;
    const float4 v = perturbed(four_logits<VOCAB>(x, group), group, noise);
    store_row4<VOCAB>(x, 4 * group, v);
}
