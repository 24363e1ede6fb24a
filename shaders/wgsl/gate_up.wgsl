// needs: layout formats matmul x_rows
// out[r, i] = silu(g[i]) * u[i], where g and u are the halves of rms_norm(x[r]) · weightᵀ
//
// A group works on a gate row and the up row that belongs to it. Both halves are bound on their own, because a large
// weight lies in banks; a binding begins at most a few rows early, where the device's alignment asks for it.

// constants-begin
const COLUMNS: u32 = 576u; // elements of a row of x, columns of the weight
const WIDTH: u32 = 1536u; // elements of a row of the output
const EPS: f32 = 1e-5f; // of the norm
const WEIGHT: u32 = 1u; // format of the weight
const ROWS: u32 = 16u; // rows of the pass
const ROW_TILE: u32 = 16u; // rows that share a weight's load
const GROUPS: u32 = 8u; // groups of lanes in a workgroup
const GATE_BASE: u32 = 0u; // where the gate rows begin in their binding, in four words
const UP_BASE: u32 = 0u; // where the up rows begin in their binding, in four words
const BANK_BEGIN: u32 = 0u; // first output of this dispatch
const BANK_ROWS: u32 = 1536u; // outputs of this dispatch
// constants-end

const NORMED: bool = true;
const OUTPUTS: u32 = 2u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [rows, COLUMNS]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>; // [COLUMNS]
@group(0) @binding(3) var<storage, read> gate: array<vec4<u32>>; // [BANK_ROWS, COLUMNS]
@group(0) @binding(4) var<storage, read> up: array<vec4<u32>>; // [BANK_ROWS, COLUMNS]
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // [rows, WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: u32;

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    if (output == 0u) {
        return gate[GATE_BASE + weight_row * WEIGHT_STEPS + at];
    }
    return up[UP_BASE + weight_row * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return gamma[at];
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_output = workgroup.x * GROUPS;
    let first_row = workgroup.y * ROW_TILE;
    weight_row = min(first_output + t / LANES, BANK_ROWS - 1u);
    accumulate(first_row, t % LANES);
    let gate_sum = reduce(0u, t);
    let up_sum = reduce(1u, t);

    let row = first_row + t % ROW_TILE;
    let output = first_output + t / ROW_TILE;
    if (t < RESULTS && output < BANK_ROWS && row < requests[0]) {
        let factor = inv_rms(t % ROW_TILE);
        let g = gate_sum * factor;
        out[row * WIDTH + BANK_BEGIN + output] = g / (1.0 + exp(-g)) * (up_sum * factor);
    }
}
