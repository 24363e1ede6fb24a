// needs: layout formats paged
// Attention over one span of positions, for a tile of query rows of one request: a partial softmax.
//
// A query row is a row of the pass and one query head of the group that shares a kv head. Key i of a row is slot i
// while i < prefix: the same for every row, loaded once a tile, no mask. From there on it is slot prefix + node, node
// being the (i - prefix)-th set bit of the row's ancestor words: the tree corner, looked up row by row. So keys are
// read in position order, and what is added to what depends on positions alone: a node in a tree gets the same sums as
// the same token decoded plainly, whatever shares the pass.
//
//     for each tile of 128 positions of the span:
//         scores   = query · key                      one thread a position
//         weights  = exp(scores - running maximum)    eight threads a query row
//         output   = output * rescale + weights · value   one thread four elements, positions dealt to key groups
//
// `merge` combines the spans. Masked scores are the SENTINEL, never multiplied; a slot outside a row's path is never
// read, so it may hold anything.

// constants-begin
const HEAD_DIM: u32 = 64u;
const HEAD_WORDS: u32 = 32u; // words of one cached vector
const GROUP: u32 = 3u; // query heads that share a kv head
const HEADS: u32 = 9u; // query heads
const KV_HEADS: u32 = 3u;
const CACHE: u32 = 1u; // format of the cache
const PAGE_SIZE: u32 = 16u;
const PAGES_PER_REQUEST: u32 = 128u;
const CACHE_BASE: u32 = 0u; // word of the cache's bindings where the layer begins
const SCALE: f32 = 0.125f; // of the scores
const TILE: u32 = 12u; // query rows of a workgroup
const TILE_ROWS: u32 = 4u; // rows that a tile touches at most
const SPAN: u32 = 128u; // positions of a workgroup, a multiple of 128
const SPANS: u32 = 8u; // spans of the longest context
const ROWS_BEGIN: u32 = 0u; // rows whose partial results this dispatch writes
const ROWS_END: u32 = 16u;
const STATIC_TREE: bool = false; // one tree for all requests, its ancestor words in TREE
const TREE_WORDS: u32 = 2u; // ancestor words of a node
const TREE: array<u32, 1> = array<u32, 1>(0u); // [nodes, TREE_WORDS]
// constants-end

const KEYS: u32 = 128u; // positions of a tile, and threads of a workgroup
const SENTINEL: f32 = -3.0e38;
const SOFTMAX_LANES: u32 = 8u; // threads that share a query row's scores
const COLUMNS: u32 = HEAD_DIM / 4u; // fours of elements of an output
const KEY_GROUPS: u32 = KEYS / COLUMNS;
const PARTIAL: u32 = HEAD_DIM + 2u; // words of a partial result: output, maximum, sum

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>; // [requests, PAGES_PER_REQUEST]
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>; // [rows, HEADS, HEAD_DIM]
@group(0) @binding(4) var<storage, read> k_cache: array<vec4<u32>>; // [pages, KV_HEADS, PAGE_SIZE, HEAD_DIM]
@group(0) @binding(5) var<storage, read> v_cache: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> partials: array<f32>; // [rows, SPANS, HEADS, PARTIAL]

var<workgroup> queries: array<vec4<f32>, TILE * HEAD_DIM / 4u>; // scaled; at the end, the outputs
var<workgroup> scores: array<f32, TILE * KEYS>; // then the weights
var<workgroup> words: array<u32, TILE_ROWS * KEYS>; // where each key lies; the prefix uses the first row alone
var<workgroup> lane_maxima: array<f32, TILE * SOFTMAX_LANES>;
var<workgroup> lane_sums: array<f32, TILE * SOFTMAX_LANES>;
var<workgroup> maxima: array<f32, TILE>;
var<workgroup> sums: array<f32, TILE>;
var<workgroup> rescales: array<f32, TILE>;

// The tile: which request, its first row and its first query row, counted from the request's first.
struct Tile {
    request: u32,
    prefix: u32,
    first_row: u32,
    n_rows: u32,
    first_query: u32,
}

@compute @workgroup_size(KEYS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let tile = find_tile(workgroup.z);
    let kv_head = workgroup.y;
    let begin = workgroup.x * SPAN;
    let end = min(begin + SPAN, keys_of(tile));
    if (begin >= end || !writes(tile)) {
        return;
    }
    load_queries(tile, kv_head, t);
    if (t < TILE) {
        maxima[t] = SENTINEL;
        sums[t] = 0.0;
    }
    var output: array<vec4<f32>, TILE>;
    for (var i = 0u; i < TILE; i++) {
        output[i] = vec4<f32>(0.0);
    }

    let column = t % COLUMNS;
    for (var at = begin; at < end; at += KEYS) {
        workgroupBarrier();
        score(tile, kv_head, at, t);
        workgroupBarrier();
        soften(t);
        workgroupBarrier();
        if (t < KEY_GROUPS * COLUMNS) {
            for (var i = 0u; i < TILE; i++) {
                output[i] *= rescales[i];
            }
            let keys = min(KEYS, end - at);
            let prefix_keys = min(keys, max(tile.prefix, at) - at);
            var key = t / COLUMNS;
            for (; key < prefix_keys; key += KEY_GROUPS) {
                let value = value_four(words[key], column);
                for (var i = 0u; i < TILE; i++) {
                    output[i] = fma(vec4<f32>(scores[i * KEYS + key]), value, output[i]);
                }
            }
            for (; key < keys; key += KEY_GROUPS) {
                for (var i = 0u; i < TILE; i++) {
                    let word = words[place_of(tile, i) * KEYS + key];
                    if (word != NONE) {
                        output[i] = fma(vec4<f32>(scores[i * KEYS + key]), value_four(word, column), output[i]);
                    }
                }
            }
        }
    }

    // Adds up the key groups, one after the other.
    for (var group = 0u; group < KEY_GROUPS; group++) {
        workgroupBarrier();
        if (t / COLUMNS == group) {
            for (var i = 0u; i < TILE; i++) {
                let to = i * COLUMNS + column;
                if (group == 0u) {
                    queries[to] = output[i];
                } else {
                    queries[to] += output[i];
                }
            }
        }
    }
    workgroupBarrier();
    write_partials(tile, kv_head, workgroup.x, t);
}

// Tiles are counted through the requests; behind the last one there is a tile without rows.
fn find_tile(index: u32) -> Tile {
    var left = index;
    for (var request = 0u; request < requests[1]; request++) {
        let at = HEADER_WORDS + request * REQUEST_WORDS;
        let n_rows = requests[at + REQUEST_ROWS];
        let tiles = (n_rows * GROUP + TILE - 1u) / TILE;
        if (left < tiles) {
            return Tile(request, requests[at + REQUEST_PREFIX], requests[at + REQUEST_FIRST_ROW], n_rows, left * TILE);
        }
        left -= tiles;
    }
    return Tile(0u, 0u, 0u, 0u, 0u);
}

// Which of the rows that the tile touches query row i belongs to.
fn place_of(tile: Tile, i: u32) -> u32 {
    return (tile.first_query % GROUP + i) / GROUP;
}

// The row of the pass at that place. Places past the request's end stand for its last row, and are not written.
fn row_at(tile: Tile, place: u32) -> u32 {
    return tile.first_row + min(tile.first_query / GROUP + place, tile.n_rows - 1u);
}

// Keys of a row: the prefix, and the nodes that it sees.
fn keys_of_row(prefix: u32, row: u32) -> u32 {
    var keys = prefix;
    for (var w = 0u; w < TREE_WORDS; w++) {
        keys += countOneBits(ancestor_word(row, w));
    }
    return keys;
}

// Keys of the tile's longest row.
fn keys_of(tile: Tile) -> u32 {
    var keys = 0u;
    if (tile.n_rows > 0u) {
        for (var place = 0u; place < TILE_ROWS; place++) {
            keys = max(keys, keys_of_row(tile.prefix, row_at(tile, place)));
        }
    }
    return keys;
}

// Whether any row of the tile is this dispatch's.
fn writes(tile: Tile) -> bool {
    return row_at(tile, 0u) < ROWS_END && row_at(tile, TILE_ROWS - 1u) >= ROWS_BEGIN;
}

fn load_queries(tile: Tile, kv_head: u32, t: u32) {
    for (var i = t; i < TILE * HEAD_DIM / 4u; i += KEYS) {
        let query = i / (HEAD_DIM / 4u);
        let head = kv_head * GROUP + (tile.first_query + query) % GROUP;
        let row = row_at(tile, place_of(tile, query));
        queries[i] = q[(row * HEADS + head) * (HEAD_DIM / 4u) + i % (HEAD_DIM / 4u)] * SCALE;
    }
}

// Scores of the key at position at + t.
fn score(tile: Tile, kv_head: u32, at: u32, t: u32) {
    let position = at + t;
    if (position < tile.prefix) {
        let word = cache_word(tile.request, position, kv_head);
        words[t] = word;
        var dots: array<f32, TILE>;
        for (var i = 0u; i < TILE; i++) {
            dots[i] = 0.0;
        }
        for (var e = 0u; e < HEAD_DIM / 8u; e++) {
            let key = key_eight(word, e);
            for (var i = 0u; i < TILE; i++) {
                dots[i] = fma8(key, query_eight(i, e), dots[i]);
            }
        }
        for (var i = 0u; i < TILE; i++) {
            scores[i * KEYS + t] = dots[i];
        }
        return;
    }
    for (var place = 0u; place < TILE_ROWS; place++) {
        let node = path_node(row_at(tile, place), position - tile.prefix);
        var word = NONE;
        if (node != NONE) {
            word = cache_word(tile.request, tile.prefix + node, kv_head);
        }
        words[place * KEYS + t] = word;
    }
    for (var i = 0u; i < TILE; i++) {
        let word = words[place_of(tile, i) * KEYS + t];
        var dot = SENTINEL;
        if (word != NONE) {
            dot = 0.0;
            for (var e = 0u; e < HEAD_DIM / 8u; e++) {
                dot = fma8(key_eight(word, e), query_eight(i, e), dot);
            }
        }
        scores[i * KEYS + t] = dot;
    }
}

// The node of this depth on the path to the row's node: the depth-th set bit of its ancestor words.
fn path_node(row: u32, depth: u32) -> u32 {
    var left = depth;
    for (var w = 0u; w < TREE_WORDS; w++) {
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
    return NONE;
}

fn ancestor_word(row: u32, w: u32) -> u32 {
    if (STATIC_TREE) {
        var tree = TREE;
        return tree[rows[row * ROW_WORDS + ROW_NODE] * TREE_WORDS + w];
    }
    return rows[row * ROW_WORDS + ROW_ANCESTORS + w];
}

fn query_eight(i: u32, e: u32) -> Eight {
    let at = i * (HEAD_DIM / 4u) + 2u * e;
    return Eight(queries[at], queries[at + 1u]);
}

// Elements 8 e .. 8 e + 8 of the key that begins at `word`.
fn key_eight(word: u32, e: u32) -> Eight {
    if (CACHE == F32) {
        let at = word / 4u + 2u * e;
        return Eight(bitcast<vec4<f32>>(k_cache[at]), bitcast<vec4<f32>>(k_cache[at + 1u]));
    }
    return widen(CACHE, k_cache[word / 4u + e]);
}

// Elements 4 column .. 4 column + 4 of the value that begins at `word`.
fn value_four(word: u32, column: u32) -> vec4<f32> {
    if (CACHE == F32) {
        let at = word / 2u + 2u * column;
        return bitcast<vec4<f32>>(vec4<u32>(v_cache[at], v_cache[at + 1u]));
    }
    let packed = v_cache[word / 2u + column];
    return vec4<f32>(widen_pair(CACHE, packed.x), widen_pair(CACHE, packed.y));
}

// Scores to weights; moves the running maxima and sums on.
fn soften(t: u32) {
    let lane = t % SOFTMAX_LANES;
    for (var i = t / SOFTMAX_LANES; i < TILE; i += KEYS / SOFTMAX_LANES) {
        var largest = SENTINEL;
        for (var key = lane; key < KEYS; key += SOFTMAX_LANES) {
            largest = max(largest, scores[i * KEYS + key]);
        }
        lane_maxima[i * SOFTMAX_LANES + lane] = largest;
    }
    workgroupBarrier();
    for (var i = t / SOFTMAX_LANES; i < TILE; i += KEYS / SOFTMAX_LANES) {
        let largest = new_maximum(i);
        var total = 0.0;
        for (var key = lane; key < KEYS; key += SOFTMAX_LANES) {
            let s = scores[i * KEYS + key];
            var weight = 0.0;
            if (s != SENTINEL) {
                weight = exp(s - largest);
            }
            scores[i * KEYS + key] = weight;
            total += weight;
        }
        lane_sums[i * SOFTMAX_LANES + lane] = total;
    }
    workgroupBarrier();
    if (t < TILE) {
        let largest = new_maximum(t);
        var rescale = 1.0;
        if (maxima[t] != largest) {
            rescale = exp(max(maxima[t] - largest, -100.0));
        }
        var total = 0.0;
        for (var l = 0u; l < SOFTMAX_LANES; l++) {
            total += lane_sums[t * SOFTMAX_LANES + l];
        }
        sums[t] = fma(sums[t], rescale, total);
        rescales[t] = rescale;
        maxima[t] = largest;
    }
}

fn new_maximum(i: u32) -> f32 {
    var largest = maxima[i];
    for (var l = 0u; l < SOFTMAX_LANES; l++) {
        largest = max(largest, lane_maxima[i * SOFTMAX_LANES + l]);
    }
    return largest;
}

// The partial results of the rows that have keys in this span.
fn write_partials(tile: Tile, kv_head: u32, span: u32, t: u32) {
    for (var i = t; i < TILE * PARTIAL; i += KEYS) {
        let query = i / PARTIAL;
        let element = i % PARTIAL;
        let place = place_of(tile, query);
        let row = row_at(tile, place);
        let is_last = tile.first_query + query >= tile.n_rows * GROUP;
        if (is_last || row < ROWS_BEGIN || row >= ROWS_END || span * SPAN >= keys_of_row(tile.prefix, row)) {
            continue;
        }
        let head = kv_head * GROUP + (tile.first_query + query) % GROUP;
        let to = (((row - ROWS_BEGIN) * SPANS + span) * HEADS + head) * PARTIAL + element;
        if (element < HEAD_DIM) {
            let at = query * HEAD_DIM + element;
            partials[to] = queries[at / 4u][at % 4u];
        } else if (element == HEAD_DIM) {
            partials[to] = maxima[query];
        } else {
            partials[to] = sums[query];
        }
    }
}
