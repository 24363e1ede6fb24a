// What the blocks of tree attention have to do: units of rows, cut into chunks of tiles of keys.
//
// A *unit* is a request, a kv head and a slab of M of the request's packed rows. Units are cut so that all clusters of the
// grid have about the same to do, by lengths that are read on the device: a captured graph serves any.
//
// Needs ptx, layout. Expects KV_HEADS, GROUP, M, CLUSTER, MIN_CHUNK.

constexpr u32 TILE = 64; // keys

// What a cluster has to do next: a chunk of a unit.
struct Item {
    u32 request;
    u32 head;
    u32 slab;
    u32 chunk, chunks;
    u32 tile, end; // tiles of the chunk
    u32 cut; // index among the chunks of units that have several
};

__device__ __forceinline__ constexpr u32 divide_up(u32 a, u32 b) { return (a + b - 1) / b; }

struct Request {
    u32 prefix, first_row, n_rows;
    u32 keys; // slots that some row may see
};

// Without rows and keys unless it exists.
__device__ __forceinline__ Request read_request(const u32* rows, const u32* requests, u32 index, bool exists = true) {
    const u32* words = requests + HEADER_WORDS + index * REQUEST_WORDS;
    Request r = {words[REQUEST_PREFIX], words[REQUEST_FIRST_ROW], words[REQUEST_ROWS], 0};
    if (!exists) r.n_rows = 0;
    // Rows come in node order: the last one has the highest slot.
    if (r.n_rows > 0) r.keys = r.prefix + rows[(r.first_row + r.n_rows - 1) * ROW_WORDS + ROW_NODE] + 1;
    return r;
}

constexpr u32 KNOWN_REQUESTS = MAX_REQUESTS < 32 ? MAX_REQUESTS : 32; // that a block keeps: reading one takes two loads, one after the other

// The same in every thread that asks: how long chunks are, and which chunk comes at a place in the order of all.
struct Schedule {
    const u32* rows;
    const u32* requests;
    Request* known; // the first requests, in shared memory
    u32 n_requests;
    u32 chunk; // most tiles of a chunk: these three are planned

    __device__ Request request(u32 index) const {
        return index < KNOWN_REQUESTS ? known[index] : read_request(rows, requests, index, index < n_requests);
    }

    // Units of a request and tiles of each. A lane past the last request has none.
    __device__ void size(u32 index, u32& units, u32& tiles) const {
        units = tiles = 0;
        if (index >= MAX_REQUESTS) return;
        const Request r = request(index);
        units = divide_up(r.n_rows * GROUP, M) * KV_HEADS;
        tiles = divide_up(r.keys, TILE);
    }

    __device__ static u32 sum(u32 value) {
#pragma unroll
        for (u32 step = 16; step > 0; step /= 2) value += __shfl_xor_sync(FULL_WARP, value, step);
        return value;
    }

    // Whole warps call it. All that do leave the same in `known`.
    __device__ void plan(u32 clusters, u32 lane) {
        n_requests = min(requests[1], MAX_REQUESTS);
        if (lane < KNOWN_REQUESTS) known[lane] = read_request(rows, requests, lane, lane < n_requests);
        __syncwarp();
        u32 units, tiles, all_units = 0, all_tiles = 0;
        for (u32 first = 0; first < n_requests; first += 32) {
            size(first + lane, units, tiles);
            all_units += sum(units);
            all_tiles += sum(units * tiles);
        }
        chunk = max(divide_up(all_tiles, clusters), MIN_CHUNK);
        // Fewer units than clusters: about the shortest chunks with which one round of clusters does all.
        if (all_units > clusters) return;
        while (true) {
            u32 chunks = 0;
            for (u32 first = 0; first < n_requests; first += 32) {
                size(first + lane, units, tiles);
                chunks += sum(units * divide_up(tiles, chunk));
            }
            if (chunks <= clusters) return;
            chunk += chunk / 32 + 1;
        }
    }

    // False past the last chunk. Whole warps call it.
    __device__ bool find(u32 index, u32 lane, Item& item) const {
        u32 before = 0, cuts = 0;
        for (u32 first = 0; first < n_requests; first += 32) {
            u32 units, tiles;
            size(first + lane, units, tiles);
            const u32 chunks = divide_up(tiles, chunk), mine = units * chunks;
            u32 upto = mine, cut_upto = chunks > 1 ? mine : 0;
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                const u32 other = __shfl_up_sync(FULL_WARP, upto, step), cut = __shfl_up_sync(FULL_WARP, cut_upto, step);
                if (lane >= step) upto += other, cut_upto += cut;
            }
            const u32 here = __ballot_sync(FULL_WARP, index < before + upto);
            if (here != 0) {
                const u32 owner = __ffs(here) - 1;
                const u32 n = __shfl_sync(FULL_WARP, chunks, owner), all = __shfl_sync(FULL_WARP, tiles, owner);
                const u32 at = index - before - __shfl_sync(FULL_WARP, upto - mine, owner);
                const u32 unit = at / n;
                item.request = first + owner;
                item.head = unit % KV_HEADS;
                item.slab = unit / KV_HEADS;
                item.chunk = at % n;
                item.chunks = n;
                item.tile = all * item.chunk / n;
                item.end = all * (item.chunk + 1) / n;
                item.cut = cuts + __shfl_sync(FULL_WARP, cut_upto - (chunks > 1 ? mine : 0), owner) + at;
                return true;
            }
            before += __shfl_sync(FULL_WARP, upto, 31);
            cuts += __shfl_sync(FULL_WARP, cut_upto, 31);
        }
        return false;
    }
};

__device__ __forceinline__ u32 cluster_rank_or_zero() { return CLUSTER == 1 ? 0 : cluster_rank(); }

// This block's share of a chunk's tiles. The last block, which has the tiles that test ancestors, gets no more than others.
__device__ __forceinline__ void share(Item& item) {
    if (CLUSTER == 1) return;
    const u32 rank = cluster_rank(), n = item.end - item.tile, begin = item.tile;
    item.tile = begin + divide_up(n * rank, CLUSTER);
    item.end = begin + divide_up(n * (rank + 1), CLUSTER);
}
