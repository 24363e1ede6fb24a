// needs: ptx formats pieces layout chunks latents
// Adds up the chunks of units that `latent_attention` has cut. Its blocks' chunks are gone through again, by SHARES blocks each: they
// add up as large a part of the unit's rows as the chunk is of its chunks.

// constants-begin
constexpr u32 KV_HEADS = 1;
constexpr u32 LATENT = 512;
constexpr u32 GROUP = 16; // heads
constexpr u32 M = 64; // packed rows of a unit
constexpr u32 CACHE = 1; // format of the cache: 1 bf16, 2 f16
constexpr u32 MIN_CHUNK = 4;
constexpr u32 MAX_REQUESTS = 1;
constexpr u32 CLUSTER = 1;
// constants-end

constexpr u32 SHARES = 4;
constexpr u32 TEAMS = 4; // of threads that go through a row's pieces. Of rows that are read at once each takes every fourth chunk,
                         // then each finishes one

// Grid: SHARES times that of `latent_attention`. `out` is [rows, GROUP, LATENT].
extern "C" __global__ void __launch_bounds__(TEAMS* PIECES, 4)
    merge_latents(const u32* __restrict__ rows, const u32* __restrict__ requests, const uint4* partials, float* __restrict__ out) {
    // Of a row, by a team.
    __shared__ Eight outs[TEAMS][TEAMS][PIECES];
    __shared__ float2 sums[TEAMS][TEAMS];
    __shared__ Request known[KNOWN_REQUESTS];
    release_next();
    const u32 lane = threadIdx.x % 32, team = threadIdx.x / PIECES, n = threadIdx.x % PIECES;
    const u32 blocks = gridDim.x / SHARES;
    Schedule schedule = {rows, requests, known};
    schedule.plan(blocks, lane);
    __syncthreads();
    wait_for_previous();
    Item item;
    for (u32 index = blockIdx.x / SHARES; schedule.find(index, lane, item); index += blocks) {
        if (item.chunks == 1) continue;
        const Request request = schedule.request(item.request);
        const u32 first_packed = item.slab * M, n_rows = min(M, request.n_rows * GROUP - first_packed);
        const u32 step = item.chunks * SHARES;
        const uint4* partial = partials + (u64)(item.cut - item.chunk) * PARTIAL;
        for (u32 first = item.chunk * SHARES + blockIdx.x % SHARES; first < n_rows; first += TEAMS * step) {
#pragma unroll
            for (u32 r = 0; r < TEAMS; r++) {
                const u32 row = first + r * step;
                if (row >= n_rows) break;
                Piece part;
#pragma unroll 8
                for (u32 chunk = team; chunk < item.chunks; chunk += TEAMS)
                    part.add(load_piece(partial + (u64)chunk * PARTIAL, row, n));
                outs[r][team][n] = part.out;
                if (n == 0) sums[r][team] = make_float2(part.largest, part.sum);
            }
            __syncthreads();
            const u32 row = first + team * step;
            if (row < n_rows) {
                Piece all;
                for (u32 t = 0; t < TEAMS; t++) all.add({sums[team][t].x, sums[team][t].y, outs[team][t][n]});
                float* to = out + ((u64)request.first_row * GROUP + first_packed + row) * LATENT;
                const float by = 1.0f / all.sum;
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    *(float2*)(to + piece_element(n, j)) = make_float2(all.out.x[2 * j] * by, all.out.x[2 * j + 1] * by);
            }
            __syncthreads();
        }
    }
}
