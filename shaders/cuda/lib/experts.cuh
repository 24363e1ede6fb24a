// The entries of experts, which GroupRows lists, and their products.
//
// A block multiplies a tile of one expert's weight with all entries that chose it, so many at a time as a tile has tokens. There are
// as many shares of blocks as experts may be chosen at most, and the n-th takes the n-th expert that was.
//
// Needs ptx, formats, vectors, wgmma, matmul. Expects EXPERTS.

struct Chosen {
    u32 expert;
    u32 begin, end; // of its entries
};

// The n-th expert that has entries, or none, with no entries. All lanes of a warp get the same.
__device__ __forceinline__ Chosen chosen_expert(const u32* groups, u32 n) {
    constexpr u32 TURNS = (EXPERTS + 31) / 32;
    const u32 lane = threadIdx.x % 32;
    u32 begins[TURNS], ends[TURNS];
#pragma unroll
    for (u32 i = 0; i < TURNS; i++) {
        begins[i] = groups[min(32 * i + lane, EXPERTS)];
        ends[i] = groups[min(32 * i + lane + 1, EXPERTS)];
    }
    Chosen found = {};
    u32 before = 0;
#pragma unroll
    for (u32 i = 0; i < TURNS; i++) {
        const bool has_entries = begins[i] < ends[i];
        const u32 chosen = __ballot_sync(FULL_WARP, has_entries);
        const u32 index = before + __popc(chosen & ((1u << lane) - 1));
        const u32 is_it = __ballot_sync(FULL_WARP, has_entries && index == n);
        if (is_it != 0) {
            const u32 from = __ffs(is_it) - 1;
            found = {32 * i + from, __shfl_sync(FULL_WARP, begins[i], from), __shfl_sync(FULL_WARP, ends[i], from)};
        }
        before += __popc(chosen);
    }
    return found;
}

// Rows of x, `rows` naming those of a tile's tokens. It has a place for each that the tile may have.
struct Gathered {
    const float* x;
    const u32* rows;
};

// What is behind the tile's tokens is not read.
__device__ __forceinline__ const float* activations_of(Gathered x, u32 token) {
    return x.x + x.rows[min(token, TOKENS - 1)] * COLUMNS;
}

// Calls `body` with this block's expert, and with each tile of its entries and the list of these, in shared memory behind
// MATMUL_BYTES. All of a cluster have the same.
template <class Body>
__device__ __forceinline__ void each_tile(unsigned char* shared, const u32* groups, Body body) {
    const Chosen chosen = chosen_expert(groups, blockIdx.y);
    u32* entries = (u32*)(shared + MATMUL_BYTES);
    for (u32 begin = chosen.begin; begin < chosen.end; begin += TOKENS) {
        const u32 n = min(TOKENS, chosen.end - begin);
        // Sums of the tile before lie where weights go, and its entries where those of this one do.
        if (begin > chosen.begin) __syncthreads();
        for (u32 i = threadIdx.x; i < n; i += THREADS) entries[i] = groups[EXPERTS + 1 + begin + i];
        body(chosen.expert, Tile{blockIdx.x / CLUSTER, blockIdx.x % CLUSTER, 0, n}, entries);
    }
}
