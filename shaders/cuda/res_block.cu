// needs: ptx layout formats
// out[r] = s + silu(weight[head] · s + bias[head]): the residual block of a Medusa head, s being the hidden state of the row
// that r's node names, and the head the one for r's depth. One warp computes an element.

// constants-begin
constexpr u32 HIDDEN = 576;
constexpr u32 WEIGHT = 1; // format of the weight
constexpr u32 HEADS = 5;
// constants-end

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / 32;

// Blocks: [HIDDEN / WARPS, rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    res_block(const u32* rows, const u32* requests, const float* states, // [rows, HIDDEN]
              const void* weight, // [HEADS * HIDDEN, HIDDEN]
              const float* bias, float* out) { // [HEADS * HIDDEN], [rows, HIDDEN]
    release_next();
    const u32 element = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y;
    wait_for_previous();
    if (row >= requests[0] || element >= HIDDEN) return;
    const u32* words = rows + row * ROW_WORDS;
    const u32 prefix = requests[HEADER_WORDS + words[ROW_REQUEST] * REQUEST_WORDS + REQUEST_PREFIX];
    const u32 head = words[ROW_POSITION] - prefix;
    if (head >= HEADS) return;
    const float* state = states + words[ROW_NODE] * HIDDEN;
    const u32 output = head * HIDDEN + element;
    float sum = 0.0f;
    for (u32 e = 8 * lane; e < HIDDEN; e += 256) {
        const Eight w = load_eight(WEIGHT, weight, (u64)output * HIDDEN + e);
#pragma unroll
        for (u32 i = 0; i < 8; i++) sum = fmaf(w.x[i], state[e + i], sum);
    }
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
    sum += bias[output];
    if (lane == 0) out[row * HIDDEN + element] = state[element] + sum / (1.0f + expf(-sum));
}
