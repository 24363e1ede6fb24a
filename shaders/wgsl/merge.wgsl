// needs: layout ancestors
// Combines the partial softmaxes of a row's spans, in position order: one thread an element of the output.

// constants-begin
const HEAD_DIM: u32 = 64u;
const HEADS: u32 = 9u; // query heads
const SPAN: u32 = 256u; // positions of a partial result
const SPANS: u32 = 8u; // spans of the longest context
const ROWS_BEGIN: u32 = 0u; // rows of this dispatch
const ROWS_END: u32 = 16u;
// constants-end

const SENTINEL: f32 = -3.0e38;
const PARTIAL: u32 = HEAD_DIM + 2u; // words of a partial result: output, maximum, sum

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> partials: array<f32>; // [rows, SPANS, HEADS, PARTIAL]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [rows, HEADS, HEAD_DIM]

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let head = id.x / HEAD_DIM;
    let element = id.x % HEAD_DIM;
    let row = ROWS_BEGIN + id.y;
    if (head >= HEADS || row >= min(ROWS_END, requests[0])) {
        return;
    }
    let request = rows[row * ROW_WORDS + ROW_REQUEST];
    let keys = requests[HEADER_WORDS + request * REQUEST_WORDS + REQUEST_PREFIX] + path_length(row);
    let spans = (keys + SPAN - 1u) / SPAN;
    let stride = HEADS * PARTIAL;
    let first = (id.y * SPANS * HEADS + head) * PARTIAL;
    var largest = SENTINEL;
    for (var span = 0u; span < spans; span++) {
        largest = max(largest, partials[span * stride + first + HEAD_DIM]);
    }
    var total = 0.0;
    var sum = 0.0;
    for (var span = 0u; span < spans; span++) {
        let at = span * stride + first;
        let factor = exp(max(partials[at + HEAD_DIM] - largest, -100.0));
        total = fma(partials[at + element], factor, total);
        sum = fma(partials[at + HEAD_DIM + 1u], factor, sum);
    }
    out[(row * HEADS + head) * HEAD_DIM + element] = total / sum;
}
