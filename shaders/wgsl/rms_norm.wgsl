// needs: layout
// out[r] = x[r] / rms(x[r]) * gamma. One workgroup takes a row.

// constants-begin
const COLUMNS: u32 = 576u; // elements of a row
const EPS: f32 = 1e-5f;
// constants-end

const THREADS: u32 = 64u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> x: array<f32>; // [rows, COLUMNS]
@group(0) @binding(2) var<storage, read> gamma: array<f32>; // [COLUMNS]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, COLUMNS]

var<workgroup> sums: array<f32, THREADS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = workgroup.x;
    if (row >= requests[0]) {
        return;
    }
    var mine = 0.0;
    for (var i = t; i < COLUMNS; i += THREADS) {
        mine = fma(x[row * COLUMNS + i], x[row * COLUMNS + i], mine);
    }
    sums[t] = mine;
    for (var stride = THREADS / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if (t < stride) {
            sums[t] += sums[t + stride];
        }
    }
    let factor = inverseSqrt(workgroupUniformLoad(&sums[0]) / f32(COLUMNS) + EPS);
    for (var i = t; i < COLUMNS; i += THREADS) {
        out[row * COLUMNS + i] = x[row * COLUMNS + i] * factor * gamma[i];
    }
}
