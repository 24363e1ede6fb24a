// The tile of entries that a workgroup takes of one expert, as `group_rows` lists them.
//
// A workgroup is launched for every place in the list, and works if a tile begins there: at every ROW_TILE-th entry of an
// expert. So an expert's weights are read once for a tile, and nobody needs to know beforehand who was chosen how often.
//
// Expects EXPERTS <= 512, ROW_TILE; groups: array<u32> of [EXPERTS + 1 + entries].

struct Tile {
    expert: u32,
    first: u32, // place in the list
    count: u32, // entries; none: no tile begins here
}

fn find_tile(place: u32) -> Tile {
    // The last expert whose entries begin here or before.
    var expert = 0u;
    for (var step = 256u; step > 0u; step /= 2u) {
        let next = expert + step;
        if (next < EXPERTS && groups[min(next, EXPERTS)] <= place) {
            expert = next;
        }
    }
    let end = groups[expert + 1u];
    if (place >= end || (place - groups[expert]) % ROW_TILE != 0u) {
        return Tile(0u, 0u, 0u);
    }
    return Tile(expert, place, min(ROW_TILE, end - place));
}

// Entry r of the tile, `row * k + j`. Those past its end are computed like the last one, and not written.
fn entry_at(tile: Tile, r: u32) -> u32 {
    return groups[EXPERTS + 1u + tile.first + min(r, tile.count - 1u)];
}
