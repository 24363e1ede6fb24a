//! How `shaders/cuda/lib/matmul.cuh` cuts a matrix: which tiles suit which sizes.
//!
//! The knobs are all here: `SMALL_SHARE`; in `small` the bytes a block may have, the warps (`most`) and rows of a tile; in
//! `for_many` the sizes and their `cost`, and what registers these need; in `streaming` the shapes, their `cost`, and the
//! depths. Whatever they are, the order of sums must follow from matrix and device alone: `cluster`, `warps_k`, `split`,
//! `wgmma`, and whether `warps_m` is 1.

use super::Device;
use crate::pass::DType;

/// Columns of a step, as in `matmul.cuh`.
const STEP: usize = 64;
/// A matrix of fewer bytes a multiprocessor is done before the memory has reached its speed: what counts is latency.
const SMALL_SHARE: usize = 128 << 10;

/// Tiles of a warp, warps along the rows and along the columns. Four warps of Hopper multiply together, an even number of
/// tiles each.
const HOPPER_SHAPES: [[usize; 3]; 4] = [[4, 12, 1], [4, 8, 1], [2, 8, 2], [2, 4, 4]];
const AMPERE_SHAPES: [[usize; 3]; 3] = [[4, 8, 1], [4, 4, 2], [4, 2, 4]];

/// What `qkv` and `head` keep of a token behind the shared memory of the product: where its vectors go, how it is drawn.
pub(super) const PLACES_BYTES: usize = 12;
pub(super) const DRAW_BYTES: usize = 28;

/// The constants of `lib/matmul.cuh` of the same names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    pub(super) tokens: usize,
    pub(super) row_tiles: usize,
    pub(super) warps_m: usize,
    pub(super) warps_k: usize,
    pub(super) cluster: usize,
    pub(super) ahead: usize,
    pub(super) depth: usize,
    pub(super) split: bool,
    pub(super) wgmma: bool,
    /// Blocks that a multiprocessor should have room for.
    pub(super) blocks: usize,
}

/// The matrix of an op.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) dtype: DType,
    /// Epsilon of the norm of the op's input, if that is normed.
    pub(super) eps: Option<f32>,
    /// Rows of which a tile must have a whole number: heads that are normed.
    pub(super) unit: usize,
}

impl Matrix {
    fn steps(&self) -> usize {
        self.columns.div_ceil(STEP)
    }
}

impl Tiling {
    pub(super) fn new(matrix: &Matrix, pass_rows: usize, device: &Device) -> Tiling {
        let share = matrix.rows * matrix.columns * matrix.dtype.size() / device.multiprocessors;
        if matrix.dtype == DType::F32 || share < SMALL_SHARE {
            Tiling::small(matrix, pass_rows, device)
        } else {
            Tiling::streaming(matrix, pass_rows, device)
        }
    }

    /// Many narrow tiles, each warp with columns of its own: weights are requested before the kernel before this one has
    /// ended, and no warp waits for another until the sums are added up.
    fn small(matrix: &Matrix, pass_rows: usize, device: &Device) -> Tiling {
        let tokens = pass_rows.next_power_of_two().clamp(8, 16);
        let warps_m = if matrix.unit > 1 { matrix.unit.div_ceil(16) } else { 1 };
        let tiles = matrix.rows.div_ceil(16 * warps_m);
        let bytes = 16 * warps_m * matrix.columns * matrix.dtype.size();
        let mut cluster = 1;
        // More than this is slow to arrive in one multiprocessor.
        while device.has_clusters() && bytes / cluster > 64 << 10 && 2 * cluster * tiles <= device.multiprocessors {
            cluster *= 2;
        }
        // Where there are more tiles than multiprocessors, wider ones load the activations less often.
        let row_tiles = if warps_m == 1 && tiles > device.multiprocessors { 4 } else { 2 };
        // Sums of wider tiles leave registers for fewer warps.
        let most = if row_tiles > 2 { 9 } else { 12 };
        let steps = matrix.steps().div_ceil(cluster);
        let each = steps.div_ceil((most / warps_m).max(1));
        let warps_k = steps.div_ceil(each);
        let (split, wgmma) = (true, false);
        let with =
            |depth| Tiling { tokens, row_tiles, warps_m, warps_k, cluster, ahead: 1, depth, split, wgmma, blocks: 1 };
        let deepest = (2..=each.min(4)).rev().map(with).find(|tiling| tiling.fits(matrix, device)).unwrap_or(with(1));
        let tiling = |ahead| Tiling { ahead, ..deepest };
        let ahead = (2..=each.min(4)).rev().find(|&ahead| tiling(ahead).has_registers(1, matrix)).unwrap_or(1);
        let for_few = tiling(ahead);
        let is_many = pass_rows > 16 && warps_m == 1 && matrix.dtype != DType::F32;
        let tiling = if is_many { for_few.for_many(matrix, pass_rows, device) } else { for_few };
        // A second block is one of the next kernel, which requests its weights early.
        let blocks = if tiling.has_room(2, matrix, device) { 2 } else { 1 };
        Tiling { blocks, ..tiling }
    }

    /// The same teams for more tokens: the tile whose blocks are done first. What a block costs, as measured on an H200: a
    /// start, and for each 16 tokens and step of a team a share for activations and one for each eight weight rows.
    fn for_many(self, matrix: &Matrix, pass_rows: usize, device: &Device) -> Tiling {
        let team_steps = self.team_steps(matrix);
        let cost = |tiling: &Tiling| {
            let blocks = matrix.rows.div_ceil(tiling.rows()) * pass_rows.div_ceil(tiling.tokens) * tiling.cluster;
            let each = 20 + tiling.token_tiles() * team_steps * (5 + 2 * tiling.row_tiles);
            blocks.div_ceil(device.multiprocessors) * each
        };
        let wider = |[row_tiles, tokens]: [usize; 2]| {
            // A warp that takes 16 tokens after 16 keeps its weights.
            let (ahead, depth) = if tokens > 16 { (team_steps, team_steps) } else { (self.ahead, self.depth) };
            Tiling { tokens, row_tiles, ahead, depth, ..self }
        };
        let all = [2, 4, 6, 8].into_iter().flat_map(|row_tiles| [16, 32, 64].map(|tokens| wider([row_tiles, tokens])));
        let possible = all.filter(|tiling| tiling.fits(matrix, device) && tiling.has_registers_for_many(matrix));
        possible.min_by_key(cost).unwrap_or(self)
    }

    /// Steps of a team.
    fn team_steps(&self, matrix: &Matrix) -> usize {
        matrix.steps().div_ceil(self.warps_k * self.cluster)
    }

    /// Wide tiles, so that activations are staged for many weight rows. Columns are shared, by a pair of blocks or by
    /// teams, so that the blocks come close to a whole number a multiprocessor: the tiling is the one whose busiest
    /// multiprocessor moves the fewest bytes. (Larger clusters leave multiprocessors over, and add up more sums.)
    fn streaming(matrix: &Matrix, pass_rows: usize, device: &Device) -> Tiling {
        let tokens = pass_rows.next_power_of_two().clamp(8, 64);
        let split = matrix.dtype == DType::F16;
        let steps = matrix.steps();
        let cost = |&([row_tiles, warps_m, warps_k], cluster): &([usize; 3], usize)| {
            let rows = 8 * row_tiles * warps_m;
            let columns = steps.div_ceil(cluster) * STEP;
            let blocks = matrix.rows.div_ceil(rows) * cluster;
            // Weights, activations of 32 tokens, and their sums.
            let sums = if cluster * warps_k > 1 { 4 * 32 * rows * warps_k } else { 0 };
            blocks.div_ceil(device.multiprocessors) * (columns * (2 * rows + 4 * 32) + sums)
        };
        let is_possible = |([row_tiles, warps_m, warps_k], cluster): &([usize; 3], usize)| {
            (8 * row_tiles * warps_m).is_multiple_of(matrix.unit) && steps >= 4 * warps_k * cluster
        };
        let shapes: &[[usize; 3]] = if device.has_clusters() { &HOPPER_SHAPES } else { &AMPERE_SHAPES };
        let clusters = if device.has_clusters() { 2 } else { 1 };
        let all = shapes.iter().flat_map(|&shape| (1..=clusters).map(move |cluster| (shape, cluster)));
        let Some(([row_tiles, warps_m, warps_k], cluster)) = all.filter(is_possible).min_by_key(cost) else {
            return Tiling::small(matrix, pass_rows, device);
        };
        let (ahead, wgmma, blocks) = (1, device.has_wgmma(), 1);
        let with =
            |tokens, depth| Tiling { tokens, row_tiles, warps_m, warps_k, cluster, ahead, depth, split, wgmma, blocks };
        let fits = |tiling: &Tiling| tiling.fits(matrix, device);
        // Each team stages its own activations: there may be room for those of fewer tokens only. Sums of both halves take
        // twice the registers.
        let most = if split { tokens.min(32) } else { tokens };
        let tokens = [64, 32, 16].into_iter().find(|&n| n <= most && fits(&with(n, 2))).unwrap_or(8);
        // A third step on its way is worth more than room for a second block; a fourth is worth nothing.
        if fits(&with(tokens, 3)) { with(tokens, 3) } else { with(tokens, 2) }
    }

    pub(super) fn threads(&self) -> usize {
        32 * self.warps_m * self.warps_k
    }

    /// Tiles of tensor cores.
    fn token_tiles(&self) -> usize {
        self.tokens.div_ceil(16)
    }

    /// Weight rows of a tile.
    pub(super) fn rows(&self) -> usize {
        8 * self.row_tiles * self.warps_m
    }

    /// `MATMUL_BYTES` of `matmul.cuh`.
    pub(super) fn shared_bytes(&self, matrix: &Matrix) -> usize {
        let is_plain = matrix.dtype == DType::F32;
        let ring = if is_plain { 0 } else { self.depth * self.row_tiles * 2 * 32 * 16 };
        let sums = self.tokens * (8 * self.row_tiles + 4) * 4;
        let of_warp = if self.warps_m == 1 && self.tokens > 16 && !is_plain { ring + sums } else { ring.max(sums) };
        let units = match self {
            _ if is_plain || self.warps_m == 1 => 0,
            _ if self.wgmma => 2 * 2 * self.tokens * 128,
            _ => 2 * self.token_tiles() * 16 * (STEP / 4 + 1) * 16,
        };
        self.warps_k * (self.warps_m * of_warp + units + self.tokens * 4)
    }

    fn fits(&self, matrix: &Matrix, device: &Device) -> bool {
        self.shared_bytes(matrix) + DRAW_BYTES * self.tokens <= device.shared_bytes
    }

    /// Whether so many blocks fit a multiprocessor.
    fn has_room(&self, blocks: usize, matrix: &Matrix, device: &Device) -> bool {
        // A block takes 1 KiB more than it asks for.
        let shared_bytes = self.shared_bytes(matrix) + DRAW_BYTES * self.tokens + 1024;
        blocks * shared_bytes <= device.shared_bytes + 1024 && self.has_registers(blocks, matrix)
    }

    /// The same for one block of warps that have columns of their own, in passes of many tokens.
    fn has_registers_for_many(&self, matrix: &Matrix) -> bool {
        let of_norm = if matrix.eps.is_some() { 24 } else { 0 };
        let of_step = 36 + if matrix.eps.is_some() { 16 } else { 0 };
        let of_next = if self.tokens > 16 { 24 * self.ahead } else { 0 };
        let of_later = if self.ahead < self.team_steps(matrix) { 40 } else { 0 };
        48 + 12 * self.row_tiles + of_norm + (self.ahead - 1) * of_step + of_next + of_later
            <= most_registers(self.warps_k)
    }

    /// Whether so many blocks of a multiprocessor have registers enough, by what the compiler was seen to need.
    fn has_registers(&self, blocks: usize, matrix: &Matrix) -> bool {
        let is_alone = self.warps_m == 1;
        let sums = self.row_tiles * self.token_tiles() * 4 * if self.split { 2 } else { 1 };
        let weights = self.row_tiles * 4;
        let units = if is_alone { 4 * self.token_tiles() } else { (4 * self.token_tiles()).div_ceil(self.warps_m) };
        let gamma = if matrix.eps.is_none() {
            0
        } else if is_alone {
            16
        } else {
            8
        };
        let ahead = self.ahead * (units * if self.tokens > 8 { 8 } else { 4 } + gamma);
        let rest = if is_alone { 44 + 16 * self.ahead } else { 36 };
        sums + weights + ahead + rest <= most_registers(blocks * self.warps_m * self.warps_k)
    }
}

/// Of a lane: a multiprocessor has four times 512 for each lane of a warp; a lane can have 255.
fn most_registers(warps: usize) -> usize {
    (512 / warps.div_ceil(4) / 8 * 8).min(255)
}
