// needs: ptx layout formats batch philox best score vectors wgmma matmul
// logits[r] = rms_norm(x[r]) · weightᵀ, and what `draw` or `top_k` needs of them.
//
// Where a draw follows, each tile leaves the best of its tokens for each row (CANDIDATES), noise included. The logits
// themselves are then written only for requests that filter them, or where others read them (KEEP_LOGITS). Where a top-k
// follows, the best of each RANKED tokens are left, and all logits, perturbed if `perturb` stands between (PERTURBED).

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row of x, columns of the weight
constexpr u32 WIDTH = 49152; // elements of a row of the logits: the vocabulary
constexpr u32 WEIGHT = 1; // format of the weight
constexpr bool NORMED = true; // x by its root mean square
constexpr float EPS = 1e-5f; // of the norm
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
constexpr u32 CANDIDATES = 0; // that are left of each row, or 0
constexpr bool KEEP_LOGITS = true;
constexpr u32 RANKED = 0; // tokens that one for a top-k is the best of; 0: a tile's, for a draw
constexpr bool PERTURBED = false; // logits with the noise of their row's draw
// constants-end

// How a row's token will be drawn.
struct Draw {
    Noise noise;
    bool needs_all_logits;
};

// Blocks: CLUSTER * tiles of tokens * tiles of weight rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    head(const u32* rows, const u32* requests,
         const float* x, // [rows, COLUMNS]
         const float* norm, // [COLUMNS]
         const void* weight, // [WIDTH, COLUMNS]
         float* logits, // [rows, WIDTH]
         u64* candidates) { // [rows, CANDIDATES]
    release_next();
    DYNAMIC_SHARED(shared);
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) { return min(tile.index * ROWS + row, WIDTH - 1); };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, norm, weight_row);
    Draw* draws = (Draw*)(shared + MATMUL_BYTES);
    for (u32 token = threadIdx.x; CANDIDATES > 0 && token < tile.n_tokens; token += THREADS) {
        const u32* row = rows + (tile.first_token + token) * ROW_WORDS;
        const Request request = read_request(requests, row[ROW_REQUEST]);
        draws[token] = {noise_of(request, row[ROW_POSITION]), needs_all_logits(request)};
    }
    wait_for_previous();
    if (tile.n_tokens == 0) return;
    matmul.multiply(x, norm, weight_row);

    // A warp finishes a token.
    for (u32 token = threadIdx.x / 32 * CLUSTER + tile.rank; token < tile.n_tokens; token += THREADS / 32 * CLUSTER) {
        const float factor = matmul.inv_rms(token);
        float* row_logits = logits + (u64)(tile.first_token + token) * WIDTH;
        const bool is_kept = CANDIDATES == 0 || KEEP_LOGITS || draws[token].needs_all_logits;
        u64* row_candidates = candidates + (u64)(tile.first_token + token) * CANDIDATES;
        u64 best = 0;
        for (u32 first = 0; first < ROWS; first += 32 * 4) {
            const u32 row = first + threadIdx.x % 32 * 4, at = tile.index * ROWS + row;
            const bool is_here = row < ROWS && at < WIDTH;
            float4 v = {};
            if (is_here) {
                v = mul4(matmul.total(token, row), factor);
                if (PERTURBED) v = perturbed(v, at / 4, draws[token].noise);
                if (is_kept) store_row4<WIDTH>(row_logits, at, v);
            }
            const float four[4] = {v.x, v.y, v.z, v.w};
            if (RANKED > 0) {
                const u64 of_ranked = best_of_lanes<(RANKED + 3) / 4>(is_here ? best_ranked(four, at, WIDTH) : 0);
                if (is_here && at % RANKED == 0) row_candidates[at / RANKED] = of_ranked;
            } else if (CANDIDATES > 0 && is_here) {
                best = better(best, best_candidate(four, at / 4, WIDTH, draws[token].noise));
            }
        }
        if (CANDIDATES == 0 || RANKED > 0) continue;
        best = best_of_warp(best);
        if (threadIdx.x % 32 == 0) row_candidates[tile.index] = best;
    }
    matmul.finish();
}
