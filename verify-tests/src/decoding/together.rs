//! Many asks at once, answered by a batcher.

use treespark::backend::Backend;
use treespark::scheduler::Policy;
use treespark::serving::batcher::{Batcher, Message};
use treespark::serving::{self, Answer, Event};
use treespark::{GrammarSource, Sequence};
use treespark_models::Model;

use super::{Ask, Decoding, Seen, Way, language, told};
use crate::conformance::agreement::Agreement;
use crate::conformance::same;
use crate::rng::Rng;
use crate::shared::Shared;

impl Decoding {
    /// All at once. Asks arrive one behind the other, each with a policy of its own.
    pub(super) fn check_together(
        &self,
        model: &Model,
        backend: &Shared,
        plain: &[Sequence],
        seen: &mut Seen,
    ) -> Result<(), String> {
        let truths = plain.iter().map(|seq| seq.tokens().to_vec()).collect();
        let engine = self.engine(model, backend.share(), truths)?;
        let mut batcher = Batcher::new(engine, vec![language::end(self.sizes.vocab)], Policy::CONFIDENCE);
        let mut rng = Rng::new(self.seed ^ 3);
        let mut answers = Vec::new();
        for ask in &self.asks {
            let (events, answer) = Answer::channel();
            let policy = ["confidence", "confidence", "off", "fixed:2", "chain", "chain:3"][rng.below(6)];
            let grammar = ask.language.map(|language| language::grammar(language, self.sizes.vocab));
            batcher.add(ask.served(policy.parse().expect("a policy")), grammar, events);
            answers.push(Some(answer));
            for _ in 0..rng.below(4) {
                batcher.round(true).map_err(told)?;
            }
        }
        let leaves = rng.below(answers.len());
        if matches!(self.way, Way::Together { one_leaves: true, .. }) {
            answers[leaves] = None;
        }
        while !batcher.is_idle() {
            batcher.round(false).map_err(told)?;
        }
        batcher.take_mail().into_iter().for_each(Message::deliver);
        let counted = batcher.counters();
        seen.rounds += counted.rounds as usize;
        seen.accepted += counted.accepted as usize;
        seen.preempted += counted.preempted as usize;
        seen.shared += counted.cached_tokens as usize;
        same("pages in use at the end", counted.pages_used, 0)?;
        for (index, answer) in answers.into_iter().enumerate() {
            let Some(mut answer) = answer else { continue };
            let (mut tokens, mut end) = (Vec::new(), None);
            while let Some(event) = answer.wait() {
                match event {
                    Event::Tokens(emitted) => tokens.extend(emitted.iter().map(|emitted| emitted.token)),
                    Event::End(why, _) => end = Some(why),
                    Event::Failed(error) => return Err(error),
                }
            }
            let why = end.ok_or("an answer without an end")?;
            seen.ends.push(why);
            let tokens = [&self.asks[index].prompt[..], &tokens].concat();
            let (what, agreement) = (format!("answer {index}"), Agreement::of(backend.info().backend, &self.sizes()));
            let both = [&tokens[..], plain[index].tokens()];
            if self.same_tokens(&what, agreement, &self.asks[index], backend, both)? {
                same(&what, (&tokens[..], Some(why)), (plain[index].tokens(), plain[index].finished()))?;
            } else {
                seen.near_ties += 1;
            }
        }
        Ok(())
    }
}

impl Ask {
    /// The same for a service.
    fn served(&self, policy: Policy) -> serving::Ask {
        serving::Ask {
            prompt: self.prompt.clone(),
            sampling: self.sampling.clone(),
            max_new_tokens: self.max_new_tokens,
            ignore_stop_tokens: true,
            logprobs: None,
            policy: Some(policy),
            grammar: self.language.map(|language| GrammarSource::Regex(language.to_string())),
        }
    }
}
