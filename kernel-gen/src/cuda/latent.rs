//! Latent attention: what it keeps of a row, its queries, and attention in the space of latents.

use super::acceptance::plain;
use super::tiling::Tiling;
use super::{Argument, Launch, Lowering, Source};
use crate::op::Op;
use crate::pass::Buf;
use crate::spec::KernelSpec;

/// Of `latent_attention.cu`: threads of a block, and keys of a tile.
const THREADS: usize = 256;
const TILE: usize = 16;

impl Lowering<'_> {
    /// The product, then what is made of it: the norm of a latent is over outputs of many tiles.
    pub(super) fn latent(&self) -> Vec<Launch> {
        let &Op::Latent { layer, eps, latent_eps, x, norm, weight, latent_norm, rope, compressed, cache, .. } = self.op
        else {
            unreachable!("lowering another op")
        };
        let width = self.pass.cache_shape(cache).head_dim;
        let y = Argument { source: Source::Workspace(self.pass.rows * width * 4), offset: 0 };
        let product = self.normed_product([x, norm, weight], eps, compressed, y);
        let spec = self
            .paged(KernelSpec::new("latent"), cache)
            .size("LATENT", "c", self.desc(latent_norm).len())
            .with("POSITIONS", self.desc(rope).shape[0])
            .with("EPS", latent_eps);
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            self.batch.pages.into(),
            y,
            latent_norm.into(),
            rope.into(),
            self.layer(cache, layer),
        ];
        vec![product, plain(spec, arguments, [self.pass.rows, 1, 1], 128)]
    }

    /// `rms_norm(x, norm, eps) · weightᵀ`: the first outputs go to `first`, if it is there, the others to `others`.
    pub(super) fn normed_product(
        &self,
        [x, norm, weight]: [Buf; 3],
        eps: f32,
        first: Option<Buf>,
        others: Argument,
    ) -> Launch {
        let matrix = self.matrix(weight, Some(eps));
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let of_first = first.map_or(0, |buf| self.desc(buf).shape[1]);
        let spec = KernelSpec::new("normed_product").size("WIDTH", "n", matrix.rows).size("FIRST", "q", of_first);
        let arguments = vec![self.batch.requests.into(), x.into(), norm.into(), weight.into(), first.into(), others];
        self.matmul(spec, &matrix, tiling, matrix.rows.div_ceil(tiling.rows()), 0, arguments)
    }

    pub(super) fn latent_queries(&self) -> Vec<Launch> {
        let &Op::LatentQueries { heads, eps, x, norm, weight, rope, nope, q, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let matrix = self.matrix(weight, Some(eps));
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let &[positions, half, _] = self.desc(rope).shape.as_slice() else {
            unreachable!("Op::check refuses other shapes")
        };
        let spec = KernelSpec::new("latent_queries")
            .size("HEADS", "h", heads)
            .size("NOPE", "nope", self.desc(nope).shape[2])
            .size("ROTATED", "rope", 2 * half)
            .size("QUERY", "q", self.desc(q).shape[2])
            .with("POSITIONS", positions);
        let Self { batch, .. } = self;
        let arguments = [batch.rows, batch.requests, x, norm, weight, rope, nope, q].map(Argument::from).to_vec();
        vec![self.matmul(spec, &matrix, tiling, matrix.rows.div_ceil(tiling.rows()), 0, arguments)]
    }

    /// Tiles are those of all heads' matrices together.
    pub(super) fn per_head(&self) -> Vec<Launch> {
        let &Op::PerHead { heads, x, weight, out, .. } = self.op else { unreachable!("lowering another op") };
        let matrix = self.matrix(weight, None);
        let tiling = Tiling::new(&matrix, self.pass.rows, self.device);
        let width = matrix.rows / heads;
        let spec = KernelSpec::new("per_head").size("HEADS", "h", heads).size("WIDTH", "n", width).size(
            "STRIDE",
            "of",
            self.desc(out).shape[2],
        );
        let arguments = [self.batch.requests, x, weight, out].map(Argument::from).to_vec();
        let mut launch = self.matmul(spec, &matrix, tiling, width.div_ceil(tiling.rows()), 0, arguments);
        launch.grid[1] = heads;
        vec![launch]
    }

    pub(super) fn latent_attention(&self) -> Vec<Launch> {
        let &Op::LatentAttention { layer, heads, scale, q, cache, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let of_block = self.heads_of_block(heads, cache);
        let shared_bytes = self.attention_bytes(of_block, cache);
        let spec = self
            .paged(KernelSpec::new("latent_attention"), cache)
            .size("LATENT", "c", self.desc(out).shape[2])
            .size("HEADS", "h", of_block)
            .with("SCALE", scale)
            .with("SHARED_BYTES", shared_bytes);
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            self.batch.pages.into(),
            q.into(),
            self.layer(cache, layer),
            out.into(),
        ];
        let grid = [heads / of_block, self.pass.rows, 1];
        vec![Launch { spec, arguments, grid, threads: THREADS, shared_bytes, cluster: 1 }]
    }

    /// As many heads as share what a block reads of the cache, and still leave a block for every multiprocessor. What a head
    /// gets does not depend on it.
    fn heads_of_block(&self, heads: usize, cache: Buf) -> usize {
        let is_possible = |&n: &usize| {
            let blocks = heads / n * self.pass.rows;
            heads.is_multiple_of(n)
                && blocks >= self.device.multiprocessors
                && self.attention_bytes(n, cache) <= self.device.shared_bytes
        };
        (1..=THREADS / TILE).rev().find(is_possible).unwrap_or(1)
    }

    /// `sizeof(Shared)` of `latent_attention.cu`.
    fn attention_bytes(&self, heads: usize, cache: Buf) -> usize {
        const WARPS: usize = THREADS / 32;
        let width = self.pass.cache_shape(cache).head_dim;
        let chunks = width * self.desc(cache).dtype.size() / 16;
        2 * TILE * (chunks | 1) * 16 + 4 * heads * (width + WARPS * TILE + TILE + 2)
    }
}

#[cfg(test)]
mod tests {
    use crate::cuda::{Device, lower_pass};
    use crate::emit::{Lang, emit};
    use crate::release::deepseek;

    #[test]
    fn specs_give_the_constants_that_sources_have() {
        for op in &deepseek::pass(16).ops {
            op.check(&deepseek::pass(16)).unwrap();
        }
        for launch in lower_pass(&deepseek::pass(16), &Device::A100).unwrap() {
            let (stem, source) = (launch.spec.stem(), emit(&launch.spec, Lang::Cuda).unwrap());
            let (_, parameters) = source.split_once(&format!("    {stem}(const u32* ")).expect("an entry");
            let parameters = parameters.split_once(") {").unwrap().0;
            assert_eq!(parameters.matches('*').count() + 1, launch.arguments.len(), "{stem}");
        }
    }

    #[test]
    fn heads_share_a_block_where_there_are_rows_for_all_multiprocessors() {
        for (device, of_16_rows) in [(Device::H100, 16), (Device::A100, 8), (Device::RTX_4090, 8)] {
            let grid = |rows| {
                let launches = lower_pass(&deepseek::pass(rows), &device).unwrap();
                launches.iter().find(|launch| launch.spec.stem() == "latent_attention").unwrap().grid
            };
            assert_eq!((grid(1), grid(16), grid(256)), ([16, 1, 1], [of_16_rows, 16, 1], [1, 256, 1]), "{device:?}");
        }
    }
}
