// The best token of a workgroup: largest key, ties to the lowest id.
//
// Needs layout. Workgroups of BEST_THREADS.

const BEST_THREADS: u32 = 256u;

struct Best {
    key: u32,
    id: u32,
}

// Worse than every token.
const NOTHING: Best = Best(0u, NONE);

fn better(a: Best, b: Best) -> Best {
    if (b.key > a.key || (b.key == a.key && b.id < a.id)) {
        return b;
    }
    return a;
}

// Orders numbers as unsigned words: key(a) < key(b) iff a < b. Both zeros have one key; no number has key 0 or
// 0xffffffff. Not for NaN.
fn order_key(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if ((bits & 0x7fffffffu) == 0u) {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, bits >> 31u == 1u);
}

// By its bits: a compiler may assume that comparisons never see one.
fn is_nan(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u;
}

var<workgroup> candidates: array<Best, BEST_THREADS>;

// The best of the candidates of all threads. Every thread must call it.
fn best_of_workgroup(candidate: Best, t: u32) -> Best {
    candidates[t] = candidate;
    for (var stride = BEST_THREADS / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if (t < stride) {
            candidates[t] = better(candidates[t], candidates[t + stride]);
        }
    }
    return workgroupUniformLoad(&candidates[0]);
}
