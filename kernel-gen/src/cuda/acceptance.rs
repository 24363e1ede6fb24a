//! Embedding, a Medusa head's block, the norm by itself, and what follows the logits: mask, perturb, draw, top-k, accept,
//! commit.

use super::{Argument, Launch, Lowering};
use crate::MAX_NODES;
use crate::op::Op;
use crate::pass::Buf;
use crate::spec::KernelSpec;

impl Lowering<'_> {
    pub(super) fn embed(&self) -> Vec<Launch> {
        const THREADS: usize = 128;
        let &Op::Embed { table, out, .. } = self.op else { unreachable!("lowering another op") };
        let desc = self.desc(table);
        let &[tokens, columns] = desc.shape.as_slice() else { unreachable!("Op::check refuses other shapes") };
        let spec = KernelSpec::new("embed")
            .size("COLUMNS", "k", columns)
            .format("WEIGHT", desc.dtype)
            .size("TOKENS", "v", tokens);
        let arguments = [self.batch.rows, self.batch.requests, table, out].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [(columns / 8).div_ceil(THREADS), self.pass.rows, 1], THREADS)]
    }

    pub(super) fn mask(&self) -> Vec<Launch> {
        const THREADS: usize = 256;
        /// Tokens of a thread.
        const TURNS: usize = 4;
        let &Op::Mask { allowed, logits, .. } = self.op else { unreachable!("lowering another op") };
        let vocab = self.desc(logits).shape[1];
        let spec = KernelSpec::new("mask").size("VOCAB", "v", vocab);
        let arguments = [self.batch.requests, allowed, logits].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [vocab.div_ceil(TURNS * THREADS), self.pass.rows, 1], THREADS)]
    }

    pub(super) fn draw(&self) -> Vec<Launch> {
        let &Op::Draw { seen, logits, draws, .. } = self.op else { unreachable!("lowering another op") };
        let (n, _, candidates) = self.head_candidates(logits);
        vec![self.draw_from(seen, logits, n, candidates, draws)]
    }

    /// Draws from the `n` best candidates that the head left of each row, where a request needs no more.
    pub(super) fn draw_from(&self, seen: Buf, logits: Buf, n: usize, candidates: Argument, draws: Buf) -> Launch {
        let spec = KernelSpec::new("draw").size("VOCAB", "v", self.desc(logits).shape[1]).size("CANDIDATES", "c", n);
        let Self { batch, pass, .. } = self;
        let arguments =
            vec![batch.rows.into(), batch.requests.into(), seen.into(), logits.into(), candidates, draws.into()];
        plain(spec, arguments, [pass.rows, 1, 1], 512)
    }

    pub(super) fn res_block(&self) -> Vec<Launch> {
        const THREADS: usize = 128;
        let &Op::ResBlock { states, weight, bias, out, .. } = self.op else { unreachable!("lowering another op") };
        let desc = self.desc(weight);
        let hidden = desc.shape[1];
        let spec = KernelSpec::new("res_block").size("HIDDEN", "k", hidden).format("WEIGHT", desc.dtype).size(
            "HEADS",
            "h",
            desc.shape[0] / hidden,
        );
        let operands = [self.batch.rows, self.batch.requests, states, weight, bias, out];
        let grid = [hidden.div_ceil(THREADS / 32), self.pass.rows, 1];
        vec![plain(spec, operands.map(Argument::from).to_vec(), grid, THREADS)]
    }

    pub(super) fn norm(&self) -> Vec<Launch> {
        let &Op::Norm { eps, x, norm, out, .. } = self.op else { unreachable!("lowering another op") };
        let spec = KernelSpec::new("rms_norm").size("COLUMNS", "k", self.desc(norm).len()).with("EPS", eps);
        let arguments = [self.batch.requests, x, norm, out].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [self.pass.rows, 1, 1], 128)]
    }

    pub(super) fn perturb(&self) -> Vec<Launch> {
        const THREADS: usize = 128;
        let &Op::Perturb { logits, .. } = self.op else { unreachable!("lowering another op") };
        if self.is_perturbed_by_head(logits) {
            return Vec::new();
        }
        let vocab = self.desc(logits).shape[1];
        let spec = KernelSpec::new("perturb").size("VOCAB", "v", vocab);
        let arguments = [self.batch.rows, self.batch.requests, logits].map(Argument::from).to_vec();
        vec![plain(spec, arguments, [vocab.div_ceil(4 * THREADS), self.pass.rows, 1], THREADS)]
    }

    pub(super) fn top_k(&self) -> Vec<Launch> {
        let &Op::TopK { logits, ids, values, .. } = self.op else { unreachable!("lowering another op") };
        let [vocab, k] = [logits, ids].map(|buf| self.desc(buf).shape[1]);
        let (n, tile, candidates) = self.head_candidates(logits);
        let spec = KernelSpec::new("top_k")
            .size("VOCAB", "v", vocab)
            .size("K", "k", k)
            .size("CANDIDATES", "c", n)
            .with("TILE", if n > 0 { tile } else { 4 });
        let arguments = vec![self.batch.requests.into(), logits.into(), candidates, ids.into(), values.into()];
        vec![plain(spec, arguments, [self.pass.rows, 1, 1], 1024)]
    }

    /// The rows carry the tree: one kernel serves every shape.
    pub(super) fn accept(&self) -> Vec<Launch> {
        let &Op::Accept { draws, accepted, .. } = self.op else { unreachable!("lowering another op") };
        let arguments = [self.batch.rows, self.batch.requests, draws, accepted].map(Argument::from).to_vec();
        vec![plain(KernelSpec::new("accept"), arguments, [self.max_requests(), 1, 1], MAX_NODES)]
    }

    pub(super) fn commit(&self) -> Vec<Launch> {
        let &Op::Commit { accepted, k_cache, v_cache, .. } = self.op else { unreachable!("lowering another op") };
        let cache = self.pass.cache_shape(k_cache);
        let spec = self.paged(KernelSpec::new("commit"), k_cache).with("POOL_PAGES", cache.pages);
        let caches = 1 + usize::from(v_cache.is_some());
        let spec = spec.with("CACHES", caches);
        let operands = [self.batch.requests, self.batch.pages, accepted, k_cache, v_cache.unwrap_or(k_cache)];
        let grid = [cache.kv_heads, cache.layers, self.max_requests()];
        let vectors = caches * cache.head_dim * self.desc(k_cache).dtype.size() / 16;
        let threads = if vectors > 128 { 256 } else { 128 };
        vec![plain(spec, operands.map(Argument::from).to_vec(), grid, threads)]
    }
}

/// A launch without clusters and dynamic shared memory.
pub(super) fn plain(spec: KernelSpec, arguments: Vec<Argument>, grid: [usize; 3], threads: usize) -> Launch {
    Launch { spec, arguments, grid, threads, shared_bytes: 0, cluster: 1 }
}

#[cfg(test)]
mod tests {
    use crate::cuda::{Device, lower};
    use crate::emit::{Lang, emit};
    use crate::op::TreeSpec;
    use crate::release::MODELS;

    #[test]
    fn specs_give_the_constants_that_sources_have() {
        const STEMS: [&str; 8] = ["embed", "rms_norm", "mask", "draw", "perturb", "top_k", "accept", "commit"];
        for model in MODELS {
            let pass = model.pass(16, TreeSpec::Any(64));
            for op in pass.ops.iter().filter(|op| STEMS.contains(&op.name())) {
                for launch in lower(op, &pass, &Device::A100).unwrap() {
                    let source = emit(&launch.spec, Lang::Cuda).unwrap();
                    let entry = format!("    {}(const u32* ", op.name());
                    let (_, parameters) = source.split_once(&entry).unwrap_or_else(|| panic!("no `{entry}`"));
                    let parameters = parameters.split_once(") {").unwrap().0;
                    assert_eq!(parameters.matches('*').count() + 1, launch.arguments.len(), "{}", op.name());
                    // Those of a commit follow from its constants.
                    let threads = match (op.name(), launch.threads) {
                        ("commit", 128) => "CACHES * CHUNKS > 128 ? 256 : 128".to_string(),
                        (_, threads) => threads.to_string(),
                    };
                    assert!(source.contains(&format!("constexpr u32 THREADS = {threads};")), "{}", op.name());
                }
            }
        }
    }
}
