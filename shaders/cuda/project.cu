// needs: ptx formats vectors wgmma matmul
// residual[r] += x[r] · weightᵀ, or without ADD just =

// constants-begin
constexpr u32 COLUMNS = 576; // elements of a row of x, columns of the weight
constexpr u32 WIDTH = 576; // elements of a row of the residual, rows of the weight
constexpr bool ADD = true;
constexpr u32 WEIGHT = 1; // format of the weight
constexpr bool NORMED = false; // x by its root mean square
constexpr float EPS = 0.0f; // of the norm
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

// Where a thread finishes no more than four outputs, it loads what they are added to early.
constexpr bool EARLY = ADD && ROWS / 4 * ((TOKENS + CLUSTER - 1) / CLUSTER) <= THREADS;

// Four neighbours of a token: the i-th of this block.
struct Four {
    u32 token;
    u32 row; // of the tile

    __device__ __forceinline__ Four(const Tile& tile, u32 i)
        : token(i / (ROWS / 4) * CLUSTER + tile.rank), row(i % (ROWS / 4) * 4) {}
};

// Blocks: CLUSTER * tiles of tokens * tiles of weight rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    project(const u32* requests, const float* x, const void* weight, float* residual) { // residual [rows, WIDTH]
    release_next();
    DYNAMIC_SHARED(shared);
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) { return min(tile.index * ROWS + row, WIDTH - 1); };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, nullptr, weight_row);
    wait_for_previous();
    if (tile.n_tokens == 0) return;

    const auto residual_row = [&](u32 token) { return residual + (tile.first_token + token) * WIDTH; };
    const Four first(tile, threadIdx.x);
    float4 early = {};
    if (EARLY && first.token < tile.n_tokens) {
        early = load_row4<WIDTH>(residual_row(first.token), tile.index * ROWS + first.row);
    }
    matmul.multiply(x, nullptr, weight_row);

    for (u32 i = threadIdx.x;; i += THREADS) {
        const Four four(tile, i);
        if (four.token >= tile.n_tokens) break;
        float* to = residual_row(four.token);
        const u32 at = tile.index * ROWS + four.row;
        float4 sum = matmul.total(four.token, four.row);
        if (ADD) sum = add4(EARLY ? early : load_row4<WIDTH>(to, at), sum);
        store_row4<WIDTH>(to, at, sum);
    }
    matmul.finish();
}
