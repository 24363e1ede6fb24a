// needs: ptx layout formats paged rope vectors wgmma matmul
// q, k, v = rms_norm(x[r]) · weightᵀ + bias; q and k heads normed and turned by their position; k and v cached.
//
// Rope turns elements i and i + D/2 of a head together: such a *pair* of outputs. A tile has the first elements of
// eight pairs, then their second ones, and so on; where heads are normed, all pairs of whole heads. Pairs are finished
// four neighbours at a time.

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row of x, columns of the weight
constexpr u32 HEAD_DIM = 64;
constexpr u32 HEADS = 9; // query heads
constexpr u32 KV_HEADS = 3;
constexpr u32 POSITIONS = 2048; // that the rope table has
constexpr u32 WEIGHT = 1; // format of the weight
constexpr bool NORMED = true; // x by its root mean square
constexpr float EPS = 1e-5f; // of the norms
constexpr u32 CACHE = 1; // format of the cache
constexpr u32 PAGE_SIZE = 16;
constexpr u32 PAGES_PER_REQUEST = 128;
constexpr bool TILED = true;
constexpr bool BIAS = false;
constexpr bool Q_NORM = false;
constexpr bool K_NORM = false;
constexpr u32 TILE_PAIRS = 8; // of a tile
constexpr u32 TOKENS = 16; // of a tile
constexpr u32 TOKEN_TILES = 1;
constexpr u32 ROW_TILES = 2; // of eight weight rows, of a warp
constexpr u32 WARPS_M = 1; // warps along the weight rows
constexpr u32 WARPS_K = 9; // warps along the columns
constexpr u32 CLUSTER = 1; // blocks along the columns
constexpr u32 AHEAD = 1; // steps whose activations are loaded ahead
constexpr u32 DEPTH = 1; // steps whose weights are requested ahead
constexpr bool SPLIT = true; // sums of their own for the halves of the activations
constexpr bool WGMMA = false; // products by groups of four warps
constexpr u32 BLOCKS = 2; // that a multiprocessor has room for
constexpr u32 SHARED_BYTES = 57344;
// constants-end

constexpr u32 HALF = HEAD_DIM / 2;
constexpr u32 PAIRS = (HEADS + 2 * KV_HEADS) * HALF;

// A head that is normed is finished by neighbouring lanes of one warp, a power of two.
constexpr bool HEAD_NORM = Q_NORM || K_NORM;
__device__ constexpr u32 power_of_two(u32 n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
constexpr u32 GROUP = HEAD_NORM ? HALF / 4 : TILE_PAIRS / 4; // fours that are finished together
constexpr u32 GROUP_LANES = HEAD_NORM ? power_of_two(GROUP) : GROUP;
constexpr u32 GROUPS = TILE_PAIRS / 4 / GROUP; // of a tile
// Where a thread finishes no more than one four, it loads what that needs early.
constexpr bool EARLY = GROUPS * GROUP_LANES * ((TOKENS + CLUSTER - 1) / CLUSTER) <= THREADS;

__device__ __forceinline__ float4 scale(float4 v, float4 gamma, float factor) {
    const float4 by = mul4(gamma, factor);
    return make_float4(v.x * by.x, v.y * by.y, v.z * by.z, v.w * by.w);
}

// Where the vectors of a token go.
struct Place {
    u32 position;
    u32 page;
    u32 slot;
};

// Four neighbouring pairs of a token: the i-th of this block.
struct Four {
    u32 token;
    u32 pair; // of the tile
    u32 head;
    u32 d; // element of the head
    bool is_token; // that the pass has
    bool is_mine; // and a pair that the tile has

    __device__ __forceinline__ Four(const Tile& tile, u32 i) {
        token = i / (GROUPS * GROUP_LANES) * CLUSTER + tile.rank;
        is_token = token < tile.n_tokens;
        token = min(token, tile.n_tokens - 1);
        pair = (i / GROUP_LANES % GROUPS * GROUP + min(i % GROUP_LANES, GROUP - 1)) * 4;
        const u32 of_all = tile.index * TILE_PAIRS + pair;
        is_mine = is_token && i % GROUP_LANES < GROUP && of_all < PAIRS;
        head = min(of_all, PAIRS - 1) / HALF;
        d = of_all % HALF;
    }
};

__device__ __forceinline__ Pairs load_pairs(const float* at) {
    return {*(const float4*)at, *(const float4*)(at + HALF)};
}

__device__ __forceinline__ void store_pairs(float* at, Pairs pairs) {
    *(float4*)at = pairs.first;
    *(float4*)(at + HALF) = pairs.second;
}

// Blocks: CLUSTER * tiles of tokens * tiles of weight rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    qkv(const u32* rows, // [rows, ROW_WORDS]
        const u32* requests, const u32* pages,
        const float* x, // [rows, COLUMNS]
        const float* norm, // [COLUMNS]
        const void* weight, // [HEADS + 2 KV_HEADS, HEAD_DIM, COLUMNS]
        const float* bias, // [HEADS + 2 KV_HEADS, HEAD_DIM]
        const float* q_norm, const float* k_norm, // [HEAD_DIM]
        const float* rope, // [POSITIONS, HALF, 2]: cos, sin
        float* q, // [rows, HEADS, HEAD_DIM]
        void* k_cache, void* v_cache) { // one layer
    release_next();
    DYNAMIC_SHARED(shared);
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) {
        const u32 pair = min(tile.index * TILE_PAIRS + row / 16 * 8 + row % 8, PAIRS - 1);
        return pair / HALF * HEAD_DIM + pair % HALF + row / 8 % 2 * HALF;
    };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, norm, weight_row);
    Place* places = (Place*)(shared + MATMUL_BYTES);
    for (u32 token = threadIdx.x; token < tile.n_tokens; token += THREADS) {
        const u32* row = rows + (tile.first_token + token) * ROW_WORDS;
        const u32 request = row[ROW_REQUEST];
        const u32 slot = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX] + row[ROW_NODE];
        const u32 page = pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE];
        places[token] = {row[ROW_POSITION], page, slot % PAGE_SIZE};
    }
    const Four first(tile, threadIdx.x);
    Pairs early_turn = {};
    if (EARLY && first.is_mine && first.head < HEADS + KV_HEADS) {
        early_turn = load_turn<HALF>(rope, rows[(tile.first_token + first.token) * ROW_WORDS + ROW_POSITION], first.d);
    }
    wait_for_previous();
    if (tile.n_tokens == 0) return;
    matmul.multiply(x, norm, weight_row);

    // Lanes of a warp stay together, because they add up the squares of a head.
    for (u32 i = threadIdx.x; Four(tile, i / 32 * 32).is_token; i += THREADS) {
        const Four four = EARLY ? first : Four(tile, i);
        const u32 row = four.pair / 8 * 16 + four.pair % 8;
        const float factor = matmul.inv_rms(four.token);
        Pairs v = {mul4(matmul.total(four.token, row), factor), mul4(matmul.total(four.token, row + 8), factor)};
        if (BIAS) {
            const Pairs b = load_pairs(bias + four.head * HEAD_DIM + four.d);
            v = {add4(v.first, b.first), add4(v.second, b.second)};
        }
        if (HEAD_NORM) {
            float squares = i % GROUP_LANES < GROUP ? add_squares(v.second, add_squares(v.first, 0.0f)) : 0.0f;
#pragma unroll
            for (u32 lanes = GROUP_LANES / 2; lanes > 0; lanes /= 2) {
                squares += __shfl_xor_sync(FULL_WARP, squares, lanes);
            }
            if (four.head < HEADS ? Q_NORM : K_NORM && four.head < HEADS + KV_HEADS) {
                const float head_factor = 1.0f / sqrtf(squares / HEAD_DIM + EPS);
                const Pairs gamma = load_pairs((four.head < HEADS ? q_norm : k_norm) + four.d);
                v = {scale(v.first, gamma.first, head_factor), scale(v.second, gamma.second, head_factor)};
            }
        }
        if (!four.is_mine) continue;
        const Place place = places[four.token];
        const bool is_turned = four.head < HEADS + KV_HEADS;
        if (is_turned) v = turn(v, EARLY ? early_turn : load_turn<HALF>(rope, place.position, four.d));
        if (four.head < HEADS) {
            store_pairs(q + ((tile.first_token + four.token) * HEADS + four.head) * HEAD_DIM + four.d, v);
        } else {
            void* cache = is_turned ? k_cache : v_cache;
            const u64 block = cache_block(place.page, (four.head - HEADS) % KV_HEADS);
            store_cached(cache, block, place.slot, four.d, v.first);
            store_cached(cache, block, place.slot, four.d + HALF, v.second);
        }
    }
    matmul.finish();
}
