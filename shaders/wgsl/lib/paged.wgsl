// Where a slot of a request lies in the paged cache of one layer, [pages, KV_HEADS, PAGE_SIZE, HEAD_DIM].
//
// Expects `pages: array<u32>` of [requests, PAGES_PER_REQUEST], and HEAD_WORDS, the words of one cached vector.

// First word of the vector of `head` at `slot`, in a binding whose layer begins at word CACHE_BASE.
fn cache_word(request: u32, slot: u32, head: u32) -> u32 {
    let page = pages[request * PAGES_PER_REQUEST + slot / PAGE_SIZE];
    return CACHE_BASE + ((page * KV_HEADS + head) * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_WORDS;
}
