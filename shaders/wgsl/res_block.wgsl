// needs: layout formats
// out[r] = s + silu(weight[head] · s + bias[head]): the residual block of a Medusa head, s being the hidden state of the row
// that r's node names, and the head the one for r's depth. One thread computes an element.

// constants-begin
const HIDDEN: u32 = 576u;
const WEIGHT: u32 = 1u; // format of the weight
const BANK_BEGIN: u32 = 0u; // first weight row of this bank
const BANK_ROWS: u32 = 2880u; // weight rows in this bank
// constants-end

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> states: array<vec4<f32>>; // [rows, HIDDEN]
@group(0) @binding(3) var<storage, read> weight: array<vec4<u32>>; // [BANK_ROWS, HIDDEN]
@group(0) @binding(4) var<storage, read> bias: array<f32>; // [heads * HIDDEN]
@group(0) @binding(5) var<storage, read_write> out: array<f32>; // [rows, HIDDEN]

const STEPS: u32 = HIDDEN / 8u * (1u + u32(WEIGHT == F32));

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.y;
    if (row >= requests[0] || id.x >= BANK_ROWS) {
        return;
    }
    let words = row * ROW_WORDS;
    let prefix = requests[HEADER_WORDS + rows[words + ROW_REQUEST] * REQUEST_WORDS + REQUEST_PREFIX];
    let output = BANK_BEGIN + id.x;
    if (output / HIDDEN != rows[words + ROW_POSITION] - prefix) {
        return;
    }
    let first = rows[words + ROW_NODE] * (HIDDEN / 4u);
    var sum = 0.0;
    for (var e = 0u; e < HIDDEN / 8u; e++) {
        var w: Eight;
        if (WEIGHT == F32) {
            let at = id.x * STEPS + 2u * e;
            w = Eight(bitcast<vec4<f32>>(weight[at]), bitcast<vec4<f32>>(weight[at + 1u]));
        } else {
            w = widen(WEIGHT, weight[id.x * STEPS + e]);
        }
        sum = fma8(w, Eight(states[first + 2u * e], states[first + 2u * e + 1u]), sum);
    }
    sum += bias[output];
    let element = output % HIDDEN;
    out[row * HIDDEN + element] = states[first + element / 4u][element % 4u] + sum / (1.0 + exp(-sum));
}
