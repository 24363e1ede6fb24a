// The ancestor bits of a row: bit j says that node j is the row's node or above it.
//
// Needs ptx, layout.

constexpr u32 ANCESTOR_WORDS = ROW_WORDS - ROW_ANCESTORS;

struct Ancestors {
    u32 words[ANCESTOR_WORDS];
};

__device__ __forceinline__ Ancestors read_ancestors(const u32* rows, u32 row) {
    static_assert(ANCESTOR_WORDS == 8 && ROW_WORDS % 4 == 0 && ROW_ANCESTORS % 4 == 0, "two loads of four words");
    const uint4* words = (const uint4*)(rows + row * ROW_WORDS + ROW_ANCESTORS);
    const uint4 a = words[0], b = words[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ __forceinline__ bool is_ancestor(const u32* rows, u32 row, u32 node) {
    return rows[row * ROW_WORDS + ROW_ANCESTORS + node / 32] >> node % 32 & 1;
}

// Nodes of the path from the root to the row's node, both included.
__device__ __forceinline__ u32 path_length(const Ancestors& row) {
    u32 n = 0;
    for (u32 word = 0; word < ANCESTOR_WORDS; word++) n += __popc(row.words[word]);
    return n;
}

// Depth of `node`, which is on the row's path: how many nodes of the path come before it.
__device__ __forceinline__ u32 depth_on_path(const Ancestors& row, u32 node) {
    u32 n = 0;
    for (u32 word = 0; word < ANCESTOR_WORDS; word++) {
        const u32 bits = row.words[word];
        if (word < node / 32) n += __popc(bits);
        if (word == node / 32) n += __popc(bits & ((1u << node % 32) - 1));
    }
    return n;
}

// The parent of the row's node, which is the nearest ancestor; NONE for the root.
__device__ __forceinline__ u32 parent_of(const Ancestors& row, u32 node) {
    u32 parent = NONE;
    for (u32 word = 0; word < ANCESTOR_WORDS; word++) {
        u32 bits = row.words[word];
        if (word == node / 32) bits &= (1u << node % 32) - 1;
        if (word <= node / 32 && bits != 0) parent = 32 * word + 31 - __clz(bits);
    }
    return parent;
}

// The node of this depth on the row's path: the depth-th set bit.
__device__ __forceinline__ u32 node_on_path(const Ancestors& row, u32 depth) {
    u32 left = depth, node = NONE;
    for (u32 word = 0; word < ANCESTOR_WORDS; word++) {
        u32 bits = row.words[word];
        const u32 n = __popc(bits);
        if (node == NONE && left < n) {
            for (; left > 0; left--) bits &= bits - 1;
            node = 32 * word + __ffs(bits) - 1;
        }
        left -= n;
    }
    return node;
}
