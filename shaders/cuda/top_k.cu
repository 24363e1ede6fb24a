// needs: ptx layout best
// ids[r], values[r] = the K largest logits of row r, descending, ties to the lowest id.
//
// One block ranks one row. Thread t owns the tokens of groups t, t + THREADS, .. and finds its best. The TURN best
// tokens are among those of the TURN threads with the best bests, and no worse than the worst of these: they alone are
// looked at again, by the thread's whole warp, and what is found is ranked by counting what is better. Beyond TURN
// tokens, all this is done again for what comes after the last one taken.

// constants-begin
constexpr u32 VOCAB = 49152;
constexpr u32 K = 8;
// constants-end

constexpr u32 THREADS = 1024;
constexpr u32 GROUPS = (VOCAB + 3) / 4;
constexpr u32 OWNED = 4 * ((GROUPS + THREADS - 1) / THREADS); // tokens of a thread
constexpr u32 TURN = K < 4096 / OWNED ? K : 4096 / OWNED;
static_assert(TURN > 0 && TURN <= THREADS, "the tokens of a thread fit the list");

// NaN ranks below every number.
__device__ __forceinline__ u64 rank(float x, u32 token) { return token_with_key(is_nan(x) ? 0 : order_key(x), token); }

// Calls `see` for the four tokens of a group.
template <class See>
__device__ __forceinline__ void each_token(const float* row, u32 group, const See& see) {
    const float4 x = four_logits<VOCAB>(row, group);
    see(rank(x.x, 4 * group));
    if (4 * group + 1 < VOCAB) see(rank(x.y, 4 * group + 1));
    if (4 * group + 2 < VOCAB) see(rank(x.z, 4 * group + 2));
    if (4 * group + 3 < VOCAB) see(rank(x.w, 4 * group + 3));
}

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    top_k(const u32* requests, const float* logits, u32* ids, float* values) { // [rows, VOCAB], [rows, K], [rows, K]
    release_next();
    __shared__ u64 list[TURN * OWNED];
    __shared__ u32 n_list;
    __shared__ u64 last;

    const u32 row = blockIdx.x, t = threadIdx.x;
    wait_for_previous();
    if (row >= requests[0]) return;
    const float* x = logits + (u64)row * VOCAB;

    u64 taken = ~0ull; // all that are at least this good are taken
    for (u32 done = 0; done < K; done += TURN) {
        const u32 wanted = min(TURN, K - done);
        u64 mine = 0;
#pragma unroll 4
        for (u32 group = t; group < GROUPS; group += THREADS) {
            each_token(x, group, [&](u64 token) { mine = better(mine, token < taken ? token : 0); });
        }

        // The best that `wanted` threads reach; 0 if fewer have any token left.
        u64 bound = 0;
        for (u64 bit = 1ull << 63; bit > 0; bit >>= 1) {
            if (__syncthreads_count(mine >= (bound | bit)) >= (int)wanted) bound |= bit;
            // The lower half tells tied logits apart; mostly there are none.
            if (bit == 1ull << 32 && __syncthreads_count(mine >= bound) == (int)wanted) break;
        }

        if (t == 0) n_list = 0;
        __syncthreads();
        const u32 lane = t % 32;
        for (u32 left = __ballot_sync(FULL_WARP, mine > 0 && mine >= bound); left > 0; left &= left - 1) {
            const u32 owner = t - lane + __ffs(left) - 1;
            for (u32 group = owner + THREADS * lane; group < GROUPS; group += THREADS * 32) {
                each_token(x, group, [&](u64 token) {
                    if (token >= bound && token < taken) list[atomicAdd(&n_list, 1u)] = token;
                });
            }
        }
        __syncthreads();

        const u32 n = n_list;
        for (u32 i = t; i < n; i += THREADS) {
            const u64 token = list[i];
            u32 n_better = 0;
            for (u32 j = 0; j < n; j++) n_better += list[j] > token;
            if (n_better >= wanted) continue;
            ids[row * K + done + n_better] = ~(u32)token;
            values[row * K + done + n_better] = x[~(u32)token];
            if (n_better == wanted - 1) last = token;
        }
        __syncthreads();
        taken = last;
    }
}
