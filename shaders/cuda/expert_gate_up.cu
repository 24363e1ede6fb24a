// needs: ptx formats vectors wgmma matmul experts
// out[entry, i] = silu(g[i]) * u[i], where g and u are the halves of rms_norm(x[r]) · weight[expert]ᵀ: `gate_up` of each expert
// that row r chose, entry r * CHOSEN + j.
//
// A tile has eight gate rows, then the eight up rows that belong to them, and so on.

// constants-begin
constexpr u32 COLUMNS = 2048; // elements of a row of x, columns of the weight
constexpr u32 WIDTH = 1408; // elements of a row of the output
constexpr u32 EXPERTS = 64;
constexpr u32 CHOSEN = 6; // of a row
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

// Where the quotient by more than 2^126 is taken for 0, it is less than 1e-36.
__device__ __forceinline__ float silu(float g) { return __fdividef(g, 1.0f + expf(-g)); }

// Blocks: [CLUSTER * tiles of weight rows, experts that may be chosen].
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    expert_gate_up(const u32* groups, const float* x, const float* norm,
                   const void* weight, // [EXPERTS, 2 WIDTH, COLUMNS]
                   float* out) { // [entries, WIDTH]
    release_next();
    DYNAMIC_SHARED(shared);
    u32* x_rows = (u32*)(shared + MATMUL_BYTES) + TOKENS;
    wait_for_previous();
    each_tile(shared, groups, [&](u32 expert, const Tile& tile, const u32* entries) {
        const u32 first = tile.index * (ROWS / 2);
        const void* of_expert = (const unsigned char*)weight + (u64)expert * (2 * WIDTH * COLUMNS) * bytes_of(WEIGHT);
        const auto weight_row = [&](u32 row) {
            return min(first + row / 16 * 8 + row % 8, WIDTH - 1) + row / 8 % 2 * WIDTH;
        };
        Matmul matmul;
        matmul.begin(shared, tile, of_expert, norm, weight_row);
        for (u32 i = threadIdx.x; i < tile.n_tokens; i += THREADS) x_rows[i] = entries[i] / CHOSEN;
        __syncthreads();
        matmul.multiply(Gathered{x, x_rows}, norm, weight_row);

        for (u32 i = threadIdx.x;; i += THREADS) {
            const u32 token = i / (ROWS / 8) * CLUSTER + tile.rank, output = i % (ROWS / 8) * 4;
            if (token >= tile.n_tokens) break;
            const u32 row = output / 8 * 16 + output % 8;
            const float factor = matmul.inv_rms(token);
            const float4 g = mul4(matmul.total(token, row), factor), u = mul4(matmul.total(token, row + 8), factor);
            const float4 v = make_float4(silu(g.x) * u.x, silu(g.y) * u.y, silu(g.z) * u.z, silu(g.w) * u.w);
            store_row4<WIDTH>(out + entries[token] * WIDTH, first + output, v);
        }
        matmul.finish();
    });
}
