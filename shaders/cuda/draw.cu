// needs: ptx layout batch ancestors philox best score
// draws[r] = the target's own token at row r: repetition penalty, temperature, top-k, top-p, min-p, then Gumbel-max.
//
// One block draws one row. Where a request has neither filters nor a penalty, and the head has left its best
// candidates, the best of those is drawn. Else, as in runtime/src/draw.rs:
//
//     top   = the largest logit
//     floor = the smallest key that the filters keep: all three keep a token by its logit alone
//     drawn = the argmax of logit / temperature + gumbel among keys of at least the floor
//
// Top-k and top-p find their floor bit by bit, as the largest key for which the tokens of at least that key have a
// given weight. That is exact, and costs 32 looks at a shortlist: the tokens that are no smaller than the RANK-th of
// the threads' largest. It holds the RANK largest tokens, or all that are finite, and nearly always enough; if not, the
// whole row is looked at.
// Masses are whole numbers, so their sums depend on no order.

// constants-begin
constexpr u32 VOCAB = 49152;
constexpr u32 CANDIDATES = 0; // that the head leaves of each row; 0: it leaves logits
// constants-end

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 GROUPS = (VOCAB + 3) / 4; // tokens go by fours, as the noise does
constexpr u32 SEEN_WORDS = (VOCAB + 31) / 32;
constexpr u32 FILTER_WORDS = 256;
constexpr u32 RANK = 496;
constexpr u32 SHORTLIST = 4096;

// What all threads know of the row.
struct Row {
    const float* logits;
    const u32* seen;
    u32 n_path;
    Request request;
    Noise noise;
};

// The block's memory.
struct Block {
    Row row;
    u64 bests[WARPS];
    u64 sums[WARPS];
    u32 path_tokens[MAX_NODES]; // of the row and its ancestors
    u32 path_filter[FILTER_WORDS]; // a bit for each one's low bits: no bit, not on the path
    float shortlist[SHORTLIST];
    u32 n_shortlist;
};

// What a token weighs: one, or its probability relative to the largest, in units of 2^-32.
struct Weigh {
    bool by_mass;
    float largest;
    float inverse_temperature;
};

// Lays out what the draw of a row reads besides its logits.
__device__ void collect_row(Row row, const u32* rows, Block& block) {
    const u32 t = threadIdx.x;
    if (t < FILTER_WORDS) block.path_filter[t] = 0;
    __syncthreads();
    const Ancestors ancestors = read_ancestors(rows, blockIdx.x);
    row.n_path = path_length(ancestors);
    if (t == 0) block.row = row;
    if (t < MAX_NODES && is_ancestor(rows, blockIdx.x, t)) {
        const u32 token = rows[(row.request.first_row + t) * ROW_WORDS + ROW_TOKEN];
        block.path_tokens[depth_on_path(ancestors, t)] = token;
        atomicOr(&block.path_filter[token / 32 % FILTER_WORDS], 1u << token % 32);
    }
    __syncthreads();
}

__device__ __forceinline__ float penalised(float x, u32 token, const Block& block) {
    const u32 bit = 1u << token % 32;
    bool is_known = block.row.seen[token / 32] & bit;
    if (!is_known && block.path_filter[token / 32 % FILTER_WORDS] & bit) {
        for (u32 i = 0; i < block.row.n_path; i++) is_known |= block.path_tokens[i] == token;
    }
    if (!is_known) return x;
    return x > 0.0f ? x / block.row.request.repetition_penalty : x * block.row.request.repetition_penalty;
}

// A function of its own: few requests call it, from many places.
__device__ __noinline__ float4 penalised_four(float4 x, u32 group, const Block& block) {
    x.x = penalised(x.x, 4 * group, block);
    x.y = penalised(x.y, 4 * group + 1, block);
    x.z = penalised(x.z, 4 * group + 2, block);
    x.w = penalised(x.w, 4 * group + 3, block);
    return x;
}

__device__ __forceinline__ float4 logits_of(u32 group, const Block& block) {
    const float4 x = four_logits<VOCAB>(block.row.logits, group);
    return block.row.request.repetition_penalty == 1.0f ? x : penalised_four(x, group, block);
}

// Calls `see` for each group of this thread's. Several are under way at once.
template <class See>
__device__ __forceinline__ void each_group(const Block& block, const See& see) {
    constexpr u32 AT_ONCE = 4;
    const bool is_penalised = block.row.request.repetition_penalty != 1.0f;
    for (u32 first = threadIdx.x; first < GROUPS; first += AT_ONCE * THREADS) {
        float4 x[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 group = first + i * THREADS;
            if (group < GROUPS) x[i] = four_logits<VOCAB>(block.row.logits, group);
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 group = first + i * THREADS;
            if (group < GROUPS) see(group, is_penalised ? penalised_four(x[i], group, block) : x[i]);
        }
    }
}

__device__ __forceinline__ float largest_of(float4 x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The largest logit of this thread's tokens.
__device__ u64 argmax_of_thread(const Block& block) {
    if (threadIdx.x >= GROUPS) return 0;
    float largest = __uint_as_float(0xff800000u);
    u32 at = threadIdx.x;
    u32 highest = 0; // magnitude: higher than infinity's is a NaN
    each_group(block, [&](u32 group, float4 x) {
        highest = max(highest, max(max(magnitude(x.x), magnitude(x.y)), max(magnitude(x.z), magnitude(x.w))));
        if (largest_of(x) > largest) {
            largest = largest_of(x);
            at = group;
        }
    });
    if (highest > 0x7f800000u) return NAN_WINS;
    const float4 x = logits_of(at, block);
    const u32 place = x.x == largest ? 0 : x.y == largest ? 1 : x.z == largest ? 2 : 3;
    return token_with_key(order_key(largest), 4 * at + place);
}

__device__ u64 sum_of_block(u64 mine, Block& block) {
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(FULL_WARP, mine, lanes);
    __syncthreads();
    if (threadIdx.x % 32 == 0) block.sums[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = block.sums[threadIdx.x % WARPS];
#pragma unroll
    for (u32 lanes = WARPS / 2; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(FULL_WARP, mine, lanes);
    return mine;
}

// Collects the shortlist. `mine` is the largest of the thread's tokens.
__device__ void make_shortlist(u64 mine, Block& block) {
    u32 bound = 0;
    for (u32 bit = 0x80000000u; bit > 0; bit >>= 1) {
        if (__syncthreads_count(key_of(mine) >= (bound | bit)) >= (int)RANK) bound |= bit;
    }
    // What is -infinity, as most tokens are under a grammar, has no mass and cannot be drawn.
    bound = max(bound, order_key(__uint_as_float(0xff800000u)) + 1);
    if (threadIdx.x == 0) block.n_shortlist = 0;
    __syncthreads();
    // A thread whose largest is smaller has nothing to add.
    if (key_of(mine) >= bound) each_group(block, [&](u32 group, float4 four) {
        const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (order_key(x[i]) < bound || 4 * group + i >= VOCAB) continue;
            const u32 place = atomicAdd(&block.n_shortlist, 1u);
            if (place < SHORTLIST) block.shortlist[place] = x[i];
        }
    });
    __syncthreads();
}

__device__ __forceinline__ u64 weight_of(float x, u32 key, const Weigh& weigh) {
    if (order_key(x) < key) return 0;
    return weigh.by_mass ? (u64)(expf((x - weigh.largest) * weigh.inverse_temperature) * 4294967296.0f) : 1;
}

// The weight of all tokens whose key is at least `key`, of the shortlist or of the row.
__device__ u64 weight_at_least(u32 key, bool of_shortlist, const Weigh& weigh, Block& block) {
    u64 mine = 0;
    if (of_shortlist) {
        for (u32 i = threadIdx.x; i < block.n_shortlist; i += THREADS) {
            mine += weight_of(block.shortlist[i], key, weigh);
        }
    } else {
        each_group(block, [&](u32, float4 x) {
            mine += weight_of(x.x, key, weigh) + weight_of(x.y, key, weigh);
            mine += weight_of(x.z, key, weigh) + weight_of(x.w, key, weigh);
        });
    }
    return sum_of_block(mine, block);
}

// The largest key for which the tokens of at least that key weigh at least `target`.
__device__ u32 largest_key(u64 target, bool of_shortlist, const Weigh& weigh, Block& block) {
    u32 key = 0;
    for (u32 bit = 0x80000000u; bit > 0; bit >>= 1) {
        if (weight_at_least(key | bit, of_shortlist, weigh, block) >= target) key |= bit;
    }
    return key;
}

// The smallest key that the request's filters keep; the most likely token is always kept.
__device__ u32 floor_key(u64 mine, u64 top, float largest, Block& block) {
    const Request& request = block.row.request;
    const float inverse_temperature = block.row.noise.inverse_temperature;
    const bool has_top_k = request.top_k > 0 && request.top_k < VOCAB;
    const bool has_top_p = request.top_p < 1.0f;
    bool is_short = false;
    if (has_top_k || has_top_p) {
        make_shortlist(mine, block);
        is_short = block.n_shortlist <= SHORTLIST;
    }
    u32 key = 0;
    if (has_top_k) {
        is_short &= request.top_k <= RANK;
        key = largest_key(request.top_k, is_short, {false, largest, inverse_temperature}, block);
    }
    if (has_top_p) {
        const Weigh mass = {true, largest, inverse_temperature};
        const u64 total = weight_at_least(key, is_short && has_top_k, mass, block);
        const u64 target = (u64)ceil((double)request.top_p * (double)total);
        is_short = is_short && weight_at_least(0, true, mass, block) >= target;
        key = largest_key(target, is_short, mass, block);
    }
    if (request.min_p > 0.0f) {
        key = max(key, order_key(__fadd_rn(largest, __fmul_rn(request.temperature, ln(request.min_p)))));
    }
    return min(key, key_of(top));
}

// The best score among keys of at least `floor`, starting from a likely winner.
__device__ u64 loudest(u32 floor, u64 likely, const Block& block) {
    const Noise& noise = block.row.noise;
    u64 mine = likely;
    const auto is_hopeless = [&](float most, float gumbel) {
        return order_key(__fadd_rn(__fmul_rn(most, noise.inverse_temperature), gumbel)) < key_of(mine);
    };
    each_group(block, [&](u32 group, float4 four) {
        const float most = largest_of(four);
        if (order_key(most) < floor || is_hopeless(most, MAX_GUMBEL)) return;
        const Four words = noise_words(noise, group);
        const u32 loudest_word = max(max(words.words[0], words.words[1]), max(words.words[2], words.words[3]));
        if (is_hopeless(most, gumbel(loudest_word))) return;
        const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (order_key(x[i]) < floor || 4 * group + i >= VOCAB) continue;
            mine = better(mine, candidate_with_word(x[i], 4 * group + i, noise, words.words[i]));
        }
    });
    return mine;
}

__device__ u64 draw_from_logits(Block& block) {
    const Noise& noise = block.row.noise;
    const u64 mine = argmax_of_thread(block);
    const u64 top = best_of_block<WARPS>(mine, block.bests);
    if (noise.is_silent || key_of(top) == NAN_KEY) return top;
    const u32 token = token_of(top);
    const float4 four = logits_of(token / 4, block);
    const float largest = largest_of(four);
    // A logit that is infinite outweighs any noise.
    if (magnitude(__fmul_rn(largest, noise.inverse_temperature)) >= 0x7f800000u) return top;
    const u32 floor = floor_key(mine, top, largest, block);
    const u64 drawn = loudest(floor, candidate(largest, token, noise), block);
    return best_of_block<WARPS>(drawn, block.bests);
}

__device__ u64 draw_from_candidates(const u64* candidates, Block& block) {
    u64 mine = 0;
    for (u32 i = threadIdx.x; i < CANDIDATES; i += THREADS) mine = better(mine, candidates[i]);
    return best_of_block<WARPS>(mine, block.bests);
}

// Blocks: [rows].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    draw(const u32* rows, const u32* requests, const u32* seen, // seen [requests, SEEN_WORDS]
         const float* logits, const u64* candidates, u32* draws) { // [rows, VOCAB], [rows, CANDIDATES], [rows]
    release_next();
    __shared__ Block block;

    const u32 row = blockIdx.x;
    const bool is_row = row < requests[0];
    const u32 request_index = is_row ? rows[row * ROW_WORDS + ROW_REQUEST] : 0;
    const Request request = read_request(requests, request_index);
    const Noise noise = noise_of(request, is_row ? rows[row * ROW_WORDS + ROW_POSITION] : 0);
    wait_for_previous();
    if (!is_row) return;

    u64 drawn;
    if (CANDIDATES > 0 && !needs_all_logits(request)) {
        drawn = draw_from_candidates(candidates + (u64)row * CANDIDATES, block);
    } else {
        const u32* seen_by_request = seen + request_index * SEEN_WORDS;
        const Row of = {logits + (u64)row * VOCAB, seen_by_request, 0, request, noise};
        collect_row(of, rows, block);
        drawn = draw_from_logits(block);
    }
    if (threadIdx.x == 0) draws[row] = token_of(drawn);
}
