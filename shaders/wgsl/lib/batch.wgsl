// A request of the batch, field by field as kernel-gen/src/layout.rs has it.
//
// Needs layout. Expects `requests: array<u32>`.

const MAX_NODES: u32 = 256u;
// Words of a request in `accepted`: how many nodes, their ids, what follows each.
const ACCEPTED_WORDS: u32 = 1u + 2u * MAX_NODES;

struct Request {
    prefix: u32,
    first_row: u32,
    n_rows: u32,
    sample: u32,
    seed: vec2<u32>,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    given: u32,
}

fn read_request(request: u32) -> Request {
    let at = HEADER_WORDS + request * REQUEST_WORDS;
    return Request(
        requests[at],
        requests[at + 1u],
        requests[at + 2u],
        requests[at + 3u],
        vec2(requests[at + 4u], requests[at + 5u]),
        bitcast<f32>(requests[at + 6u]),
        requests[at + 7u],
        bitcast<f32>(requests[at + 8u]),
        bitcast<f32>(requests[at + 9u]),
        bitcast<f32>(requests[at + 10u]),
        requests[at + 11u],
    );
}
