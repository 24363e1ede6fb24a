// needs: layout formats matmul experts
// out[r, j] = x[r, j] · weightᵀ of row r's j-th expert

// constants-begin
const COLUMNS: u32 = 1408u; // elements of an entry of x, columns of the weight
const EXPERTS: u32 = 64u;
const WIDTH: u32 = 2048u; // outputs of an expert
const WEIGHT: u32 = 1u; // format of the weight
const ROW_TILE: u32 = 4u; // entries that share a weight's load
const GROUPS: u32 = 4u; // groups of lanes in a workgroup
const BANK_BEGIN: u32 = 0u; // first weight row of this bank
const BANK_ROWS: u32 = 131072u; // weight rows in this bank
// constants-end

const NORMED: bool = false;
const EPS: f32 = 0.0;
const OUTPUTS: u32 = 1u;

@group(0) @binding(0) var<storage, read> groups: array<u32>; // [EXPERTS + 1 + entries]
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [entries, COLUMNS]
@group(0) @binding(2) var<storage, read> weight: array<vec4<u32>>; // [BANK_ROWS, COLUMNS]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [entries, WIDTH]

const WEIGHT_STEPS: u32 = COLUMNS / 8u * (1u + u32(WEIGHT == F32));
var<private> weight_row: u32;
var<private> starts: array<u32, ROW_TILE>;

fn x_start(first_row: u32, r: u32) -> u32 {
    return starts[r];
}

fn weight_words(output: u32, at: u32) -> vec4<u32> {
    return weight[weight_row * WEIGHT_STEPS + at];
}

fn gamma_words(at: u32) -> vec4<f32> {
    return vec4<f32>(1.0);
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
        starts[r] = entry_at(tile, r) * (COLUMNS / 4u);
    }
    weight_row = clamp(first_output + t / LANES, BANK_BEGIN, BANK_BEGIN + BANK_ROWS - 1u) - BANK_BEGIN;
    accumulate(0u, t % LANES);
    let total = reduce(0u, t);

    let place = t / ROW_TILE;
    let output = first_output + place;
    let is_here = output >= BANK_BEGIN && output < BANK_BEGIN + BANK_ROWS && workgroup.x * GROUPS + place < WIDTH;
    if (t < RESULTS && is_here && t % ROW_TILE < tile.count) {
        out[entry_at(tile, t % ROW_TILE) * WIDTH + output % WIDTH] = total;
    }
}
