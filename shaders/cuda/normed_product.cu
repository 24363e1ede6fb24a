// needs: ptx formats vectors wgmma matmul
// y[r] = rms_norm(x[r]) · weightᵀ: the first FIRST outputs of a row in one place, the others in another. What `latent` and
// `route` go on with.

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row of x, columns of the weight
constexpr u32 WIDTH = 576; // rows of the weight
constexpr u32 FIRST = 0;
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
// constants-end

static_assert(FIRST % 4 == 0, "four neighbours stay together");

// Blocks: CLUSTER * tiles of tokens * tiles of weight rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    normed_product(const u32* requests, const float* x, const float* norm, const void* weight,
                   float* first, // [rows, FIRST]
                   float* others) { // [rows, WIDTH - FIRST]
    release_next();
    DYNAMIC_SHARED(shared);
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) { return min(tile.index * ROWS + row, WIDTH - 1); };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, norm, weight_row);
    wait_for_previous();
    if (tile.n_tokens == 0) return;
    matmul.multiply(x, norm, weight_row);

    for (u32 i = threadIdx.x;; i += THREADS) {
        const u32 token = i / (ROWS / 4) * CLUSTER + tile.rank, row = i % (ROWS / 4) * 4;
        if (token >= tile.n_tokens) break;
        const u32 r = tile.first_token + token, at = tile.index * ROWS + row;
        const float4 y = mul4(matmul.total(token, row), matmul.inv_rms(token));
        if (at < FIRST) store_row4<FIRST>(first + r * FIRST, at, y);
        else store_row4<WIDTH - FIRST>(others + r * (WIDTH - FIRST), at - FIRST, y);
    }
    matmul.finish();
}
