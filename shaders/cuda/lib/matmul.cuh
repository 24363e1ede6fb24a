// A tile of weight rows times a tile of tokens: the body that all weight kernels share.
//
//     sum[token][row] = sum over k of weight[row][k] * gamma[k] * x[token][k]
//
// The columns are cut into *steps* of 64, whole lines of memory, and the steps among *teams*: the blocks of a cluster,
// and WARPS_K teams of each block. A team multiplies its steps with all rows of the tile; its WARPS_M warps have
// 8 * ROW_TILES rows each. In the end the teams' sums are added, in order, by whoever needs them (`total`).
//
//     weights      stream through a ring in shared memory, DEPTH steps ahead. A lane copies what its own tensor-core
//                  fragments need, 16 bytes of a row at a time, so the ring needs no barrier. They are requested before
//                  the kernel before this one has ended: it never writes them
//     activations  are loaded AHEAD steps ahead, multiplied with the norm's weight and split in two 16-bit halves,
//                  a = high + low. Both halves are multiplied, so that only the weights are as coarse as 16 bits. Warps
//                  with the same columns share this work, through shared memory; a warp with columns of its own keeps
//                  its fragments in registers, and takes 16 tokens at a time
//     products     are a warp's own (mma), or a whole group's of four warps, each with its own rows (wgmma): the weights are in
//                  the same registers, the activations are read where the team shares them
//     norm         is linear but for one factor a token, so the sum of squares is gathered on the way (`inv_rms`)
//
// The order of a token's sums depends on the matrix alone (COLUMNS, CLUSTER, WARPS_K, SPLIT, WGMMA, whether WARPS_M is 1),
// never on how many tokens share the pass or a tile.
//
// Weights in F32 take a plain path, lanes along the columns, with the same teams.
//
// Needs ptx, formats, vectors, wgmma. Expects COLUMNS, WEIGHT, NORMED, EPS, TOKENS, TOKEN_TILES, ROW_TILES, WARPS_M, WARPS_K,
// CLUSTER, AHEAD, DEPTH, SPLIT, WGMMA, SHARED_BYTES.

constexpr u32 STEP = 64; // columns
constexpr u32 STEPS = (COLUMNS + STEP - 1) / STEP;
constexpr u32 TEAM_STEPS = (STEPS + CLUSTER * WARPS_K - 1) / (CLUSTER * WARPS_K);
constexpr u32 TEAM = 32 * WARPS_M; // threads
constexpr u32 THREADS = TEAM * WARPS_K;
constexpr u32 WARP_ROWS = 8 * ROW_TILES;
constexpr u32 ROWS = WARP_ROWS * WARPS_M; // weight rows of a tile
// The tensor cores multiply 16 tokens with 8 weight rows. A lane has tokens of their tiles in pairs, g and g + 8.
constexpr u32 M_TILES = (TOKENS + 15) / 16;
constexpr u32 PAIR = TOKENS > 8 ? 2 : 1;
constexpr bool PLAIN = WEIGHT == F32;
// A warp with columns of its own. It multiplies one tile of tokens after the other.
constexpr bool ALONE = WARPS_M == 1;
constexpr u32 M_AT_ONCE = ALONE ? 1 : M_TILES;
static_assert(!ALONE || M_TILES == 1 || PLAIN || (AHEAD == TEAM_STEPS && DEPTH == TEAM_STEPS), "all weights stay");

// High and low halves have sums of their own, or share them. F16 needs the former: its halves are scaled, so that they
// neither overflow nor vanish.
constexpr u32 PARTS = SPLIT ? 2 : 1;
constexpr float HIGH_SCALE = WEIGHT == F16 ? 1.0f / 256 : 1.0f;
constexpr float LOW_SCALE = WEIGHT == F16 ? 2048.0f : 1.0f;
static_assert(WEIGHT != F16 || SPLIT, "the halves of F16 are scaled differently");
static_assert(!WGMMA || (WARPS_M % 4 == 0 && ROW_TILES % 2 == 0 && !PLAIN), "a group of four warps has 16 rows each");

// ---- shared memory

// Activations of a step, in *units* of four columns: of a pair of tokens 16 bytes, as the tensor cores take them. Two
// buffers of [M_TILES][high, low][8 pairs][UNIT_STRIDE]; padded, so that eight lanes read two pairs' without conflicts.
// For groups [high, low][TOKENS] rows of 128 bytes, 16-byte chunks permuted by the row modulo 8.
constexpr u32 UNITS = STEP / 4;
constexpr u32 UNIT_STRIDE = UNITS + 1;
constexpr u32 BUFFER_UNITS = PLAIN || ALONE ? 0 : WGMMA ? 2 * TOKENS * 8 : M_TILES * 2 * 8 * UNIT_STRIDE;

// A warp's ring of weights [DEPTH][ROW_TILES][half of the step][32 lanes][16 bytes], later its sums
// [TOKENS][SUM_STRIDE].
constexpr u32 RING_BYTES = PLAIN ? 0 : DEPTH * ROW_TILES * 2 * 32 * 16;
constexpr u32 SUM_STRIDE = WARP_ROWS + 4;
constexpr u32 SUM_BYTES = TOKENS * SUM_STRIDE * 4;
// While there are more tokens to come the weights stay, and the sums have room of their own.
constexpr u32 SUMS_AT = ALONE && M_TILES > 1 ? RING_BYTES : 0;
constexpr u32 WARP_BYTES = RING_BYTES > SUMS_AT + SUM_BYTES ? RING_BYTES : SUMS_AT + SUM_BYTES;

constexpr u32 UNITS_AT = WARPS_M * WARPS_K * WARP_BYTES;
static_assert(!WGMMA || UNITS_AT % 1024 == 0, "what groups read is aligned");
constexpr u32 SQUARES_AT = UNITS_AT + WARPS_K * 2 * BUFFER_UNITS * 16;
constexpr u32 MATMUL_BYTES = SQUARES_AT + WARPS_K * TOKENS * 4;
static_assert(MATMUL_BYTES <= SHARED_BYTES, "the launch gives less shared memory than the tile needs");

// The units of a step that a thread loads: of MY_PAIRS pairs of tokens, MY_UNITS each.
constexpr u32 MY_PAIRS = ALONE ? 1 : (M_TILES * 8 * UNITS + TEAM - 1) / TEAM;
constexpr u32 MY_UNITS = ALONE ? 4 : 1;

// ---- the tile of a block

struct Tile {
    u32 index; // of its weight rows
    u32 rank; // of the block in its cluster
    u32 first_token;
    u32 n_tokens; // that the pass has of TOKENS
};

// Blocks of a cluster are neighbours, then clusters of the same weight rows: they find them in the cache.
__device__ __forceinline__ Tile tile_of_block(const u32* requests) {
    const u32 cluster = blockIdx.x / CLUSTER;
    const u32 first_token = cluster % TOKEN_TILES * TOKENS;
    const u32 n_rows = requests[0];
    const u32 left = n_rows > first_token ? n_rows - first_token : 0;
    return {cluster / TOKEN_TILES, blockIdx.x % CLUSTER, first_token, left < TOKENS ? left : TOKENS};
}

// Where the activations of a token begin. Other kinds of `x` have an overload of their own.
__device__ __forceinline__ const float* activations_of(const float* x, u32 token) { return x + token * COLUMNS; }

// ---- the product

// Four activations as 16-bit halves: {high 01, high 23, low 01, low 23}.
__device__ __forceinline__ uint4 split(float4 a) {
    a = mul4(a, HIGH_SCALE);
    const u32 high01 = narrow_pair(WEIGHT, a.x, a.y), high23 = narrow_pair(WEIGHT, a.z, a.w);
    const float2 h01 = widen_pair(WEIGHT, high01), h23 = widen_pair(WEIGHT, high23);
    return make_uint4(high01, high23, narrow_pair(WEIGHT, (a.x - h01.x) * LOW_SCALE, (a.y - h01.y) * LOW_SCALE),
                      narrow_pair(WEIGHT, (a.z - h23.x) * LOW_SCALE, (a.w - h23.y) * LOW_SCALE));
}

// d[16 tokens x 8 rows] += activations · weightsᵀ, over the first or second half of what lanes hold of 32 columns.
__device__ __forceinline__ void mma(float d[4], uint4 activations, uint4 weights, u32 half) {
    const u32 a[4] = {activations.x, activations.y, activations.z, activations.w};
    const u32 b0 = half ? weights.z : weights.x, b1 = half ? weights.w : weights.y;
    if (WEIGHT == BF16) mma_bf16(d, a, b0, b1);
    else mma_f16(d, a, b0, b1);
}

struct Matmul {
    Tile tile;
    unsigned char* shared;
    u32 lane, warp, warp_m, team; // team: of the block
    u32 first, end; // steps of the team
    const uint4* weight;
    u32 rows[ROW_TILES]; // where this lane's part of its rows of the weight begins, in 16 bytes
    float4 gamma[AHEAD][MY_UNITS]; // of the steps to come
    float4 ahead[AHEAD][MY_PAIRS][PAIR][MY_UNITS];
    float squares[MY_PAIRS][PAIR];
    float sums[PARTS][M_AT_ONCE][ROW_TILES][4]; // for groups [PARTS][ROW_TILES / 2][tokens / 8][4]

    // Requests the first weights. `weight_row` says which row of the weight is which of the tile.
    template <class WeightRow>
    __device__ __forceinline__ void begin(unsigned char* dynamic_shared, Tile of_block, const void* whole_weight,
                                          const float* norm, WeightRow weight_row) {
        shared = dynamic_shared;
        weight = (const uint4*)whole_weight;
        tile = of_block;
        lane = threadIdx.x % 32;
        warp = threadIdx.x / 32;
        warp_m = warp % WARPS_M;
        team = warp / WARPS_M;
        first = (tile.rank * WARPS_K + team) * TEAM_STEPS;
        first = first < STEPS ? first : STEPS;
        end = first + TEAM_STEPS < STEPS ? first + TEAM_STEPS : STEPS;
        if (PLAIN) return;
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++) {
            rows[r] = weight_row(warp_m * WARP_ROWS + r * 8 + lane / 4) * (COLUMNS / 8) + lane % 4;
        }
#pragma unroll
        for (u32 slot = 0; slot < DEPTH; slot++) request_weights(first + slot, slot);
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) load_gamma(norm, i, first + i);
    }

    // All of the team's steps. Writes the warp's sums to shared memory, where `total` finds them.
    template <class X, class WeightRow>
    __device__ __forceinline__ void multiply(X x, const float* norm, WeightRow weight_row) {
        if constexpr (PLAIN) multiply_plain(x, norm, weight_row);
        else multiply_halves(x, norm);
        if (CLUSTER > 1) cluster_sync();
        else __syncthreads();
    }

    // Four neighbouring rows of a token, of all teams.
    __device__ __forceinline__ float4 total(u32 token, u32 row) const {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (u32 rank = 0; rank < CLUSTER; rank++) {
            const float* there = of_rank(warp_sums(0, row / WARP_ROWS) + token * SUM_STRIDE + row % WARP_ROWS, rank);
            float4 of_block = *(const float4*)there;
#pragma unroll
            for (u32 k = 1; k < WARPS_K; k++) {
                of_block = add4(of_block, *(const float4*)(there + k * (WARPS_M * WARP_BYTES / 4)));
            }
            sum = rank == 0 ? of_block : add4(sum, of_block);
        }
        return sum;
    }

    // What the norm multiplies the token's sums with.
    __device__ __forceinline__ float inv_rms(u32 token) const {
        if (!NORMED) return 1.0f;
        float sum = 0.0f;
#pragma unroll
        for (u32 rank = 0; rank < CLUSTER; rank++) {
            const float* there = of_rank((const float*)(shared + SQUARES_AT) + token, rank);
#pragma unroll
            for (u32 k = 0; k < WARPS_K; k++) sum += there[k * TOKENS];
        }
        return rsqrtf(sum * (1.0f / COLUMNS) + EPS);
    }

    // To be called when the block no longer reads sums: others of the cluster may still read its own.
    __device__ __forceinline__ void finish() const {
        if (CLUSTER > 1) cluster_leave();
    }

  private:
    __device__ __forceinline__ float* warp_sums(u32 of_team, u32 of_warp_m) const {
        return (float*)(shared + (of_team * WARPS_M + of_warp_m) * WARP_BYTES + SUMS_AT);
    }

    template <class T>
    __device__ __forceinline__ static T* of_rank(T* here, u32 rank) {
        return CLUSTER > 1 ? cluster_map(here, rank) : here;
    }

    // This lane's part of a slot of the ring: [ROW_TILES][half of the step], each 32 lanes apart.
    __device__ __forceinline__ uint4* ring(u32 slot) const {
        return (uint4*)(shared + warp * WARP_BYTES) + slot * (ROW_TILES * 2 * 32) + lane;
    }

    __device__ __forceinline__ void request_weights(u32 of_step, u32 slot) const {
        if (of_step < end) {
#pragma unroll
            for (u32 i = 0; i < ROW_TILES * 2; i++) {
                const u32 column = of_step * STEP + i % 2 * 32;
                const bool on = COLUMNS % STEP == 0 || column + lane % 4 * 8 < COLUMNS;
                cp_async16(ring(slot) + i * 32, weight + rows[i / 2] + column / 8, on);
            }
        }
        cp_async_commit();
    }

    // The first token of this thread's i-th pair, the other is 8 further on, and the columns of its j-th unit: as the
    // tensor cores want them of this lane, or the next of those that the team shares.
    __device__ __forceinline__ u32 my_token(u32 i) const {
        const u32 pair = ALONE ? i * 8 + lane / 4 : (i * TEAM + threadIdx.x % TEAM) / UNITS;
        return pair / 8 * 16 + pair % 8;
    }
    __device__ __forceinline__ u32 my_unit(u32 j) const {
        return ALONE ? j / 2 * 8 + lane % 4 * 2 + j % 2 : threadIdx.x % UNITS;
    }

    __device__ __forceinline__ void load_gamma(const float* norm, u32 slot, u32 of_step) {
        if (!NORMED) return;
#pragma unroll
        for (u32 j = 0; j < MY_UNITS; j++) {
            const u32 column = of_step * STEP + my_unit(j) * 4;
            gamma[slot][j] = column < COLUMNS ? *(const float4*)(norm + column) : make_float4(0, 0, 0, 0);
        }
    }

    // `m`: the tile of tokens, where a warp takes one after the other.
    template <class X>
    __device__ __forceinline__ void load_activations(X x, u32 slot, u32 of_step, u32 m = 0) {
#pragma unroll
        for (u32 i = 0; i < MY_PAIRS; i++) {
#pragma unroll
            for (u32 j = 0; j < MY_UNITS; j++) load_unit(x, slot, of_step, m, i, j);
        }
    }

    template <class X>
    __device__ __forceinline__ void load_unit(X x, u32 slot, u32 of_step, u32 m, u32 i, u32 j) {
#pragma unroll
        for (u32 of_pair = 0; of_pair < PAIR; of_pair++) {
            const u32 token = m * 16 + my_token(i) + of_pair * 8, column = of_step * STEP + my_unit(j) * 4;
            const bool on = token < tile.n_tokens && of_step < end && column < COLUMNS;
            const float* at = activations_of(x, tile.first_token + token) + column;
            ahead[slot][i][of_pair][j] = on ? *(const float4*)at : make_float4(0, 0, 0, 0);
        }
    }

    // A loaded unit of a token, as {high 01, high 23, low 01, low 23}.
    __device__ __forceinline__ uint4 take_halves(u32 slot, u32 i, u32 of_pair, u32 j) {
        float4 a = ahead[slot][i][of_pair][j];
        if (NORMED) {
            squares[i][of_pair] = add_squares(a, squares[i][of_pair]);
            const float4 g = gamma[slot][j];
            a = make_float4(a.x * g.x, a.y * g.y, a.z * g.z, a.w * g.w);
        }
        return split(a);
    }

    // A loaded unit of a pair of tokens: what a lane holds of the tensor cores' operand.
    __device__ __forceinline__ void take_unit(u32 slot, u32 i, u32 j, uint4& high, uint4& low) {
        const uint4 a = take_halves(slot, i, 0, j);
        const uint4 b = PAIR == 2 ? take_halves(slot, i, PAIR - 1, j) : make_uint4(0, 0, 0, 0);
        high = make_uint4(a.x, b.x, a.y, b.y);
        low = make_uint4(a.z, b.z, a.w, b.w);
    }

    __device__ __forceinline__ static void team_barrier() {
        if (WARPS_K == 1) __syncthreads();
        else named_barrier(1 + threadIdx.x / TEAM, TEAM);
    }

    template <class X>
    __device__ __forceinline__ void multiply_halves(X x, const float* norm) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) load_activations(x, i, first + i);
        uint4* buffers = (uint4*)(shared + UNITS_AT) + team * 2 * BUFFER_UNITS;
        for (u32 m = 0; m < M_TILES / M_AT_ONCE && m * 16 < tile.n_tokens; m++) {
            clear_sums();
            u32 slot = 0, buffer = 0, step = first;
            while (step < end) {
#pragma unroll
                for (u32 i = 0; i < AHEAD; i++) {
                    if (step >= end) break;
                    uint4* units = buffers + buffer * BUFFER_UNITS;
                    if (!ALONE) {
                        share_activations(units, i);
                        load_gamma(norm, i, step + AHEAD);
                        load_activations(x, i, step + AHEAD);
                        if (WGMMA) fence_async();
                        // Whoever passes has also seen the others leave the buffer that is written next.
                        team_barrier();
                    }
                    if constexpr (WGMMA) multiply_step_together(units, step, slot);
                    else multiply_step(units + lane / 4 * UNIT_STRIDE + lane % 4 * 2, x, m, step, i, slot);
                    if (ALONE && TEAM_STEPS > AHEAD) {
                        load_gamma(norm, i, step + AHEAD);
                        load_activations(x, i, step + AHEAD);
                    }
                    slot = slot + 1 < DEPTH ? slot + 1 : 0;
                    buffer ^= 1;
                    step++;
                }
                if (AHEAD >= TEAM_STEPS) break;
            }
            cp_async_wait<0>();
            __syncwarp();
            store_sums(m);
            if (NORMED) store_all_squares(m);
        }
    }

    __device__ __forceinline__ void clear_sums() {
#pragma unroll
        for (u32 i = 0; i < PARTS * M_AT_ONCE * ROW_TILES * 4; i++) (&sums[0][0][0][0])[i] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < MY_PAIRS * PAIR; i++) squares[i / PAIR][i % PAIR] = 0.0f;
    }

    __device__ __forceinline__ void share_activations(uint4* units, u32 slot) {
#pragma unroll
        for (u32 i = 0; i < MY_PAIRS; i++) {
            const u32 token = my_token(i);
            if (token >= tile.n_tokens) continue;
            if (WGMMA) {
#pragma unroll
                for (u32 j = 0; j < PAIR; j++) share_unit((unsigned char*)units, token + j * 8, take_halves(slot, i, j, 0));
                continue;
            }
            uint4* to = units + (token / 16 * 16 + token % 8) * UNIT_STRIDE + my_unit(0);
            take_unit(slot, i, 0, to[0], to[8 * UNIT_STRIDE]);
        }
    }

    // A lane's eight elements of a row of the weight count as two blocks of 16 columns, as below: so do a unit's pairs.
    __device__ __forceinline__ void share_unit(unsigned char* units, u32 token, uint4 halves) const {
        const u32 unit = my_unit(0), block = unit / 8 * 2 + unit % 2, lane_of_unit = unit / 2 % 4;
        unsigned char* to = units + token * 128 + lane_of_unit * 4;
        const u32 first = ((2 * block) ^ (token % 8)) * 16, second = ((2 * block + 1) ^ (token % 8)) * 16;
        *(u32*)(to + first) = halves.x;
        *(u32*)(to + second) = halves.y;
        *(u32*)(to + TOKENS * 128 + first) = halves.z;
        *(u32*)(to + TOKENS * 128 + second) = halves.w;
    }

    // d[64 rows x TOKENS] += a · activationsᵀ
    __device__ __forceinline__ static void add_product(float (*d)[4], const u32 a[4], u64 activations) {
        if (WEIGHT == BF16) {
            if constexpr (TOKENS == 8) wgmma_rows8(d, a, activations, true);
            else if constexpr (TOKENS == 16) wgmma_rows16(d, a, activations, true);
            else if constexpr (TOKENS == 32) wgmma_rows32(d, a, activations, true);
            else wgmma_rows64(d, a, activations, true);
        } else {
            if constexpr (TOKENS == 8) wgmma_rows8_f16(d, a, activations, true);
            else if constexpr (TOKENS == 16) wgmma_rows16_f16(d, a, activations, true);
            else if constexpr (TOKENS == 32) wgmma_rows32_f16(d, a, activations, true);
            else wgmma_rows64_f16(d, a, activations, true);
        }
    }

    __device__ __forceinline__ float (*group_sums(u32 part, u32 pair))[4] {
        return &sums[0][0][0] + (part * (ROW_TILES / 2) + pair) * (TOKENS / 8);
    }

    __device__ __forceinline__ void multiply_step_together(const uint4* units, u32 step, u32 slot) {
        if (TEAM_STEPS > DEPTH) cp_async_wait<DEPTH - 1>();
        else cp_async_wait<0>();
        u32 a[2][ROW_TILES / 2][2][4];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (u32 pair = 0; pair < ROW_TILES / 2; pair++) {
                const uint4 w = ring(slot)[(pair * 4 + half) * 32], below = ring(slot)[(pair * 4 + 2 + half) * 32];
                a[half][pair][0][0] = w.x, a[half][pair][0][1] = below.x, a[half][pair][0][2] = w.y, a[half][pair][0][3] = below.y;
                a[half][pair][1][0] = w.z, a[half][pair][1][1] = below.z, a[half][pair][1][2] = w.w, a[half][pair][1][3] = below.w;
            }
        }
        if (TEAM_STEPS > DEPTH) request_weights(step + DEPTH, slot);
        const u64 all = wgmma_matrix(units, 0, 1024);
        wgmma_fence();
#pragma unroll
        for (u32 block = 0; block < 4; block++) {
#pragma unroll
            for (u32 part = 0; part < 2; part++) { // high, low
                const u64 activations = wgmma_further(all, part * TOKENS * 128 + block * 32);
#pragma unroll
                for (u32 pair = 0; pair < ROW_TILES / 2; pair++) {
                    add_product(group_sums(part < PARTS ? part : 0, pair), a[block / 2][pair][block % 2], activations);
                }
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
    }

    // `units`: this lane's first unit of its first pair of tokens, if the team shares them.
    template <class X>
    __device__ __forceinline__ void multiply_step(const uint4* units, X x, u32 m, u32 step, u32 slot_ahead, u32 slot) {
        if (TEAM_STEPS > DEPTH) cp_async_wait<DEPTH - 1>();
        else cp_async_wait<0>();
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            uint4 weights[ROW_TILES];
#pragma unroll
            for (u32 r = 0; r < ROW_TILES; r++) weights[r] = ring(slot)[(r * 2 + half) * 32];
            if (half == 1 && TEAM_STEPS > DEPTH) request_weights(step + DEPTH, slot);
            if constexpr (ALONE) multiply_alone(x, m, step, slot_ahead, half, weights);
            else multiply_tokens<M_TILES>(units + half * 8, half, weights);
        }
    }

    // A lane's 16 bytes of a row are eight elements k: their first four are what it holds of 16 columns of the tensor
    // core's operands, their last four of the next 16. Which columns these are does not matter, as long as weights and
    // activations agree.
    template <class X>
    __device__ __forceinline__ void multiply_alone(X x, u32 m, u32 step, u32 slot_ahead, u32 half,
                                                   const uint4 weights[ROW_TILES]) {
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
            uint4 high, low;
            take_unit(slot_ahead, 0, half * 2 + k, high, low);
            // The next tile's takes its place.
            if (M_TILES > 1) load_unit(x, slot_ahead, step, m + 1, 0, half * 2 + k);
            multiply_tile(0, high, low, weights, k);
        }
    }

    template <u32 M>
    __device__ __forceinline__ void multiply_tokens(const uint4* units, u32 half, const uint4 weights[ROW_TILES]) {
        if constexpr (M > 1) {
            if (tile.n_tokens <= M / 2 * 16) return multiply_tokens<M / 2>(units, half, weights);
        }
#pragma unroll
        for (u32 k = 0; k < 2; k++) {
#pragma unroll
            for (u32 m = 0; m < M; m++) {
                multiply_tile(m, units[m * 16 * UNIT_STRIDE + k], units[(m * 16 + 8) * UNIT_STRIDE + k], weights, k);
            }
        }
    }

    __device__ __forceinline__ void multiply_tile(u32 m, uint4 high, uint4 low, const uint4 weights[ROW_TILES], u32 k) {
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++) mma(sums[0][m][r], high, weights[r], k);
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; r++) mma(sums[PARTS - 1][m][r], low, weights[r], k);
    }

    // From tile `first_m` on.
    __device__ __forceinline__ void store_sums(u32 first_m) {
        if (WGMMA) return store_group_sums();
        float* to = warp_sums(team, warp_m) + (first_m * 16 + lane / 4) * SUM_STRIDE + lane % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < M_AT_ONCE; m++) {
            if ((first_m + m) * 16 >= tile.n_tokens) break;
#pragma unroll
            for (u32 i = 0; i < ROW_TILES * PAIR; i++) {
                const u32 r = i / PAIR, of_pair = i % PAIR;
                *(float2*)(to + (m * 16 + of_pair * 8) * SUM_STRIDE + r * 8) =
                    make_float2(sum_of_parts(m, r, of_pair * 2), sum_of_parts(m, r, of_pair * 2 + 1));
            }
        }
    }

    __device__ __forceinline__ void store_group_sums() {
        float* to = warp_sums(team, warp_m) + lane % 4 * 2 * SUM_STRIDE + lane / 4;
#pragma unroll
        for (u32 n = 0; n < TOKENS / 8; n++) {
            if (n * 8 >= tile.n_tokens) break;
#pragma unroll
            for (u32 i = 0; i < ROW_TILES / 2 * 4; i++) {
                const u32 pair = i / 4, of_row = i / 2 % 2, token = n * 8 + i % 2;
                const float high = group_sums(0, pair)[n][i % 4], low = group_sums(PARTS - 1, pair)[n][i % 4];
                to[token * SUM_STRIDE + pair * 16 + of_row * 8] = (SPLIT ? fmaf(low, 1.0f / LOW_SCALE, high) : high) / HIGH_SCALE;
            }
        }
    }

    __device__ __forceinline__ float sum_of_parts(u32 m, u32 r, u32 i) const {
        float sum = sums[0][m][r][i];
        if (SPLIT) sum = fmaf(sums[PARTS - 1][m][r][i], 1.0f / LOW_SCALE, sum);
        return sum * (1.0f / HIGH_SCALE);
    }

    __device__ __forceinline__ void store_all_squares(u32 first_m) {
        constexpr u32 LANES = ALONE ? 4 : UNITS; // that have units of the same tokens
        // All lanes together, before any of them stores: shuffles of a warp that has come apart are slow.
        __syncwarp();
#pragma unroll
        for (u32 i = 0; i < MY_PAIRS * PAIR; i++) {
            float& sum = squares[i / PAIR][i % PAIR];
#pragma unroll
            for (u32 lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
        }
#pragma unroll
        for (u32 i = 0; i < MY_PAIRS * PAIR; i++) {
            const u32 token = first_m * 16 + my_token(i / PAIR) + i % PAIR * 8;
            store_squares(token, squares[i / PAIR][i % PAIR], lane % LANES == 0);
        }
    }

    __device__ __forceinline__ void store_squares(u32 token, float sum, bool mine) const {
        if (mine && token < TOKENS) ((float*)(shared + SQUARES_AT))[team * TOKENS + token] = sum;
    }

    // Four rows and eight tokens at a time; a lane has every 32nd four columns.
    template <class X, class WeightRow>
    __device__ __forceinline__ void multiply_plain(X x, const float* norm, WeightRow weight_row) const {
        const u32 begin = first * STEP + lane * 4;
        const u32 stop = end * STEP < COLUMNS ? end * STEP : COLUMNS;
        for (u32 row = 0; row < WARP_ROWS; row += 4) {
            const float* weights[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                weights[i] = (const float*)weight + (u64)weight_row(warp_m * WARP_ROWS + row + i) * COLUMNS;
            }
            for (u32 token = 0; token < tile.n_tokens; token += 8) {
                float of_lane[4][8] = {};
                for (u32 k = begin; k < stop; k += 128) {
                    float4 w[4];
#pragma unroll
                    for (u32 i = 0; i < 4; i++) w[i] = *(const float4*)(weights[i] + k);
                    const float4 g = NORMED ? *(const float4*)(norm + k) : make_float4(1, 1, 1, 1);
#pragma unroll
                    for (u32 n = 0; n < 8; n++) {
                        if (token + n >= tile.n_tokens) break;
                        const float4 a = *(const float4*)(activations_of(x, tile.first_token + token + n) + k);
#pragma unroll
                        for (u32 i = 0; i < 4; i++) {
                            float sum = of_lane[i][n];
                            sum = fmaf(w[i].x, a.x * g.x, sum);
                            sum = fmaf(w[i].y, a.y * g.y, sum);
                            sum = fmaf(w[i].z, a.z * g.z, sum);
                            of_lane[i][n] = fmaf(w[i].w, a.w * g.w, sum);
                        }
                    }
                }
#pragma unroll
                for (u32 i = 0; i < 32; i++) {
                    const float sum = sum_of_warp(of_lane[i / 8][i % 8]);
                    if (lane == i && token + i % 8 < tile.n_tokens) {
                        warp_sums(team, warp_m)[(token + i % 8) * SUM_STRIDE + row + i / 8] = sum;
                    }
                }
            }
        }
        if (!NORMED) return;
        for (u32 token = warp_m; token < tile.n_tokens; token += WARPS_M) {
            float sum = 0.0f;
            const float* of_token = activations_of(x, tile.first_token + token);
            for (u32 k = begin; k < stop; k += 128) sum = add_squares(*(const float4*)(of_token + k), sum);
            store_squares(token, sum_of_warp(sum), lane == 0);
        }
    }

    __device__ __forceinline__ static float sum_of_warp(float sum) {
#pragma unroll
        for (u32 lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, lanes);
        return sum;
    }
};
