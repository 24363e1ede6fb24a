/* Fuzz a tree-attention kernel or an acceptance kernel of your own against treespark's f64 oracle.
 *
 *     cargo build --release -p treespark-fuzz-ffi        makes target/release/libtreespark_fuzz.so
 *
 * Hand over a function that answers one case; you get the smallest case on which it is wrong. examples/sdpa.py does it from
 * Python. Pointers in a case are valid until the function returns. Nothing is called from other threads.
 */
#ifndef TREESPARK_FUZZ_H
#define TREESPARK_FUZZ_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TREESPARK_MASK_WORDS = 8 };

/* Attention of n_rows rows. Row r is node row_node[r] of the tree of request row_request[r]. It sees the slots
 * 0 .. prefix[request] - 1 of its request, and slot prefix[request] + j for each node j whose bit is set in its mask:
 * bit j % 32 of mask[r * TREESPARK_MASK_WORDS + j / 32]. Head h reads the keys of head h / (heads / kv_heads). Slot s of a
 * request lies in slot s % page_size of page pages[request * pages_per_request + s / page_size]. Slots that nothing has
 * written hold NaN, which must not reach the result. */
typedef struct {
    uint32_t n_rows, n_requests, heads, kv_heads, head_dim, page_size, n_pages, pages_per_request;
    float scale;
    const uint32_t *row_request, *row_node, *row_position; /* [n_rows]; position: prefix + depth */
    const uint32_t *mask;                                  /* [n_rows, TREESPARK_MASK_WORDS] */
    const uint32_t *prefix;                                /* [n_requests] */
    const uint32_t *pages;                                 /* [n_requests, pages_per_request] */
    const float *q;                                        /* [n_rows, heads, head_dim] */
    const float *k, *v;                                    /* [n_pages, kv_heads, page_size, head_dim] */
    float *out;                                            /* [n_rows, heads, head_dim], yours to write */
} treespark_attention;

/* Which nodes of a verified tree are kept: from the root (node 0) on, always the first child whose token is the draw of its
 * parent. Parents come before children. */
typedef struct {
    uint32_t n_nodes;
    const uint32_t *parents, *tokens, *draws; /* [n_nodes]; draws: the target's own token behind each node */
    uint32_t *path;                           /* [n_nodes], yours to write: node ids, ascending */
    uint32_t *n_path;
} treespark_acceptance;

/* Answers one case. 0: done; else the case is none for you, and is left out. */
typedef int32_t (*treespark_attention_fn)(const treespark_attention *, void *user);
typedef int32_t (*treespark_acceptance_fn)(const treespark_acceptance *, void *user);

/* 0: every case was answered rightly. 1: one was not, and is printed to standard output. tolerance: largest difference of
 * an element; queries, keys and values are standard normal. Equal seeds make equal cases. */
int32_t treespark_fuzz_attention(treespark_attention_fn run, void *user, uint64_t seed, uint64_t cases, float tolerance);
int32_t treespark_fuzz_acceptance(treespark_acceptance_fn run, void *user, uint64_t seed, uint64_t cases);

#ifdef __cplusplus
}
#endif
#endif
