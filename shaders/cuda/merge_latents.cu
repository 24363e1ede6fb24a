// needs: ptx layout chunks latents
// Adds up the chunks of units that `latent_attention` has cut: as many blocks as it had go through the same chunks, and each adds
// up some of a unit's rows, all its chunks of them.

// constants-begin
constexpr u32 KV_HEADS = 1;
constexpr u32 LATENT = 512;
constexpr u32 GROUP = 16; // heads
constexpr u32 M = 64; // packed rows of a unit
constexpr u32 MIN_CHUNK = 4;
constexpr u32 MAX_REQUESTS = 1;
constexpr u32 CLUSTER = 1;
// constants-end

constexpr u32 QUADS = LATENT / 4; // threads that have a row together, four columns each
constexpr u32 TEAMS = 4; // that take chunks in turn
constexpr u32 THREADS = TEAMS * QUADS;
#define NEVER __uint_as_float(0xff800000u) // minus infinity

// A unit's row in each of its chunks.
struct Row {
    const float* partial; // the first chunk's
    u32 row, chunks;

    __device__ float2 sums(u32 chunk) const { return __ldcg((const float2*)(partial + (u64)chunk * PARTIAL + M * LATENT + row * 2)); }
    __device__ float4 quad(u32 chunk, u32 n) const {
        return __ldcg((const float4*)(partial + (u64)chunk * PARTIAL + row * LATENT + n * 4));
    }

    // The largest score of all chunks, and the sum of all weights. Whole warps call it.
    __device__ float2 total(u32 lane) const {
        float most = NEVER, sum = 0.0f;
        for (u32 chunk = lane; chunk < chunks; chunk += 32) most = fmaxf(most, sums(chunk).x);
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, step));
        for (u32 chunk = lane; chunk < chunks; chunk += 32) sum = fmaf(sums(chunk).y, exp2_approx(sums(chunk).x - most), sum);
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        return make_float2(most, sum); // some chunk has seen a key: the row's own
    }

    // Of every TEAMS-th chunk.
    __device__ float4 add(u32 team, u32 n, float most) const {
        float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (u32 chunk = team; chunk < chunks; chunk += TEAMS) {
            const float by = exp2_approx(sums(chunk).x - most);
            const float4 v = quad(chunk, n);
            all.x = fmaf(v.x, by, all.x), all.y = fmaf(v.y, by, all.y), all.z = fmaf(v.z, by, all.z), all.w = fmaf(v.w, by, all.w);
        }
        return all;
    }
};

// Grid: that of `latent_attention`. `out` is [rows, GROUP, LATENT].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    merge_latents(const u32* __restrict__ rows, const u32* __restrict__ requests, const float* partials, float* __restrict__ out) {
    __shared__ float4 parts[TEAMS][QUADS];
    release_next();
    const u32 lane = threadIdx.x % 32, team = threadIdx.x / QUADS, n = threadIdx.x % QUADS;
    Schedule schedule = {rows, requests, min(requests[1], MAX_REQUESTS), 0};
    schedule.plan(gridDim.x, lane);
    wait_for_previous();
    Item item;
    for (u32 index = blockIdx.x; schedule.find(index, lane, item); index += gridDim.x) {
        if (item.chunks == 1) continue;
        const Request request = read_request(rows, requests, item.request);
        const u32 first_packed = item.slab * M, n_rows = min(M, request.n_rows * GROUP - first_packed);
        for (u32 row = item.chunk; row < n_rows; row += item.chunks) {
            const Row all = {partials + (u64)(item.cut - item.chunk) * PARTIAL, row, item.chunks};
            const float2 total = all.total(lane);
            parts[team][n] = all.add(team, n, total.x);
            __syncthreads();
            // Each team finishes a quarter of the columns.
            const u32 column = threadIdx.x;
            float sum = 0.0f;
            for (u32 t = 0; t < TEAMS; t++) sum += ((const float*)parts[t])[column];
            out[((u64)request.first_row * GROUP + first_packed + row) * LATENT + column] = sum / total.y;
            __syncthreads();
        }
    }
}
