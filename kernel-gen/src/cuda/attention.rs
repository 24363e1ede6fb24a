//! Tree attention: the tensor-core kernel, and which of its sizes suits a pass.

use super::{Argument, Launch, Lowering, Source, is_tiled};
use crate::op::Op;
use crate::spec::KernelSpec;

/// Keys of a tile, as in `tree_attention.cu`.
const TILE: usize = 64;
/// Slots of a context that a cluster of 8 goes through in a few tiles a block.
const SHORT_CONTEXT: usize = 2048;
/// A merge through the workspace takes as long as this many tiles.
const MIN_TILES: usize = 6;
/// Words of a row's ancestors in shared memory: padded.
const ANCESTOR_STRIDE: usize = crate::ANCESTOR_WORDS + 1;

/// The shared memory of a block.
struct Ring {
    /// Of four warps.
    groups: usize,
    /// Groups that take tiles in turn.
    key_groups: usize,
    /// Tiles of keys or of values; 0 if too few fit.
    stages: usize,
    shared_bytes: usize,
}

impl Ring {
    fn new(groups: usize, m: usize, cluster: usize, head_dim: usize, known: usize, available: usize) -> Ring {
        let key_groups = groups / m.div_ceil(64);
        let parts = cluster * key_groups * (64 / m).max(1);
        let parts_rows = if parts == 1 { 1 } else { parts * m.div_ceil(cluster) };
        let parts_bytes = parts_rows * (head_dim / 8 + 4) * 16;
        let rest = parts_bytes + key_groups * m * ANCESTOR_STRIDE * 4 + known + 512;
        let stage_bytes = TILE * head_dim * 2;
        let most = available.saturating_sub(1024 + rest) / stage_bytes;
        let stages = most.min(12) / (2 * key_groups) * (2 * key_groups);
        Ring { groups, key_groups, stages, shared_bytes: stages * stage_bytes + rest }
    }
}

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
        let packed = self.pass.rows.min(tree.max_nodes()) * group; // rows of a request
        let requests = self.max_requests().min(self.pass.rows);
        let m = self.rows_of_a_unit(packed);
        let slabs = packed.div_ceil(m);
        // Each request ends at most one slab early.
        let units = kv_heads * (requests * slabs).min(self.pass.rows * group / m + requests);
        let cluster = self.cluster(units, self.pages_per_request() * cache.page_size);
        // Many units of few rows: what a block waits for, others of its multiprocessor make up (on an H200 64 requests behind 512
        // slots 13.8 to 11.8 us, behind 4096 78.6 to 53.8).
        let is_crowd = m == 16 && cluster == 1 && self.device.has_clusters() && units > self.device.multiprocessors;
        let crowd = match cache.head_dim {
            64 if is_crowd => 3,
            _ if is_crowd => 2,
            _ => 1,
        };
        let clusters = self.device.clusters(cluster) * crowd;
        let wgmma = self.device.has_wgmma() && m >= 64;
        // A small block of a cluster leaves room for one of the next kernel beside it.
        let blocks = if m <= 64 && cluster > 2 && cache.head_dim == 64 { 2 } else { crowd };
        let available = self.device.shared_bytes / blocks;
        let ring = |groups| Ring::new(groups, m, cluster, cache.head_dim, self.known_bytes(), available);
        // One group is enough for the few tiles that a block of a large cluster gets. Without wgmma two groups, whose
        // warps hold 64 rows of a large head, would spill.
        let spills = !self.device.has_wgmma() && m >= 32;
        let prefers_one = m <= 64 && (cluster > 2 || spills || crowd > 1);
        let Ring { groups, key_groups, stages, shared_bytes } =
            if prefers_one || ring(2).stages == 0 { ring(1) } else { ring(2) };
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
            .with("BLOCKS", blocks)
            .with("STAGES", stages)
            .with("BULK", self.device.has_clusters())
            .with("MIN_CHUNK", if cluster > 1 { MIN_TILES * cluster * key_groups } else { 8 * crowd.min(2) });
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
            shared_bytes,
            cluster,
        }]
    }

    /// What `lib/chunks.cuh` keeps of requests in shared memory.
    pub(super) fn known_bytes(&self) -> usize {
        self.max_requests().min(32) * 16
    }

    /// Packed rows of a unit: all of a request's where they fit, since each unit reads the keys anew.
    fn rows_of_a_unit(&self, packed: usize) -> usize {
        let hopper = self.device.has_wgmma();
        match packed {
            ..=16 => 16,
            // Products by whole groups take 64 rows, at the price of fewer.
            17..=32 if !hopper => 32,
            17..=64 => 64,
            _ => {
                if hopper {
                    128
                } else {
                    64
                }
            }
        }
    }

    /// Blocks that share a chunk: where there are few units, their partial results meet in shared memory. A large
    /// cluster has done soonest with a short context; for a long one what counts is that few multiprocessors are idle.
    fn cluster(&self, units: usize, context: usize) -> usize {
        if !self.device.has_clusters() {
            return 1;
        }
        let busy = |size: usize| self.device.clusters(size) / units * units * size;
        let is_short = context <= SHORT_CONTEXT;
        let suits = |size: &usize| busy(*size) > 0 && (is_short || busy(*size) * 10 >= self.device.multiprocessors * 7);
        [8, 4, 2].into_iter().find(suits).unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use crate::TreeSpec;
    use crate::cuda::{Device, Launch, lower};
    use crate::release::MODELS;
    use crate::spec::Value;

    fn launch(model: usize, rows: usize, device: &Device) -> Launch {
        let pass = MODELS[model].pass(rows, TreeSpec::Any(64));
        let op = pass.ops.iter().find(|op| op.name() == "tree_attention").unwrap();
        lower(op, &pass, device).unwrap().remove(0)
    }

    fn constant(launch: &Launch, name: &str) -> u32 {
        match launch.spec.constants().iter().find(|(constant, _)| *constant == name).unwrap().1 {
            Value::U32(value) => value,
            ref other => panic!("{name} is {other:?}"),
        }
    }

    #[test]
    fn a_unit_has_as_many_rows_as_a_request_needs() {
        // SmolLM2-135M: three query heads share a key head.
        for (rows, hopper, ampere) in [(1, 16, 16), (5, 16, 16), (10, 64, 32), (16, 64, 64), (64, 128, 64)] {
            assert_eq!(constant(&launch(0, rows, &Device::H100), "M"), hopper, "{rows} rows");
            assert_eq!(constant(&launch(0, rows, &Device::A100), "M"), ampere, "{rows} rows");
        }
    }

    #[test]
    fn blocks_fit_the_device_and_clusters_run_at_once() {
        for device in [Device::H100, Device::A100, Device::RTX_4090] {
            for model in 0..MODELS.len() {
                for rows in [1, 16, 64, 256] {
                    let launch = launch(model, rows, &device);
                    assert!(launch.shared_bytes <= device.shared_bytes);
                    if launch.spec.stem() == "tree_attention" {
                        assert!(constant(&launch, "STAGES") > 0, "{}", launch.spec.name());
                        let blocks = constant(&launch, "BLOCKS") as usize;
                        assert!(launch.grid[0] / launch.cluster <= device.clusters(launch.cluster) * blocks);
                        assert!(launch.cluster == 1 || device.has_clusters());
                    }
                }
            }
        }
    }
}
