// A request of the batch, field by field as kernel-gen/src/layout.rs has it.
//
// Needs ptx, layout.

// Words of a request in `accepted`: how many nodes, their ids, what follows each.
constexpr u32 ACCEPTED_WORDS = 1 + 2 * MAX_NODES;
constexpr u32 ACCEPTED_PATH = 1;
constexpr u32 ACCEPTED_TOKENS = 1 + MAX_NODES;

struct Request {
    u32 prefix;
    u32 first_row;
    u32 n_rows;
    u32 sample;
    u32 seed[2];
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
    float repetition_penalty;
    u32 given;
};

__device__ __forceinline__ Request read_request(const u32* requests, u32 request) {
    const uint4* words = (const uint4*)(requests + HEADER_WORDS + request * REQUEST_WORDS);
    const uint4 a = words[0], b = words[1], c = words[2];
    return {a.x, a.y, a.z, a.w, {b.x, b.y}, __uint_as_float(b.z), b.w,
            __uint_as_float(c.x), __uint_as_float(c.y), __uint_as_float(c.z), c.w};
}
