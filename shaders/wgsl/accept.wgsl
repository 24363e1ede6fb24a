// needs: layout batch ancestors
// accepted[b] = the deepest path of request b whose tokens equal the draws at their parents, and what follows each node.
//
// One workgroup takes one request, thread t its node t. A node is matched if its token is the draw at its parent or if it
// is given (the root always is), accepted if all nodes of its path are matched: no bit in ancestors & ~matched. No walk is
// needed, and nothing is compiled in: the rows carry the tree.

// constants-begin
// constants-end

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read> requests: array<u32>;
@group(0) @binding(2) var<storage, read> draws: array<u32>; // [rows]
@group(0) @binding(3) var<storage, read_write> accepted: array<u32>; // [requests, ACCEPTED_WORDS]

var<workgroup> matched: array<atomic<u32>, ANCESTOR_WORDS>;
var<workgroup> deepest: atomic<u32>; // path length, then 255 - node

fn token_at(row: u32) -> u32 {
    return rows[row * ROW_WORDS + ROW_TOKEN];
}

fn is_matched(request: Request, node: u32) -> bool {
    let row = request.first_row + node;
    let parent = parent_of(row, node);
    if (parent == NONE || node < request.given) {
        return true;
    }
    let token = token_at(row);
    return token != NONE && token == draws[request.first_row + parent];
}

fn is_accepted(row: u32) -> bool {
    for (var word = 0u; word < ANCESTOR_WORDS; word++) {
        if ((ancestor_word(row, word) & ~atomicLoad(&matched[word])) != 0u) {
            return false;
        }
    }
    return true;
}

@compute @workgroup_size(MAX_NODES)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) node: u32) {
    if (workgroup.x >= requests[1]) {
        return;
    }
    let request = read_request(workgroup.x);
    let is_node = node < request.n_rows;
    if (is_node && is_matched(request, node)) {
        atomicOr(&matched[node / 32u], 1u << (node % 32u));
    }
    workgroupBarrier();
    if (is_node && is_accepted(request.first_row + node)) {
        atomicMax(&deepest, path_length(request.first_row + node) * MAX_NODES + (MAX_NODES - 1u - node));
    }
    workgroupBarrier();

    let best = atomicLoad(&deepest);
    let n_path = best / MAX_NODES;
    let end = request.first_row + MAX_NODES - 1u - best % MAX_NODES;
    let count = workgroup.x * ACCEPTED_WORDS;
    let path = count + 1u;
    let tokens = path + MAX_NODES;
    if (node == 0u) {
        accepted[count] = n_path;
    }
    if (is_node && n_path > 0u && is_ancestor(end, node)) {
        let depth = depth_on_path(end, node);
        accepted[path + depth] = node;
        // Where a node is given, the draw before it may be another token.
        if (depth > 0u) {
            accepted[tokens + depth - 1u] = token_at(request.first_row + node);
        }
        if (depth + 1u == n_path) {
            accepted[tokens + depth] = draws[end];
        }
    }
    if (node >= n_path) {
        accepted[path + node] = 0u;
        accepted[tokens + node] = 0u;
    }
}
