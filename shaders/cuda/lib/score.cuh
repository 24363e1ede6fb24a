// What a token's logit is worth in a draw: logit / temperature + noise, as a number whose largest wins.
//
// The head kernel has the logits in registers; it ranks them here and leaves the best of each block to `draw`, which
// then need not read the vocabulary again. A request with filters or a penalty looks at all logits instead.
//
// Needs ptx, layout, batch, philox, best.

// The noise of one row.
struct Noise {
    u32 seed[2];
    u32 sample;
    u32 position;
    float inverse_temperature;
    bool is_silent;
};

__device__ __forceinline__ Noise noise_of(const Request& request, u32 position) {
    // Colder than this, no noise outweighs a difference between logits.
    const bool is_silent = request.temperature < 1e-30f;
    const float inverse = is_silent ? 1.0f : 1.0f / request.temperature;
    return {{request.seed[0], request.seed[1]}, request.sample, position, inverse, is_silent};
}

// Whether the draw depends on more than the best score.
__device__ __forceinline__ bool needs_all_logits(const Request& request) {
    const bool has_filter = request.top_k > 0 || request.top_p < 1.0f || request.min_p > 0.0f;
    return request.repetition_penalty != 1.0f || (has_filter && !(request.temperature < 1e-30f));
}

// The noise words of the tokens 4 * group ..
__device__ __forceinline__ Four noise_words(const Noise& noise, u32 group) {
    return philox({{group, noise.position, noise.sample, 0}}, noise.seed[0], noise.seed[1]);
}

__device__ __forceinline__ u64 candidate_with_word(float logit, u32 token, const Noise& noise, u32 word) {
    if (is_nan(logit)) return NAN_WINS;
    if (noise.is_silent) return token_with_key(order_key(logit), token);
    const float score = __fadd_rn(__fmul_rn(logit, noise.inverse_temperature), gumbel(word));
    return token_with_key(order_key(score), token);
}

// What a draw ranks: the logits of tokens 4 * group .., with their noise.
__device__ __forceinline__ float4 perturbed(float4 logits, u32 group, const Noise& noise) {
    if (noise.is_silent) return logits;
    const Four four = noise_words(noise, group);
    const auto score = [&](float x, u32 word) {
        return __fadd_rn(__fmul_rn(x, noise.inverse_temperature), gumbel(word));
    };
    return make_float4(score(logits.x, four.words[0]), score(logits.y, four.words[1]), score(logits.z, four.words[2]),
                       score(logits.w, four.words[3]));
}

// One token. Four neighbours are cheaper together.
__device__ __forceinline__ u64 candidate(float logit, u32 token, const Noise& noise) {
    u32 word = 0;
    if (!noise.is_silent) {
        const Four four = noise_words(noise, token / 4);
        const u32 low = token % 2 ? four.words[1] : four.words[0], high = token % 2 ? four.words[3] : four.words[2];
        word = token % 4 < 2 ? low : high;
    }
    return candidate_with_word(logit, token, noise, word);
}

// The best of the tokens 4 * group .. that are below `end`.
__device__ __forceinline__ u64 best_candidate(const float logits[4], u32 group, u32 end, const Noise& noise) {
    Four four = {};
    if (!noise.is_silent) four = noise_words(noise, group);
    u64 best = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 token = 4 * group + i;
        if (token < end) best = better(best, candidate_with_word(logits[i], token, noise, four.words[i]));
    }
    return best;
}
