// A tile of a product is consecutive rows of x, which has ROWS of COLUMNS.

// Where row r of the tile begins, in fours. Rows past the end are computed like the last one, and not written.
fn x_start(first_row: u32, r: u32) -> u32 {
    return min(first_row + r, ROWS - 1u) * (COLUMNS / 4u);
}
