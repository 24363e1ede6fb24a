//! The end of a round: acceptance, commit, and the round as a whole against plain decoding.

use treespark::backend::Backend;
use treespark_kernel_gen::layout::NO_TOKEN;
use treespark_kernel_gen::{MAX_NODES, TreeShape, TreeSpec};

use super::{Property, for_cases, same, same_bits};
use crate::arb::{Case, cases};
use crate::batch::{Batch, Member, Tree};
use crate::bed::{Accepted, Bed, Outputs, SlotValues};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::tiny_model::{MAX_ROWS, MAX_SLOTS, Tail};

const ANY: TreeSpec = TreeSpec::Any(MAX_NODES);

/// Draws that a batch's trees are likely to contain: mostly the token of a child, now and then none of them. Along a given
/// chain they mostly are not its tokens.
fn likely_draws(batch: &Batch, vocab: usize, rng: &mut Rng) -> Vec<u32> {
    let mut draws = Vec::new();
    for m in &batch.members {
        for node in m.done..m.tree.nodes() {
            let children: Vec<usize> = (1..m.tree.nodes()).filter(|&n| m.tree.parents[n] == node).collect();
            draws.push(match rng.below(12) {
                0 => NO_TOKEN,
                1 => rng.below(vocab) as u32,
                2..9 if node + 1 < m.given.min(m.tree.nodes()) => (m.tree.tokens[node + 1] + 1) % vocab as u32,
                _ if children.is_empty() => rng.below(vocab) as u32,
                _ => m.tree.tokens[rng.pick(&children)],
            });
        }
    }
    draws
}

/// Acceptance on given draws: the oracle walks the tree. For trees of any kind, and compiled for one tree.
pub fn acceptance_equals_the_oracle(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 24, cases(), acceptance_equals_the_oracle_in_case)
}

pub fn acceptance_equals_the_oracle_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let draws = likely_draws(&case.batch, case.model.sizes.vocab, &mut case.rng());
    let mut oracle = Oracle::new();
    let want = accept(&mut oracle, &case, &case.batch, &draws, &ANY);
    same("accepted", &accept(backend, &case, &case.batch, &draws, &ANY), &want)?;
    let parents: Vec<u32> = case.batch.members[0].tree.parents.iter().map(|&p| p as u32).collect();
    let shape = TreeShape::from_parents(&parents).map_err(|e| e.to_string())?;
    let first = Batch { members: case.batch.members[..1].to_vec() };
    let fixed = accept(backend, &case, &first, &draws[..first.rows()], &TreeSpec::Static(shape));
    same("accepted, by a static tree", &fixed[0], &want[0])
}

fn accept(backend: &mut dyn Backend, case: &Case, batch: &Batch, draws: &[u32], tree: &TreeSpec) -> Vec<Accepted> {
    let mut bed = Bed::new(backend, case.model.clone());
    let pass = case.model.accept_pass(batch.rows(), tree);
    bed.prepare(&pass);
    bed.write("draws", draws);
    bed.run(&pass, batch);
    (0..batch.members.len()).map(|i| bed.accepted(i)).collect()
}

/// A commit moves the accepted nodes' keys and values, bit for bit, next to the prefix. All other slots keep what they
/// held.
pub fn commit_moves_the_path_and_nothing_else(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), commit_moves_the_path_and_nothing_else_in_case)
}

pub fn commit_moves_the_path_and_nothing_else_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut bed = Bed::new(backend, case.model.clone());
    bed.verify(&case.batch, MAX_ROWS, &ANY);
    let draws = likely_draws(&case.batch, case.model.sizes.vocab, &mut case.rng());
    commit(&mut bed, &case.batch, &draws).moves_the_path_and_nothing_else(&case.batch)
}

/// A request without rows accepts nothing and keeps its cache; the others accept what the oracle says, and commit it.
pub fn a_request_without_rows_commits_nothing(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 3, cases(), a_request_without_rows_commits_nothing_in_case)
}

pub fn a_request_without_rows_commits_nothing_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut bed = Bed::new(backend, case.model.clone());
    bed.verify(&case.batch, MAX_ROWS, &ANY);
    for (ended, batch) in case.batch.with_one_ended() {
        let what = |problem| format!("request {ended} has ended: {problem}");
        let draws = likely_draws(&batch, case.model.sizes.vocab, &mut case.rng());
        let committed = commit(&mut bed, &batch, &draws);
        let want = accept(&mut Oracle::new(), &case, &batch, &draws, &ANY);
        same("accepted", &committed.accepted, &want).map_err(what)?;
        committed.moves_the_path_and_nothing_else(&batch).map_err(what)?;
    }
    Ok(())
}

/// After a commit the cache holds what decoding the accepted tokens one by one would have left.
pub fn commit_leaves_the_cache_of_plain_decoding(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), commit_leaves_the_cache_of_plain_decoding_in_case)
}

pub fn commit_leaves_the_cache_of_plain_decoding_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut bed = Bed::new(backend, case.model.clone());
    let agreement = bed.agreement();
    bed.verify(&case.batch, MAX_ROWS, &ANY);
    let draws = likely_draws(&case.batch, case.model.sizes.vocab, &mut case.rng());
    let Committed { accepted, after, .. } = commit(&mut bed, &case.batch, &draws);
    drop(bed);
    for (i, member) in case.batch.members.iter().enumerate() {
        let tokens: Vec<u32> = accepted[i].path.iter().map(|&n| member.tree.tokens[n as usize]).collect();
        for (slot, want) in plain_cache(backend, &case, member, &tokens).iter().enumerate() {
            let what = format!("request {i}, slot {slot} of path {:?}", accepted[i].path);
            agreement.slots(&what, &after[i][slot], want, case.model.sizes.cache)?;
        }
    }
    Ok(())
}

/// What a commit is about: slots of each request, and the path that it accepts.
struct Committed {
    before: Vec<Vec<SlotValues>>,
    accepted: Vec<Accepted>,
    after: Vec<Vec<SlotValues>>,
}

impl Committed {
    fn moves_the_path_and_nothing_else(&self, batch: &Batch) -> Property {
        for (i, member) in batch.members.iter().enumerate() {
            let (prefix, path) = (member.prefix.len(), &self.accepted[i].path);
            for (slot, values) in self.after[i].iter().enumerate() {
                let from = slot.checked_sub(prefix).and_then(|n| path.get(n)).map_or(slot, |&n| prefix + n as usize);
                let what = format!("request {i}, slot {slot} of path {path:?}");
                same_bits(&what, values, &self.before[i][from])?;
            }
        }
        Ok(())
    }
}

/// Commits what these draws accept of a batch whose nodes are in the cache.
fn commit(bed: &mut Bed, batch: &Batch, draws: &[u32]) -> Committed {
    let requests = 0..batch.members.len();
    let slots = |bed: &mut Bed| requests.clone().map(|i| bed.cached(i, MAX_SLOTS)).collect();
    let pass = bed.model.commit_pass(MAX_ROWS, &ANY);
    bed.prepare(&pass);
    let before = slots(bed);
    bed.write("draws", draws);
    bed.run(&pass, batch);
    let accepted = requests.clone().map(|i| bed.accepted(i)).collect();
    Committed { before, accepted, after: slots(bed) }
}

/// The cache after `tokens` have been decoded one by one behind a member's prefix.
fn plain_cache(backend: &mut dyn Backend, case: &Case, member: &Member, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut bed = Bed::new(backend, case.model.clone());
    bed.prefill(&Batch { members: vec![member.clone()] });
    let mut prefix = member.prefix.clone();
    for &token in tokens {
        bed.decode(&Batch { members: vec![Member::new(&prefix, Tree::chain(&[token]))] }, 1, &ANY);
        prefix.push(token);
    }
    bed.cached(0, prefix.len())
}

/// A whole round in one pass emits the tokens that plain decoding draws, as far as the tree goes, and commits them.
pub fn a_round_emits_what_plain_decoding_draws(backend: &mut dyn Backend) -> Property {
    for_cases(backend, 4, cases(), a_round_emits_what_plain_decoding_draws_in_case)
}

pub fn a_round_emits_what_plain_decoding_draws_in_case(backend: &mut dyn Backend, case: Case) -> Property {
    let mut rng = case.rng();
    let mut members = Vec::new();
    let mut expected = Vec::new();
    for member in case.batch.members.iter().filter(|m| m.tree.nodes() <= 64) {
        let plain = plain_rows(backend, &case, member, 1 + rng.below(6));
        let draws: Vec<u32> = plain.iter().map(|row| row.draws[0]).collect();
        let (tree, path) = graft(&member.tree, &draws[..draws.len() - 1], &mut rng);
        members.push(Member { tree, given: 0, ..member.clone() });
        expected.push((plain, path));
    }
    if members.is_empty() {
        return Ok(());
    }
    let batch = Batch { members };
    let mut bed = Bed::new(backend, case.model.clone());
    bed.prefill(&batch);
    let pass = case.model.pass(MAX_ROWS, &ANY, Tail::Commit);
    bed.run(&pass, &batch);
    let round = bed.outputs(&batch);
    for (i, (plain, path)) in expected.iter().enumerate() {
        let accepted = bed.accepted(i);
        emits(&round, batch.first_row(i), &accepted, plain)
            .map_err(|problem| format!("request {i}: {problem}: round {accepted:?} along {path:?}"))?;
    }
    Ok(())
}

/// `Err` unless a round's request, whose rows begin at `first`, emits what plain decoding does, up to a first draw that
/// the backend's promise excuses.
fn emits(round: &Outputs, first: usize, accepted: &Accepted, plain: &[Outputs]) -> Property {
    let emitted = accepted.path.iter().zip(&accepted.tokens);
    for (i, ((&node, &token), plain)) in emitted.clone().zip(plain).enumerate() {
        if token != plain.draws[0] {
            let runs = [(round, first + node as usize), (plain, 0)];
            return round
                .agreement
                .draws([token, plain.draws[0]], runs)
                .map_err(|problem| format!("token {i}: {problem}"));
        }
    }
    // The random part of the tree may happen to continue the grafted path: longer is right, shorter is not.
    if emitted.len() < plain.len() {
        return Err(format!("{} tokens, plain decoding {}", emitted.len(), plain.len()));
    }
    Ok(())
}

/// The first `n` rows of plain decoding from a member's root on.
fn plain_rows(backend: &mut dyn Backend, case: &Case, member: &Member, n: usize) -> Vec<Outputs> {
    let mut bed = Bed::new(backend, case.model.clone());
    bed.prefill(&Batch { members: vec![member.clone()] });
    let mut step = Member { tree: Tree::chain(&member.tree.tokens[..1]), ..member.clone() };
    let mut rows = Vec::new();
    for _ in 0..n {
        let row = bed.decode(&Batch { members: vec![step.clone()] }, 1, &ANY);
        step.prefix.push(step.tree.tokens[0]);
        step.tree = Tree::chain(&row.draws);
        rows.push(row);
    }
    rows
}

/// Adds a path of these tokens from the root to a tree, its nodes spread among the others.
fn graft(tree: &Tree, tokens: &[u32], rng: &mut Rng) -> (Tree, Vec<usize>) {
    let mut grown = Tree { parents: vec![0], tokens: vec![tree.tokens[0]] };
    let mut new_id = vec![0; tree.nodes()];
    let mut path = vec![0];
    let mut node = 1;
    while node < tree.nodes() || path.len() <= tokens.len() {
        let graft_now = path.len() <= tokens.len() && (node == tree.nodes() || rng.below(3) == 0);
        if graft_now {
            grown.parents.push(path[path.len() - 1]);
            grown.tokens.push(tokens[path.len() - 1]);
            path.push(grown.nodes() - 1);
        } else {
            grown.parents.push(new_id[tree.parents[node]]);
            grown.tokens.push(tree.tokens[node]);
            new_id[node] = grown.nodes() - 1;
            node += 1;
        }
    }
    (grown, path)
}
