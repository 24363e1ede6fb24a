// needs: layout formats matmul x_rows paged
// q, k, v = rms_norm(x[r]) · weightᵀ + bias; q and k heads normed and turned by their position; k and v cached.
//
// Rope turns elements i and i + D/2 of a head together, so a group works on such a pair of weight rows. A workgroup
// takes PAIRS pairs, GROUPS at a time: where heads are normed, all pairs of one head.

// constants-begin
const COLUMNS: u32 = 576u; // elements of a row of x, columns of the weight
const HEAD_DIM: u32 = 64u;
const HEAD_WORDS: u32 = 32u; // words of one cached vector
const HEADS: u32 = 9u; // query heads
const KV_HEADS: u32 = 3u;
const EPS: f32 = 1e-5f; // of the norms
const WEIGHT: u32 = 1u; // format of the weight
const CACHE: u32 = 1u; // format of the cache
const PAGE_SIZE: u32 = 16u;
const PAGES_PER_REQUEST: u32 = 128u;
const CACHE_BASE: u32 = 0u; // word of the cache's binding where the layer begins
const BIAS: bool = false;
const BIAS_VECTORS: u32 = 1u; // of four elements
const Q_NORM: bool = false;
const K_NORM: bool = false;
const Q_NORM_VECTORS: u32 = 1u; // of four elements
const K_NORM_VECTORS: u32 = 1u; // of four elements
const ROWS: u32 = 16u; // rows of the pass
const REQUESTS: u32 = 4u; // most requests of a pass
const ROW_TILE: u32 = 16u; // rows that share a weight's load
const GROUPS: u32 = 8u; // groups of lanes in a workgroup
const PAIRS: u32 = 8u; // pairs of outputs of a workgroup, even
const BANK_BEGIN: u32 = 0u; // first head of this bank: q heads, then k heads, then v heads
const BANK_HEADS: u32 = 15u; // heads in this bank
// constants-end

const NORMED: bool = true;
const OUTPUTS: u32 = 2u;
const HALF: u32 = HEAD_DIM / 2u;

// The small ones are uniforms, because eight storage buffers are all that every device has.
@group(0) @binding(0) var<uniform> rows: array<vec4<u32>, ROWS * ROW_WORDS / 4u>;
@group(0) @binding(1) var<uniform> requests: array<vec4<u32>, (HEADER_WORDS + REQUESTS * REQUEST_WORDS) / 4u>;
@group(0) @binding(2) var<uniform> bias: array<vec4<f32>, BIAS_VECTORS>; // [heads of all kinds, HEAD_DIM]
@group(0) @binding(3) var<uniform> q_norm: array<vec4<f32>, Q_NORM_VECTORS>; // [HEAD_DIM]
@group(0) @binding(4) var<uniform> k_norm: array<vec4<f32>, K_NORM_VECTORS>; // [HEAD_DIM]
@group(0) @binding(5) var<storage, read> pages: array<u32>; // [requests, PAGES_PER_REQUEST]
@group(0) @binding(6) var<storage, read> x: array<vec4<f32>>; // [rows, COLUMNS]
@group(0) @binding(7) var<storage, read> gamma: array<vec4<f32>>; // [COLUMNS]
@group(0) @binding(8) var<storage, read> weight: array<vec4<u32>>; // [BANK_HEADS * HEAD_DIM, COLUMNS]
@group(0) @binding(9) var<storage, read> rope: array<vec2<f32>>; // [positions, HALF]: cos, sin
@group(0) @binding(10) var<storage, read_write> q: array<f32>; // [rows, HEADS, HEAD_DIM]
@group(0) @binding(11) var<storage, read_write> k_cache: array<u32>; // [pages, KV_HEADS, PAGE_SIZE, HEAD_DIM]
@group(0) @binding(12) var<storage, read_write> v_cache: array<u32>;

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: array<u32, OUTPUTS>;
// Outputs of the workgroup before norm and rope: elements i and i + HALF of a head. [PAIRS, ROW_TILE]
var<workgroup> pairs: array<vec2<f32>, PAIRS * ROW_TILE>;
// What the norm over the head multiplies with, or one.
var<workgroup> head_factors: array<f32, ROW_TILE>;

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    return weight[weight_row[output] * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return gamma[at];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_row = workgroup.y * ROW_TILE;
    let first_pair = workgroup.x * PAIRS;
    for (var block = 0u; block < PAIRS; block += GROUPS) {
        multiply(first_row, first_pair, block, t);
    }
    workgroupBarrier();
    if (t < ROW_TILE) {
        head_factors[t] = head_factor(t, BANK_BEGIN + first_pair / HALF);
    }
    workgroupBarrier();

    // Two neighbouring pairs at a time, because two elements of a 16-bit cache share a word.
    for (var i = t; i < PAIRS / 2u * ROW_TILE; i += THREADS) {
        let pair = 2u * (i / ROW_TILE);
        let row = first_row + i % ROW_TILE;
        if (first_pair + pair < BANK_HEADS * HALF && row < requests[0].x) {
            finish(row, first_pair + pair, pairs[pair * ROW_TILE + i % ROW_TILE],
                pairs[(pair + 1u) * ROW_TILE + i % ROW_TILE], head_factors[i % ROW_TILE]);
        }
    }
}

// GROUPS pairs of outputs, with bias, into `pairs`.
fn multiply(first_row: u32, first_pair: u32, block: u32, t: u32) {
    let mine = min(first_pair + block + t / LANES, BANK_HEADS * HALF - 1u);
    weight_row[0] = mine / HALF * HEAD_DIM + mine % HALF;
    weight_row[1] = weight_row[0] + HALF;
    accumulate(first_row, t % LANES);
    var pair = vec2<f32>(reduce(0u, t), 0.0);
    pair.y = reduce(1u, t);

    let place = block + t / ROW_TILE;
    if (t < RESULTS && place < PAIRS) {
        pair *= inv_rms(t % ROW_TILE);
        if (BIAS) {
            let global = min(first_pair + place, BANK_HEADS * HALF - 1u);
            let at = (BANK_BEGIN + global / HALF) * HEAD_DIM + global % HALF;
            pair += vec2<f32>(bias[at / 4u][at % 4u], bias[(at + HALF) / 4u][(at + HALF) % 4u]);
        }
        pairs[place * ROW_TILE + t % ROW_TILE] = pair;
    }
}

fn is_normed(head: u32) -> bool {
    return (Q_NORM && head < HEADS) || (K_NORM && head >= HEADS && head < HEADS + KV_HEADS);
}

// 1 / rms of the workgroup's head for row r of the tile, if it is normed.
fn head_factor(r: u32, head: u32) -> f32 {
    if (!is_normed(head)) {
        return 1.0;
    }
    var total = 0.0;
    for (var p = 0u; p < PAIRS; p++) {
        let pair = pairs[p * ROW_TILE + r];
        total = fma(pair.x, pair.x, total);
        total = fma(pair.y, pair.y, total);
    }
    return inverseSqrt(total / f32(HEAD_DIM) + EPS);
}

// Norms, turns and writes two neighbouring pairs, the first at place `index` among the bank's pairs.
fn finish(row: u32, index: u32, first: vec2<f32>, second: vec2<f32>, factor: f32) {
    let head = BANK_BEGIN + index / HALF;
    let i = index % HALF;
    let info = rows[row * ROW_WORDS / 4u]; // token, position, request, node
    var lo = vec2<f32>(first.x, second.x); // elements i, i + 1
    var hi = vec2<f32>(first.y, second.y); // elements i + HALF, i + HALF + 1
    if (is_normed(head)) {
        lo *= factor * norm_weight(head, i);
        hi *= factor * norm_weight(head, i + HALF);
    }
    if (head < HEADS + KV_HEADS) {
        let turn = min(info.y, arrayLength(&rope) / HALF - 1u) * HALF + i;
        let cos = vec2<f32>(rope[turn].x, rope[turn + 1u].x);
        let sin = vec2<f32>(rope[turn].y, rope[turn + 1u].y);
        let turned = lo * cos - hi * sin;
        hi = hi * cos + lo * sin;
        lo = turned;
    }
    if (head < HEADS) {
        let to = (row * HEADS + head) * HEAD_DIM + i;
        q[to] = lo.x;
        q[to + 1u] = lo.y;
        q[to + HALF] = hi.x;
        q[to + HALF + 1u] = hi.y;
        return;
    }
    let kv_head = (head - HEADS) % KV_HEADS;
    let slot = requests[(HEADER_WORDS + info.z * REQUEST_WORDS) / 4u].x + info.w;
    let to = cache_word(info.z, slot, kv_head);
    if (head < HEADS + KV_HEADS) {
        if (CACHE == F32) {
            k_cache[to + i] = bitcast<u32>(lo.x);
            k_cache[to + i + 1u] = bitcast<u32>(lo.y);
            k_cache[to + i + HALF] = bitcast<u32>(hi.x);
            k_cache[to + i + HALF + 1u] = bitcast<u32>(hi.y);
        } else {
            k_cache[to + i / 2u] = narrow_pair(CACHE, lo);
            k_cache[to + (i + HALF) / 2u] = narrow_pair(CACHE, hi);
        }
    } else if (CACHE == F32) {
        v_cache[to + i] = bitcast<u32>(lo.x);
        v_cache[to + i + 1u] = bitcast<u32>(lo.y);
        v_cache[to + i + HALF] = bitcast<u32>(hi.x);
        v_cache[to + i + HALF + 1u] = bitcast<u32>(hi.y);
    } else {
        v_cache[to + i / 2u] = narrow_pair(CACHE, lo);
        v_cache[to + (i + HALF) / 2u] = narrow_pair(CACHE, hi);
    }
}

// Elements i and i + 1 of the norm's weight for this kind of head.
fn norm_weight(head: u32, i: u32) -> vec2<f32> {
    if (head < HEADS) {
        return vec2<f32>(q_norm[i / 4u][i % 4u], q_norm[i / 4u][i % 4u + 1u]);
    }
    return vec2<f32>(k_norm[i / 4u][i % 4u], k_norm[i / 4u][i % 4u + 1u]);
}
