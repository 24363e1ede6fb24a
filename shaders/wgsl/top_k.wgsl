// needs: layout best
// ids[r], values[r] = the K largest logits of row r, descending, ties to the lowest id.
//
// One workgroup ranks one row. Thread t owns the tokens t, t + THREADS, .. and holds the best of those not yet taken. Each
// round takes the best of all threads; then all threads together look through the tokens of the one that owned it.

// constants-begin
const VOCAB: u32 = 49152u;
const K: u32 = 8u;
// constants-end

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> logits: array<f32>; // [rows, VOCAB]
@group(0) @binding(2) var<storage, read_write> ids: array<u32>; // [rows, K]
@group(0) @binding(3) var<storage, read_write> values: array<f32>; // [rows, K]

// NaN ranks below every number.
fn rank(row: u32, token: u32) -> Best {
    let x = logits[row * VOCAB + token];
    if (is_nan(x)) {
        return Best(0u, token);
    }
    return Best(order_key(x), token);
}

fn comes_after(candidate: Best, taken: Best) -> bool {
    return candidate.key < taken.key || (candidate.key == taken.key && candidate.id > taken.id);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row = workgroup.x;
    if (row >= requests[0]) {
        return;
    }
    var mine = NOTHING;
    for (var token = t; token < VOCAB; token += THREADS) {
        mine = better(mine, rank(row, token));
    }

    for (var round = 0u; round < K; round++) {
        let taken = best_of_workgroup(mine, t);
        if (t == 0u) {
            ids[row * K + round] = taken.id;
            values[row * K + round] = logits[row * VOCAB + taken.id];
        }
        let owner = taken.id % THREADS;
        var next = NOTHING;
        for (var token = owner + THREADS * t; token < VOCAB; token += THREADS * THREADS) {
            let candidate = rank(row, token);
            if (comes_after(candidate, taken)) {
                next = better(next, candidate);
            }
        }
        next = best_of_workgroup(next, t);
        if (t == owner) {
            mine = next;
        }
    }
}
