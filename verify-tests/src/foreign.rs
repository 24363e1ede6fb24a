//! Somebody else's kernels, fuzzed: tree attention and acceptance as plain data in and out. `ffi/` is this as a C interface.

pub use treespark_kernel_gen::Row;
use treespark_kernel_gen::{DType, MAX_NODES};

use crate::arb::{Case, Failure, Family, Scale, Topology, attempt, some_cases, tree};
pub use crate::attention::Attention;
use crate::rng::Rng;
use crate::tiny_model::{Sizes, TinyModel};

/// Steps towards a smaller case.
const SHRINKS: u32 = 200;

/// A verified tree: the draft's tokens, and what the target drew behind each node.
pub struct Acceptance {
    pub parents: Vec<u32>,
    pub tokens: Vec<u32>,
    pub draws: Vec<u32>,
    /// Node ids from the root on, which are kept.
    pub path: Vec<u32>,
}

impl Acceptance {
    /// A random tree whose draws mostly go on along it; siblings may hold equal tokens, and the first of them counts.
    pub fn random(seed: u64) -> Acceptance {
        const VOCAB: usize = 40;
        let mut rng = Rng::new(seed);
        let topologies = [Topology::Chain, Topology::Recursive, Topology::DepthFirst];
        let nodes = if rng.below(4) > 0 { 1 + rng.below(16) } else { 1 + rng.below(MAX_NODES) };
        let tree = tree(nodes, rng.pick(&topologies), VOCAB, rng.word());
        let children = |node: usize| (1..nodes).filter(|&n| tree.parents[n] == node).collect::<Vec<usize>>();
        let draws: Vec<u32> = (0..nodes)
            .map(|node| match children(node) {
                children if children.is_empty() || rng.below(6) == 0 => rng.below(VOCAB) as u32,
                children => tree.tokens[rng.pick(&children)],
            })
            .collect();
        let mut path = vec![0];
        while let Some(next) =
            children(path[path.len() - 1]).into_iter().find(|&n| tree.tokens[n] == draws[path[path.len() - 1]])
        {
            path.push(next);
        }
        let ids = |nodes: &[usize]| nodes.iter().map(|&node| node as u32).collect();
        Acceptance { parents: ids(&tree.parents), tokens: tree.tokens.clone(), draws, path: ids(&path) }
    }
}

/// Others' kernels get numbers as they are.
fn in_f32(case: &Case) -> Case {
    let sizes = Sizes { cache: DType::F32, ..case.model.sizes };
    Case { model: TinyModel { sizes, ..case.model }, ..case.clone() }
}

/// Attacks somebody's attention with cases of a seed; the smallest failing case, told. `run` answers a case, or does not take it.
pub fn attack_attention(
    seed: u64,
    cases: u64,
    tolerance: f32,
    run: &mut dyn FnMut(&Attention) -> Option<Vec<f32>>,
) -> Result<(), String> {
    for index in 0..cases {
        let scale = if index % 8 == 7 { Scale::Usual } else { Scale::Small };
        let found = attempt([seed, index], some_cases(Family::Llama, true, scale), SHRINKS, &mut |_| {}, &mut |case| {
            let attention = Attention::of(&in_f32(&case));
            run(&attention).and_then(|out| attention.problem(&out, tolerance)).map_or(Ok(()), Err)
        });
        if let Err(Failure { case, problem }) = found {
            let mut text = format!("case {index} of seed {seed}: {problem}\n");
            if let Some(case) = case {
                text += &format!("the smallest case that fails:\n{:?}\n", case.model.sizes);
                for (request, member) in case.batch.members.iter().enumerate() {
                    let (prefix, parents) = (member.prefix.len(), &member.tree.parents);
                    text += &format!("request {request}: {prefix} committed slots, parents of the nodes {parents:?}\n");
                }
            }
            return Err(text);
        }
    }
    Ok(())
}

/// The same for acceptance: `run` answers with the path.
pub fn attack_acceptance(
    seed: u64,
    cases: u64,
    run: &mut dyn FnMut(&Acceptance) -> Option<Vec<u32>>,
) -> Result<(), String> {
    for index in 0..cases {
        let case = Acceptance::random(Rng::new(seed ^ index.rotate_left(32)).word());
        let Some(path) = run(&case) else { continue };
        if path != case.path {
            let Acceptance { parents, tokens, draws, path: want } = &case;
            let tree = format!("parents {parents:?}, tokens {tokens:?}, draws {draws:?}");
            return Err(format!("case {index} of seed {seed}: path {path:?}, expected {want:?}: {tree}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attention as anyone would write it, with a mask that may forget the node itself.
    fn plain(a: &Attention, sees_itself: bool) -> Vec<f32> {
        let (s, mut out) = (a.sizes, Vec::new());
        for (index, row) in a.rows.iter().enumerate() {
            let prefix = a.prefix[row.request as usize] as usize;
            let nodes = row.path().filter(|&node| sees_itself || node != row.node as usize || node == 0);
            let slots: Vec<usize> = (0..prefix).chain(nodes.map(|node| prefix + node)).collect();
            for head in 0..s.heads() {
                let place = |slot: usize| {
                    let page = a.pages[row.request as usize * a.pages_per_request + slot / s.page_size] as usize;
                    ((page * s.kv_heads + head / s.group) * s.page_size + slot % s.page_size) * s.head_dim
                };
                let q = &a.q[(index * s.heads() + head) * s.head_dim..][..s.head_dim];
                let dot = |slot: usize| q.iter().zip(&a.keys[place(slot)..]).map(|(q, k)| q * k).sum::<f32>() * a.scale;
                let weights: Vec<f32> = slots.iter().map(|&slot| dot(slot).exp()).collect();
                let total: f32 = weights.iter().sum();
                for d in 0..s.head_dim {
                    let sum: f32 = slots.iter().zip(&weights).map(|(&slot, w)| w * a.values[place(slot) + d]).sum();
                    out.push(sum / total);
                }
            }
        }
        out
    }

    #[test]
    fn right_attention_passes_and_a_mask_off_by_one_is_caught() {
        assert_eq!(attack_attention(1, 24, 1e-3, &mut |a| Some(plain(a, true))), Ok(()));
        let found = attack_attention(1, 24, 1e-3, &mut |a| Some(plain(a, false))).unwrap_err();
        assert!(found.contains("node 1") && found.contains("parents of the nodes [0, 0]"), "{found}");
    }

    #[test]
    fn right_acceptance_passes_and_the_last_sibling_is_caught() {
        let walk = |case: &Acceptance, last: bool| {
            let mut path = vec![0u32];
            loop {
                let at = path[path.len() - 1];
                let is_next =
                    |&n: &u32| case.parents[n as usize] == at && case.tokens[n as usize] == case.draws[at as usize];
                let mut next = (1..case.parents.len() as u32).filter(is_next);
                match if last { next.next_back() } else { next.next() } {
                    Some(node) => path.push(node),
                    None => return Some(path),
                }
            }
        };
        assert_eq!(attack_acceptance(3, 400, &mut |case| walk(case, false)), Ok(()));
        assert!(attack_acceptance(3, 400, &mut |case| walk(case, true)).unwrap_err().contains("expected"));
    }
}
