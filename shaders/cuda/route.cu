// needs: ptx layout best
// The CHOSEN experts of a row, by falling score plus bias, ties to the lowest, and what each counts for.
//
// One block takes a row, and a thread an expert. An expert's place is the number of those that are better, and so is a group's:
// nothing is searched for one after the other.

// constants-begin
constexpr u32 EXPERTS = 64;
constexpr u32 CHOSEN = 6;
constexpr u32 GROUPS = 1; // of equal size
constexpr u32 TOP_GROUPS = 1; // that experts are chosen from
constexpr bool TWO_LARGEST = false; // a group is worth the sum of its two best, not its best
constexpr bool SOFTMAX = true; // scores are a softmax over all experts, not sigmoids
constexpr bool BIAS = false; // added to the scores to choose by
constexpr bool NORMALISE = false; // scores of the chosen are divided by their sum
constexpr float SCALE = 1.0f; // of the weights
// constants-end

constexpr u32 WARPS = (EXPERTS + 31) / 32;
constexpr u32 THREADS = 32 * WARPS;
constexpr u32 GROUP = EXPERTS / GROUPS;

// By any order of a warp's lanes that is always the same.
template <class Combine>
__device__ __forceinline__ float of_block(float mine, float* shared, Combine combine) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) mine = combine(mine, __shfl_xor_sync(FULL_WARP, mine, lanes));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    float all = shared[0];
    for (u32 warp = 1; warp < WARPS; warp++) all = combine(all, shared[warp]);
    return all;
}

__device__ __forceinline__ u32 n_better(const u64* all, u32 n, u64 mine) {
    u32 better = 0;
#pragma unroll 8
    for (u32 i = 0; i < n; i++) better += all[i] > mine;
    return better;
}

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const u32* requests, const float* logits, // [rows, EXPERTS]
          const float* bias, // [EXPERTS]
          u32* experts, float* weights) { // [rows, CHOSEN]
    release_next();
    __shared__ float parts[2][WARPS];
    __shared__ float scores[EXPERTS]; // that experts are chosen by
    __shared__ u64 order[EXPERTS]; // the same; 0 for an expert of no group that is chosen from
    __shared__ u64 worths[GROUPS];
    __shared__ float of_chosen[CHOSEN];
    const u32 row = blockIdx.x, t = threadIdx.x;
    const bool is_expert = t < EXPERTS;
    wait_for_previous();
    if (row >= requests[0]) return;

    const float never = __uint_as_float(0xff800000u); // -infinity
    const float logit = is_expert ? logits[row * EXPERTS + t] : never;
    float score;
    if (SOFTMAX) {
        const float largest = of_block(logit, parts[0], [](float a, float b) { return fmaxf(a, b); });
        const float e = is_expert ? expf(logit - largest) : 0.0f;
        score = e / of_block(e, parts[1], [](float a, float b) { return a + b; });
    } else {
        score = 1.0f / (1.0f + expf(-logit));
    }
    const float ranked_by = BIAS && is_expert ? score + bias[t] : score;
    if (is_expert) scores[t] = ranked_by;
    __syncthreads();

    bool is_left = is_expert;
    if (TOP_GROUPS < GROUPS) {
        if (t < GROUPS) {
            float best = never, second = never;
            for (u32 i = 0; i < GROUP; i++) {
                const float of_member = scores[t * GROUP + i];
                second = fmaxf(second, fminf(best, of_member));
                best = fmaxf(best, of_member);
            }
            worths[t] = ranked(TWO_LARGEST ? best + second : best, t);
        }
        __syncthreads();
        is_left = is_expert && n_better(worths, GROUPS, worths[t / GROUP]) < TOP_GROUPS;
    }
    const u64 mine = is_left ? ranked(ranked_by, t) : 0;
    if (is_expert) order[t] = mine;
    __syncthreads();
    const u32 place = mine > 0 ? n_better(order, EXPERTS, mine) : EXPERTS;
    if (place < CHOSEN) {
        experts[row * CHOSEN + place] = t;
        of_chosen[place] = score;
    }
    __syncthreads();
    if (t < CHOSEN) {
        float total = 0.0f;
        for (u32 j = 0; j < CHOSEN; j++) total += of_chosen[j];
        weights[row * CHOSEN + t] = (NORMALISE ? of_chosen[t] / (total + 1e-20f) : of_chosen[t]) * SCALE;
    }
}
