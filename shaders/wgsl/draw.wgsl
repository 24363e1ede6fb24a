// needs: layout batch ancestors philox best
// draws[r] = the target's own token at row r: repetition penalty, temperature, top-k, top-p, min-p, then Gumbel-max.
//
// One workgroup draws one row. The three filters keep a token by its logit alone, so together they are one floor: the
// smallest key that is kept. Top-k and top-p find theirs bit by bit, as the largest key for which the tokens of at least
// that key have a given mass; that is exact, and costs 32 looks at the row. Without filters one look is all.

// constants-begin
const VOCAB: u32 = 49152u;
// constants-end

const THREADS: u32 = 256u;
const GROUPS: u32 = (VOCAB + 3u) / 4u; // tokens go by fours, as the noise does
const SEEN_WORDS: u32 = (VOCAB + 31u) / 32u;
const NAN_KEY: u32 = 0xffffffffu;
const FILTER_WORDS: u32 = 256u;

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> seen: array<u32>; // [requests, SEEN_WORDS]
@group(0) @binding(3) var<storage, read> logits: array<f32>; // [rows, VOCAB]
@group(0) @binding(4) var<storage, read_write> draws: array<u32>; // [rows]

var<private> row: u32;
var<private> request_index: u32;
var<private> penalty: f32;

// Tokens of the row and its ancestors, and a bit for each token's low bits: no bit, not on the path.
var<workgroup> path_tokens: array<u32, MAX_NODES>;
var<workgroup> path_filter: array<atomic<u32>, FILTER_WORDS>;
var<workgroup> sums: array<f32, THREADS>;

fn collect_path(first_row: u32, t: u32) {
    if (is_ancestor(row, t)) {
        let token = rows[(first_row + t) * ROW_WORDS + ROW_TOKEN];
        path_tokens[depth_on_path(row, t)] = token;
        atomicOr(&path_filter[token / 32u % FILTER_WORDS], 1u << (token % 32u));
    }
    workgroupBarrier();
}

fn is_penalised(token: u32) -> bool {
    let bit = 1u << (token % 32u);
    if ((seen[request_index * SEEN_WORDS + token / 32u] & bit) != 0u) {
        return true;
    }
    if ((atomicLoad(&path_filter[token / 32u % FILTER_WORDS]) & bit) == 0u) {
        return false;
    }
    let n = path_length(row);
    for (var i = 0u; i < n; i++) {
        if (path_tokens[i] == token) {
            return true;
        }
    }
    return false;
}

// The token's logit after the penalty. Reads the last token's where there is none, for the caller to ignore.
fn logit(token: u32) -> f32 {
    let known = min(token, VOCAB - 1u);
    let x = logits[row * VOCAB + known];
    if (penalty == 1.0f || !is_penalised(known)) {
        return x;
    }
    return select(x * penalty, x / penalty, x > 0.0f);
}

fn logits_of(group: u32) -> vec4<f32> {
    return vec4(logit(4u * group), logit(4u * group + 1u), logit(4u * group + 2u), logit(4u * group + 3u));
}

// The best of `mine` and a token of logit `x`; a NaN beats everything and is no token.
fn consider(mine: Best, token: u32, x: f32, score: f32) -> Best {
    if (is_nan(x)) {
        return Best(NAN_KEY, NONE);
    }
    if (token >= VOCAB) {
        return mine;
    }
    return better(mine, Best(order_key(score), token));
}

fn argmax(t: u32) -> Best {
    var mine = NOTHING;
    for (var group = t; group < GROUPS; group += THREADS) {
        let x = logits_of(group);
        for (var i = 0u; i < 4u; i++) {
            mine = consider(mine, 4u * group + i, x[i], x[i]);
        }
    }
    return best_of_workgroup(mine, t);
}

// What the tokens weigh: one each, or exp((logit - largest) / temperature).
struct Weigh {
    by_mass: bool,
    largest: f32,
    inverse_temperature: f32,
}

// The weight of all tokens whose key is at least `key`.
fn weight_at_least(key: u32, weigh: Weigh, t: u32) -> f32 {
    var mine = 0.0f;
    for (var group = t; group < GROUPS; group += THREADS) {
        let x = logits_of(group);
        let weight = exp(max((x - weigh.largest) * weigh.inverse_temperature, vec4(-100.0f)));
        for (var i = 0u; i < 4u; i++) {
            if (4u * group + i < VOCAB && order_key(x[i]) >= key) {
                mine += select(1.0f, weight[i], weigh.by_mass);
            }
        }
    }
    sums[t] = mine;
    for (var stride = THREADS / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if (t < stride) {
            sums[t] += sums[t + stride];
        }
    }
    return workgroupUniformLoad(&sums[0]);
}

// The largest key for which the tokens of at least that key weigh at least `target`.
fn largest_key(target_weight: f32, weigh: Weigh, t: u32) -> u32 {
    var key = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        if (weight_at_least(key | bit, weigh, t) >= target_weight) {
            key |= bit;
        }
    }
    return key;
}

// The smallest key that the request's filters keep; the most likely token is always kept.
fn floor_key(request: Request, inverse_temperature: f32, t: u32) -> u32 {
    let top = argmax(t);
    let largest = logit(top.id);
    var key = 0u;
    if (request.top_k > 0u && request.top_k < VOCAB) {
        key = largest_key(f32(request.top_k), Weigh(false, largest, inverse_temperature), t);
    }
    if (request.top_p < 1.0f) {
        let weigh = Weigh(true, largest, inverse_temperature);
        let total = weight_at_least(key, weigh, t);
        key = largest_key(request.top_p * total, weigh, t);
    }
    if (request.min_p > 0.0f) {
        key = max(key, order_key(largest + request.temperature * ln(vec4(request.min_p)).x));
    }
    return min(key, top.key);
}

// The argmax of logit / temperature + gumbel over the tokens whose key is at least `floor`.
fn loudest(floor: u32, request: Request, inverse_temperature: f32, t: u32) -> Best {
    let position = rows[row * ROW_WORDS + ROW_POSITION];
    var mine = NOTHING;
    for (var group = t; group < GROUPS; group += THREADS) {
        let x = logits_of(group);
        let scaled = x * inverse_temperature;
        let most = max(max(scaled.x, scaled.y), max(scaled.z, scaled.w)) + MAX_GUMBEL;
        let hopeless = order_key(most) < mine.key;
        if (hopeless && !any(vec4(is_nan(x.x), is_nan(x.y), is_nan(x.z), is_nan(x.w)))) {
            continue;
        }
        let score = scaled + gumbel(noise(group, position, request.sample, request.seed));
        for (var i = 0u; i < 4u; i++) {
            if (is_nan(x[i]) || order_key(x[i]) >= floor) {
                mine = consider(mine, 4u * group + i, x[i], score[i]);
            }
        }
    }
    return best_of_workgroup(mine, t);
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    if (workgroup.x >= requests[0]) {
        return;
    }
    row = workgroup.x;
    request_index = rows[workgroup.x * ROW_WORDS + ROW_REQUEST];
    let request = read_request(rows[workgroup.x * ROW_WORDS + ROW_REQUEST]);
    penalty = request.repetition_penalty;
    if (request.repetition_penalty != 1.0f) {
        collect_path(request.first_row, t);
    }

    var drawn: Best;
    // Colder than this, no noise outweighs a difference between logits.
    if (request.temperature < 1e-30f) {
        drawn = argmax(t);
    } else {
        let inverse_temperature = 1.0f / request.temperature;
        var floor = 0u;
        if ((request.top_k > 0u && request.top_k < VOCAB) || request.top_p < 1.0f || request.min_p > 0.0f) {
            floor = floor_key(request, inverse_temperature, t);
        }
        drawn = loudest(floor, request, inverse_temperature, t);
    }
    if (t == 0u) {
        draws[row] = drawn.id;
    }
}
