// The ancestor bits of a row: bit j says that node j is the row's node or above it.
//
// Needs layout. Expects `rows: array<u32>`.

const ANCESTOR_WORDS: u32 = ROW_WORDS - ROW_ANCESTORS;

fn ancestor_word(row: u32, word: u32) -> u32 {
    return rows[row * ROW_WORDS + ROW_ANCESTORS + word];
}

// The bits of nodes before `node`, in the word that holds the node.
fn ancestors_beside(row: u32, node: u32) -> u32 {
    return ancestor_word(row, node / 32u) & ((1u << (node % 32u)) - 1u);
}

fn is_ancestor(row: u32, node: u32) -> bool {
    return ((ancestor_word(row, node / 32u) >> (node % 32u)) & 1u) == 1u;
}

// Nodes of the path from the root to the row's node, both included.
fn path_length(row: u32) -> u32 {
    var n = 0u;
    for (var word = 0u; word < ANCESTOR_WORDS; word++) {
        n += countOneBits(ancestor_word(row, word));
    }
    return n;
}

// Depth of `node`, which is on the row's path: how many nodes of the path come before it.
fn depth_on_path(row: u32, node: u32) -> u32 {
    var n = countOneBits(ancestors_beside(row, node));
    for (var word = 0u; word < node / 32u; word++) {
        n += countOneBits(ancestor_word(row, word));
    }
    return n;
}

// The parent of the row's node, which is the nearest ancestor; NONE for the root.
fn parent_of(row: u32, node: u32) -> u32 {
    var bits = ancestors_beside(row, node);
    var word = node / 32u;
    while (bits == 0u && word > 0u) {
        word -= 1u;
        bits = ancestor_word(row, word);
    }
    return select(32u * word + firstLeadingBit(bits), NONE, bits == 0u);
}
