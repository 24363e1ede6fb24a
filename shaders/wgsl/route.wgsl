// needs: layout best
// experts[r] = the CHOSEN experts of row r by falling score, ties to the lowest; weights[r] = what each counts for.
//
// `head` has left the logits. One workgroup takes a row, a thread every 256th expert. Scores are made of the logits;
// experts are ranked by score plus bias, and only those of the groups worth most may be chosen.

// constants-begin
const EXPERTS: u32 = 64u; // at most 512
const CHOSEN: u32 = 6u; // experts of a row, at most 16
const SIGMOID: bool = false; // scores are sigmoids; else a softmax
const GROUPS: u32 = 1u; // groups of experts, of one size
const TOP_GROUPS: u32 = 1u; // groups from which experts are chosen
const TWO_LARGEST: bool = false; // a group is worth its two best experts; else its best
const NORMALISE: bool = false; // weights add up to SCALE
const SCALE: f32 = 1.0f;
const BIAS: bool = false;
// constants-end

const THREADS: u32 = BEST_THREADS;
const GROUP: u32 = EXPERTS / GROUPS; // experts of a group
const LOWEST: f32 = -3.0e38;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // [rows, EXPERTS]
@group(0) @binding(2) var<storage, read> bias: array<f32>; // [EXPERTS]
@group(0) @binding(3) var<storage, read_write> experts: array<u32>; // [rows, CHOSEN]
@group(0) @binding(4) var<storage, read_write> weights: array<f32>; // [rows, CHOSEN]

var<workgroup> scores: array<f32, EXPERTS>;
var<workgroup> ranked: array<f32, EXPERTS>; // score and bias
var<workgroup> worths: array<f32, GROUPS>;
// Whether it may still be chosen.
var<workgroup> is_open: array<u32, EXPERTS>;
var<workgroup> is_group_open: array<u32, GROUPS>;
var<workgroup> thread_sums: array<f32, THREADS>;
var<workgroup> chosen: array<u32, CHOSEN>;

// NaN ranks below every number.
fn key_of(x: f32) -> u32 {
    return select(order_key(x), 1u, is_nan(x));
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = workgroup.x;
    if (row >= requests[0]) {
        return;
    }
    make_scores(row, t);
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        ranked[expert] = scores[expert];
        if (BIAS) {
            ranked[expert] += bias[expert];
        }
        is_open[expert] = u32(TOP_GROUPS == GROUPS);
    }
    if (TOP_GROUPS < GROUPS) {
        open_best_groups(t);
    }
    for (var round = 0u; round < CHOSEN; round++) {
        var mine = NOTHING;
        for (var expert = t; expert < EXPERTS; expert += THREADS) {
            if (is_open[expert] == 1u) {
                mine = better(mine, Best(key_of(ranked[expert]), expert));
            }
        }
        let best = best_of_workgroup(mine, t).id;
        if (t == best % THREADS) {
            is_open[best] = 0u;
            chosen[round] = best;
        }
    }
    workgroupBarrier();
    if (t < CHOSEN) {
        var total = 1.0;
        if (NORMALISE) {
            total = 0.0;
            for (var j = 0u; j < CHOSEN; j++) {
                total += scores[chosen[j]];
            }
            total += 1e-20;
        }
        experts[row * CHOSEN + t] = chosen[t];
        weights[row * CHOSEN + t] = scores[chosen[t]] / total * SCALE;
    }
}

fn make_scores(row: u32, t: u32) {
    if (SIGMOID) {
        for (var expert = t; expert < EXPERTS; expert += THREADS) {
            scores[expert] = 1.0 / (1.0 + exp(-logits[row * EXPERTS + expert]));
        }
        return;
    }
    var mine = NOTHING;
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        mine = better(mine, Best(key_of(logits[row * EXPERTS + expert]), expert));
    }
    let largest = logits[row * EXPERTS + best_of_workgroup(mine, t).id];
    var sum = 0.0;
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        scores[expert] = exp(logits[row * EXPERTS + expert] - largest);
        sum += scores[expert];
    }
    thread_sums[t] = sum;
    for (var stride = THREADS / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if (t < stride) {
            thread_sums[t] += thread_sums[t + stride];
        }
    }
    let total = workgroupUniformLoad(&thread_sums[0]);
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        scores[expert] /= total;
    }
}

// The experts of the groups worth most may be chosen. A group's thread looks at all its experts.
fn open_best_groups(t: u32) {
    workgroupBarrier();
    for (var group = t; group < GROUPS; group += THREADS) {
        var largest = LOWEST;
        var second = LOWEST;
        for (var expert = group * GROUP; expert < (group + 1u) * GROUP; expert++) {
            second = max(second, min(largest, ranked[expert]));
            largest = max(largest, ranked[expert]);
        }
        worths[group] = largest;
        if (TWO_LARGEST) {
            worths[group] += second;
        }
        is_group_open[group] = 1u;
    }
    for (var round = 0u; round < TOP_GROUPS; round++) {
        var mine = NOTHING;
        for (var group = t; group < GROUPS; group += THREADS) {
            if (is_group_open[group] == 1u) {
                mine = better(mine, Best(key_of(worths[group]), group));
            }
        }
        let best = best_of_workgroup(mine, t).id;
        if (t == best % THREADS) {
            is_group_open[best] = 0u;
        }
    }
    workgroupBarrier();
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        is_open[expert] = 1u - is_group_open[expert / GROUP];
    }
}
