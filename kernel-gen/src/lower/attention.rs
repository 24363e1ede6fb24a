//! Tree attention and the merge of its partial results.

use std::ops::Range;

use super::{Access, Axis, Binding, Grid, KernelCall, LowerError, Lowering, Source};
use crate::op::Op;
use crate::pass::Buf;
use crate::spec::KernelSpec;

/// Positions whose scores one workgroup adds up. Part of the arithmetic: never chosen by what a pass holds.
pub(super) const SPAN: usize = 128;
/// Positions that a workgroup looks at together, one a thread.
const KEYS: usize = 128;
/// Floats of workgroup memory that every device has.
const WORKGROUP_FLOATS: usize = 4096;
/// Query rows whose sums a thread keeps in registers.
const MAX_TILE: usize = 16;
/// Floats a query row needs besides its query and scores: softmax lanes, maximum, sum, rescale.
const FLOATS_PER_QUERY: usize = 2 * 8 + 3;
/// Most bytes of partial results; a pass that needs more takes its rows in several turns.
const PARTIAL_BYTES: usize = 64 << 20;

/// Rows of a pass whose partial results are held together.
pub(super) struct Turn {
    pub rows: Range<usize>,
    /// The first row that is not this turn's.
    pub end: usize,
    /// Partial results of a row: one for each span of its context.
    pub spans: usize,
    /// Bytes of a row's partial results.
    row_bytes: usize,
}

impl Turn {
    pub(super) fn binding(&self, access: Access) -> Binding {
        Binding { source: Source::Partials, access, bytes: 0..self.rows.len() * self.row_bytes }
    }
}

impl Lowering<'_> {
    pub(super) fn tree_attention(&self) -> Result<Vec<KernelCall>, LowerError> {
        let &Op::TreeAttention { heads, k_cache, out, .. } = self.op else { unreachable!("lowering another op") };
        let head_dim = self.pass.cache_shape(k_cache).head_dim;
        let turns = self.turns(heads, head_dim, k_cache);
        Ok(turns.iter().flat_map(|turn| [self.partials(turn), self.merge(turn, heads, head_dim, out)]).collect())
    }

    /// Turns of a pass whose rows have so many heads, each with a result of `width` elements.
    pub(super) fn turns(&self, heads: usize, width: usize, cache: Buf) -> Vec<Turn> {
        let spans = (self.pages_per_request() * self.pass.cache_shape(cache).page_size).div_ceil(SPAN);
        let row_bytes = spans * heads * (width + 2) * 4;
        let turn = (PARTIAL_BYTES.min(self.limits.binding_bytes) / row_bytes).clamp(1, self.pass.rows);
        let turns = (0..self.pass.rows).step_by(turn).map(|begin| Turn {
            rows: begin..(begin + turn).min(self.pass.rows),
            // Where one turn takes all rows, kernels of passes of any size are the same.
            end: if turn == self.pass.rows { u32::MAX as usize } else { begin + turn },
            spans,
            row_bytes,
        });
        turns.collect()
    }

    /// Where one turn takes all rows, a run of fewer rows launches fewer.
    pub(super) fn rows_of(&self, turn: &Turn) -> Axis {
        if turn.rows.len() == self.pass.rows { Axis::Rows(1) } else { Axis::Fixed(turn.rows.len()) }
    }

    fn partials(&self, turn: &Turn) -> KernelCall {
        let Op::TreeAttention { layer, heads, kv_heads, scale, tree, q, k_cache, v_cache, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let cache = self.pass.cache_shape(*k_cache);
        let dtype = self.desc(*k_cache).dtype;
        let group = heads / kv_heads;
        let (tile, tile_rows) = tile(group, cache.head_dim, self.pass.rows);
        let (k, base) = self.layer(*k_cache, *layer, Access::Read);
        let (v, _) = self.layer(*v_cache, *layer, Access::Read);
        let spec = KernelSpec::new("tree_attention")
            .size("HEAD_DIM", "hd", cache.head_dim)
            .size("HEADS", "h", *heads)
            .size("GROUP", "g", group)
            .format("CACHE", dtype)
            .size("PAGE_SIZE", "p", cache.page_size)
            .size("TILE", "t", tile)
            .tree_constants(tree)
            .with("HEAD_WORDS", cache.head_dim * dtype.size() / 4)
            .with("KV_HEADS", *kv_heads)
            .with("PAGES_PER_REQUEST", self.pages_per_request())
            .with("CACHE_BASE", base / 4)
            .with("SCALE", *scale)
            .with("TILE_ROWS", tile_rows)
            .with("SPAN", SPAN)
            .with("SPANS", turn.spans)
            .turn(turn.rows.start, turn.end);
        KernelCall {
            spec,
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                self.read(self.batch.pages),
                self.rows(*q, Access::Read),
                k,
                v,
                turn.binding(Access::Write),
            ],
            grid: Grid([Axis::Keys(SPAN), Axis::Fixed(*kv_heads), Axis::Tiles { heads: group, tile }]),
        }
    }

    pub(super) fn merge(&self, turn: &Turn, heads: usize, width: usize, out: Buf) -> KernelCall {
        KernelCall {
            spec: KernelSpec::new("merge")
                .size("HEAD_DIM", "hd", width)
                .size("HEADS", "h", heads)
                .with("SPAN", SPAN)
                .with("SPANS", turn.spans)
                .turn(turn.rows.start, turn.end),
            bindings: vec![
                self.read(self.batch.rows),
                self.read(self.batch.requests),
                turn.binding(Access::Read),
                self.rows(out, Access::Write),
            ],
            grid: Grid([Axis::Fixed((heads * width).div_ceil(64)), self.rows_of(turn), Axis::Fixed(1)]),
        }
    }
}

/// Query rows of a workgroup, and the rows that they touch at most. Tiles hold whole groups where one fits, are as
/// large as workgroup memory allows, and of equal size.
fn tile(group: usize, head_dim: usize, rows: usize) -> (usize, usize) {
    let touched = |tile: usize| {
        if tile.is_multiple_of(group) { tile / group } else { (tile + group - 2) / group + 1 }
    };
    let fits = |tile: &usize| tile * (head_dim + KEYS + FLOATS_PER_QUERY) + touched(*tile) * KEYS <= WORKGROUP_FLOATS;
    let unit = if fits(&group) && group <= MAX_TILE { group } else { 1 };
    let largest = (1..=MAX_TILE / unit).map(|n| n * unit).rfind(fits).expect("one query row fits every head_dim");
    let queries = rows * group;
    let tiles = queries.div_ceil(largest);
    let tile = queries.div_ceil(tiles).next_multiple_of(unit).min(largest);
    (tile, touched(tile))
}

#[cfg(test)]
mod tests {
    use super::tile;

    #[test]
    fn tiles_hold_whole_groups_and_fit_workgroup_memory() {
        assert_eq!(tile(3, 64, 1), (3, 1));
        assert_eq!(tile(3, 64, 16), (12, 4));
        assert_eq!(tile(8, 128, 16), (8, 1));
        assert_eq!(tile(1, 64, 1), (1, 1));
        for group in 1..=40 {
            for head_dim in (8..=256).step_by(8) {
                let (tile, rows) = tile(group, head_dim, 16);
                assert!((tile * (head_dim + 128 + 19) + rows * 128) * 4 <= 16 << 10, "g{group} hd{head_dim}");
                // Wherever a tile begins, it touches no more rows than that.
                let starts = (0..16 * group).step_by(tile);
                let touched = starts.map(|q| (q + tile - 1) / group - q / group + 1).max().unwrap();
                assert!(touched <= rows, "g{group} hd{head_dim}: {touched} rows, room for {rows}");
            }
        }
    }
}
