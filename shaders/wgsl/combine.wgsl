// needs: layout
// residual[r] += sum over j of weights[r, j] * x[r, j], by ascending j. One thread computes an element.

// constants-begin
const CHOSEN: u32 = 6u; // experts of a row
const WIDTH: u32 = 2048u; // elements of a row of the residual
// constants-end

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>; // [rows, CHOSEN, WIDTH]
@group(0) @binding(2) var<storage, read> weights: array<f32>; // [rows, CHOSEN]
@group(0) @binding(3) var<storage, read_write> residual: array<f32>; // [rows, WIDTH]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let row = id.y;
    if (row >= requests[0] || id.x >= WIDTH) {
        return;
    }
    var sum = 0.0;
    for (var j = 0u; j < CHOSEN; j++) {
        let entry = row * CHOSEN + j;
        sum = fma(weights[entry], x[entry * WIDTH + id.x], sum);
    }
    residual[row * WIDTH + id.x] += sum;
}
