// needs: layout formats matmul x_rows
// Heads of rms_norm(x[r]) · weightᵀ: the first NOPE elements of each go to `nope`, the others, turned by the row's
// position, to the end of the head's `q`.
//
// Rope turns elements i and i + ROTATED / 2 together, so a group works on such a pair of weight rows; of what is not turned
// a pair is an element of each half.

// constants-begin
const COLUMNS: u32 = 2048u; // elements of a row of x, columns of the weight
const HEADS: u32 = 16u;
const NOPE: u32 = 128u; // elements of a head that are not turned
const ROTATED: u32 = 64u; // and that are
const Q_WIDTH: u32 = 576u; // elements of a head of q
const EPS: f32 = 1e-6f; // of the norm
const WEIGHT: u32 = 1u; // format of the weight
const ROWS: u32 = 16u; // rows of the pass
const ROW_TILE: u32 = 8u; // rows that share a weight's load
const GROUPS: u32 = 2u; // groups of lanes in a workgroup
const BANK_BEGIN: u32 = 0u; // first head of this bank
const BANK_HEADS: u32 = 16u; // heads in this bank
// constants-end

const NORMED: bool = true;
const OUTPUTS: u32 = 2u;
const PAIRS: u32 = (NOPE + ROTATED) / 2u; // of a head

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [rows, COLUMNS]
@group(0) @binding(3) var<storage, read> gamma: array<vec4<f32>>; // [COLUMNS]
@group(0) @binding(4) var<storage, read> weight: array<vec4<u32>>; // [BANK_HEADS * (NOPE + ROTATED), COLUMNS]
@group(0) @binding(5) var<storage, read> rope: array<vec2<f32>>; // [positions, ROTATED / 2]: cos, sin
@group(0) @binding(6) var<storage, read_write> nope: array<f32>; // [rows, HEADS, NOPE]
@group(0) @binding(7) var<storage, read_write> q: array<f32>; // [rows, HEADS, Q_WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: array<u32, OUTPUTS>;

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    return weight[weight_row[output] * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return gamma[at];
}

// The elements of a pair within a head.
fn elements_of(pair: u32) -> vec2<u32> {
    if (pair < NOPE / 2u) {
        return vec2(pair, pair + NOPE / 2u);
    }
    return vec2(pair + NOPE / 2u, pair + NOPE / 2u + ROTATED / 2u);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_pair = workgroup.x * GROUPS;
    let first_row = workgroup.y * ROW_TILE;
    let mine = min(first_pair + t / LANES, BANK_HEADS * PAIRS - 1u);
    let elements = mine / PAIRS * (NOPE + ROTATED) + elements_of(mine % PAIRS);
    weight_row[0] = elements.x;
    weight_row[1] = elements.y;
    accumulate(first_row, t % LANES);
    var pair = vec2<f32>(reduce(0u, t), 0.0);
    pair.y = reduce(1u, t);

    let row = first_row + t % ROW_TILE;
    let index = first_pair + t / ROW_TILE;
    if (t < RESULTS && index < BANK_HEADS * PAIRS && row < requests[0]) {
        finish(row, BANK_BEGIN + index / PAIRS, index % PAIRS, pair * inv_rms(t % ROW_TILE));
    }
}

fn finish(row: u32, head: u32, index: u32, pair: vec2<f32>) {
    let elements = elements_of(index);
    if (index < NOPE / 2u) {
        let to = (row * HEADS + head) * NOPE;
        nope[to + elements.x] = pair.x;
        nope[to + elements.y] = pair.y;
        return;
    }
    const HALF = ROTATED / 2u;
    let position = min(rows[row * ROW_WORDS + ROW_POSITION], arrayLength(&rope) / HALF - 1u);
    let turn = rope[position * HALF + index - NOPE / 2u];
    let to = (row * HEADS + head) * Q_WIDTH + Q_WIDTH - ROTATED - NOPE;
    q[to + elements.x] = fma(pair.x, turn.x, -(pair.y * turn.y));
    q[to + elements.y] = fma(pair.y, turn.x, pair.x * turn.y);
}
