//! The buffers of one shape on a device, several sets of them that together exceed its cache, and a pass for each.

use anyhow::{Result, ensure};
use half::bf16;
use treespark::backend::{BufferId, Extent, PassId};
use treespark_benches::relative_error;
use treespark_kernel_gen::layout::HEADER_WORDS;
use treespark_kernel_gen::op::Batch;
use treespark_kernel_gen::{ANCESTOR_WORDS, CacheShape, DType, Op, Pass, Request, Role, Row, TreeShape, TreeSpec};
use treespark_models::random::{self, RandomBlock};

use super::reference;
use super::shapes::{Cached, Member, Shape};
use crate::device::Device;

pub const PAGE_SIZE: usize = 16;
/// Bytes past the cache of every GPU.
const LARGE: usize = 200_000_000;
/// Elements of the block that keys and values are cut from.
const BLOCK: usize = 16 << 20;

/// What the rows of a request see of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// A prefix, and their ancestors in a binary tree.
    Tree,
    /// Everything: the tree's slots are prefix too, and the rows are no nodes. The same keys, and nothing to hide.
    Off,
}

pub struct Bed<'a> {
    device: &'a mut Device,
    shape: Shape,
    pass: Pass,
    /// The pool's pages of each request, in random order.
    pages: Vec<Vec<u32>>,
    sets: Vec<Set>,
    /// All that was allocated. The first three are the batch's, which the sets share.
    buffers: Vec<BufferId>,
}

#[derive(Debug, Clone, Copy)]
struct Set {
    q: BufferId,
    k: BufferId,
    /// The keys' own, if they are latents.
    v: BufferId,
    out: BufferId,
    pass: PassId,
}

impl<'a> Bed<'a> {
    pub fn new(device: &'a mut Device, shape: &Shape) -> Result<Bed<'a>> {
        let (shape, pages) = (shape.clone(), shuffled_pages(&shape.members()));
        let mut bed = Bed { device, pass: describe(&shape)?, shape, pages, sets: Vec::new(), buffers: Vec::new() };
        for desc in &bed.pass.buffers[..3] {
            bed.buffers.push(bed.device.backend().alloc(desc)?);
        }
        bed.write_pages()?;
        bed.show(Mask::Tree)?;
        // Variance 1, as peers are measured with.
        let block = |dtype| RandomBlock::new(dtype, BLOCK, 3f32.sqrt(), 1);
        let blocks = [block(DType::F32), block(DType::BF16)];
        for set in 0..bed.n_sets() {
            bed.add_set(&blocks, set as u64)?;
        }
        Ok(bed)
    }

    /// Together past the GPU's cache. Small shapes of keys and values keep to the eight that they were recorded with.
    fn n_sets(&self) -> usize {
        let most = if self.shape.cached == Cached::Latents { 64 } else { 8 };
        (LARGE / self.shape.cache_bytes() + 1).min(most)
    }

    fn write_pages(&mut self) -> Result<()> {
        let width = self.pass.buffers[2].shape[1];
        let mut words = Vec::new();
        for pages in &self.pages {
            words.extend(pages);
            words.resize(words.len().next_multiple_of(width), 0);
        }
        Ok(self.device.backend().write(self.buffers[2], 0, &words)?)
    }

    fn add_set(&mut self, [floats, halves]: &[RandomBlock; 2], set: u64) -> Result<()> {
        let backend = self.device.backend();
        let mut ids = self.buffers[..3].to_vec();
        for (i, desc) in self.pass.buffers.iter().enumerate().skip(3) {
            let which = (set * 8 + i as u64) << 32;
            let id = match desc.role {
                Role::Output => backend.alloc(desc)?,
                // Random numbers are as random in any order: `load` does not put a cache into the device's own.
                Role::Cache => backend.load(desc, &halves.parts(&[desc.len()], which))?,
                _ => backend.load(desc, &floats.parts(&[desc.len()], which))?,
            };
            self.buffers.push(id);
            ids.push(id);
        }
        let pass = backend.compile(&self.pass, &ids)?;
        let (q, k, v, out) = match ids[3..] {
            [q, out, k, v] => (q, k, v, out),
            [q, out, latents] => (q, latents, latents, out),
            _ => unreachable!("the pass has these buffers"),
        };
        self.sets.push(Set { q, k, v, out, pass });
        Ok(())
    }

    /// Writes the batch.
    pub fn show(&mut self, mask: Mask) -> Result<()> {
        let (mut rows, mut requests) = (Vec::new(), vec![0; HEADER_WORDS]);
        for (index, Member { prefix, nodes }) in self.shape.members().into_iter().enumerate() {
            let tree = binary_tree(nodes)?;
            let request = Request {
                prefix: (prefix + if mask == Mask::Off { nodes } else { 0 }) as u32,
                first_row: (rows.len() / Row::WORDS) as u32,
                n_rows: nodes as u32,
                sample: 0,
                seed: [0; 2],
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                given: 0,
            };
            requests.extend(request.to_words());
            for node in 0..nodes {
                let (position, request) = ((prefix + tree.depth(node)) as u32, index as u32);
                let (node, ancestors) = match mask {
                    Mask::Tree => (node as u32, tree.ancestors(node)),
                    // The slot before the tree's first.
                    Mask::Off => (u32::MAX, [0; ANCESTOR_WORDS]),
                };
                rows.extend(Row { token: 0, position, request, node, ancestors }.to_words());
            }
        }
        requests[0] = self.shape.rows() as u32;
        requests[1] = self.shape.members().len() as u32;
        self.device.backend().write(self.buffers[0], 0, &rows)?;
        self.device.backend().write(self.buffers[1], 0, &requests)?;
        Ok(())
    }

    /// Runs the first set once and compares all rows and heads of request 0 with a reference in f64: the relative error.
    pub fn check(&mut self, mask: Mask) -> Result<f64> {
        let Set { q, k, v, out, pass } = self.sets[0];
        let Member { prefix, nodes } = self.shape.members()[0];
        let (heads, kv_heads, scale) = (self.shape.heads, self.shape.kv_heads(), f64::from(self.shape.scale()));
        let (key_dim, value_dim) = (self.shape.key_dim(), self.shape.value_dim());
        let (rows, width) = (self.shape.rows(), heads * value_dim);
        let backend = self.device.backend();
        backend.write(out, 0, &vec![f32::NAN.to_bits(); rows * width])?;
        let extent = Extent { rows, requests: self.pages.len(), keys: self.pages[0].len() * PAGE_SIZE };
        backend.run(pass, extent)?;
        let got = floats(backend.read(out, 0, rows * width)?);
        ensure!(got.iter().all(|x| x.is_finite()), "some outputs were not written");
        let q = floats(backend.read(q, 0, nodes * heads * key_dim)?);
        let caches = if k == v { vec![k] } else { vec![k, v] };
        let caches = caches.into_iter().map(|cache| self.cached(cache, prefix + nodes)).collect::<Result<Vec<_>>>()?;
        let (k, v) = (&caches[0], &caches[caches.len() - 1]);
        let tree = binary_tree(nodes)?;
        let is_ancestor = |row: usize, node: usize| tree.ancestors(row)[node / 32] >> (node % 32) & 1 == 1;
        let sees = |row, slot| mask == Mask::Off || slot < prefix || is_ancestor(row, slot - prefix);
        let want = reference::Request { heads, kv_heads, key_dim, value_dim, scale, q: &q, k, v }.attend(sees);
        Ok(relative_error(&got[..nodes * width], &want))
    }

    /// Request 0's vectors of a cache: `[kv_heads, slots, key_dim]`.
    fn cached(&mut self, cache: BufferId, slots: usize) -> Result<Vec<f32>> {
        let (kv_heads, head_dim) = (self.shape.kv_heads(), self.shape.key_dim());
        let mut values = vec![0.0; kv_heads * slots * head_dim];
        let page_words = kv_heads * PAGE_SIZE * head_dim / 2;
        for (at, &page) in self.pages[0].iter().enumerate() {
            let words = self.device.backend().read(cache, page as usize * page_words, page_words)?;
            let halves = words.iter().flat_map(|&word| [word as u16, (word >> 16) as u16]);
            for (i, half) in halves.enumerate() {
                let (head, place, d) = (i / head_dim / PAGE_SIZE, i / head_dim % PAGE_SIZE, i % head_dim);
                let slot = at * PAGE_SIZE + place;
                if slot < slots {
                    values[(head * slots + slot) * head_dim + d] = bf16::from_bits(half).to_f32();
                }
            }
        }
        Ok(values)
    }

    /// Microseconds of one call, by each of `repeats` graphs in which calls take turns on all sets.
    pub fn time(&mut self, repeats: usize) -> Result<Vec<f64>> {
        let calls = self.sets.len().max(16);
        let passes: Vec<PassId> = (0..calls).map(|i| self.sets[i % self.sets.len()].pass).collect();
        let times = self.device.time(&passes, repeats)?;
        Ok(times.into_iter().map(|time| time / calls as f64).collect())
    }

    pub fn kernels(&self) -> Result<String> {
        Ok(self.device.kernels(&self.pass)?.join(" + "))
    }
}

impl Drop for Bed<'_> {
    fn drop(&mut self) {
        self.buffers.iter().for_each(|&buffer| self.device.backend().free(buffer));
    }
}

/// A pass of the one op, for all rows of a shape. Its buffers: rows, requests, pages, q, out, keys and values or latents.
fn describe(shape: &Shape) -> Result<Pass> {
    let (members, rows, heads, kv_heads) = (shape.members(), shape.rows(), shape.heads, shape.kv_heads());
    let pages = members.iter().map(page_count);
    let mut pass = Pass::new("attention", rows);
    let batch = Batch {
        rows: pass.add("rows", Role::Input, DType::U32, &[rows, Row::WORDS]),
        requests: pass.add("requests", Role::Input, DType::U32, &[HEADER_WORDS + members.len() * Request::WORDS]),
        pages: pass.add("pages", Role::Input, DType::U32, &[members.len(), pages.clone().max().unwrap_or(1)]),
    };
    let head_dim = shape.key_dim();
    let q = pass.add("q", Role::Scratch, DType::F32, &[rows, heads, head_dim]);
    let out = pass.add("out", Role::Output, DType::F32, &[rows, heads, shape.value_dim()]);
    let dims = CacheShape { layers: 1, pages: pages.sum(), kv_heads, page_size: PAGE_SIZE, head_dim }.dims();
    let mut add_cache = |name: &str| pass.add(name, Role::Cache, DType::BF16, &dims);
    let tree = TreeSpec::Any(members.iter().map(|member| member.nodes).max().unwrap_or(1));
    let (layer, scale) = (0, shape.scale());
    let op = match shape.cached {
        Cached::Heads { .. } => {
            let (k_cache, v_cache) = (add_cache("k_cache"), add_cache("v_cache"));
            Op::TreeAttention { batch, layer, heads, kv_heads, scale, tree, q, k_cache, v_cache, out }
        }
        Cached::Latents => {
            let cache = add_cache("cache");
            Op::LatentAttention { batch, layer, heads, scale, tree, q, cache, out }
        }
    };
    pass.ops.push(op);
    pass.check()?;
    Ok(pass)
}

fn floats(words: Vec<u32>) -> Vec<f32> {
    words.into_iter().map(f32::from_bits).collect()
}

fn page_count(member: &Member) -> usize {
    (member.prefix + member.nodes).div_ceil(PAGE_SIZE)
}

fn shuffled_pages(members: &[Member]) -> Vec<Vec<u32>> {
    let total: usize = members.iter().map(page_count).sum();
    let mut pool: Vec<u32> = (0..total as u32).collect();
    pool.sort_by_key(|&page| random::hash(u64::from(page)));
    members.iter().map(|member| pool.drain(..page_count(member)).collect()).collect()
}

/// The children of node n are 2n + 1 and 2n + 2.
fn binary_tree(nodes: usize) -> Result<TreeShape> {
    let parents: Vec<u32> = (0..nodes as u32).map(|node| node.saturating_sub(1) / 2).collect();
    Ok(TreeShape::from_parents(&parents)?)
}

#[cfg(test)]
mod tests {
    use treespark::cpu::CpuBackend;
    use treespark_kernel_gen::cuda::lower_pass;

    use super::*;

    #[test]
    fn the_cpu_backend_agrees_with_the_reference() {
        let mut device = Device::Other(Box::new(CpuBackend::new(Some(2))));
        for shape in ["4/2x64:B3:L100:N12", "3/3x128:B1:L16:N40", "mla4:B3:L100:N12"] {
            let mut bed = Bed::new(&mut device, &shape.parse().unwrap()).unwrap();
            let error = bed.check(Mask::Tree).unwrap();
            assert!(error < 1e-5, "{shape}: {error}");
        }
    }

    #[test]
    fn all_shapes_go_to_tensor_cores() {
        for shape in [Shape::all(), Shape::latents()].concat() {
            let pass = describe(&shape).unwrap();
            let launches = lower_pass(&pass, &treespark_kernel_gen::cuda::Device::H100).unwrap();
            let stem = if shape.cached == Cached::Latents { "latent_attention" } else { "tree_attention" };
            assert!(launches.iter().any(|launch| launch.spec.stem() == stem), "{shape}: {launches:?}");
        }
    }
}
