// Tiles of keys or of values in shared memory, as tiled caches hold them: [HALVES][TILE] rows of 128 bytes, 16-byte chunks permuted
// by the row modulo 8. How one warp copies them, and which of their keys a row sees.
//
// Needs ptx, layout, paged, chunks. Expects HEAD_DIM, PAGE_SIZE, BULK.

constexpr u32 ANCESTOR_WORDS = ROW_WORDS - ROW_ANCESTORS;
constexpr u32 HALVES = HEAD_DIM / 64; // a vector is read in pieces of 64 elements
constexpr u32 HALF_BYTES = TILE * 128; // of a tile
constexpr u32 TILE_BYTES = HALVES * HALF_BYTES;

// The row of a tile and the 16-byte chunk of its vector.
__device__ __forceinline__ const unsigned char* place(const unsigned char* tile, u32 row, u32 chunk) {
    return tile + chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

constexpr u32 PAGES = TILE / PAGE_SIZE; // of a tile
constexpr u32 KNOWN_TILES = 32 / PAGES; // tiles whose pages a warp knows, one a lane

// One warp copies the keys or the values of a tile, or of them every PARTS-th two halves: the blocks of its pages lie as the tile
// wants them. Lane l knows page `first_known + l`. The first part is told what bytes will come, of all.
template <u32 PARTS = 1>
__device__ __forceinline__ void copy_tile(unsigned char* stage, u64* full, u32 n_pages, u32 first_known, u32 known, u32 head,
                                          const u16* cache, u32 lane, u32 part = 0) {
    constexpr u32 PIECE = PAGE_SIZE * 128; // bytes that are contiguous in cache and tile
    constexpr u32 CHUNKS = BULK ? 1 : PIECE / 16; // copies of a piece
    constexpr u32 OF_PART = divide_up(HALVES, PARTS);
    constexpr u32 COPIES = PAGES * OF_PART * CHUNKS;
    if (BULK && lane == 0 && part == 0) mbarrier_expect(full, n_pages * HALVES * PIECE);
    __syncwarp();
#pragma unroll(BULK ? 1 : 4)
    for (u32 first = 0; first < COPIES; first += 32) {
        const u32 piece = (first + lane) / CHUNKS, at = (first + lane) % CHUNKS;
        const u32 page = piece / OF_PART, nth = piece % OF_PART, half = PARTS == 1 ? nth : (nth / 2 * PARTS + part) * 2 + nth % 2;
        const u64 block = cache_block(__shfl_sync(FULL_WARP, known, (first_known + page) % 32), head);
        if (page >= n_pages || half >= HALVES) continue;
        const u16* from = cache + block + half * (PAGE_SIZE * 64) + at * 8;
        unsigned char* to = stage + half * HALF_BYTES + page * PIECE + at * 16;
        if (BULK) bulk_copy(to, from, PIECE, full);
        else cp_async16(to, from, true);
    }
    if (!BULK) cp_async_arrive(full);
    __syncwarp();
}

// 64 bits of a row's ancestor words from node `first` on; nodes before 0 are prefix, and seen.
__device__ __forceinline__ u64 window(const u32* words, int first) {
    auto word = [&](int i) { return i >= 0 && i < (int)ANCESTOR_WORDS ? words[i] : i < 0 ? 0xffffffffu : 0u; };
    const int at = first >> 5; // rounds down
    const u32 shift = first & 31;
    const u64 low = word(at) | (u64)word(at + 1) << 32;
    return shift == 0 ? low : low >> shift | (u64)word(at + 2) << (64 - shift);
}
