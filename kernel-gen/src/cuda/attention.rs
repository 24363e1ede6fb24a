//! Tree attention: the tensor-core kernel, and which of its sizes suits a pass.

use super::{Argument, Launch, Lowering, Source, is_tiled};
use crate::op::{Op, TreeSpec};
use crate::spec::KernelSpec;

/// Keys of a tile, as in `tree_attention.cu`.
const TILE: usize = 64;
/// Words of a row's ancestors in shared memory: padded.
const ANCESTOR_STRIDE: usize = crate::ANCESTOR_WORDS + 1;

impl Lowering<'_> {
    pub(super) fn tree_attention(&self) -> Vec<Launch> {
        let Op::TreeAttention { layer, heads, kv_heads, scale, tree, q, k_cache, v_cache, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let cache = self.pass.cache_shape(*k_cache);
        if !is_tiled(&cache, self.desc(*k_cache).dtype) {
            return self.plain_attention();
        }
        let group = heads / kv_heads;
        let packed = self.pass.rows * group;
        let m = packed.next_power_of_two().clamp(16, if self.device.has_clusters() { 128 } else { 64 });
        // Each request ends at most one slab early, and no request has more rows than the pass.
        let slabs = packed.div_ceil(m);
        let requests = self.max_requests().min(self.pass.rows);
        let units = kv_heads * (slabs + requests - 1);
        let cluster = self.cluster(units);
        let clusters = self.device.multiprocessors / cluster;
        let tile_bytes = 2 * TILE * cache.head_dim * 2;
        // Where a warp's registers hold 64 rows of a large head, two groups of warps would spill.
        let groups = if !self.device.has_clusters() && cache.head_dim > 64 && m == 64 { 1 } else { 2 };
        let wgmma = self.device.has_clusters() && m >= 64;
        let key_groups = groups / m.div_ceil(64);
        let parts = key_groups * (64 / m).max(1);
        let merge_bytes = parts * m * ((cache.head_dim + 4) * 4 + 8) + key_groups * m * ANCESTOR_STRIDE * 4 + 64;
        let stages = ((self.device.shared_bytes - merge_bytes - 1024) / tile_bytes).min(6);
        let spec = self
            .paged(KernelSpec::new("tree_attention"), *k_cache)
            .size("GROUP", "g", group)
            .size("M", "m", m)
            .size("CLUSTER", "c", cluster)
            .size("MAX_REQUESTS", "b", self.max_requests())
            .tree_constants(tree)
            .with("SLABS", slabs)
            .with("SCALE", *scale)
            .with("GROUPS", groups)
            .with("WGMMA", wgmma)
            .with("STAGES", stages)
            .with("BULK", self.device.has_clusters())
            .with("MIN_CHUNK", if cluster > 1 { 2 * cluster * key_groups } else { 8 });
        // Chunks of units that are cut: at most one more than each cluster's share of tiles gives, and one a unit.
        let cut = clusters + units.min(clusters);
        vec![Launch {
            spec,
            arguments: vec![
                self.batch.rows.into(),
                self.batch.requests.into(),
                self.batch.pages.into(),
                (*q).into(),
                self.layer(*k_cache, *layer),
                self.layer(*v_cache, *layer),
                Argument { source: Source::Workspace(cut * m * (cache.head_dim + 2) * 4), offset: 0 },
                Argument { source: Source::Counters(self.max_requests() * kv_heads * slabs * cluster), offset: 0 },
                (*out).into(),
            ],
            grid: [clusters * cluster, 1, 1],
            threads: groups * 128 + if wgmma { 128 } else { 32 },
            shared_bytes: stages * tile_bytes + merge_bytes + stages * 16 + 128,
            cluster,
        }]
    }

    /// Blocks that share a chunk: where there are few units, their partial results meet in shared memory.
    fn cluster(&self, units: usize) -> usize {
        if !self.device.has_clusters() {
            return 1;
        }
        let each = (self.device.multiprocessors / units.max(1)).max(1);
        (1 << each.ilog2()).min(8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{Device, lower};
    use crate::release;

    #[test]
    #[ignore]
    fn print() {
        let env = |n: &str, d: usize| std::env::var(n).map_or(d, |v| v.parse().unwrap());
        let pass = release::MODELS[env("MODEL", 0)].pass(env("ROWS", 16), TreeSpec::Any(64));
        let op = pass.ops.iter().find(|op| op.name() == "tree_attention").unwrap();
        let launch =
            lower(op, &pass, if env("ARCH", 90) == 90 { &Device::H100 } else { &Device::A100 }).unwrap().remove(0);
        println!("{}", crate::emit::emit(&launch.spec, crate::emit::Lang::Cuda).unwrap());
        eprintln!("{launch:?}");
    }
}
