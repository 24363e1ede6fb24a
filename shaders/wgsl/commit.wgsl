// needs: layout batch paged
// Moves the accepted rows of one cache next to the prefix: slot L + path[i] to slot L + i, in every layer and head.
//
// One workgroup takes one layer, head and request; each thread moves its own words of all path entries, in ascending
// order. Path ids ascend and path[i] >= i, so no source is overwritten before it is read, and no barrier is needed.

// constants-begin
const HEAD_WORDS: u32 = 32u; // words of one cached vector
const KV_HEADS: u32 = 3u;
const PAGE_SIZE: u32 = 16u;
const PAGES_PER_REQUEST: u32 = 128u;
const CACHE_BASE: u32 = 0u; // word of the cache's binding where its first layer begins
const LAYER_WORDS: u32 = 196608u; // words of one layer
// constants-end

const THREADS: u32 = 64u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> pages: array<u32>; // [requests, PAGES_PER_REQUEST]
@group(0) @binding(2) var<storage, read> accepted: array<u32>; // [requests, ACCEPTED_WORDS]
@group(0) @binding(3) var<storage, read_write> cache: array<u32>; // [layers, pages, KV_HEADS, PAGE_SIZE, HEAD_WORDS]

// Workgroups: [KV_HEADS, layers, requests].
@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let request = workgroup.z;
    if (request >= requests[1]) {
        return;
    }
    let prefix = read_request(request).prefix;
    let layer = workgroup.y * LAYER_WORDS;
    let n_path = accepted[request * ACCEPTED_WORDS];
    for (var i = 1u; i < n_path; i++) {
        let node = accepted[request * ACCEPTED_WORDS + 1u + i];
        if (node == i) {
            continue;
        }
        let old_place = layer + cache_word(request, prefix + node, workgroup.x);
        let new_place = layer + cache_word(request, prefix + i, workgroup.x);
        for (var word = t; word < HEAD_WORDS; word += THREADS) {
            cache[new_place + word] = cache[old_place + word];
        }
    }
}
