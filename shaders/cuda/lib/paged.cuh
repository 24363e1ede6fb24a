// Where a slot of a request lies in the paged cache of one layer, [pages, KV_HEADS, a block of PAGE_SIZE vectors].
//
// In a tiled cache a block is [HEAD_DIM / 64][PAGE_SIZE][64], and the 16-byte chunks of each 64 elements are permuted by
// the slot, chunk c at c ^ (slot % 8): copied to shared memory as it is, it is read by ldmatrix and wgmma without bank
// conflicts. Else a block is [PAGE_SIZE][HEAD_DIM]. kernel-gen/src/cuda.rs says which caches are tiled.
//
// Needs ptx, formats. Expects HEAD_DIM, KV_HEADS, PAGE_SIZE, CACHE, PAGES_PER_REQUEST, TILED.

// First element of the block of `page` and `head`.
__device__ __forceinline__ u64 cache_block(u32 page, u32 head) {
    return ((u64)page * KV_HEADS + head) * (PAGE_SIZE * HEAD_DIM);
}

// Element `d` of the vector of `slot` of the page, in its block.
__device__ __forceinline__ u32 cache_place(u32 slot, u32 d) {
    if (!TILED) return slot * HEAD_DIM + d;
    return (d / 64 * PAGE_SIZE + slot) * 64 + (d % 64 / 8 ^ slot % 8) * 8 + d % 8;
}

// Element `d` of the vector of `head` at `slot` of a request.
__device__ __forceinline__ u64 cache_element(const u32* pages, u32 request, u32 slot, u32 head, u32 d) {
    const u32 page = pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE];
    return cache_block(page, head) + cache_place(slot % PAGE_SIZE, d);
}

// Four neighbours from element `d` of a vector on, rounded.
__device__ __forceinline__ void store_cached(void* cache, u64 block, u32 slot, u32 d, float4 v) {
    const u64 at = block + cache_place(slot, d);
    if (CACHE == F32) *(float4*)((float*)cache + at) = v;
    else *(uint2*)((u16*)cache + at) = make_uint2(narrow_pair(CACHE, v.x, v.y), narrow_pair(CACHE, v.z, v.w));
}
