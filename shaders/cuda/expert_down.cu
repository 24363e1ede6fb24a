// needs: ptx formats vectors wgmma matmul experts
// out[entry] = x[entry] · weight[expert]ᵀ, for each entry of each expert.

// constants-begin
constexpr u32 COLUMNS = 1408; // elements of a row of x, columns of the weight
constexpr u32 WIDTH = 2048; // elements of a row of the output
constexpr u32 EXPERTS = 64;
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

// Blocks: [CLUSTER * tiles of weight rows, experts that may be chosen].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    expert_down(const u32* groups, const float* x, // [entries, COLUMNS]
                const void* weight, // [EXPERTS, WIDTH, COLUMNS]
                float* out) { // [entries, WIDTH]
    release_next();
    DYNAMIC_SHARED(shared);
    wait_for_previous();
    each_tile(shared, groups, [&](u32 expert, const Tile& tile, const u32* entries) {
        const void* of_expert = (const unsigned char*)weight + (u64)expert * (WIDTH * COLUMNS) * bytes_of(WEIGHT);
        const auto weight_row = [&](u32 row) { return min(tile.index * ROWS + row, WIDTH - 1); };
        Matmul matmul;
        matmul.begin(shared, tile, of_expert, nullptr, weight_row);
        __syncthreads();
        matmul.multiply(Gathered{x, entries}, nullptr, weight_row);

        for (u32 i = threadIdx.x;; i += THREADS) {
            const u32 token = i / (ROWS / 4) * CLUSTER + tile.rank, row = i % (ROWS / 4) * 4;
            if (token >= tile.n_tokens) break;
            store_row4<WIDTH>(out + entries[token] * WIDTH, tile.index * ROWS + row, matmul.total(token, row));
        }
        matmul.finish();
    });
}
