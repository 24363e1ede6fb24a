// needs: ptx layout formats rope vectors wgmma matmul
// Of each head of rms_norm(x[r]) · weightᵀ, the first NOPE elements as they are, and the last ROTATED turned by the row's
// position, to the end of the head's query.
//
// As in `qkv` outputs come in pairs, those of the first half and of the second of what is turned, or of what is not. A tile has the
// first elements of eight pairs, then their second ones, and so on. Of a head, the pairs that are turned come first.

// constants-begin
constexpr u32 COLUMNS = 2048; // elements of a row of x, columns of the weight
constexpr u32 HEADS = 16;
constexpr u32 NOPE = 128; // elements of a head
constexpr u32 ROTATED = 64;
constexpr u32 QUERY = 576; // elements of a head of q
constexpr u32 POSITIONS = 2048; // that the rope table has
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

constexpr u32 HALF = ROTATED / 2;
constexpr u32 HEAD_PAIRS = (NOPE + ROTATED) / 2;
constexpr u32 PAIRS = HEADS * HEAD_PAIRS;
constexpr u32 TILE_PAIRS = ROWS / 2;
static_assert(NOPE % 8 == 0 && ROTATED % 8 == 0, "four neighbouring pairs stay together");

// Blocks: CLUSTER * tiles of tokens * tiles of weight rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    latent_queries(const u32* rows, const u32* requests, const float* x, const float* norm,
                   const void* weight, // [HEADS, NOPE + ROTATED, COLUMNS]
                   const float* rope, // [POSITIONS, HALF, 2]: cos, sin
                   float* nope, float* q) { // [rows, HEADS, NOPE], [rows, HEADS, QUERY]
    release_next();
    DYNAMIC_SHARED(shared);
    const Tile tile = tile_of_block(requests);
    const auto weight_row = [&](u32 row) {
        const u32 pair = min(tile.index * TILE_PAIRS + row / 16 * 8 + row % 8, PAIRS - 1), of_head = pair % HEAD_PAIRS;
        const u32 element = of_head < HALF ? NOPE + of_head : of_head - HALF, is_second = row / 8 % 2;
        return pair / HEAD_PAIRS * (NOPE + ROTATED) + element + is_second * (of_head < HALF ? HALF : NOPE / 2);
    };
    Matmul matmul;
    if (TOKEN_TILES == 1 || tile.n_tokens > 0) matmul.begin(shared, tile, weight, norm, weight_row);
    wait_for_previous();
    if (tile.n_tokens == 0) return;
    matmul.multiply(x, norm, weight_row);

    for (u32 i = threadIdx.x;; i += THREADS) {
        const u32 token = i / (TILE_PAIRS / 4) * CLUSTER + tile.rank, of_tile = i % (TILE_PAIRS / 4) * 4;
        if (token >= tile.n_tokens) break;
        const u32 pair = tile.index * TILE_PAIRS + of_tile, of_head = pair % HEAD_PAIRS;
        if (pair >= PAIRS) continue;
        const u32 r = tile.first_token + token, head = r * HEADS + pair / HEAD_PAIRS, row = of_tile / 8 * 16 + of_tile % 8;
        const float factor = matmul.inv_rms(token);
        const Pairs y = {mul4(matmul.total(token, row), factor), mul4(matmul.total(token, row + 8), factor)};
        if (of_head < HALF) {
            const Pairs turned = turn(y, load_turn<HALF>(rope, rows[r * ROW_WORDS + ROW_POSITION], of_head));
            float* to = q + head * QUERY + QUERY - ROTATED + of_head;
            *(float4*)to = turned.first;
            *(float4*)(to + HALF) = turned.second;
        } else {
            float* to = nope + head * NOPE + of_head - HALF;
            *(float4*)to = y.first;
            *(float4*)(to + NOPE / 2) = y.second;
        }
    }
    matmul.finish();
}
