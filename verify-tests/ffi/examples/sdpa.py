"""PyTorch's scaled_dot_product_attention as a tree-attention kernel, fuzzed on the CPU; then with a mask that is off by one.

    cargo build --release -p treespark-fuzz-ffi
    python verify-tests/ffi/examples/sdpa.py target/release/libtreespark_fuzz.so

Needs numpy and torch. Exit status 0: the right mask passes, and the wrong one is caught.
"""

import ctypes
import sys
from ctypes import POINTER, c_float, c_int32, c_uint32, c_uint64, c_void_p

import numpy as np
import torch
import torch.nn.functional as F

MASK_WORDS = 8
SIZES = "n_rows n_requests heads kv_heads head_dim page_size n_pages pages_per_request".split()
WORDS = "row_request row_node row_position mask prefix pages".split()
FLOATS = "q k v out".split()


class Attention(ctypes.Structure):
    _fields_ = (
        [(name, c_uint32) for name in SIZES]
        + [("scale", c_float)]
        + [(name, POINTER(c_uint32)) for name in WORDS]
        + [(name, POINTER(c_float)) for name in FLOATS]
    )


Run = ctypes.CFUNCTYPE(c_int32, POINTER(Attention), c_void_p)


def array(pointer, *shape):
    return np.ctypeslib.as_array(pointer, shape)


def attention(mask_of):
    """A kernel that sees of its tree what mask_of(ancestor bits [nodes], node) leaves."""

    def run(case, _):
        a = case.contents
        request, node = array(a.row_request, a.n_rows), array(a.row_node, a.n_rows)
        bits = array(a.mask, a.n_rows, MASK_WORDS).view(np.uint8)
        bits = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
        prefix, pages = array(a.prefix, a.n_requests), array(a.pages, a.n_requests, a.pages_per_request)
        cache = (a.n_pages, a.kv_heads, a.page_size, a.head_dim)
        keys, values = (array(pointer, *cache) for pointer in (a.k, a.v))
        q, out = (array(pointer, a.n_rows, a.heads, a.head_dim) for pointer in (a.q, a.out))
        for row in range(a.n_rows):
            seen = mask_of(bits[row].copy(), node[row])
            n = prefix[request[row]]
            slots = np.concatenate([np.arange(n), n + np.nonzero(seen)[0]]).astype(np.int64)
            page, at = pages[request[row]][slots // a.page_size], slots % a.page_size
            # [kv_heads, slots, head_dim], each head for its group of query heads.
            k, v = (torch.from_numpy(c[page, :, at].swapaxes(0, 1).copy()) for c in (keys, values))
            k, v = (t.repeat_interleave(a.heads // a.kv_heads, 0) for t in (k, v))
            query = torch.from_numpy(q[row].copy())[:, None]
            out[row] = F.scaled_dot_product_attention(query, k, v, scale=a.scale)[:, 0].numpy()
        return 0

    return Run(run)


def right(bits, _):
    return bits


def off_by_one(bits, node):
    """The mask is shifted by a node, as where a kernel counts nodes from 1."""
    shifted = np.zeros_like(bits)
    shifted[1:] = bits[:-1]
    shifted[0] = True
    return shifted & (np.arange(len(bits)) <= node)


def main():
    library = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else "target/release/libtreespark_fuzz.so")
    fuzz = library.treespark_fuzz_attention
    fuzz.argtypes, fuzz.restype = [Run, c_void_p, c_uint64, c_uint64, c_float], c_int32
    if fuzz(attention(right), None, 1, 100, 1e-4) != 0:
        sys.exit("SDPA with the right mask fails")
    print("SDPA, the right mask: 100 cases pass")
    if fuzz(attention(off_by_one), None, 1, 100, 1e-4) == 0:
        sys.exit("a mask that is off by one passes")
    print("SDPA, a mask off by one: caught, as above")


if __name__ == "__main__":
    main()
