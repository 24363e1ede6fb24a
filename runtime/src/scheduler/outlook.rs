//! What drafts were worth of late, and so how deep the next should look.
//!
//! A drafter costs its time also where none of its nodes is worth a row, and the more, the deeper it looks. So the speed that
//! drafts of every depth would have brought is kept, for each load; now and then the deepest is drafted all the same, which
//! tells of all.

/// Rounds of a load after which the deepest drafts are looked at again, and how many of them then.
pub(super) const LOOK_AGAIN: usize = 1024;
pub(super) const LOOK: usize = 16;
/// How much of a mean a new round is.
const RATE: f32 = 1.0 / 16.0;

#[derive(Debug, Default)]
pub(super) struct Outlook {
    /// How deep drafts can look, the deepest first, and what that costs at the load at hand.
    drafting: Vec<(usize, f32)>,
    /// Power of two that has room for the requests at hand.
    load: usize,
    loads: Vec<Load>,
}

#[derive(Debug, Clone, Default)]
struct Load {
    rounds: usize,
    /// Of drafts of each depth.
    speeds: Vec<Speed>,
}

/// Against plain decoding, in the mean.
#[derive(Debug, Clone, Copy, Default)]
struct Speed {
    tokens: f32,
    time: f32,
}

impl Outlook {
    pub(super) fn drafting(&self) -> &[(usize, f32)] {
        &self.drafting
    }

    /// How deep drafts for so many requests should look; 0: none is expected to pay.
    pub(super) fn depth(&mut self, requests: usize, drafting: &[(usize, f32)]) -> usize {
        self.drafting = drafting.to_vec();
        self.load = requests.next_power_of_two().ilog2() as usize;
        self.loads.resize(self.loads.len().max(self.load + 1), Load::default());
        let Load { rounds, speeds } = &mut self.loads[self.load];
        speeds.resize(drafting.len(), Speed::default());
        let looks = *rounds % LOOK_AGAIN < LOOK || speeds.iter().any(|speed| speed.time == 0.0);
        *rounds += 1;
        if looks {
            return drafting[0].0;
        }
        let ratios = speeds.iter().map(|speed| speed.tokens / speed.time);
        let best = drafting.iter().zip(ratios).max_by(|a, b| a.1.total_cmp(&b.1));
        best.filter(|(_, ratio)| *ratio > 1.0).map_or(0, |((depth, _), _)| *depth)
    }

    /// What a round would have brought with a draft of the depth at this place: tokens and time, against plain decoding.
    pub(super) fn learn(&mut self, place: usize, tokens: f32, time: f32) {
        let speed = &mut self.loads[self.load].speeds[place];
        let rate = if speed.time == 0.0 { 1.0 } else { RATE };
        speed.tokens += rate * (tokens - speed.tokens);
        speed.time += rate * (time - speed.time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Drafts of two depths at a load, of whose deepest so many rounds were seen.
    fn seen(outlook: &mut Outlook, requests: usize, deep: [f32; 2], shallow: [f32; 2]) {
        for _ in 0..LOOK {
            assert_eq!(outlook.depth(requests, &[(7, 0.5), (2, 0.25)]), 7, "nothing is known yet");
            outlook.learn(0, deep[0], deep[1]);
            outlook.learn(1, shallow[0], shallow[1]);
        }
    }

    #[test]
    fn the_depth_is_that_of_the_best_speed_at_a_load() {
        let mut outlook = Outlook::default();
        seen(&mut outlook, 1, [3.0, 1.5], [2.0, 1.25]);
        seen(&mut outlook, 20, [3.0, 2.5], [2.0, 1.25]);
        seen(&mut outlook, 100, [3.0, 4.0], [2.0, 2.5]);
        let mut depth = |requests| outlook.depth(requests, &[(7, 0.5), (2, 0.25)]);
        assert_eq!([1, 17, 32, 65].map(&mut depth), [7, 2, 2, 0]);
        let rests = (0..).take_while(|_| depth(128) == 0).count();
        assert_eq!(rests, LOOK_AGAIN - LOOK - 1, "from time to time it is tried all the same");
    }

    #[test]
    fn what_is_seen_later_counts_more_and_more() {
        let mut outlook = Outlook::default();
        seen(&mut outlook, 1, [3.0, 1.5], [2.0, 1.25]);
        (0..100).for_each(|_| outlook.learn(1, 2.0, 0.8));
        assert_eq!(outlook.depth(1, &[(7, 0.5), (2, 0.25)]), 2);
    }

    #[test]
    fn drafters_of_whom_nothing_is_learnt_never_rest() {
        let mut outlook = Outlook::default();
        (0..2 * LOOK).for_each(|_| assert_eq!(outlook.depth(3, &[(usize::MAX, 0.0)]), usize::MAX));
    }
}
