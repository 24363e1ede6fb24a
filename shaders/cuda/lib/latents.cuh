// Partial results of attention to latents: what the chunks of a unit leave for `merge_latents`.
//
// Needs ptx, formats, pieces. Expects M, LATENT, CACHE.

constexpr u32 PIECES = LATENT / 8;
// 16-byte words of a chunk in the workspace: all rows' pieces in the cache's format, divided by the row's sum, then of each row
// {base, sum}. Weights are 2^(score - base).
constexpr u32 PARTIAL = M * PIECES + M / 2;

// What the lanes of a warp have at a time lies together.
__device__ __forceinline__ u32 partial_place(u32 row, u32 piece) { return (piece / 4 * M + row) * 4 + piece % 4; }

__device__ __forceinline__ Piece load_piece(const uint4* partial, u32 row, u32 n) {
    const float2 sums = __ldcg((const float2*)(partial + M * PIECES) + row);
    Piece piece = {sums.x, sums.y, widen_eight(CACHE, __ldcg(partial + partial_place(row, n)))};
#pragma unroll
    for (u32 i = 0; i < 8; i++) piece.out.x[i] *= piece.sum;
    return piece;
}
