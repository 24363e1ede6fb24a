// needs: layout formats matmul experts
// out[r, j, i] = silu(g[i]) * u[i], where g and u are the halves of rms_norm(x[r]) · weightᵀ of row r's j-th expert
//
// A group works on a gate row and the up row that belongs to it. Both may lie in different banks: a dispatch serves the
// outputs, counted through all experts, whose gate rows lie in one bank and whose up rows lie in one.

// constants-begin
const COLUMNS: u32 = 2048u; // elements of a row of x, columns of the weight
const EXPERTS: u32 = 64u;
const CHOSEN: u32 = 6u; // experts of a row
const WIDTH: u32 = 1408u; // outputs of an expert
const EPS: f32 = 1e-6f; // of the norm
const WEIGHT: u32 = 1u; // format of the weight
const ROW_TILE: u32 = 4u; // entries that share a weight's load
const GROUPS: u32 = 4u; // groups of lanes in a workgroup
const GATE_FIRST: u32 = 0u; // weight row with which the gate rows' bank begins
const UP_FIRST: u32 = 0u; // weight row with which the up rows' bank begins
const BANK_BEGIN: u32 = 0u; // first output of this dispatch
const BANK_ROWS: u32 = 90112u; // outputs of this dispatch
// constants-end

const NORMED: bool = true;
const OUTPUTS: u32 = 2u;

@group(0) @binding(0) var<storage, read> groups: array<u32>; // [EXPERTS + 1 + entries]
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [rows, COLUMNS]
@group(0) @binding(2) var<storage, read> gamma: array<vec4<f32>>; // [COLUMNS]
@group(0) @binding(3) var<storage, read> gate: array<vec4<u32>>; // [rows of the bank, COLUMNS]
@group(0) @binding(4) var<storage, read> up: array<vec4<u32>>; // [rows of the bank, COLUMNS]
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // [rows, CHOSEN, WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> gate_row: u32;
var<private> up_row: u32;
var<private> starts: array<u32, ROW_TILE>;

fn x_start(first_row: u32, r: u32) -> u32 {
    return starts[r];
}

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    if (output == 0u) {
        return gate[gate_row * WEIGHT_STEPS + at];
    }
    return up[up_row * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return gamma[at];
}

// Workgroups: [WIDTH / GROUPS, entries].
@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let tile = find_tile(workgroup.y);
    let first_output = tile.expert * WIDTH + workgroup.x * GROUPS;
    if (tile.count == 0u || first_output + GROUPS <= BANK_BEGIN || first_output >= BANK_BEGIN + BANK_ROWS) {
        return;
    }
    for (var r = 0u; r < ROW_TILE; r++) {
        starts[r] = entry_at(tile, r) / CHOSEN * (COLUMNS / 4u);
    }
    let mine = clamp(first_output + t / LANES, BANK_BEGIN, BANK_BEGIN + BANK_ROWS - 1u);
    gate_row = mine / WIDTH * 2u * WIDTH + mine % WIDTH - GATE_FIRST;
    up_row = mine / WIDTH * 2u * WIDTH + WIDTH + mine % WIDTH - UP_FIRST;
    accumulate(0u, t % LANES);
    let gate_sum = reduce(0u, t);
    let up_sum = reduce(1u, t);

    let place = t / ROW_TILE;
    let output = first_output + place;
    let is_here = output >= BANK_BEGIN && output < BANK_BEGIN + BANK_ROWS && workgroup.x * GROUPS + place < WIDTH;
    if (t < RESULTS && is_here && t % ROW_TILE < tile.count) {
        let factor = inv_rms(t % ROW_TILE);
        let g = gate_sum * factor;
        out[entry_at(tile, t % ROW_TILE) * WIDTH + output % WIDTH] = g / (1.0 + exp(-g)) * (up_sum * factor);
    }
}
