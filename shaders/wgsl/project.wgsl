// needs: layout formats matmul x_rows
// residual[r] += x[r] · weightᵀ, or without ADD just =

// constants-begin
const COLUMNS: u32 = 576u; // elements of a row of x, columns of the weight
const WIDTH: u32 = 576u; // elements of a row of the residual
const ADD: bool = true;
const WEIGHT: u32 = 1u; // format of the weight
const ROWS: u32 = 16u; // rows of the pass
const ROW_TILE: u32 = 16u; // rows that share a weight's load
const GROUPS: u32 = 8u; // groups of lanes in a workgroup
const OUTPUTS: u32 = 1u; // weight rows a group works on at a time
const BANK_BEGIN: u32 = 0u; // first weight row of this bank
const BANK_ROWS: u32 = 576u; // weight rows in this bank
// constants-end

const NORMED: bool = false;
const EPS: f32 = 0.0;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [rows, COLUMNS]
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>; // [BANK_ROWS, COLUMNS]
@group(0) @binding(3) var<storage, read_write> residual: array<f32>; // [rows, WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: array<u32, OUTPUTS>;

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    return weight[weight_row[output] * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return vec4<f32>(1.0);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_output = workgroup.x * OUTPUTS * GROUPS;
    let first_row = workgroup.y * ROW_TILE;
    for (var o = 0u; o < OUTPUTS; o++) {
        weight_row[o] = min(first_output + o * GROUPS + t / LANES, BANK_ROWS - 1u);
    }
    accumulate(first_row, t % LANES);

    let row = first_row + t % ROW_TILE;
    for (var o = 0u; o < OUTPUTS; o++) {
        let total = reduce(o, t);
        let output = first_output + o * GROUPS + t / ROW_TILE;
        if (t < RESULTS && output < BANK_ROWS && row < requests[0]) {
            let at = row * WIDTH + BANK_BEGIN + output;
            residual[at] = select(total, residual[at] + total, ADD);
        }
    }
}
