// logits[r] = -infinity where row r must not draw a token: its bit in `allowed` is not set. One thread takes one token.

// constants-begin
const VOCAB: u32 = 49152u;
// constants-end

const ALLOWED_WORDS: u32 = (VOCAB + 31u) / 32u;
// By its bits: WGSL has no infinite constants.
const MINUS_INFINITY: u32 = 0xff800000u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> allowed: array<u32>; // [rows, ALLOWED_WORDS]
@group(0) @binding(2) var<storage, read_write> logits: array<u32>; // [rows, VOCAB]

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let token = id.x;
    let row = id.y;
    if (row >= requests[0] || token >= VOCAB) {
        return;
    }
    let word = allowed[row * ALLOWED_WORDS + token / 32u];
    if (((word >> (token % 32u)) & 1u) == 0u) {
        logits[row * VOCAB + token] = MINUS_INFINITY;
    }
}
