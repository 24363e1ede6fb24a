// needs: layout batch philox
// logits[r] = logits[r] / temperature + gumbel: what `draw` ranks at the row's position. One thread takes four tokens.

// constants-begin
const VOCAB: u32 = 49152u;
// constants-end

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>; // [rows, VOCAB]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.y;
    if (row >= requests[0] || 4u * id.x >= VOCAB) {
        return;
    }
    let request = read_request(rows[row * ROW_WORDS + ROW_REQUEST]);
    // Colder than this, no noise outweighs a difference between logits.
    if (request.temperature < 1e-30f) {
        return;
    }
    let words = noise(id.x, rows[row * ROW_WORDS + ROW_POSITION], request.sample, request.seed);
    let loudness = gumbel(words);
    let inverse_temperature = 1.0f / request.temperature;
    for (var token = 4u * id.x; token < min(4u * id.x + 4u, VOCAB); token++) {
        let at = row * VOCAB + token;
        logits[at] = logits[at] * inverse_temperature + loudness[token % 4u];
    }
}
