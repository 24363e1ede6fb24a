//! The ops that read a weight: qkv, project, gate/up, head.

use super::tiling::{DRAW_BYTES, Matrix, PLACES_BYTES, Tiling};
use super::{Argument, Launch, Lowering, Source};
use crate::op::Op;
use crate::pass::{Buf, Role};
use crate::spec::KernelSpec;

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
        let &Op::Project { add, x, weight, residual, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, None);
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let spec = KernelSpec::new("project").size("WIDTH", "n", matrix.rows).flag("ADD", "add", add);
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

    /// Where a draw or a top-k follows, the head leaves it the best token of each tile or part of one, so that it need not
    /// read the vocabulary. A perturbation between head and top-k is the head's, too.
    pub(super) fn head(&self) -> Vec<Launch> {
        let &Op::Head { eps, x, norm, weight, logits, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, Some(eps));
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let tiles = matrix.rows.div_ceil(tiling.rows());
        let perturbed = matches!(self.neighbour(1), Some(&Op::Perturb { logits: noisy, .. }) if noisy == logits);
        let reader = self.neighbour(if perturbed { 2 } else { 1 });
        let ranked = matches!(reader, Some(&Op::TopK { logits: ranked, .. }) if ranked == logits);
        let drawn = !perturbed && matches!(reader, Some(&Op::Draw { logits: drawn, .. }) if drawn == logits);
        let of_ranked = if ranked { ranked_tokens(&tiling) } else { 0 };
        let candidates = match of_ranked {
            0 if drawn => tiles,
            0 => 0,
            tokens => matrix.rows.div_ceil(tokens),
        };
        let spec = KernelSpec::new("head")
            .size("WIDTH", "v", matrix.rows)
            .size("CANDIDATES", "c", candidates)
            .size("RANKED", "top", of_ranked)
            .flag("PERTURBED", "noise", ranked && perturbed)
            .with("KEEP_LOGITS", ranked || self.is_read_besides(logits));
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

    /// What a draw or a top-k of these logits reads, if it follows the head: how many candidates a row has, of how many
    /// tokens each, and where.
    pub(super) fn head_candidates(&self, logits: Buf) -> (usize, usize, Argument) {
        let distance = if self.is_ranked_behind_noise(logits) { -2 } else { -1 };
        match self.neighbour(distance) {
            Some(&Op::Head { weight, logits: left, eps, .. }) if left == logits => {
                let matrix = self.matrix(weight, Some(eps));
                let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
                let tokens = if matches!(self.op, Op::TopK { .. }) { ranked_tokens(&tiling) } else { tiling.rows() };
                let n = matrix.rows.div_ceil(tokens);
                (n, tokens, self.candidates(n))
            }
            _ => (0, 0, self.candidates(0)),
        }
    }

    /// Whether this op is a top-k with a perturbation of its logits before it.
    fn is_ranked_behind_noise(&self, logits: Buf) -> bool {
        let before = self.neighbour(-1);
        matches!(self.op, Op::TopK { .. })
            && matches!(before, Some(&Op::Perturb { logits: noisy, .. }) if noisy == logits)
    }

    /// Whether the head before this perturbation has done its work for the top-k behind it.
    pub(super) fn is_perturbed_by_head(&self, logits: Buf) -> bool {
        let head = matches!(self.neighbour(-1), Some(&Op::Head { logits: left, .. }) if left == logits);
        head && matches!(self.neighbour(1), Some(&Op::TopK { logits: ranked, .. }) if ranked == logits)
    }

    /// One a tile and row, from the head's launch to that of its reader right behind it.
    fn candidates(&self, n: usize) -> Argument {
        let source = if n > 0 { Source::Workspace(self.pass.rows * n * 8) } else { Source::Null };
        Argument { source, offset: 0 }
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

    pub(super) fn matrix(&self, weight: Buf, eps: Option<f32>) -> Matrix {
        let desc = self.desc(weight);
        Matrix { rows: desc.shape[0], columns: desc.shape[1], dtype: desc.dtype, eps, unit: 1 }
    }

    /// A launch over `tiles` tiles of weight rows and all rows of the pass; `extra` bytes of shared memory are the kernel's own.
    pub(super) fn matmul(
        &self,
        spec: KernelSpec,
        matrix: &Matrix,
        tiling: Tiling,
        tiles: usize,
        extra: usize,
        arguments: Vec<Argument>,
    ) -> Launch {
        let token_tiles = self.pass.rows.div_ceil(tiling.tokens);
        self.matmul_of(spec, matrix, tiling, [tiles, token_tiles], extra, arguments)
    }

    /// A launch over so many tiles of weight rows and of tokens.
    pub(super) fn matmul_of(
        &self,
        spec: KernelSpec,
        matrix: &Matrix,
        tiling: Tiling,
        [tiles, token_tiles]: [usize; 2],
        extra: usize,
        arguments: Vec<Argument>,
    ) -> Launch {
        let needed = tiling.shared_bytes(matrix) + extra;
        // Two blocks of a pair would share a multiprocessor if they fitted, and leave another one idle. Of few tokens, too:
        // blocks of the next kernel, which come early, go where nobody else is (12 % of SmolLM2's pass of one row).
        let is_lonely = tiling.blocks == 1 && (tiling.cluster > 1 || tiling.warps_m == 1 && tiling.tokens == 8);
        let shared_bytes =
            if is_lonely { needed.max(self.device.shared_bytes / 2 + 1).next_multiple_of(16) } else { needed };
        let spec = spec
            .size("COLUMNS", "k", matrix.columns)
            .format("WEIGHT", matrix.dtype)
            .with("NORMED", matrix.eps.is_some())
            .with("EPS", matrix.eps.unwrap_or(0.0))
            .size("TOKENS", "t", tiling.tokens)
            .with("TOKEN_TILES", token_tiles)
            .with("ROW_TILES", tiling.row_tiles)
            .with("WARPS_M", tiling.warps_m)
            .with("WARPS_K", tiling.warps_k)
            .with("CLUSTER", tiling.cluster)
            .with("AHEAD", tiling.ahead)
            .with("DEPTH", tiling.depth)
            .with("SPLIT", tiling.split)
            .with("WGMMA", tiling.wgmma)
            .with("BLOCKS", tiling.blocks)
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

/// Of how many tokens the head leaves a top-k the best: a part of a tile that some lanes of a warp have at once.
fn ranked_tokens(tiling: &Tiling) -> usize {
    1 << tiling.rows().trailing_zeros().min(7)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Device, lower};
    use crate::emit::{Lang, emit};
    use crate::op::TreeSpec;
    use crate::pass::Pass;
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
        for device in [Device::H100, Device::A100, Device::RTX_4090] {
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
        for device in [Device::H100, Device::A100, Device::RTX_4090] {
            for model in MODELS {
                for rows in [1, 8, 16, 32, 64, 256] {
                    for launch in launches(model, rows, &device) {
                        let name = launch.spec.name();
                        emit(&launch.spec, Lang::Cuda).unwrap();
                        assert!(launch.threads <= 1024, "{name}");
                        assert!(launch.shared_bytes <= device.shared_bytes, "{name}: {}", launch.shared_bytes);
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
        assert_eq!(constant(&with_top_k[4], "RANKED"), 128);
        pass.ops.retain(|op| !matches!(op.name(), "top_k" | "perturb" | "mask"));
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

    /// The head's best tokens may not be allowed.
    #[test]
    fn behind_a_mask_a_draw_looks_at_all_logits() {
        let mut pass = MODELS[0].pass(16, TreeSpec::Any(64));
        let place = |pass: &Pass, stem: &str| pass.ops.iter().position(|op| op.name() == stem).unwrap();
        let mask = pass.ops.remove(place(&pass, "mask"));
        pass.ops.retain(|op| !matches!(op.name(), "top_k" | "perturb"));
        pass.ops.insert(place(&pass, "draw"), mask);
        for stem in ["head", "draw"] {
            let launch = lower(&pass.ops[place(&pass, stem)], &pass, &Device::H100).unwrap().remove(0);
            assert_eq!(constant(&launch, "CANDIDATES"), 0, "{stem}");
            assert!(stem == "draw" || launch.spec.constants().contains(&("KEEP_LOGITS", Value::Bool(true))));
        }
    }
}
