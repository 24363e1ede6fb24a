// needs: ptx layout best
// ids[r], values[r] = the K largest logits of row r, descending, ties to the lowest id.
//
// One block ranks one row. Thread t owns tiles t, t + THREADS, .. of the tokens and knows their best; where the head left
// the best of each tile, without reading the row. The K best tokens are among those of the K threads with the best bests,
// and no worse than the worst of these: they alone are looked at, each by a warp, and what is found is ranked by counting
// what is better. Where that is more than the list holds (near neighbours are all good), fewer are taken at once.

// constants-begin
constexpr u32 VOCAB = 49152;
constexpr u32 K = 8;
constexpr u32 CANDIDATES = 0; // tiles of which the head leaves each row's best, or 0
constexpr u32 TILE = 4; // tokens of a tile
// constants-end

constexpr u32 THREADS = 1024;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 GROUPS = (VOCAB + 3) / 4;
constexpr u32 TILES = (VOCAB + TILE - 1) / TILE;
constexpr u32 OWNED = TILE * ((TILES + THREADS - 1) / THREADS); // tokens of a thread
constexpr u32 LIST = 2048;
static_assert(OWNED <= LIST && K <= THREADS, "the tokens of a thread fit the list");
static_assert(TILE % 4 == 0 && (CANDIDATES == 0 || CANDIDATES == TILES), "tiles are whole groups");

// Calls `see` for the four tokens of a group.
template <class See>
__device__ __forceinline__ void each_token(const float* row, u32 group, const See& see) {
    const float4 x = four_logits<VOCAB>(row, group);
    see(ranked(x.x, 4 * group));
    if (4 * group + 1 < VOCAB) see(ranked(x.y, 4 * group + 1));
    if (4 * group + 2 < VOCAB) see(ranked(x.z, 4 * group + 2));
    if (4 * group + 3 < VOCAB) see(ranked(x.w, 4 * group + 3));
}

// The i-th group of a thread's tiles; past the end GROUPS or more.
__device__ __forceinline__ u32 group_of(u32 owner, u32 i) {
    return (owner + i / (TILE / 4) * THREADS) * (TILE / 4) + i % (TILE / 4);
}

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    top_k(const u32* requests, const float* logits, // [rows, VOCAB]
          const u64* candidates, // [rows, CANDIDATES]
          u32* ids, float* values) { // [rows, K]
    release_next();
    __shared__ u64 list[LIST];
    __shared__ u32 n_list, n_owners, owners[THREADS];
    __shared__ u64 last;

    const u32 row = blockIdx.x, t = threadIdx.x;
    wait_for_previous();
    if (row >= requests[0]) return;
    const float* x = logits + (u64)row * VOCAB;

    u64 taken = ~0ull; // all that are at least this good are taken
    for (u32 done = 0, wanted = K; done < K; done += wanted, wanted = K - done, taken = last) {
        u64 mine = 0;
        if (CANDIDATES > 0 && done == 0) {
            for (u32 tile = t; tile < CANDIDATES; tile += THREADS) mine = better(mine, candidates[(u64)row * CANDIDATES + tile]);
        } else {
#pragma unroll 4
            for (u32 i = 0; i < OWNED / 4; i++) {
                const u32 group = group_of(t, i);
                if (group >= GROUPS) break;
                each_token(x, group, [&](u64 token) { mine = better(mine, token < taken ? token : 0); });
            }
        }
        for (;; wanted /= 2) {
            // What `wanted` threads reach; 0 if fewer have any token left. Once no more do, lower bits are of no use.
            u64 bound = 0;
            for (u64 bit = 1ull << 63; bit > 0; bit >>= 1) {
                const u32 reach = __syncthreads_count(mine >= (bound | bit));
                if (reach >= wanted) bound |= bit;
                if (reach == wanted) break;
            }
            if (t == 0) n_list = n_owners = 0;
            __syncthreads();
            if (mine > 0 && mine >= bound) owners[atomicAdd(&n_owners, 1u)] = t;
            __syncthreads();
            for (u32 at = t / 32; at < n_owners; at += WARPS) {
                for (u32 i = t % 32; i < OWNED / 4; i += 32) {
                    const u32 group = group_of(owners[at], i);
                    if (group >= GROUPS) continue;
                    each_token(x, group, [&](u64 token) {
                        if (token < bound || token >= taken) return;
                        const u32 place = atomicAdd(&n_list, 1u);
                        if (place < LIST) list[place] = token;
                    });
                }
            }
            __syncthreads();
            if (n_list <= LIST) break;
        }
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
    }
}
