// A warp's rows of tree attention: scores, softmax and output, on tensor cores.
//
// A *group* of four warps has up to 64 rows. Where it has fewer, its warps share the keys of a tile.
//
// Needs ptx, formats, pieces, wgmma, layout, chunks, tiles. Expects HEAD_DIM, KV_HEADS, GROUP, M, GROUPS, WGMMA, CACHE, SCALE.

constexpr u32 HEADS = KV_HEADS * GROUP;
constexpr u32 ROW_GROUPS = (M + 63) / 64; // groups that share a tile
constexpr u32 KEY_GROUPS = GROUPS / ROW_GROUPS; // that take tiles in turn
constexpr u32 ROW_WARPS = M / ROW_GROUPS / 16;
constexpr u32 KEY_WARPS = 4 / ROW_WARPS;
constexpr u32 WARP_KEYS = TILE / KEY_WARPS; // of a tile
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ void mma(float d[4], const u32 a[4], u32 b0, u32 b1) {
    if (CACHE == 1) mma_bf16(d, a, b0, b1);
    else mma_f16(d, a, b0, b1);
}

__device__ __forceinline__ u32 pack(float low, float high) { return narrow_pair(CACHE, low, high); }

// A warp's 16 rows of a unit, two a lane: rows lane / 4 and lane / 4 + 8.
struct Accumulator {
    u32 q[HEAD_DIM / 16][4];
    float out[HEAD_DIM / 8][4];
    float largest[2];
    float sum[2]; // this lane's columns only
    float rescale[2]; // of what was added before the latest tile

    __device__ void clear() {
#pragma unroll
        for (u32 d = 0; d < HEAD_DIM / 8; d++)
            for (u32 i = 0; i < 4; i++) out[d][i] = 0.0f;
        for (u32 i = 0; i < 2; i++) largest[i] = NEVER, sum[i] = 0.0f;
    }

    // Rows past the end are computed like the last one, and not written.
    __device__ void load_queries(const float* q_rows, const Request& request, u32 head, u32 first, u32 lane) {
        const u32 last = request.n_rows * GROUP - 1;
        const float* from[2];
        for (u32 i = 0; i < 2; i++) {
            const u32 row = min(first + lane / 4 + 8 * i, last);
            from[i] = q_rows + ((u64)(request.first_row + row / GROUP) * HEADS + head * GROUP + row % GROUP) * HEAD_DIM;
        }
        // A lane loads four neighbours. The tensor cores want two of them, and two others eight further on.
        float4 four[HEAD_DIM / 16][2];
#pragma unroll
        for (u32 kk = 0; kk < HEAD_DIM / 16; kk++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) four[kk][i] = *(const float4*)(from[i] + kk * 16 + lane % 4 * 4);
#pragma unroll
        for (u32 kk = 0; kk < HEAD_DIM / 16; kk++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 a = pack(four[kk][i].x, four[kk][i].y), b = pack(four[kk][i].z, four[kk][i].w);
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const u32 from_lane = (lane & ~3u) + half * 2 + lane % 4 / 2;
                    const u32 x = __shfl_sync(FULL_WARP, a, from_lane), y = __shfl_sync(FULL_WARP, b, from_lane);
                    q[kk][i + 2 * half] = lane % 2 ? y : x;
                }
            }
    }

    __device__ void score_keys(float score[WARP_KEYS / 8][4], const unsigned char* keys, u32 first_key, u32 lane) {
#pragma unroll
        for (u32 n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) score[n][i] = 0.0f;
#pragma unroll
        for (u32 kk = 0; kk < HEAD_DIM / 16; kk++)
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 16; n++) {
                u32 b[4];
                ldmatrix_x4(b, place(keys, first_key + n * 16 + lane / 16 * 8 + lane % 8, 2 * kk + lane / 8 % 2));
                mma(score[2 * n], q[kk], b[0], b[1]);
                mma(score[2 * n + 1], q[kk], b[2], b[3]);
            }
    }

    // The same by the whole group, under way when it returns.
    __device__ void start_scores(float score[WARP_KEYS / 8][4], const unsigned char* keys) {
        const u64 all = wgmma_matrix(keys, 0, 1024);
        wgmma_fence();
#pragma unroll
        for (u32 kk = 0; kk < HEAD_DIM / 16; kk++) {
            const u64 matrix = wgmma_further(all, kk / 4 * HALF_BYTES + kk % 4 * 32);
            if (CACHE == 1) wgmma_rows64(score, q[kk], matrix, kk > 0);
            else wgmma_rows64_f16(score, q[kk], matrix, kk > 0);
        }
        wgmma_commit();
    }

    // Scores become weights. What was added before must be rescaled to the new maximum before more is added. In a masked
    // tile, bit j of `sees[i]` says that row i sees key j.
    template <bool MASKED>
    __device__ void weigh(float score[WARP_KEYS / 8][4], const u64 sees[2], u32 lane) {
        if (MASKED) {
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (u32 i = 0; i < 4; i++)
                    if (!(sees[i / 2] >> (n * 8 + lane % 4 * 2 + i % 2) & 1)) score[n][i] = NEVER;
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float most = NEVER;
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 8; n++) most = fmaxf(most, fmaxf(score[n][2 * i], score[n][2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            most = fmaxf(largest[i], most * (SCALE * LOG2_E));
            // A row that has seen no key yet keeps its zeros.
            const float base = MASKED && most == NEVER ? 0.0f : most;
            rescale[i] = exp2_approx(largest[i] - base);
            largest[i] = most;
            sum[i] *= rescale[i];
#pragma unroll
            for (u32 n = 0; n < WARP_KEYS / 8; n++)
#pragma unroll
                for (u32 j = 2 * i; j < 2 * i + 2; j++) {
                    score[n][j] = exp2_approx(fmaf(score[n][j], SCALE * LOG2_E, -base));
                    sum[i] += score[n][j];
                }
        }
    }

    __device__ void rescale_out() {
#pragma unroll
        for (u32 d = 0; d < HEAD_DIM / 8; d++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) out[d][i] *= rescale[i / 2];
    }

    // The sums of whole rows, in each of their lanes.
    __device__ void add_up_sums() {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 1);
            sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 2);
        }
    }

    // Weights of 16 keys as the products take them.
    __device__ static void narrow(u32 a[4], const float (*weight)[4]) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) a[i] = pack(weight[i / 2][i % 2 * 2], weight[i / 2][i % 2 * 2 + 1]);
    }

    // Adds the values of this warp's keys. In a masked tile, bit j of `any` says that some row sees key j: a value that none
    // sees may be anything, NaN too, which zero times would not remove.
    template <bool MASKED>
    __device__ void add_values(const float weight[WARP_KEYS / 8][4], const unsigned char* values, u32 first_key, u64 any,
                               u32 lane) {
#pragma unroll
        for (u32 n = 0; n < WARP_KEYS / 16; n++) {
            u32 a[4], keep[2] = {FULL_WARP, FULL_WARP};
            narrow(a, weight + 2 * n);
            if (MASKED) {
                for (u32 i = 0; i < 2; i++) {
                    const u32 pair = (u32)(any >> (n * 16 + i * 8 + lane % 4 * 2)) & 3;
                    keep[i] = (pair & 1 ? 0xffffu : 0u) | (pair & 2 ? 0xffff0000u : 0u);
                }
            }
#pragma unroll
            for (u32 d = 0; d < HEAD_DIM / 16; d++) {
                u32 b[4];
                ldmatrix_x4_trans(b, place(values, first_key + n * 16 + lane / 8 % 2 * 8 + lane % 8, 2 * d + lane / 16));
                if (MASKED) b[0] &= keep[0], b[1] &= keep[1], b[2] &= keep[0], b[3] &= keep[1];
                mma(out[2 * d], a, b[0], b[1]);
                mma(out[2 * d + 1], a, b[2], b[3]);
            }
        }
    }

    // The same by the whole group, under way when it returns.
    __device__ void start_values(const u32 weights[TILE / 16][4], const unsigned char* values) {
        const u64 all = wgmma_matrix(values, HALF_BYTES, 1024);
        wgmma_fence();
#pragma unroll
        for (u32 n = 0; n < TILE / 16; n++) {
            const u64 matrix = wgmma_further(all, n * 16 * 128);
            if (HEAD_DIM == 64 && CACHE == 1) wgmma_columns64(out, weights[n], matrix, true);
            if (HEAD_DIM == 64 && CACHE == 2) wgmma_columns64_f16(out, weights[n], matrix, true);
            if (HEAD_DIM == 128 && CACHE == 1) wgmma_columns128(out, weights[n], matrix, true);
            if (HEAD_DIM == 128 && CACHE == 2) wgmma_columns128_f16(out, weights[n], matrix, true);
        }
        wgmma_commit();
    }
};
