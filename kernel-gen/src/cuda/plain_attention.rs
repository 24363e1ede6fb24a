//! Tree attention without tensor cores, for the caches that those do not take.

use super::{Launch, Lowering};
use crate::op::Op;
use crate::spec::KernelSpec;

impl Lowering<'_> {
    /// The rows carry the tree: one kernel serves every shape.
    pub(super) fn plain_attention(&self) -> Vec<Launch> {
        let &Op::TreeAttention { layer, heads, kv_heads, scale, q, k_cache, v_cache, out, .. } = self.op else {
            unreachable!("lowering another op")
        };
        let spec = self
            .paged(KernelSpec::new("plain_attention"), k_cache)
            .size("GROUP", "g", heads / kv_heads)
            .with("SCALE", scale);
        let [k, v] = [k_cache, v_cache].map(|cache| self.layer(cache, layer));
        let arguments = vec![
            self.batch.rows.into(),
            self.batch.requests.into(),
            self.batch.pages.into(),
            q.into(),
            k,
            v,
            out.into(),
        ];
        vec![Launch { spec, arguments, grid: [heads, self.pass.rows, 1], threads: 256, shared_bytes: 0, cluster: 1 }]
    }
}
