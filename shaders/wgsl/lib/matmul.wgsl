// Weight rows times up to ROW_TILE rows of x: the loop that all weight kernels share.
//
// A workgroup is GROUPS groups of 32 lanes. A group works on OUTPUTS weight rows at a time; its lanes share the
// columns, eight at a step. A weight is read and widened once for all rows of the tile. The root mean square norm is
// linear but for one factor a row, so its sum of squares is gathered on the way and applied to the result:
//
//     y[o, r] = inv_rms(r) * sum over k of (weight[o, k] * gamma[k]) * x[r, k]
//
// The order of a row's sums depends on COLUMNS alone, never on how many rows share the pass.
//
// Expects COLUMNS, ROW_TILE <= 16, GROUPS, OUTPUTS, WEIGHT, NORMED, EPS; x: array<vec4<f32>>; and
//     x_start(first_row, r) -> u32            where row r of the tile begins in x, in fours: see `x_rows`
//     weight_words(output, at) -> vec4<u32>   the at-th four words of the weight row for `output`
//     gamma_words(at) -> vec4<f32>            elements 4 at .. 4 at + 4 of the norm's weight, or ones

const LANES: u32 = 32u;
const THREADS: u32 = GROUPS * LANES;
// One more than the lanes: rows of this length start in different memory banks.
const STRIDE: u32 = LANES + 1u;
// Values that `reduce` returns: thread t < RESULTS gets group t / ROW_TILE, row t % ROW_TILE of the tile.
const RESULTS: u32 = GROUPS * ROW_TILE;

// The sums of this thread's columns.
var<private> sums: array<array<f32, ROW_TILE>, OUTPUTS>;
var<private> squares: array<f32, ROW_TILE>;
var<workgroup> lane_sums: array<f32, RESULTS * STRIDE>;
var<workgroup> lane_squares: array<f32, ROW_TILE * STRIDE>;

fn weight_eight(output: u32, at: u32) -> Eight {
    if (WEIGHT == F32) {
        let lo = weight_words(output, 2u * at);
        let hi = weight_words(output, 2u * at + 1u);
        return Eight(bitcast<vec4<f32>>(lo), bitcast<vec4<f32>>(hi));
    }
    return widen(WEIGHT, weight_words(output, at));
}

// Fills `sums` and `squares` with the products of the tile's rows, which begin at `first_row`.
fn accumulate(first_row: u32, lane: u32) {
    for (var r = 0u; r < ROW_TILE; r++) {
        squares[r] = 0.0;
        for (var o = 0u; o < OUTPUTS; o++) {
            sums[o][r] = 0.0;
        }
    }
    for (var at = lane; at < COLUMNS / 8u; at += LANES) {
        let gamma = Eight(gamma_words(2u * at), gamma_words(2u * at + 1u));
        var scaled: array<Eight, OUTPUTS>;
        for (var o = 0u; o < OUTPUTS; o++) {
            let weight = weight_eight(o, at);
            scaled[o] = Eight(weight.lo * gamma.lo, weight.hi * gamma.hi);
        }
        for (var r = 0u; r < ROW_TILE; r++) {
            let start = x_start(first_row, r) + 2u * at;
            let values = Eight(x[start], x[start + 1u]);
            if (NORMED) {
                squares[r] = fma8(values, values, squares[r]);
            }
            for (var o = 0u; o < OUTPUTS; o++) {
                sums[o][r] = fma8(scaled[o], values, sums[o][r]);
            }
        }
    }
}

// Adds up the lanes of one output. Valid in threads t < RESULTS. All threads must call it.
fn reduce(output: u32, t: u32) -> f32 {
    let group = t / LANES;
    let lane = t % LANES;
    workgroupBarrier();
    for (var r = 0u; r < ROW_TILE; r++) {
        lane_sums[(group * ROW_TILE + r) * STRIDE + lane] = sums[output][r];
        if (NORMED && group == 0u) {
            lane_squares[r * STRIDE + lane] = squares[r];
        }
    }
    workgroupBarrier();
    if (t >= RESULTS) {
        return 0.0;
    }
    var total = 0.0;
    for (var l = 0u; l < LANES; l++) {
        total += lane_sums[t * STRIDE + l];
    }
    return total;
}

// The norm's factor for row r of the tile, once `reduce` has run.
fn inv_rms(r: u32) -> f32 {
    if (!NORMED) {
        return 1.0;
    }
    var total = 0.0;
    for (var l = 0u; l < LANES; l++) {
        total += lane_squares[r * STRIDE + l];
    }
    return inverseSqrt(total / f32(COLUMNS) + EPS);
}
