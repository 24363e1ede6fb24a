//! Runs a plan. Contenders answer every prompt one after the other; the first of them is plain decoding, if it is
//! measured at all, and its answer is what later turns of a conversation stand behind, for all of them.

use std::ops::ControlFlow;

use treespark_models::Message;

use super::report::{Difference, Outcome};
use super::tally::Tally;
use super::{Plan, Prompt, PromptSet, Report, Setup};
use crate::error::Result;
use crate::{GenerateOptions, Llm, LoadProgress, Statistics};

/// Tokens that are generated before anything is timed, behind the longest prompt, so that no timed round waits for a
/// compiler or a cold cache.
const WARM_UP_TOKENS: usize = 32;

/// What a run is doing.
pub enum Event<'a> {
    Load(LoadProgress),
    Loaded,
    /// A setup begins a set.
    Set {
        set: &'a str,
        setup: &'a Setup,
        temperature: f32,
    },
    Round,
    /// All contenders have answered a prompt.
    Prompt,
}

/// Hears of every event; its answer says whether to go on.
pub type Watch<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// Runs all of it into the report. The report holds what was measured even where this fails or is ended early; it is
/// partial then.
pub fn run(plan: &Plan, report: &mut Report, watch: &mut Watch<'_>) -> Result<()> {
    report.partial = true;
    let mut contenders = Vec::new();
    if plan.plain {
        contenders.push(load(plan, &Setup::plain(), watch)?);
    }
    let (beside, only_plain) = (contenders.len(), [Setup::plain()]);
    let setups = if plan.setups.is_empty() { &only_plain[..] } else { &plan.setups };
    for setup in setups {
        contenders.truncate(beside);
        if contenders.is_empty() || !plan.setups.is_empty() {
            contenders.push(load(plan, setup, watch)?);
        }
        if warm_up(&mut contenders, plan, watch)?.is_break() {
            return Ok(());
        }
        for &temperature in &plan.temperatures {
            for set in &plan.sets {
                let _ = watch(Event::Set { set: &set.name, setup, temperature });
                let mut outcome = Outcome::new(contenders.len());
                let flow = measure(&mut contenders, plan, set, temperature, &mut outcome, watch)?;
                let used = contenders.last().expect("one at least").engine().drafter.name();
                report.add(set, setup, used, temperature, outcome);
                if flow.is_break() {
                    return Ok(());
                }
            }
        }
    }
    report.partial = false;
    Ok(())
}

fn load(plan: &Plan, setup: &Setup, watch: &mut Watch<'_>) -> Result<Llm> {
    let llm = Llm::load_with_progress(&setup.llm_options(&plan.target), &mut |progress| {
        let _ = watch(Event::Load(progress));
    });
    let _ = watch(Event::Loaded);
    llm
}

fn warm_up(contenders: &mut [Llm], plan: &Plan, watch: &mut Watch<'_>) -> Result<ControlFlow<()>> {
    let prompts = plan.sets.iter().flat_map(|set| &set.prompts);
    let Some(prompt) = prompts.max_by_key(|prompt| prompt.turns.first().map(String::len)) else {
        return Ok(ControlFlow::Continue(()));
    };
    for &temperature in &plan.temperatures {
        let options = plan.generate_options(temperature);
        let options = GenerateOptions { max_new_tokens: options.max_new_tokens.min(WARM_UP_TOKENS), ..options };
        if converse(contenders, plan, prompt, &options, watch)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// One set. A prompt that is ended early counts for nobody.
fn measure(
    contenders: &mut [Llm],
    plan: &Plan,
    set: &PromptSet,
    temperature: f32,
    outcome: &mut Outcome,
    watch: &mut Watch<'_>,
) -> Result<ControlFlow<()>> {
    let options = plan.generate_options(temperature);
    for prompt in &set.prompts {
        let ControlFlow::Continue(conversation) = converse(contenders, plan, prompt, &options, watch)? else {
            return Ok(ControlFlow::Break(()));
        };
        outcome.add(conversation);
        if watch(Event::Prompt).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// What became of one prompt.
pub struct Conversation {
    /// Of every contender, turn by turn.
    pub answers: Vec<Vec<Statistics>>,
    /// Where the last contender's tokens first part from the first's.
    pub difference: Option<Difference>,
    /// A turn was too long for the context; it and those behind it were left out.
    pub too_long: bool,
}

fn converse(
    contenders: &mut [Llm],
    plan: &Plan,
    prompt: &Prompt,
    options: &GenerateOptions,
    watch: &mut Watch<'_>,
) -> Result<ControlFlow<(), Conversation>> {
    let answers = contenders.iter().map(|_| Vec::new()).collect();
    let mut conversation = Conversation { answers, difference: None, too_long: false };
    let mut messages = Vec::new();
    let turns = if plan.all_turns { prompt.turns.len() } else { 1 };
    for (turn, text) in prompt.turns.iter().enumerate().take(turns) {
        messages.push(Message::user(text));
        let tokens = if plan.raw { contenders[0].text_prompt(text)? } else { contenders[0].chat_prompt(&messages)? };
        if tokens.len() >= contenders[0].engine().context() {
            conversation.too_long = true;
            break;
        }
        let mut made = Vec::new();
        for (llm, answers) in contenders.iter_mut().zip(&mut conversation.answers) {
            let ControlFlow::Continue(answer) = answer(llm, tokens.clone(), options, watch)? else {
                return Ok(ControlFlow::Break(()));
            };
            answers.push(answer.statistics);
            made.push((answer.tokens, answer.text));
        }
        let parted = made.last().and_then(|(last, _)| first_difference(&made[0].0, last));
        let here = parted.map(|token| Difference { line: prompt.line, turn: turn + 1, token });
        conversation.difference = conversation.difference.or(here);
        messages.push(Message::assistant(made.swap_remove(0).1));
    }
    Ok(ControlFlow::Continue(conversation))
}

struct Answer {
    text: String,
    tokens: Vec<u32>,
    statistics: Statistics,
}

fn answer(
    llm: &mut Llm,
    prompt: Vec<u32>,
    options: &GenerateOptions,
    watch: &mut Watch<'_>,
) -> Result<ControlFlow<(), Answer>> {
    let mut generation = llm.generate(prompt, options)?;
    let mut text = String::new();
    for step in generation.by_ref() {
        text += &step?.text;
        if watch(Event::Round).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    let (tokens, statistics) = (generation.tokens().to_vec(), generation.statistics());
    Ok(ControlFlow::Continue(Answer { text, tokens, statistics }))
}

/// The first place where two texts differ; one may end before the other.
fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (common < a.len().max(b.len())).then_some(common)
}

impl Outcome {
    fn add(&mut self, conversation: Conversation) {
        self.too_long += usize::from(conversation.too_long);
        self.differences.extend(conversation.difference);
        for (tally, answers) in self.tallies.iter_mut().zip(conversation.answers) {
            tally.prompts += usize::from(!answers.is_empty());
            answers.into_iter().for_each(|answer| tally.add(answer));
        }
    }

    fn new(contenders: usize) -> Outcome {
        Outcome { tallies: vec![Tally::default(); contenders], differences: Vec::new(), too_long: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_differ_where_one_goes_on() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 4, 3]), Some(1));
        assert_eq!(first_difference(&[1, 2], &[1, 2, 3]), Some(2));
        assert_eq!(first_difference(&[], &[]), None);
    }

    #[test]
    fn prompts_that_do_not_fit_count_apart() {
        let mut outcome = Outcome::new(2);
        let difference = Some(Difference { line: 1, turn: 1, token: 0 });
        let answers = vec![vec![Statistics { new_tokens: 3, ..Statistics::default() }; 2]; 2];
        outcome.add(Conversation { answers, difference, too_long: false });
        outcome.add(Conversation { answers: vec![Vec::new(); 2], difference: None, too_long: true });
        let tally = &outcome.tallies[1];
        assert_eq!((tally.prompts, tally.sums.new_tokens), (1, 6));
        assert_eq!((outcome.differences.len(), outcome.too_long), (1, 1));
    }
}
