// needs: layout formats paged
// What latent attention keeps of a row: of y[r], which `head` has left, the compressed query is copied, the latent behind it
// normed and cached, and behind it the key, turned by the row's position. One workgroup takes a row.

// constants-begin
const COMPRESSED: u32 = 0u; // elements of a compressed query
const LATENT: u32 = 512u; // elements of a latent
const HEAD_DIM: u32 = 576u; // elements of a latent and its key
const HEAD_WORDS: u32 = 288u; // words of them in the cache
const EPS: f32 = 1e-6f; // of the latent's norm
const CACHE: u32 = 1u; // format of the cache
const PAGE_SIZE: u32 = 16u;
const PAGES_PER_REQUEST: u32 = 128u;
const CACHE_BASE: u32 = 0u; // word of the cache's binding where the layer begins
// constants-end

const THREADS: u32 = 64u;
const KV_HEADS: u32 = 1u;
const WIDTH: u32 = COMPRESSED + HEAD_DIM;
const HALF: u32 = (HEAD_DIM - LATENT) / 2u;

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> pages: array<u32>; // [requests, PAGES_PER_REQUEST]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [rows, WIDTH], only read
@group(0) @binding(4) var<storage, read> gamma: array<f32>; // [LATENT]
@group(0) @binding(5) var<storage, read> rope: array<vec2<f32>>; // [positions, HALF]: cos, sin
@group(0) @binding(6) var<storage, read_write> compressed: array<f32>; // [rows, COMPRESSED]
@group(0) @binding(7) var<storage, read_write> cache: array<u32>; // [pages, 1, PAGE_SIZE, HEAD_DIM]

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = workgroup.x;
    if (row >= requests[0]) {
        return;
    }
    for (var i = t; i < COMPRESSED; i += THREADS) {
        compressed[row * COMPRESSED + i] = y[row * WIDTH + i];
    }
    let first = row * WIDTH + COMPRESSED;
    var mine = 0.0;
    for (var i = t; i < LATENT; i += THREADS) {
        mine = fma(y[first + i], y[first + i], mine);
    }
    sums[t] = mine;
    for (var stride = THREADS / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if (t < stride) {
            sums[t] += sums[t + stride];
        }
    }
    let factor = inverseSqrt(workgroupUniformLoad(&sums[0]) / f32(LATENT) + EPS);

    let at = row * ROW_WORDS;
    let request = rows[at + ROW_REQUEST];
    let slot = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX] + rows[at + ROW_NODE];
    let turns = min(rows[at + ROW_POSITION], arrayLength(&rope) / HALF - 1u) * HALF;
    let to = cache_word(request, slot, 0u);
    for (var word = t; word < HEAD_WORDS; word += THREADS) {
        if (CACHE == F32) {
            cache[to + word] = bitcast<u32>(kept(first, word, factor, turns));
        } else {
            let pair = vec2(kept(first, 2u * word, factor, turns), kept(first, 2u * word + 1u, factor, turns));
            cache[to + word] = narrow_pair(CACHE, pair);
        }
    }
}

// Element i of what is cached.
fn kept(first: u32, i: u32, factor: f32, turns: u32) -> f32 {
    let value = y[first + i];
    if (i < LATENT) {
        return value * factor * gamma[i];
    }
    let turn = rope[turns + (i - LATENT) % HALF];
    if (i < LATENT + HALF) {
        return fma(value, turn.x, -(y[first + i + HALF] * turn.y));
    }
    return fma(value, turn.x, y[first + i - HALF] * turn.y);
}
