//! Latent attention: what it keeps of a row, its queries, and attention in the space of latents.

use super::acceptance::plain;
use super::tiling::Tiling;
use super::{Argument, LATENT_DIM, Launch, Lowering, Source, is_tiled};
use crate::op::Op;
use crate::pass::Buf;
use crate::spec::KernelSpec;

/// Of `plain_latents.cu`: threads of a block, and keys of a tile.
const THREADS: usize = 256;
const TILE: usize = 16;
/// Of `latent_attention.cu`: keys of a tile, and elements of a latent that it is cut for.
const TENSOR_TILE: usize = 64;
const LATENT: usize = 512;
/// Blocks of `merge_latents.cu` for each of them.
const MERGE_SHARES: usize = 4;
/// Fewer tiles are not worth what a chunk begins and ends with.
const MIN_CHUNK: usize = 1;

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
        if is_tiled(&self.pass.cache_shape(cache), self.desc(cache).dtype) && self.desc(out).shape[2] == LATENT {
            return self.latents_on_tensor_cores();
        }
        let of_block = self.heads_of_block(heads, cache);
        let shared_bytes = self.attention_bytes(of_block, cache);
        let spec = self
            .paged(KernelSpec::new("plain_latents"), cache)
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

    fn latents_on_tensor_cores(&self) -> Vec<Launch> {
        let Op::LatentAttention { layer, heads, scale, tree, q, cache, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let packed = self.pass.rows.min(tree.max_nodes()) * heads; // rows of a request
        let requests = self.max_requests().min(self.pass.rows);
        // Groups of warps multiply 64 rows, at the price of fewer. Other tensor cores' outputs of so many would not fit registers.
        let (m, threads) = if self.device.has_wgmma() { (64, THREADS + 128) } else { (16, THREADS + 32) };
        let (stages, shared_bytes) = self.tiles_of_latents(m, *heads);
        // Each request ends at most one slab early.
        let units = (requests * packed.div_ceil(m)).min(self.pass.rows * heads / m + requests);
        let blocks = self.device.multiprocessors;
        let dtype = self.desc(*cache).dtype;
        let common = |stem| {
            KernelSpec::new(stem)
                .size("GROUP", "g", *heads)
                .size("M", "m", m)
                .size("MAX_REQUESTS", "b", self.max_requests())
                .with("LATENT", LATENT)
                .with("MIN_CHUNK", MIN_CHUNK)
                .with("CLUSTER", 1_usize)
        };
        let spec = self
            .paged(common("latent_attention"), *cache)
            .with("SCALE", *scale)
            .with("STAGES", stages)
            .with("BULK", self.device.has_clusters());
        // Chunks of units that are cut: at most one more than each block's share of tiles gives, and one a unit.
        let cut = blocks + units.min(blocks);
        let partials = Argument { source: Source::Workspace(cut * m * (LATENT * 2 + 8)), offset: 0 };
        let of_batch = [self.batch.rows, self.batch.requests].map(Argument::from);
        let cache = [self.batch.pages.into(), (*q).into(), self.layer(*cache, *layer)];
        let results = [partials, (*out).into()];
        let grid = [blocks, 1, 1];
        let arguments = [&of_batch[..], &cache, &results].concat();
        let attention = Launch { spec, arguments, grid, threads, shared_bytes, cluster: 1 };
        let spec = common("merge_latents").format("CACHE", dtype).with("KV_HEADS", 1_usize);
        let (arguments, grid) = ([of_batch, results].concat(), [MERGE_SHARES * blocks, 1, 1]);
        let merge = Launch { spec, arguments, grid, threads: LATENT / 2, shared_bytes: 0, cluster: 1 };
        vec![attention, merge]
    }

    /// Tiles in the ring of `latent_attention.cu` for units of `m` rows, as many as fit up to two, and the block's shared memory.
    fn tiles_of_latents(&self, m: usize, heads: usize) -> (usize, usize) {
        let head_dim = LATENT_DIM;
        let key_warps = if m == 64 { 1 } else { 8 };
        let nodes = (m - 1) / heads + 2;
        let stage = TENSOR_TILE * head_dim * 2;
        let of_rows = m * (head_dim * 2 + TENSOR_TILE * 2 + (2 * key_warps + 1) * 4);
        let rest = of_rows + nodes * crate::ANCESTOR_WORDS * 4 + self.known_bytes() + 128;
        let stages = if 2 * stage + rest <= self.device.shared_bytes { 2 } else { 1 };
        (stages, stages * stage + rest)
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

    /// `sizeof(Shared)` of `plain_latents.cu`.
    fn attention_bytes(&self, heads: usize, cache: Buf) -> usize {
        const WARPS: usize = THREADS / 32;
        let width = self.pass.cache_shape(cache).head_dim;
        let chunks = width * self.desc(cache).dtype.size() / 16;
        2 * TILE * (chunks | 1) * 16 + 4 * heads * (width + WARPS * TILE + TILE + 2)
    }
}

#[cfg(test)]
mod tests {
    use crate::cuda::{Device, Launch, lower, lower_pass};
    use crate::emit::{Lang, emit};
    use crate::pass::{DType, Role};
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

    fn attention(rows: usize, dtype: DType, device: &Device) -> Launch {
        let mut pass = deepseek::pass(rows);
        pass.buffers.iter_mut().filter(|desc| desc.role == Role::Cache).for_each(|desc| desc.dtype = dtype);
        let op = pass.ops.iter().find(|op| op.name() == "latent_attention").unwrap();
        lower(op, &pass, device).unwrap().remove(0)
    }

    #[test]
    fn heads_share_a_block_where_there_are_rows_for_all_multiprocessors() {
        let cases = [(Device::H100, 16, 1), (Device::A100, 8, 1), (Device::RTX_4090, 8, 2)];
        for (device, of_16_rows, of_256) in cases {
            let grid = |rows| attention(rows, DType::F32, &device).grid;
            assert_eq!(
                (grid(1), grid(16), grid(256)),
                ([16, 1, 1], [of_16_rows, 16, 1], [of_256, 256, 1]),
                "{device:?}"
            );
        }
    }

    #[test]
    fn latents_of_16_bits_go_to_tensor_cores_where_a_tile_fits() {
        for (device, m) in [(Device::H100, 64), (Device::A100, 16), (Device::RTX_4090, 16)] {
            for rows in [1, 4, 256] {
                let launch = attention(rows, DType::BF16, &device);
                assert_eq!((launch.spec.stem(), launch.grid[0]), ("latent_attention", device.multiprocessors));
                assert!(launch.shared_bytes <= device.shared_bytes, "{device:?}: {} bytes", launch.shared_bytes);
                assert!(launch.spec.name().contains(&format!("_m{m}_")), "{}", launch.spec.name());
            }
        }
    }
}
