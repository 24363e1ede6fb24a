// Partial results of tree attention: what warps, blocks of a cluster and chunks of a unit leave for whoever adds them up.
//
// Needs ptx, formats, pieces, chunks, accumulator. Expects HEAD_DIM, M, GROUPS, CLUSTER, CACHE.

constexpr u32 CONSUMERS = GROUPS * 128; // threads
constexpr u32 PARTS = CLUSTER * KEY_GROUPS * KEY_WARPS; // warps that have partial results of a row
constexpr u32 MOST_ROWS = PARTS == 1 ? 1 : (M + CLUSTER - 1) / CLUSTER; // that a block of the cluster finishes

constexpr u32 PIECES = HEAD_DIM / 8;

// Results of all warps of the cluster for the rows that this block finishes: every CLUSTER-th.
struct Parts {
    // Pieces, divided by the row's sum, then its {running maximum, sum, -, -}; padded against bank conflicts.
    uint4 rows[PARTS][MOST_ROWS][PIECES + 4];
};
constexpr u32 PART_BYTES = (PIECES + 1) * 16; // of a row

// This lane's piece number `n` of its i-th row.
__device__ __forceinline__ Piece piece_of(const Accumulator& acc, u32 i, u32 n) {
    Piece piece;
    piece.largest = acc.largest[i];
    piece.sum = acc.sum[i];
#pragma unroll
    for (u32 j = 0; j < 8; j++) piece.out.x[j] = acc.out[n * 4 + j / 2][2 * i + j % 2];
    return piece;
}

// Leaves a warp's partial results with the blocks that finish its rows; if those are several, they count on `received`.
__device__ __forceinline__ void leave_parts(const Accumulator& acc, Parts& parts, u64* received, u32 part, u32 first,
                                            u32 n_rows, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const u32 row = first + lane / 4 + 8 * i;
        if (row >= n_rows) continue;
        uint4* to = parts.rows[part][row / CLUSTER];
        const auto put = [&](u32 at, u32 a, u32 b, u32 c, u32 d) {
            if (CLUSTER == 1) to[at] = make_uint4(a, b, c, d);
            else send(to + at, make_uint4(a, b, c, d), received, row % CLUSTER);
        };
        const float inverse = acc.sum[i] > 0.0f ? reciprocal_approx(acc.sum[i]) : 0.0f;
#pragma unroll
        for (u32 n = 0; n < PIECES / 4; n++) {
            const Eight x = piece_of(acc, i, n).out;
            const auto pair = [&](u32 j) { return pack(x.x[2 * j] * inverse, x.x[2 * j + 1] * inverse); };
            put(n * 4 + lane % 4, pair(0), pair(1), pair(2), pair(3));
        }
        if (lane % 4 == 0) put(PIECES, __float_as_uint(acc.largest[i]), __float_as_uint(acc.sum[i]), 0, 0);
    }
}

// Threads that share a piece, each with some of its parts: neighbours, a power of two.
__device__ constexpr u32 least(u32 a, u32 b) { return a < b ? a : b; }
__device__ constexpr u32 power_of_two_upto(u32 n) { return n < 2 ? 1 : 2 * power_of_two_upto(n / 2); }
constexpr u32 SHARES = power_of_two_upto(least(least(CONSUMERS / (MOST_ROWS * PIECES), PARTS), 32));

// All warps' results of a piece of this block's row number `row`. Its threads call it together.
__device__ __forceinline__ Piece merge_parts(const Parts& parts, u32 row, u32 n, u32 lane) {
    const u32 together = (SHARES == 32 ? FULL_WARP : (1u << SHARES) - 1) << (lane & ~(SHARES - 1));
    Piece merged;
#pragma unroll
    for (u32 i = lane % SHARES; i < PARTS; i += SHARES) {
        merged.largest = fmaxf(merged.largest, __uint_as_float(parts.rows[i][row][PIECES].x));
    }
#pragma unroll
    for (u32 step = 1; step < SHARES; step *= 2) {
        merged.largest = fmaxf(merged.largest, __shfl_xor_sync(together, merged.largest, step));
    }
    const float base = merged.largest == NEVER ? 0.0f : merged.largest;
#pragma unroll 8
    for (u32 i = lane % SHARES; i < PARTS; i += SHARES) {
        const uint4 sums = parts.rows[i][row][PIECES];
        const Eight part = widen_eight(CACHE, parts.rows[i][row][n]);
        const float weight = __uint_as_float(sums.y) * exp2_approx(__uint_as_float(sums.x) - base);
        merged.sum += weight;
#pragma unroll
        for (u32 j = 0; j < 8; j++) merged.out.x[j] = fmaf(weight, part.x[j], merged.out.x[j]);
    }
#pragma unroll
    for (u32 step = 1; step < SHARES; step *= 2) {
        merged.sum += __shfl_xor_sync(together, merged.sum, step);
#pragma unroll
        for (u32 j = 0; j < 8; j++) merged.out.x[j] += __shfl_xor_sync(together, merged.out.x[j], step);
    }
    return merged;
}

// What a chunk leaves in the workspace: [M, PIECES] pieces of eight elements, then a maximum and a sum a row.
constexpr u32 PARTIAL = M * (HEAD_DIM + 2);

__device__ __forceinline__ void store_partial(float* partial, u32 row, u32 n, const Piece& piece) {
    float4* to = (float4*)(partial + (row * PIECES + n) * 8);
    const float* x = piece.out.x;
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
    if (n == 0) *(float2*)(partial + M * HEAD_DIM + row * 2) = make_float2(piece.largest, piece.sum);
}

__device__ __forceinline__ Piece load_partial(const float* partial, u32 row, u32 n) {
    const float4* from = (const float4*)(partial + (row * PIECES + n) * 8);
    const float4 a = __ldcg(from), b = __ldcg(from + 1);
    const float2 sums = __ldcg((const float2*)(partial + M * HEAD_DIM + row * 2));
    return {sums.x, sums.y, {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}}};
}
