//! The engine: one target, one drafter, and the round. Start reading at [`Engine::round`].

use std::time::Instant;

use treespark_kernel_gen::MAX_NODES;

use crate::backend::Backend;
use crate::batch::Entry;
use crate::draft::{Draft, Drafter, Plan, Proposal};
use crate::error::{Error, Result};
use crate::network::{Network, Outcome};
use crate::scheduler::{Policy, Scheduler};
use crate::sequence::{Fresh, Sequence};
use crate::stats::Statistics;
use crate::tree::{Accepted, TokenTree};

pub struct Engine {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) target: Network,
    pub(crate) drafter: Box<dyn Drafter>,
    pub(crate) scheduler: Scheduler,
    pub(crate) context: usize,
    /// Nodes of the largest tree where the device drafts; `None` where the host does.
    nodes_on_device: Option<usize>,
    /// The same where it drafts for many sequences, behind a pass that the host makes up.
    nodes_for_many: Option<usize>,
}

/// What one round did.
#[derive(Debug, Clone)]
pub struct Round {
    /// The verified tree.
    pub tree: TokenTree,
    /// What the drafter expected of its nodes; empty where the device drafted.
    pub survival: Vec<f32>,
    pub accepted: Accepted,
    /// The tokens that the sequence took: the accepted draft tokens and the bonus token, cut where the sequence ended. None
    /// where a part of a prompt was run.
    pub tokens: Vec<u32>,
    /// The logits behind which these were drawn, where the sequence wants them.
    pub logits: Vec<Vec<f32>>,
}

impl Engine {
    /// An engine over parts that are already on the device. [`Llm`](crate::Llm) is the convenient way.
    pub fn new(
        backend: Box<dyn Backend>,
        target: Network,
        drafter: Box<dyn Drafter>,
        scheduler: Scheduler,
        context: usize,
    ) -> Engine {
        let plan = scheduler.plan(Policy::CONFIDENCE, 0);
        let on_device = backend.drafts() && plan.shape.is_none();
        let nodes = drafter.nodes_on_device().filter(|_| on_device).map(|nodes| nodes.min(plan.max_nodes));
        // There is nothing to grow from a block where a tree is its root.
        let nodes = nodes.filter(|&nodes| nodes > 1 || !target.grows_blocks());
        let is_for_many = target.max_requests() > 1;
        let nodes_on_device = nodes.filter(|_| !is_for_many);
        let nodes_for_many = nodes.filter(|_| is_for_many && target.grows_blocks());
        Engine { backend, target, drafter, scheduler, context, nodes_on_device, nodes_for_many }
    }

    /// The same with the host drafting, also where the device could: a round then tells what the drafter expected.
    pub fn drafting_on_the_host(self) -> Engine {
        Engine { nodes_on_device: None, nodes_for_many: None, ..self }
    }

    /// Compiles what prompts and rounds will run, where the device can draft: elsewhere sequences wait for it, once.
    pub fn prepare(&mut self) -> Result<()> {
        let Engine { backend, target, drafter, scheduler, .. } = self;
        let backend = backend.as_mut();
        if backend.drafts() {
            target.prepare_prompts(backend)?;
            drafter.prepare(backend, target, &scheduler.plan(Policy::CONFIDENCE, self.context))?;
        }
        if let Some(nodes) = self.nodes_on_device {
            target.prepare_rounds(backend, nodes)?;
        }
        Ok(())
    }

    /// Measures what passes cost, so that trees are as large as pays on this very device, and drafters rest while they do not
    /// pay. `progress` gets steps done and in all.
    pub fn serve_many(&mut self, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
        let costs = self.target.measure_costs(self.backend.as_mut(), self.nodes_for_many, progress)?;
        self.scheduler.serve_many(costs);
        Ok(())
    }

    /// Whether a prompt can be run at all.
    pub fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab = self.target.config().vocab_size;
        match prompt.len() {
            0 => return Err(Error::EmptyPrompt),
            n if n >= self.context => return Err(Error::ContextFull { needed: n + 1, limit: self.context }),
            _ => {}
        }
        match prompt.iter().find(|&&token| token as usize >= vocab) {
            Some(&token) => Err(Error::Token { token, vocab }),
            None => Ok(()),
        }
    }

    /// Runs the prompt: all of it but the last token, which is the root of the first round's tree.
    pub fn prefill(
        &mut self,
        seq: &mut Sequence,
        stats: &mut Statistics,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        self.check_prompt(seq.tokens())?;
        let start = Instant::now();
        let Engine { backend, target, drafter, .. } = self;
        let prompt = seq.pending()[..seq.pending().len() - 1].to_vec();
        drafter.start(backend.as_mut(), seq)?;
        target.extend(backend.as_mut(), &mut seq.kv, &prompt, progress)?;
        target.note_prompt(seq, prompt.len());
        target.wait(backend.as_mut())?; // so that the first round's time is its own
        stats.prefill(seq.tokens().len(), start.elapsed());
        Ok(())
    }

    /// One speculative round of a sequence: draft, verify, accept, commit.
    pub fn round(&mut self, seq: &mut Sequence, stats: &mut Statistics) -> Result<Round> {
        // What a repetition penalty or a grammar needs to know of a sequence, the device does not note.
        if let (Some(nodes), None, None, Policy::CONFIDENCE, false) =
            (self.nodes_on_device, seq.seen(), &seq.grammar, seq.policy, seq.wants_logits)
        {
            return self.round_on_device(nodes, seq, stats);
        }
        let (_, round) = self.rounds(&mut [seq], stats)?.pop().expect("there is a row for one sequence");
        round
    }

    /// The same of many, in one pass. A sequence whose prompt is not in the cache yet runs a part of it instead. Returns the
    /// rounds of those for which there were rows, with their places; an error of one sequence is its own.
    pub fn rounds(
        &mut self,
        seqs: &mut [&mut Sequence],
        stats: &mut Statistics,
    ) -> Result<Vec<(usize, Result<Round>)>> {
        let nodes = self.nodes_for_many;
        let Engine { backend, target, drafter, scheduler, .. } = self;
        let backend = backend.as_mut();
        let mut clock = stats.start_round();
        // Those that may draft, or soon may: behind a prompt the device drafts at once.
        let ready = seqs.iter().filter(|seq| seq.pending().len() == 1).count().max(1);
        let costs = |depth| (depth, target.draft_cost(ready, depth));
        scheduler.look_ahead(ready, &target.draft_depths().into_iter().map(costs).collect::<Vec<_>>());

        // Draft. Where the device drafts, the round before has. Node 0 is the last committed token; every other node is a guess.
        // One that a grammar forbids is left out.
        let drafts = match nodes {
            Some(_) => drafted(seqs),
            None => draft(backend, target, drafter.as_mut(), scheduler, seqs)?,
        };
        let start = Instant::now(); // of the host's own part
        let proposals = propose(drafts, seqs);
        clock.drafted(stats);

        // Schedule. The likeliest nodes of all sequences are verified, as many as pay.
        let (places, mut entries) = schedule(scheduler, seqs, &proposals, target.max_rows());

        // Verify. One target pass; a node sees the committed prefix and its own ancestors, and the target draws its own
        // token at every node. The path whose tokens equal those draws is accepted, plus one bonus token; its rows move
        // next to the prefix.
        if nodes.is_some() {
            entries.iter_mut().for_each(|entry| entry.draft_depth = draft_depth(scheduler, entry));
        }
        let scheduled = Instant::now();
        target.verify(backend, &mut entries)?;
        let outcomes = target.outcomes(backend, &mut entries, nodes)?; // the round's only wait on the target
        let passes = scheduled.elapsed();
        clock.verified(stats);

        // Accept. A stop token or the end of the context may lie inside the path.
        let mut rounds = Vec::new();
        for ((place, entry), outcome) in places.into_iter().zip(entries).zip(outcomes) {
            rounds.push((place, accept(entry, outcome, proposals[place].as_ref(), drafter.as_mut(), stats)));
        }
        clock.accepted(stats);
        scheduler.took_beside((start.elapsed() - passes).as_secs_f64());
        Ok(rounds)
    }

    /// The same round where the device drafts, too.
    fn round_on_device(&mut self, nodes: usize, seq: &mut Sequence, stats: &mut Statistics) -> Result<Round> {
        let Engine { backend, target, drafter, .. } = self;
        let backend = backend.as_mut();
        let mut clock = stats.start_round();

        // Draft. The round before has.
        let tree = target.drafted(backend, seq, nodes)?;
        clock.drafted(stats);

        // Verify and commit. The device then drafts the next round, behind the path that it accepted.
        let accepted = target.round(backend, &mut seq.kv, &tree, nodes)?; // the round's only wait
        clock.verified(stats);

        // Accept. A stop token or the end of the context may lie inside the path; then there is no next round.
        let tokens = seq.push(&accepted.tokens).to_vec();
        clock.accepted(stats);

        stats.record(drafter.name(), &tree, &accepted, tokens.len());
        Ok(Round { tree, survival: Vec::new(), accepted, tokens, logits: Vec::new() })
    }

    /// Decodes until the sequence is finished.
    pub fn generate(&mut self, seq: &mut Sequence, stats: &mut Statistics) -> Result<()> {
        self.prefill(seq, stats, &mut |_| {})?;
        while seq.finished().is_none() {
            self.round(seq, stats)?;
        }
        self.release(seq);
        Ok(())
    }

    /// Gives a sequence's cache pages back: it is finished, or waits and runs its text again later.
    pub fn release(&mut self, seq: &mut Sequence) {
        self.target.release(&mut seq.kv);
        seq.fresh = Fresh::default();
        self.drafter.forget(seq);
    }

    /// Gives a new sequence what the cache already holds of its text, and returns how many tokens that are.
    pub fn share(&mut self, seq: &mut Sequence) -> usize {
        self.target.share(seq)
    }

    /// Pages that the sequence's next round needs beside those that it has, if it runs so many tokens of its prompt before.
    pub fn pages_for(&self, seq: &Sequence, prompt: usize) -> usize {
        // Behind a part of a prompt comes a tree, and behind that perhaps a block.
        let part = seq.pending().len().min(PROMPT_ROWS).max(prompt);
        let behind = self.scheduler.max_nodes() + self.target.block_rows();
        seq.kv.missing(self.target.pool(), part + behind)
    }

    /// Lets others share what a sequence has in the cache.
    pub fn publish(&mut self, seq: &mut Sequence) {
        self.target.publish(seq);
    }

    pub fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    pub fn target(&self) -> &Network {
        &self.target
    }

    /// Tokens of a sequence, prompt included.
    pub fn context(&self) -> usize {
        self.context
    }
}

/// Rows of prompts in a pass, at most: what else is in it waits for them.
const PROMPT_ROWS: usize = 256;

/// What the drafter proposes to those who may use it; of a sequence whose prompt is still to be run, none.
fn draft(
    backend: &mut dyn Backend,
    target: &mut Network,
    drafter: &mut dyn Drafter,
    scheduler: &Scheduler,
    seqs: &mut [&mut Sequence],
) -> Result<Vec<Option<Draft>>> {
    let wants = |plan: &Plan| plan.max_nodes > 1 && plan.max_depth > 0;
    let mut drafts: Vec<Option<Draft>> =
        seqs.iter().map(|seq| (seq.pending().len() == 1).then(|| Draft::root(seq.last()))).collect();
    let mut places = Vec::new();
    let mut drafting = Vec::new();
    for (place, seq) in seqs.iter_mut().enumerate().filter(|(place, _)| drafts[*place].is_some()) {
        let plan = scheduler.plan(seq.policy, seq.room());
        if wants(&plan) {
            places.push(place);
            drafting.push((&mut **seq, plan));
        }
    }
    if !drafting.is_empty() {
        let proposed = drafter.propose_all(backend, target, &mut drafting)?;
        places.into_iter().zip(proposed).for_each(|(place, draft)| drafts[place] = Some(draft));
    }
    Ok(drafts)
}

/// The same without what grammars forbid and policies do not want.
fn propose(drafts: Vec<Option<Draft>>, seqs: &[&mut Sequence]) -> Vec<Option<Proposal>> {
    let proposal = |(draft, seq): (Option<Draft>, &&mut Sequence)| {
        Some(Proposal::new(draft?, seq.grammar.as_ref(), seq.policy.chain))
    };
    drafts.into_iter().zip(seqs).map(proposal).collect()
}

/// What the device has drafted behind the round before.
fn drafted(seqs: &mut [&mut Sequence]) -> Vec<Option<Draft>> {
    let draft = |seq: &mut &mut Sequence| {
        let draft = seq.draft.take();
        (seq.pending().len() == 1).then(|| draft.unwrap_or_else(|| Draft::root(seq.last())))
    };
    seqs.iter_mut().map(draft).collect()
}

/// How deep the device may draft behind an entry.
fn draft_depth(scheduler: &Scheduler, entry: &Entry<'_>) -> usize {
    let plan = scheduler.plan(entry.seq.policy, entry.seq.room());
    if entry.is_part() || plan.max_nodes == 1 { 0 } else { plan.reach }
}

/// The entries of a pass, and whose they are: of those with a draft as many nodes as pay, of the others parts of prompts, whoever
/// comes first.
fn schedule<'a>(
    scheduler: &mut Scheduler,
    seqs: &'a mut [&mut Sequence],
    proposals: &[Option<Proposal>],
    max_rows: usize,
) -> (Vec<usize>, Vec<Entry<'a>>) {
    let drafts: Vec<Option<&Draft>> = proposals.iter().map(|proposal| Some(&proposal.as_ref()?.draft)).collect();
    let drafted: Vec<(&Draft, Policy)> =
        drafts.iter().zip(seqs.iter()).filter_map(|(draft, seq)| Some(((*draft)?, seq.policy))).collect();
    let mut room = max_rows.saturating_sub(drafted.len()).min(PROMPT_ROWS);
    let mut part = |seq: &Sequence| {
        let rows = seq.pending().len().min(room).min(MAX_NODES);
        room -= rows;
        rows
    };
    let parts: Vec<usize> =
        drafts.iter().zip(seqs.iter()).map(|(draft, seq)| if draft.is_some() { 0 } else { part(seq) }).collect();
    let mut nodes = scheduler.nodes(&drafted, parts.iter().sum(), max_rows).into_iter();
    let (mut places, mut entries) = (Vec::new(), Vec::new());
    for (place, seq) in seqs.iter_mut().enumerate() {
        let (tree, given) = match drafts[place] {
            Some(draft) => {
                let mut tree = draft.tree.clone();
                tree.truncate(nodes.next().expect("a number for each draft"));
                (tree, 1)
            }
            None if parts[place] > 0 => {
                let part = TokenTree::chain(&seq.pending()[..parts[place]]).expect("no more than a tree may have");
                (part, parts[place])
            }
            None => continue,
        };
        places.push(place);
        entries.push(Entry { seq, tree, given, draft_depth: 0 });
    }
    (places, entries)
}

/// Takes what was accepted into a sequence.
fn accept(
    entry: Entry<'_>,
    outcome: Outcome,
    proposal: Option<&Proposal>,
    drafter: &mut dyn Drafter,
    stats: &mut Statistics,
) -> Result<Round> {
    let is_part = entry.is_part();
    let Entry { seq, mut tree, given, .. } = entry;
    let Outcome { accepted, logits, draft: next } = outcome;
    let mut accepted = accepted.checked(seq.kv.len())?;
    seq.kv.commit(accepted.path.len());
    if given > 1 {
        // What was given is no guess: from here on it is a round of plain decoding.
        let bonus = accepted.tokens[given - 1];
        (tree, accepted) = (TokenTree::root(seq.last()), Accepted { path: vec![0], tokens: vec![bonus] });
    }
    let mut tokens = Vec::new();
    if !is_part {
        tokens = seq.push(&accepted.tokens).to_vec();
        stats.record(drafter.name(), &tree, &accepted, tokens.len());
        if let Some(grammar) = &mut seq.grammar {
            grammar.advance(&tokens)?;
        }
    }
    if let Some(proposal) = proposal {
        proposal.observe(drafter, seq, &accepted);
    }
    seq.draft = next;
    let survival = proposal.map_or(Vec::new(), |proposal| proposal.draft.survival[..tree.len()].to_vec());
    Ok(Round { tree, survival, accepted, tokens, logits })
}
