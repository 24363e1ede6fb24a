// out[r] = states[sources[r]]. One thread copies an element.

// constants-begin
const COLUMNS: u32 = 576u; // elements of a row
// constants-end

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> sources: array<u32>; // [rows]
@group(0) @binding(2) var<storage, read> states: array<f32>; // [rows, COLUMNS]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, COLUMNS]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.y;
    if (row >= requests[0] || id.x >= COLUMNS) {
        return;
    }
    out[row * COLUMNS + id.x] = states[sources[row] * COLUMNS + id.x];
}
