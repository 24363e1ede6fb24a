// needs: layout
// Lists which entries chose each expert: where its entries begin, then the entries `row * CHOSEN + j`, ascending.
//
// One workgroup; a thread looks through all entries for those of its experts, so that their order needs no sorting.

// constants-begin
const EXPERTS: u32 = 64u;
const CHOSEN: u32 = 6u; // experts of a row
// constants-end

const THREADS: u32 = 256u;

@group(0) @binding(0) var<storage, read> requests: array<u32>;
@group(0) @binding(1) var<storage, read> experts: array<u32>; // [rows, CHOSEN]
@group(0) @binding(2) var<storage, read_write> groups: array<u32>; // [EXPERTS + 1 + entries]

var<workgroup> counts: array<u32, EXPERTS>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) t: u32) {
    let entries = requests[0] * CHOSEN;
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        var count = 0u;
        for (var entry = 0u; entry < entries; entry++) {
            count += u32(experts[entry] == expert);
        }
        counts[expert] = count;
    }
    workgroupBarrier();
    for (var expert = t; expert < EXPERTS; expert += THREADS) {
        var place = 0u;
        for (var before = 0u; before < expert; before++) {
            place += counts[before];
        }
        groups[expert] = place;
        for (var entry = 0u; entry < entries; entry++) {
            if (experts[entry] == expert) {
                groups[EXPERTS + 1u + place] = entry;
                place += 1u;
            }
        }
    }
    if (t == 0u) {
        groups[EXPERTS] = entries;
    }
}
