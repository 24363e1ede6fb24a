// needs: layout formats
// out[r] = table[token(r)], widened to f32. One thread widens eight elements.
//
// A table too large for one binding lies in banks of whole rows; each dispatch serves the tokens of its bank.

// constants-begin
const COLUMNS: u32 = 576u; // elements of a table row
const WEIGHT: u32 = 1u; // format of the table
const BANK_BEGIN: u32 = 0u; // first token of this bank
const BANK_ROWS: u32 = 49152u; // tokens in this bank
// constants-end

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>; // [rows, COLUMNS]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let at = id.x;
    let row = id.y;
    if (at >= COLUMNS / 8u || row >= requests[0]) {
        return;
    }
    let token = rows[row * ROW_WORDS + ROW_TOKEN];
    if (token < BANK_BEGIN || token >= BANK_BEGIN + BANK_ROWS) {
        return;
    }
    let start = (token - BANK_BEGIN) * (COLUMNS / 8u) + at;
    var values: Eight;
    if (WEIGHT == F32) {
        values = Eight(bitcast<vec4<f32>>(table[2u * start]), bitcast<vec4<f32>>(table[2u * start + 1u]));
    } else {
        values = widen(WEIGHT, table[start]);
    }
    let to = row * (COLUMNS / 4u) + 2u * at;
    out[to] = values.lo;
    out[to + 1u] = values.hi;
}
