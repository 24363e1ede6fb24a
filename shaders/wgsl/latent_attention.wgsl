// needs: layout ancestors formats paged
// Attention to the latents of one span of positions, for one row and a tile of its heads: a partial softmax.
//
// All heads read the same keys, which are their own values but for the rotated end: a latent is loaded once for a tile. Key i
// of a row is slot i while i < prefix, from there on slot prefix + node, node being the (i - prefix)-th set bit of the row's
// ancestor words. What is added to what depends on positions alone. `merge` combines the spans.
//
//     scores  = query · key            one thread a position, for half of the heads
//     weights = exp(scores - maximum)  sixteen threads a head
//     output  = weights · latent       one thread four elements, positions dealt to key groups

// constants-begin
const HEAD_DIM: u32 = 576u; // elements of a key: a latent and what is turned
const LATENT: u32 = 512u; // elements of a value
const HEAD_WORDS: u32 = 288u; // words of one cached vector
const HEADS: u32 = 16u;
const CACHE: u32 = 1u; // format of the cache
const PAGE_SIZE: u32 = 16u;
const PAGES_PER_REQUEST: u32 = 128u;
const CACHE_BASE: u32 = 0u; // word of the cache's bindings where the layer begins
const SCALE: f32 = 0.07216878f; // of the scores
const TILE: u32 = 16u; // heads of a workgroup, at most 16
const SPAN: u32 = 128u; // positions of a workgroup
const SPANS: u32 = 16u; // spans of the longest context
const ROWS_BEGIN: u32 = 0u; // rows whose partial results this dispatch writes
const ROWS_END: u32 = 16u;
// constants-end

const THREADS: u32 = 256u;
const KV_HEADS: u32 = 1u;
const SENTINEL: f32 = -3.0e38;
const PARTS: u32 = THREADS / SPAN; // of the tile, for the scores
const PART: u32 = (TILE + PARTS - 1u) / PARTS; // heads of a part
const LANES: u32 = 16u; // threads that share a head's scores
const COLUMNS: u32 = LATENT / 4u; // fours of elements of an output
const KEY_GROUPS: u32 = THREADS / COLUMNS;
const PARTIAL: u32 = LATENT + 2u; // words of a partial result: output, maximum, sum

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>; // [requests, PAGES_PER_REQUEST]
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>; // [rows, HEADS, HEAD_DIM]
@group(0) @binding(4) var<storage, read> keys: array<vec4<u32>>; // [pages, 1, PAGE_SIZE, HEAD_DIM]
@group(0) @binding(5) var<storage, read> values: array<vec2<u32>>; // the same
@group(0) @binding(6) var<storage, read_write> partials: array<f32>; // [rows, SPANS, HEADS, PARTIAL]

var<workgroup> words: array<u32, SPAN>; // where each key lies
var<workgroup> scores: array<f32, TILE * SPAN>; // then the weights
var<workgroup> lanes: array<f32, THREADS>;
var<workgroup> maxima: array<f32, TILE>;
var<workgroup> sums: array<f32, TILE>;
var<workgroup> groups: array<vec4<f32>, KEY_GROUPS * COLUMNS>;

// Workgroups: [spans, tiles of heads, rows].
@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = ROWS_BEGIN + workgroup.z;
    if (row >= min(ROWS_END, requests[0])) {
        return;
    }
    let request = rows[row * ROW_WORDS + ROW_REQUEST];
    let prefix = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX];
    let begin = workgroup.x * SPAN;
    let end = min(begin + SPAN, prefix + path_length(row));
    if (begin >= end) {
        return;
    }
    let count = end - begin;
    let first_head = workgroup.y * TILE;
    if (t < count) {
        var slot = begin + t;
        if (slot >= prefix) {
            slot = prefix + path_node(row, slot - prefix);
        }
        words[t] = cache_word(request, slot, 0u);
    }
    workgroupBarrier();
    score(row, first_head, count, t);
    workgroupBarrier();
    soften(count, t);
    workgroupBarrier();

    var output: array<vec4<f32>, TILE>;
    for (var i = 0u; i < TILE; i++) {
        output[i] = vec4<f32>(0.0);
    }
    if (t < KEY_GROUPS * COLUMNS) {
        for (var key = t / COLUMNS; key < count; key += KEY_GROUPS) {
            let value = value_four(words[key], t % COLUMNS);
            for (var i = 0u; i < TILE; i++) {
                output[i] = fma(vec4<f32>(scores[i * SPAN + key]), value, output[i]);
            }
        }
    }
    // Adds up the key groups, one after the other.
    for (var i = 0u; i < TILE; i++) {
        workgroupBarrier();
        if (t < KEY_GROUPS * COLUMNS) {
            groups[t] = output[i];
        }
        workgroupBarrier();
        if (t < COLUMNS && first_head + i < HEADS) {
            var total = groups[t];
            for (var group = 1u; group < KEY_GROUPS; group++) {
                total += groups[group * COLUMNS + t];
            }
            let to = partial_of(workgroup.z, workgroup.x, first_head + i) + 4u * t;
            for (var e = 0u; e < 4u; e++) {
                partials[to + e] = total[e];
            }
        }
    }
    if (t < TILE && first_head + t < HEADS) {
        let to = partial_of(workgroup.z, workgroup.x, first_head + t);
        partials[to + LATENT] = maxima[t];
        partials[to + LATENT + 1u] = sums[t];
    }
}

fn partial_of(row: u32, span: u32, head: u32) -> u32 {
    return ((row * SPANS + span) * HEADS + head) * PARTIAL;
}

// The node of this depth on the path to the row's node: the depth-th set bit of its ancestor words.
fn path_node(row: u32, depth: u32) -> u32 {
    var left = depth;
    for (var w = 0u; w < ANCESTOR_WORDS; w++) {
        var word = ancestor_word(row, w);
        let n = countOneBits(word);
        if (left < n) {
            for (; left > 0u; left--) {
                word &= word - 1u;
            }
            return w * 32u + firstTrailingBit(word);
        }
        left -= n;
    }
    return 0u;
}

// Scores of a key, for a part of the tile.
fn score(row: u32, first_head: u32, count: u32, t: u32) {
    let key = t % SPAN;
    let first = t / SPAN * PART;
    if (key >= count) {
        return;
    }
    let word = words[key];
    var dots: array<f32, PART>;
    for (var i = 0u; i < PART; i++) {
        dots[i] = 0.0;
    }
    for (var e = 0u; e < HEAD_DIM / 8u; e++) {
        let eight = key_eight(word, e);
        for (var i = 0u; i < PART; i++) {
            // Heads past the last are computed like it, and not written.
            let head = min(first_head + first + i, HEADS - 1u);
            let at = (row * HEADS + head) * (HEAD_DIM / 4u) + 2u * e;
            dots[i] = fma8(eight, Eight(q[at], q[at + 1u]), dots[i]);
        }
    }
    for (var i = 0u; i < PART; i++) {
        if (first + i < TILE) {
            scores[(first + i) * SPAN + key] = dots[i] * SCALE;
        }
    }
}

// Elements 8 e .. 8 e + 8 of the key that begins at `word`.
fn key_eight(word: u32, e: u32) -> Eight {
    if (CACHE == F32) {
        let at = word / 4u + 2u * e;
        return Eight(bitcast<vec4<f32>>(keys[at]), bitcast<vec4<f32>>(keys[at + 1u]));
    }
    return widen(CACHE, keys[word / 4u + e]);
}

// Elements 4 column .. 4 column + 4 of the latent that begins at `word`.
fn value_four(word: u32, column: u32) -> vec4<f32> {
    if (CACHE == F32) {
        let at = word / 2u + 2u * column;
        return bitcast<vec4<f32>>(vec4<u32>(values[at], values[at + 1u]));
    }
    let packed = values[word / 2u + column];
    return vec4<f32>(widen_pair(CACHE, packed.x), widen_pair(CACHE, packed.y));
}

// Scores to weights. Its barriers are for all threads, also those without a head.
fn soften(count: u32, t: u32) {
    let i = t / LANES;
    let lane = t % LANES;
    var largest = SENTINEL;
    if (i < TILE) {
        for (var key = lane; key < count; key += LANES) {
            largest = max(largest, scores[i * SPAN + key]);
        }
    }
    lanes[t] = largest;
    workgroupBarrier();
    for (var l = 0u; l < LANES; l++) {
        largest = max(largest, lanes[i * LANES + l]);
    }
    workgroupBarrier();
    var total = 0.0;
    if (i < TILE) {
        for (var key = lane; key < count; key += LANES) {
            let weight = exp(scores[i * SPAN + key] - largest);
            scores[i * SPAN + key] = weight;
            total += weight;
        }
    }
    lanes[t] = total;
    workgroupBarrier();
    if (lane == 0u && i < TILE) {
        var sum = 0.0;
        for (var l = 0u; l < LANES; l++) {
            sum += lanes[i * LANES + l];
        }
        maxima[i] = largest;
        sums[i] = sum;
    }
}
