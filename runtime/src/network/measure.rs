//! What passes cost on the device at hand, by their rows: measured once, when a server starts. The curve decides how many nodes
//! of trees are worth a row, and so the speed, never the tokens.

use std::time::Instant;

use treespark_models::random;

use super::{Kind, Network};
use crate::backend::{Backend, PassCost};
use crate::batch::Entry;
use crate::error::Result;
use crate::sampling::Sampling;
use crate::scheduler::Costs;
use crate::sequence::Sequence;
use crate::tree::TokenTree;

/// Tokens in front of every tree that is timed.
const PREFIX: usize = 256;
/// Nodes of the largest tree that is timed, alone and beside others.
const TREE: usize = 64;
const SMALL_TREE: usize = 8;
/// The least of so many runs counts, after one that warms up.
const RUNS: usize = 5;
/// Points of a curve that tell of those behind them.
const LAST: usize = 5;
/// A pass that takes so long is run no more often than needed: on a slow device the curve is known soon.
const PATIENCE_SECONDS: f64 = 0.25;

impl Network {
    /// Times passes of 1, 4, 16 .. sequences with different numbers of rows, and blocks that are filled for 1, 2, 4 .. of them, or
    /// where the device drafts trees of up to so many `nodes`, all of that. Passes are compiled for powers of two, so that costs
    /// jump behind these: what lies there is timed, too. From then on these are the costs that nodes are weighed by. `progress`
    /// gets steps done and in all.
    pub fn measure_costs(
        &mut self,
        backend: &mut dyn Backend,
        nodes: Option<usize>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Costs> {
        let prefix = PREFIX.min(self.dims.context / 4);
        let room = self.dims.pages * self.dims.page_size / (prefix + TREE);
        let most = self.dims.max_requests.min(room).max(1);
        let blocks = between(1, most);
        let mut loads: Vec<usize> =
            blocks.iter().copied().filter(|n| n.is_power_of_two() && n.ilog2() % 2 == 0).collect();
        if !loads.contains(&most) {
            loads.push(most);
        }
        let largest = |requests: usize| if requests == 1 { TREE } else { requests * SMALL_TREE };
        let sizes = |requests: usize| between(requests, largest(requests).min(self.dims.max_rows));
        let sizes: Vec<Vec<usize>> = loads.iter().map(|&requests| sizes(requests)).collect();
        let depths = if self.fills_blocks() { self.draft_depths() } else { Vec::new() };
        let steps = sizes.iter().map(Vec::len).sum::<usize>() + blocks.len() * depths.len();
        self.prepare_many(backend, &sizes.concat(), &blocks, nodes)?;
        let mut seqs: Vec<Sequence> = (0..most).map(|_| self.stand_in(prefix)).collect();

        let mut done = 0;
        let mut curve = |sizes: &[usize], time: &mut dyn FnMut(usize) -> Result<f64>| {
            let mut points = Vec::new();
            for (i, &n) in sizes.iter().enumerate() {
                points.push((n, time(n)?));
                progress(done + i + 1, steps);
                // Beyond the last points the curve is a line through them.
                if n.is_power_of_two() && is_linear(&points) {
                    break;
                }
            }
            done += sizes.len();
            Ok::<_, crate::error::Error>(points)
        };
        let mut passes = Vec::new();
        for (&requests, sizes) in loads.iter().zip(&sizes) {
            passes.push(curve(sizes, &mut |rows| self.time_pass(backend, &mut seqs[..requests], rows))?);
        }
        let unit = passes[0][0].1;
        let mut block_costs = Vec::new();
        for depth in depths {
            let points = curve(&blocks, &mut |n| self.time_drafts(backend, &mut seqs[..n], nodes, depth))?;
            block_costs.push((depth, PassCost::measured(&points, unit)));
        }
        seqs.iter_mut().for_each(|seq| self.release(&mut seq.kv));
        let passes: Vec<PassCost> = passes.iter().map(|points| PassCost::measured(points, unit)).collect();
        self.cost = passes[0].clone();
        self.block_costs = block_costs;
        Ok(Costs::new(loads.into_iter().zip(passes).collect(), unit))
    }

    /// Compiles what rounds of many may run on a quick device, so that none of them waits for it.
    fn prepare_many(
        &mut self,
        backend: &mut dyn Backend,
        rows: &[usize],
        requests: &[usize],
        nodes: Option<usize>,
    ) -> Result<()> {
        if !self.is_quick_with_many() {
            return Ok(());
        }
        let mut wanted = Vec::new();
        for largest in self.tree_sizes() {
            wanted.extend(rows.iter().map(|&rows| (Kind::Verify { largest }, rows)));
        }
        for (depth, nodes) in self.draft_depths().into_iter().flat_map(|depth| nodes.map(|nodes| (depth, nodes))) {
            let rows = self.shortened(depth).rows;
            wanted.push((Kind::OpenBlocks { depth, nodes }, 1));
            let blocks = requests.iter().filter(|requests| requests.is_power_of_two());
            wanted.extend(blocks.map(|blocks| (Kind::GrowBlock { depth, nodes }, blocks * rows)));
        }
        self.prepare(backend, wanted)
    }

    /// A pass of so many rows, in shares as equal as can be.
    fn time_pass(&mut self, backend: &mut dyn Backend, seqs: &mut [Sequence], rows: usize) -> Result<f64> {
        let n = seqs.len();
        // Different tokens choose different experts, as those of a text do.
        let vocab = self.config.vocab_size;
        let token = |row: usize| (random::hash(row as u64) % vocab as u64) as u32;
        let chain = |i: usize| TokenTree::chain(&(rows * i / n..rows * (i + 1) / n).map(token).collect::<Vec<u32>>());
        let trees = (0..n).map(chain).collect::<Result<Vec<TokenTree>>>()?;
        least_seconds(&mut || {
            let entry = |(seq, tree): (_, &TokenTree)| Entry::of_tree(seq, tree.clone());
            let mut entries: Vec<Entry<'_>> = seqs.iter_mut().zip(&trees).map(entry).collect();
            self.verify(backend, &mut entries)?;
            self.outcomes(backend, &mut entries, None).map(drop)
        })
    }

    /// Of blocks for so many tokens.
    fn time_drafts(
        &mut self,
        backend: &mut dyn Backend,
        seqs: &mut [Sequence],
        nodes: Option<usize>,
        depth: usize,
    ) -> Result<f64> {
        if nodes.is_none() {
            return least_seconds(&mut || {
                let mut drafting: Vec<&mut Sequence> = seqs.iter_mut().collect();
                self.draft_blocks(backend, &mut drafting, depth).map(drop)
            });
        }
        // What drafting adds to a round.
        let mut round = |draft_depth: usize| {
            least_seconds(&mut || {
                let entry = |seq| Entry { draft_depth, ..Entry::of_tree(seq, TokenTree::root(0)) };
                let mut entries: Vec<Entry<'_>> = seqs.iter_mut().map(entry).collect();
                self.verify(backend, &mut entries)?;
                self.outcomes(backend, &mut entries, nodes).map(drop)
            })
        };
        Ok(round(depth)? - round(0)?)
    }

    /// A sequence as if so many tokens were in the cache; what is there does not change the time.
    fn stand_in(&mut self, prefix: usize) -> Sequence {
        let (context, vocab) = (self.dims.context, self.config.vocab_size);
        let mut seq = Sequence::new(vec![0; prefix + 1], Sampling::default(), context, vec![], context, vocab);
        if seq.kv.reserve(&mut self.pool, prefix).is_ok() {
            seq.kv.commit(prefix);
        }
        seq
    }
}

/// Powers of two from the first number to the last, with the first, and what lies right behind each.
fn between(first: usize, last: usize) -> Vec<usize> {
    let powers = (0..).map(|power| 1usize << power).take_while(|&n| n <= last).filter(|&n| n > first);
    let with_next = |n: usize| if n < 4 { vec![n] } else { vec![n, n + 1] };
    std::iter::once(first).chain(powers).flat_map(with_next).filter(|&n| n <= last).collect()
}

fn least_seconds(run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut least = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        least = least.min(start.elapsed().as_secs_f64());
        if least > PATIENCE_SECONDS {
            break;
        }
    }
    Ok(least)
}

/// Whether the last steps were in proportion to the rows, so that the rest can be told.
fn is_linear(points: &[(usize, f64)]) -> bool {
    let steep = |pair: &[(usize, f64)]| pair[1].1 / pair[0].1 > 0.9 * pair[1].0 as f64 / pair[0].0 as f64;
    points.len() > LAST && points[points.len() - LAST..].windows(2).all(steep)
}
