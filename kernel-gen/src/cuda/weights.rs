//! The ops that read a weight: qkv, project, gate/up, head; and which tiles of `lib/matmul.cuh` suit a matrix.

use super::{Argument, Device, Launch, Lowering, Source};
use crate::op::Op;
use crate::pass::{Buf, DType, Role};
use crate::spec::KernelSpec;

/// Columns of a step, as in `matmul.cuh`.
const STEP: usize = 64;
/// A matrix of fewer bytes a multiprocessor is done before the memory has reached its speed: what counts is latency.
const SMALL_SHARE: usize = 128 << 10;

/// How `lib/matmul.cuh` cuts a matrix. The order of sums is that of `cluster` and `warps_k`: they must not depend on the
/// rows of the pass. The others may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling {
    tokens: usize,
    m_tiles: usize,
    warps_m: usize,
    warps_k: usize,
    cluster: usize,
    ahead: usize,
    depth: usize,
    split: bool,
}

/// The matrix of an op.
#[derive(Debug, Clone, Copy)]
struct Matrix {
    rows: usize,
    columns: usize,
    dtype: DType,
    /// Epsilon of the norm of the op's input, if that is normed.
    eps: Option<f32>,
    /// Rows of which a tile must have a whole number: heads that are normed.
    unit: usize,
}

impl Matrix {
    fn steps(&self) -> usize {
        self.columns.div_ceil(STEP)
    }
}

impl Tiling {
    fn new(matrix: &Matrix, pass_rows: usize, device: &Device) -> Tiling {
        let tokens = pass_rows.next_power_of_two().clamp(8, 64);
        let share = matrix.rows * matrix.columns * matrix.dtype.size() / device.multiprocessors;
        if matrix.dtype == DType::F32 || share < SMALL_SHARE {
            Tiling::small(matrix, tokens, device)
        } else {
            Tiling::streaming(matrix, tokens, device)
        }
    }

    /// Many narrow tiles, each warp with columns of its own: weights are requested before the kernel before this one has
    /// ended, and no warp waits for another until the sums are added up.
    fn small(matrix: &Matrix, tokens: usize, device: &Device) -> Tiling {
        // Matrices that are read again for more tokens come from the cache.
        let tokens = tokens.min(16);
        let warps_m = if matrix.unit > 1 { matrix.unit.div_ceil(16) } else { 1 };
        let tiles = matrix.rows.div_ceil(16 * warps_m);
        let bytes = 16 * warps_m * matrix.columns * matrix.dtype.size();
        let mut cluster = 1;
        // More than this is slow to arrive in one multiprocessor.
        while device.has_clusters() && bytes / cluster > 64 << 10 && 2 * cluster * tiles <= device.multiprocessors {
            cluster *= 2;
        }
        let steps = matrix.steps().div_ceil(cluster);
        let each = steps.div_ceil((12 / warps_m).max(1));
        // Where there are more tiles than multiprocessors, wider ones load the activations less often.
        let m_tiles = if warps_m == 1 && tiles > device.multiprocessors { 2 } else { 1 };
        let (ahead, depth) = (each.min(if tokens > 8 { 2 } else { 4 }), each.min(4));
        Tiling { tokens, m_tiles, warps_m, warps_k: steps.div_ceil(each), cluster, ahead, depth, split: true }
    }

    /// Wide tiles, so that activations are staged for many weight rows. Columns are shared, by a cluster or by teams, so
    /// that the blocks come close to a whole number a multiprocessor: the tiling is the one whose busiest multiprocessor
    /// moves the fewest bytes.
    fn streaming(matrix: &Matrix, tokens: usize, device: &Device) -> Tiling {
        const M_TILES: usize = 2;
        /// Warps along rows and along columns, blocks along columns.
        const CLUSTERS: &[[usize; 3]] = &[
            [12, 1, 1],
            [8, 1, 1],
            [6, 1, 1],
            [4, 1, 1],
            [12, 1, 2],
            [8, 1, 2],
            [6, 1, 2],
            [4, 1, 2],
            [12, 1, 4],
            [8, 1, 4],
            [6, 1, 4],
            [4, 1, 4],
            [12, 1, 8],
            [8, 1, 8],
            [6, 1, 8],
            [4, 1, 8],
        ];
        const BLOCKS: &[[usize; 3]] = &[[8, 1, 1], [4, 2, 1], [2, 4, 1]];

        let split = matrix.dtype == DType::F16;
        // Sums of 64 tokens for both halves leave registers for half the rows.
        let halve = |m_tiles: usize| if split { m_tiles / 2 } else { m_tiles };
        let cost = |&[warps_m, warps_k, cluster]: &[usize; 3]| {
            let rows = 16 * M_TILES * warps_m;
            let columns = matrix.steps().div_ceil(cluster) * STEP;
            let blocks = matrix.rows.div_ceil(rows) * cluster;
            // Weights, activations of 32 tokens, and their sums.
            let sums = if cluster * warps_k > 1 { 4 * 32 * rows * warps_k } else { 0 };
            blocks.div_ceil(device.multiprocessors) * (columns * (2 * rows + 4 * 32) + sums)
        };
        let candidates =
            if device.has_clusters() { CLUSTERS } else { BLOCKS }.iter().filter(|[warps_m, warps_k, cluster]| {
                (16 * halve(M_TILES) * warps_m).is_multiple_of(matrix.unit) && matrix.steps() >= 4 * warps_k * cluster
            });
        let Some(&[warps_m, warps_k, cluster]) = candidates.min_by_key(|candidate| cost(candidate)) else {
            return Tiling::small(matrix, tokens, device);
        };
        // Each team stages its own activations.
        let tokens = if warps_k > 1 { tokens.min(32) } else { tokens };
        let m_tiles = if tokens > 32 { halve(M_TILES) } else { M_TILES };
        let with_depth = |depth| Tiling { tokens, m_tiles, warps_m, warps_k, cluster, ahead: 1, depth, split };
        // As deep as leaves room for a block of the next kernel, which requests its weights early.
        let has_room = |&depth: &usize| with_depth(depth).blocks(device, matrix) == 2;
        let fits = |&depth: &usize| with_depth(depth).shared_bytes(matrix) + DRAW_BYTES * tokens <= device.shared_bytes;
        let depth = (2..=4).rev().find(has_room).or_else(|| (2..=3).rev().find(fits));
        with_depth(depth.unwrap_or(2))
    }

    fn threads(&self) -> usize {
        32 * self.warps_m * self.warps_k
    }

    /// Weight rows of a tile.
    fn rows(&self) -> usize {
        16 * self.m_tiles * self.warps_m
    }

    /// `MATMUL_BYTES` of `matmul.cuh`.
    fn shared_bytes(&self, matrix: &Matrix) -> usize {
        let is_plain = matrix.dtype == DType::F32;
        let ring = if is_plain { 0 } else { self.depth * self.m_tiles * 4 * 32 * 16 };
        let sums = self.tokens * (16 * self.m_tiles + 4) * 4;
        let units = if is_plain || self.warps_m == 1 { 0 } else { 2 * self.tokens * (STEP / 4 + 1) * 16 };
        self.warps_k * (self.warps_m * ring.max(sums) + units + self.tokens * 4)
    }

    /// Blocks that a multiprocessor should have room for: two, if shared memory and registers allow it.
    fn blocks(&self, device: &Device, matrix: &Matrix) -> usize {
        // A block takes 1 KiB more than it asks for.
        let fits = 2 * (self.shared_bytes(matrix) + DRAW_BYTES * self.tokens + 1024) <= device.shared_bytes + 1024;
        // Sums, weights of half a step, activations ahead, the rest.
        let sums = self.m_tiles * self.tokens / 8 * 4 * if self.split { 2 } else { 1 };
        let units =
            if self.warps_m == 1 { 4 * (self.tokens / 8 + 1) } else { self.tokens.div_ceil(2 * self.warps_m) + 1 };
        let registers = sums + self.m_tiles * 8 + self.ahead * units * 4 + 28;
        // A multiprocessor has four times 512 registers for each lane of a warp.
        let warps = (2 * self.warps_m * self.warps_k).div_ceil(4);
        if fits && registers <= 512 / warps / 8 * 8 { 2 } else { 1 }
    }
}

/// What `qkv` and `head` keep of a token behind the shared memory of the product: where its vectors go, how it is drawn.
const PLACES_BYTES: usize = 12;
const DRAW_BYTES: usize = 28;

impl Lowering<'_> {
    pub(super) fn qkv(&self) -> Vec<Launch> {
        let &Op::Qkv { layer, heads, kv_heads, eps, x, norm, weight, bias, q_norm, k_norm, rope, q, .. } = self.op
        else {
            unreachable!("lowering another op")
        };
        let &Op::Qkv { k_cache, v_cache, .. } = self.op else { unreachable!("lowering another op") };
        let head_dim = self.pass.cache_shape(k_cache).head_dim;
        let owns_heads = q_norm.is_some() || k_norm.is_some();
        let matrix = Matrix { unit: if owns_heads { head_dim } else { 1 }, ..self.matrix(weight, Some(eps)) };
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let tile_pairs = if owns_heads { tiling.rows() / head_dim * head_dim / 2 } else { tiling.rows() / 2 };
        let spec = self
            .paged(KernelSpec::new("qkv"), k_cache)
            .size("HEADS", "h", heads)
            .flag("BIAS", "bias", bias.is_some())
            .flag("Q_NORM", "qnorm", q_norm.is_some())
            .flag("K_NORM", "knorm", k_norm.is_some())
            .with("POSITIONS", self.desc(rope).shape[0])
            .with("TILE_PAIRS", tile_pairs);
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            self.batch.pages.into(),
            x.into(),
            norm.into(),
            weight.into(),
            bias.into(),
            q_norm.into(),
            k_norm.into(),
            rope.into(),
            q.into(),
            self.layer(k_cache, layer),
            self.layer(v_cache, layer),
        ];
        let tiles = ((heads + 2 * kv_heads) * head_dim / 2).div_ceil(tile_pairs);
        let extra = PLACES_BYTES * tiling.tokens;
        vec![self.matmul(spec, &matrix, tiling, tiles, extra, arguments)]
    }

    pub(super) fn project(&self) -> Vec<Launch> {
        let &Op::Project { x, weight, residual, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, None);
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let spec = KernelSpec::new("project").size("WIDTH", "n", matrix.rows);
        let arguments = vec![self.batch.requests.into(), x.into(), weight.into(), residual.into()];
        vec![self.matmul(spec, &matrix, tiling, matrix.rows.div_ceil(tiling.rows()), 0, arguments)]
    }

    pub(super) fn gate_up(&self) -> Vec<Launch> {
        let &Op::GateUp { eps, x, norm, weight, out, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, Some(eps));
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let width = matrix.rows / 2;
        let spec = KernelSpec::new("gate_up").size("WIDTH", "n", width);
        let arguments = vec![self.batch.requests.into(), x.into(), norm.into(), weight.into(), out.into()];
        vec![self.matmul(spec, &matrix, tiling, width.div_ceil(tiling.rows() / 2), 0, arguments)]
    }

    /// Where a draw follows, the head leaves it the best token of each tile, so that it need not read the vocabulary.
    pub(super) fn head(&self) -> Vec<Launch> {
        let &Op::Head { eps, x, norm, weight, logits, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, Some(eps));
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let tiles = matrix.rows.div_ceil(tiling.rows());
        let candidates = if self.is_drawn(logits) { tiles } else { 0 };
        let spec = KernelSpec::new("head")
            .size("WIDTH", "v", matrix.rows)
            .size("CANDIDATES", "c", candidates)
            .with("KEEP_LOGITS", self.is_read_besides(logits));
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            x.into(),
            norm.into(),
            weight.into(),
            logits.into(),
            self.candidates(candidates),
        ];
        vec![self.matmul(spec, &matrix, tiling, tiles, DRAW_BYTES * tiling.tokens, arguments)]
    }

    /// What a draw that follows its head reads: how many candidates a row has, and where.
    pub(super) fn head_candidates(&self) -> (usize, Argument) {
        let n = match (self.neighbour(-1), self.op) {
            (Some(&Op::Head { weight, logits, eps, .. }), &Op::Draw { logits: drawn, .. }) if logits == drawn => {
                let matrix = self.matrix(weight, Some(eps));
                matrix.rows.div_ceil(Tiling::new(&matrix, self.pass.rows, self.device).rows())
            }
            _ => 0,
        };
        (n, self.candidates(n))
    }

    /// One a tile and row, from the head's launch to the draw's right behind it.
    fn candidates(&self, n: usize) -> Argument {
        let source = if n > 0 { Source::Workspace(self.pass.rows * n * 8) } else { Source::Null };
        Argument { source, offset: 0 }
    }

    /// Whether the next op draws from these logits.
    fn is_drawn(&self, logits: Buf) -> bool {
        matches!(self.neighbour(1), Some(&Op::Draw { logits: drawn, .. }) if drawn == logits)
    }

    /// Whether anyone but the head and its draw has to do with the logits.
    fn is_read_besides(&self, logits: Buf) -> bool {
        let users = self.pass.ops.iter().filter(|op| op.operands().iter().any(|&(_, operand)| operand == logits));
        self.desc(logits).role != Role::Scratch || users.count() > 2
    }

    /// The op so many places further on in the pass.
    fn neighbour(&self, distance: isize) -> Option<&Op> {
        let at = self.pass.ops.iter().position(|op| std::ptr::eq(op, self.op))?;
        self.pass.ops.get(at.checked_add_signed(distance)?)
    }

    fn matrix(&self, weight: Buf, eps: Option<f32>) -> Matrix {
        let desc = self.desc(weight);
        Matrix { rows: desc.shape[0], columns: desc.shape[1], dtype: desc.dtype, eps, unit: 1 }
    }

    /// A launch over `tiles` tiles of weight rows; `extra` bytes of shared memory are the kernel's own.
    fn matmul(
        &self,
        spec: KernelSpec,
        matrix: &Matrix,
        tiling: Tiling,
        tiles: usize,
        extra: usize,
        arguments: Vec<Argument>,
    ) -> Launch {
        let token_tiles = self.pass.rows.div_ceil(tiling.tokens);
        let shared_bytes = tiling.shared_bytes(matrix) + extra;
        let spec = spec
            .size("COLUMNS", "k", matrix.columns)
            .format("WEIGHT", matrix.dtype)
            .with("NORMED", matrix.eps.is_some())
            .with("EPS", matrix.eps.unwrap_or(0.0))
            .size("TOKENS", "t", tiling.tokens)
            .with("TOKEN_TILES", token_tiles)
            .with("M_TILES", tiling.m_tiles)
            .with("WARPS_M", tiling.warps_m)
            .with("WARPS_K", tiling.warps_k)
            .with("CLUSTER", tiling.cluster)
            .with("AHEAD", tiling.ahead)
            .with("DEPTH", tiling.depth)
            .with("SPLIT", tiling.split)
            .with("BLOCKS", tiling.blocks(self.device, matrix))
            .with("SHARED_BYTES", shared_bytes);
        Launch {
            spec,
            arguments,
            grid: [tiles * token_tiles * tiling.cluster, 1, 1],
            threads: tiling.threads(),
            shared_bytes,
            cluster: tiling.cluster,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::lower;
    use crate::emit::{Lang, emit};
    use crate::op::TreeSpec;
    use crate::release::MODELS;
    use crate::spec::Value;

    const STEMS: [&str; 4] = ["qkv", "project", "gate_up", "head"];

    fn launches(model: &crate::release::Sizes, rows: usize, device: &Device) -> Vec<Launch> {
        let pass = model.pass(rows, TreeSpec::Any(64));
        let ops = pass.ops.iter().filter(|op| STEMS.contains(&op.name()));
        ops.flat_map(|op| lower(op, &pass, device).unwrap_or_else(|e| panic!("{} {rows}: {e}", model.name))).collect()
    }

    fn constant(launch: &Launch, name: &str) -> usize {
        match launch.spec.constants().iter().find(|(known, _)| *known == name) {
            Some((_, Value::U32(value))) => *value as usize,
            other => panic!("{name} is {other:?}"),
        }
    }

    #[test]
    fn the_order_of_sums_is_that_of_the_matrix() {
        for device in [Device::H100, Device::A100] {
            for model in MODELS {
                let order = |rows| -> Vec<[usize; 3]> {
                    let order = |launch: &Launch| {
                        let warps_m = constant(launch, "WARPS_M");
                        [constant(launch, "CLUSTER"), constant(launch, "WARPS_K"), usize::from(warps_m == 1)]
                    };
                    launches(model, rows, &device).iter().map(order).collect()
                };
                for rows in [8, 16, 33, 64] {
                    assert_eq!(order(1), order(rows), "{} {rows}", model.name);
                }
            }
        }
    }

    #[test]
    fn launches_are_possible() {
        for device in [Device::H100, Device::A100] {
            for model in MODELS {
                for rows in [1, 8, 16, 32, 64, 256] {
                    for launch in launches(model, rows, &device) {
                        let name = launch.spec.name();
                        emit(&launch.spec, Lang::Cuda).unwrap();
                        assert!(launch.threads <= 1024, "{name}");
                        assert_eq!(launch.grid[0] % launch.cluster, 0, "{name}");
                        assert!(launch.cluster == 1 || device.has_clusters(), "{name}");
                        // Teams have barriers 1 to 15.
                        assert!(constant(&launch, "WARPS_M") == 1 || constant(&launch, "WARPS_K") < 16, "{name}");
                        assert!(constant(&launch, "TOKENS") * constant(&launch, "TOKEN_TILES") >= rows, "{name}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_draw_takes_what_its_head_leaves() {
        let mut pass = MODELS[0].pass(16, TreeSpec::Any(64));
        let with_top_k = launches(&MODELS[0], 16, &Device::H100);
        assert_eq!(constant(&with_top_k[4], "CANDIDATES"), 0);
        pass.ops.retain(|op| op.name() != "top_k");
        let lowered = |stem: &str| {
            let op = pass.ops.iter().find(|op| op.name() == stem).unwrap();
            lower(op, &pass, &Device::H100).unwrap().remove(0)
        };
        let (head, draw) = (lowered("head"), lowered("draw"));
        assert!(head.spec.constants().contains(&("KEEP_LOGITS", Value::Bool(false))));
        assert_eq!(constant(&head, "CANDIDATES"), constant(&draw, "CANDIDATES"));
        assert_eq!(constant(&head, "CANDIDATES"), head.grid[0]);
        assert_eq!(head.arguments[6], draw.arguments[4]);
    }
}
