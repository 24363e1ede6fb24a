// needs: ptx
// Which rows each expert has: `groups` begins with where each expert's entries begin, EXPERTS + 1 numbers; then come the entries,
// row * CHOSEN + j where experts[row, j] is the expert, ascending.
//
// One block counts, adds up, and lists: a warp goes through all entries for one expert after the other.

// constants-begin
constexpr u32 EXPERTS = 64;
constexpr u32 CHOSEN = 6; // of a row
// constants-end

constexpr u32 THREADS = 1024;
constexpr u32 WARPS = THREADS / 32;

// Blocks: [1].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    group_rows(const u32* requests, const u32* experts, // [rows, CHOSEN]
               u32* groups) { // [EXPERTS + 1 + entries]
    release_next();
    __shared__ u32 counts[EXPERTS];
    __shared__ u32 begins[EXPERTS + 1];
    const u32 t = threadIdx.x, lane = t % 32, warp = t / 32;
    for (u32 expert = t; expert < EXPERTS; expert += THREADS) counts[expert] = 0;
    const u32 entries = requests[0] * CHOSEN;
    __syncthreads();
    wait_for_previous();
    for (u32 entry = t; entry < entries; entry += THREADS) atomicAdd(&counts[experts[entry]], 1u);
    __syncthreads();

    if (warp == 0) {
        u32 before = 0;
        for (u32 first = 0; first < EXPERTS; first += 32) {
            const u32 mine = first + lane < EXPERTS ? counts[first + lane] : 0;
            u32 upto = mine;
#pragma unroll
            for (u32 lanes = 1; lanes < 32; lanes *= 2) {
                const u32 below = __shfl_up_sync(FULL_WARP, upto, lanes);
                if (lane >= lanes) upto += below;
            }
            if (first + lane < EXPERTS) begins[first + lane] = before + upto - mine;
            before += __shfl_sync(FULL_WARP, upto, 31);
        }
        if (lane == 0) begins[EXPERTS] = before;
    }
    __syncthreads();
    for (u32 expert = t; expert <= EXPERTS; expert += THREADS) groups[expert] = begins[expert];

    for (u32 expert = warp; expert < EXPERTS; expert += WARPS) {
        u32 at = EXPERTS + 1 + begins[expert];
        const u32 end = EXPERTS + 1 + begins[expert + 1];
        for (u32 first = 0; at < end; first += 32) {
            const u32 entry = first + lane;
            const bool is_mine = entry < entries && experts[entry] == expert;
            const u32 found = __ballot_sync(FULL_WARP, is_mine);
            if (is_mine) groups[at + __popc(found & ((1u << lane) - 1))] = entry;
            at += __popc(found);
        }
    }
}
