//! The engine: one target, one drafter, and the round. Start reading at [`Engine::round`].

use std::time::Instant;

use crate::backend::Backend;
use crate::draft::Drafter;
use crate::error::{Error, Result};
use crate::network::Network;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
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
}

/// What one round did.
#[derive(Debug, Clone)]
pub struct Round {
    /// The verified tree.
    pub tree: TokenTree,
    /// What the drafter expected of its nodes; empty where the device drafted.
    pub survival: Vec<f32>,
    pub accepted: Accepted,
    /// The tokens that the sequence took: the accepted draft tokens and the bonus token, cut where the sequence ended.
    pub tokens: Vec<u32>,
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
        let plan = scheduler.plan(0);
        let on_device = backend.drafts() && plan.shape.is_none();
        let nodes = drafter.nodes_on_device().filter(|_| on_device).map(|nodes| nodes.min(plan.max_nodes));
        // There is nothing to grow from a block where a tree is its root.
        let nodes_on_device = nodes.filter(|&nodes| nodes > 1 || !target.grows_blocks());
        Engine { backend, target, drafter, scheduler, context, nodes_on_device }
    }

    /// The same with the host drafting, also where the device could: a round then tells what the drafter expected.
    pub fn drafting_on_the_host(self) -> Engine {
        Engine { nodes_on_device: None, ..self }
    }

    /// Compiles what prompts and rounds will run, where the device can draft: elsewhere sequences wait for it, once.
    pub fn prepare(&mut self) -> Result<()> {
        let backend = self.backend.as_mut();
        if backend.drafts() {
            self.target.prepare_prompts(backend)?;
            self.drafter.prepare(backend)?;
        }
        if let Some(nodes) = self.nodes_on_device {
            self.target.prepare_rounds(backend, nodes)?;
        }
        Ok(())
    }

    /// Runs the prompt: all of it but the last token, which is the root of the first round's tree.
    pub fn prefill(
        &mut self,
        seq: &mut Sequence,
        stats: &mut Statistics,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let vocab = self.target.config().vocab_size;
        let prompt = seq.tokens();
        match prompt.len() {
            0 => return Err(Error::EmptyPrompt),
            n if n >= self.context => return Err(Error::ContextFull { needed: n + 1, limit: self.context }),
            _ => {}
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        let start = Instant::now();
        let Engine { backend, target, drafter, .. } = self;
        let (prompt, from) = (prompt.to_vec(), seq.kv.len());
        drafter.start(backend.as_mut(), &prompt)?;
        target.extend(backend.as_mut(), &mut seq.kv, &prompt[from..prompt.len() - 1], progress)?;
        target.wait(backend.as_mut())?; // so that the first round's time is its own
        stats.prefill(seq.tokens().len(), start.elapsed());
        Ok(())
    }

    /// One speculative round: draft, verify, accept, commit.
    pub fn round(&mut self, seq: &mut Sequence, stats: &mut Statistics) -> Result<Round> {
        // What a repetition penalty needs to know of a sequence, the device does not note.
        if let (Some(nodes), None) = (self.nodes_on_device, seq.seen()) {
            return self.round_on_device(nodes, seq, stats);
        }
        let Engine { backend, target, drafter, scheduler, .. } = self;
        let backend = backend.as_mut();
        let mut clock = stats.start_round();

        // Draft. Node 0 is the last committed token; every other node is a guess.
        let draft = drafter.propose(backend, target, seq, &scheduler.plan(seq.room()))?;
        let mut tree = draft.tree.clone();
        tree.truncate(scheduler.nodes(&draft));
        clock.drafted(stats);

        // Verify. One target pass; a node sees the committed prefix and its own ancestors, and the target draws its own
        // token at every node. The path whose tokens equal those draws is accepted, plus one bonus token.
        target.verify(backend, seq, &tree)?;
        let accepted = target.accepted(backend, &seq.kv)?; // the round's only wait on the target
        clock.verified(stats);

        // Accept. A stop token or the end of the context may lie inside the path.
        let tokens = seq.push(&accepted.tokens).to_vec();
        clock.accepted(stats);

        // Commit. The path's rows move next to the prefix. Rejected rows are left alone: nothing reads past the
        // prefix, and the next tree overwrites them.
        target.commit(backend, &mut seq.kv, &accepted.path)?;
        drafter.observe(backend, &draft, &accepted)?;
        clock.committed(stats);

        stats.record(drafter.name(), &tree, &accepted, tokens.len());
        let survival = draft.survival[..tree.len()].to_vec();
        Ok(Round { tree, survival, accepted, tokens })
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
        Ok(Round { tree, survival: Vec::new(), accepted, tokens })
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

    /// Gives a finished sequence's cache pages back.
    pub fn release(&mut self, seq: &mut Sequence) {
        self.target.release(&mut seq.kv);
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
