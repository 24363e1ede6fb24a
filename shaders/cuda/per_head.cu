// needs: ptx formats vectors wgmma matmul
// out[r, h, ..WIDTH] = weight[h] · x[r, h]: each head has a matrix of its own.

// constants-begin
constexpr u32 COLUMNS = 128; // elements of a head of x, columns of the weight
constexpr u32 HEADS = 16;
constexpr u32 WIDTH = 512; // rows of a head's matrix
constexpr u32 STRIDE = 576; // elements of a head of the output
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

static_assert(STRIDE % 4 == 0 || WIDTH % 4 != 0, "where four neighbours are stored at once, they are aligned");

// A head of all rows.
struct Head {
    const float* x;
};

__device__ __forceinline__ const float* activations_of(Head head, u32 token) { return head.x + token * (HEADS * COLUMNS); }

// Blocks: [CLUSTER * tiles of tokens * tiles of weight rows of a head, HEADS].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    per_head(const u32* requests, const float* x, // [rows, HEADS, COLUMNS]
             const void* weight, // [HEADS, WIDTH, COLUMNS]
             float* out) { // [rows, HEADS, STRIDE]
    release_next();
    DYNAMIC_SHARED(shared);
    const u32 head = blockIdx.y;
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) { return head * WIDTH + min(tile.index * ROWS + row, WIDTH - 1); };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, nullptr, weight_row);
    wait_for_previous();
    if (tile.n_tokens == 0) return;
    matmul.multiply(Head{x + head * COLUMNS}, nullptr, weight_row);

    for (u32 i = threadIdx.x;; i += THREADS) {
        const u32 token = i / (ROWS / 4) * CLUSTER + tile.rank, row = i % (ROWS / 4) * 4;
        if (token >= tile.n_tokens) break;
        float* to = out + ((tile.first_token + token) * HEADS + head) * STRIDE;
        store_row4<WIDTH>(to, tile.index * ROWS + row, matmul.total(token, row));
    }
    matmul.finish();
}
