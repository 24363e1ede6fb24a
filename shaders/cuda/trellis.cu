// needs: ptx layout batch formats
// The trellis of a block: how likely each candidate of a depth is accepted behind each candidate of the depth before.
//
//     score(i, j)  = scores[depth][j] + W2[ids[depth][j]] · W1[ids[depth - 1][i]] / temperature
//     first child  : sigmoid of the confidence, or its softmax share where there is no confidence head
//     the others   : what that leaves, shared as in the softmax, times a factor of the depth
//
// A parent's children are written by falling probability, with the candidates that they are; ties go to the lower one.
// Behind the root there is one parent, the last committed token. One block takes some parents of one depth of one
// request. As runtime/src/draft/dspark.rs, which explains it.

// constants-begin
constexpr u32 K = 64; // candidates of a depth
constexpr u32 RANK = 64; // of the Markov head; 0: there is none
constexpr u32 HIDDEN = 576;
constexpr u32 ROWS = 7; // of a block
constexpr u32 FIRST = 0; // row of a block that predicts depth 1
constexpr u32 WEIGHT = 1; // format of W1 and W2
constexpr bool CONFIDENCE = true;
// constants-end

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 PARENTS = 8; // of a block
constexpr u32 DEPTH = ROWS - FIRST;
constexpr u32 CHUNK = 64; // elements of W1 and W2 that are in shared memory
constexpr u32 STRIDE = CHUNK + 1;
constexpr u32 OWNED = (PARENTS * K + THREADS - 1) / THREADS; // scores of a thread
static_assert(K <= 64, "a warp's lane has two candidates");

// Rows `token_of(0) .. token_of(n - 1)` of a matrix, elements first .. first + CHUNK.
template <class TokenOf>
__device__ __forceinline__ void load_rows(float* to, const void* matrix, u32 n, u32 first, const TokenOf& token_of) {
    for (u32 i = threadIdx.x; i < n * (CHUNK / 8); i += THREADS) {
        const u32 row = i / (CHUNK / 8), at = i % (CHUNK / 8) * 8;
        Eight eight = {};
        if (first + at < RANK) eight = load_eight(WEIGHT, matrix, (u64)token_of(row) * RANK + first + at);
#pragma unroll
        for (u32 j = 0; j < 8; j++) to[row * STRIDE + at + j] = eight.x[j];
    }
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(FULL_WARP, x, lanes);
    return x;
}

// Blocks: [parents of a depth / PARENTS, DEPTH, requests].
extern "C" __global__ void __launch_bounds__(THREADS)
    trellis(const u32* rows, const u32* requests, const u32* ids, const float* scores, // [rows, K]
            const float* hidden, // [rows, HIDDEN]
            const void* w1, const void* w2, // [tokens, RANK]
            const float* confidence, // HIDDEN + RANK weights, the bias, of each depth: inverse temperature, factor
            float* out, u32* order) { // [requests * DEPTH, K, K]
    release_next();
    __shared__ float first_rows[PARENTS * STRIDE]; // of W1
    __shared__ float second_rows[K * STRIDE]; // of W2
    __shared__ float table[PARENTS * K];
    __shared__ float parent_confidence[PARENTS];

    const u32 t = threadIdx.x, lane = t % 32, warp = t / 32;
    const u32 depth = blockIdx.y, request = blockIdx.z, first_parent = blockIdx.x * PARENTS;
    wait_for_previous();
    if (request >= requests[1]) return;
    const Request batch = read_request(requests, request);
    if (batch.n_rows == 0) return;
    const u32 row = batch.first_row + FIRST + depth;
    const u32 n_parents = depth == 0 ? 1 : K;
    if (first_parent >= n_parents) return;
    const u32 n_here = min(PARENTS, n_parents - first_parent);
    const auto parent = [&](u32 i) {
        return depth == 0 ? rows[batch.first_row * ROW_WORDS + ROW_TOKEN] : ids[(row - 1) * K + first_parent + i];
    };
    const float inverse_temperature = batch.temperature > 0.0f ? 1.0f / batch.temperature : 1.0f;

    // A thread's scores, and on the way what the confidence head reads of W1.
    float bias[OWNED] = {}, read[(PARENTS + WARPS - 1) / WARPS] = {};
    for (u32 first = 0; first < RANK; first += CHUNK) {
        __syncthreads();
        load_rows(first_rows, w1, n_here, first, parent);
        load_rows(second_rows, w2, K, first, [&](u32 j) { return ids[row * K + j]; });
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < OWNED; n++) {
            const u32 i = (t + n * THREADS) / K, j = (t + n * THREADS) % K;
            if (i >= n_here) break;
            for (u32 e = 0; e < CHUNK; e++) bias[n] = fmaf(first_rows[i * STRIDE + e], second_rows[j * STRIDE + e], bias[n]);
        }
        if (CONFIDENCE) {
            for (u32 i = warp, n = 0; i < n_here; i += WARPS, n++) {
                for (u32 e = lane; e < CHUNK && first + e < RANK; e += 32) {
                    read[n] = fmaf(first_rows[i * STRIDE + e], confidence[HIDDEN + first + e], read[n]);
                }
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < OWNED; n++) {
        const u32 at = t + n * THREADS;
        if (at / K < n_here) table[at] = fmaf(bias[n], inverse_temperature, scores[row * K + at % K]);
    }
    if (CONFIDENCE) {
        float mine = 0.0f;
        for (u32 e = lane; e < HIDDEN; e += 32) mine = fmaf(hidden[(u64)row * HIDDEN + e], confidence[e], mine);
        for (u32 i = warp, n = 0; i < n_here; i += WARPS, n++) {
            const float logit = sum_of_warp(mine + read[n]) + confidence[HIDDEN + RANK];
            const float scaled = logit * confidence[HIDDEN + RANK + 1 + 2 * depth];
            if (lane == 0) parent_confidence[i] = 1.0f / (1.0f + expf(-scaled));
        }
    }
    __syncthreads();

    const float never = __uint_as_float(0xff800000u); // -infinity
    for (u32 i = warp; i < n_here; i += WARPS) {
        const float a = lane < K ? table[i * K + lane] : never, b = lane + 32 < K ? table[i * K + lane + 32] : never;
        float largest = fmaxf(a, b);
#pragma unroll
        for (u32 lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, lanes));
        // Ties go to the candidate that comes first.
        const u32 is_a = __ballot_sync(FULL_WARP, a == largest), is_b = __ballot_sync(FULL_WARP, b == largest);
        const u32 best = is_a ? __ffs(is_a) - 1 : __ffs(is_b) + 31;
        const float wa = lane < K ? expf(a - largest) : 0.0f, wb = lane + 32 < K ? expf(b - largest) : 0.0f;
        const float rest = sum_of_warp((lane == best ? 0.0f : wa) + (lane + 32 == best ? 0.0f : wb));
        const float first = CONFIDENCE ? parent_confidence[i] : 1.0f / (1.0f + rest);
        const float factor = CONFIDENCE ? confidence[HIDDEN + RANK + 2 + 2 * depth] : 1.0f;
        const float share = rest > 0.0f ? factor * (1.0f - first) / rest : 0.0f;
        const float p = lane == best ? first : wa * share, q = lane + 32 == best ? first : wb * share;
        if (lane < K) table[i * K + lane] = p;
        if (lane + 32 < K) table[i * K + lane + 32] = q;
        __syncwarp();
        u32 before_p = 0, before_q = 0;
        for (u32 j = 0; j < K; j++) {
            const float other = table[i * K + j];
            before_p += other > p || (other == p && j < lane);
            before_q += other > q || (other == q && j < lane + 32);
        }
        const u64 at = ((u64)(request * DEPTH + depth) * K + first_parent + i) * K;
        if (lane < K) out[at + before_p] = p, order[at + before_p] = lane;
        if (lane + 32 < K) out[at + before_q] = q, order[at + before_q] = lane + 32;
    }
}
