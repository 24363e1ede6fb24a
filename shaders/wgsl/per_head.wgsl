// needs: layout formats matmul
// out[r, h, i] = weight[h, i] · x[r, h]: each head has a matrix of its own.

// constants-begin
const COLUMNS: u32 = 128u; // elements of a head of x, columns of the weight
const HEADS: u32 = 16u;
const OUT_ROWS: u32 = 512u; // weight rows of a head
const WIDTH: u32 = 576u; // elements of a head of the output, of which the first OUT_ROWS are written
const WEIGHT: u32 = 1u; // format of the weight
const ROWS: u32 = 16u; // rows of the pass
const ROW_TILE: u32 = 8u; // rows that share a weight's load
const GROUPS: u32 = 2u; // groups of lanes in a workgroup
const BANK_BEGIN: u32 = 0u; // first weight row of this bank
const BANK_ROWS: u32 = 8192u; // weight rows in this bank
// constants-end

const NORMED: bool = false;
const EPS: f32 = 0.0;
const OUTPUTS: u32 = 1u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [rows, HEADS, COLUMNS]
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>; // [BANK_ROWS, COLUMNS]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, HEADS, WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: u32;

// Each group multiplies the head of its weight row. Rows past the end are computed like the last one, and not written.
fn x_start(first_row: u32, r: u32) -> u32 {
    let head = (BANK_BEGIN + weight_row) / OUT_ROWS;
    return (min(first_row + r, ROWS - 1u) * HEADS + head) * (COLUMNS / 4u);
}

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    return weight[weight_row * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return vec4<f32>(1.0);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_output = workgroup.x * GROUPS;
    let first_row = workgroup.y * ROW_TILE;
    weight_row = min(first_output + t / LANES, BANK_ROWS - 1u);
    accumulate(first_row, t % LANES);
    let total = reduce(0u, t);

    let row = first_row + t % ROW_TILE;
    let output = first_output + t / ROW_TILE;
    if (t < RESULTS && output < BANK_ROWS && row < requests[0]) {
        let head = (BANK_BEGIN + output) / OUT_ROWS;
        out[(row * HEADS + head) * WIDTH + (BANK_BEGIN + output) % OUT_ROWS] = total;
    }
}
