//! A sampled chain, verified as a block (Sun et al., 2024): never shorter in the mean than token by token.
//!
//! A token that the target likes more than the draft does makes up for a later one that it likes less:
//!
//! ```text
//! share[0] = 1,  share[i] = min(1, share[i-1] · target(x_i) / draft(x_i))
//! owed[i]  = Σ_x max(share[i] · target(x | x_1..x_i) - draft(x | x_1..x_i), 0)
//! the first i tokens are kept with probability  owed[i] / (owed[i] + 1 - share[i]),  all of them with the last share;
//! every coin is tossed, and the largest i wins
//! one token more:  from max(share · target - draft, 0), normalised; after the whole chain from the target
//! ```

use std::cmp::min;

use super::law::{Rational, coin, excess, ratio};
use super::{Choose, Law, Models};

pub fn verify(models: &Models, chain: &[usize], choose: &mut Choose) -> Vec<usize> {
    let mut share = vec![ratio(1, 1)];
    for (i, &token) in chain.iter().enumerate() {
        let (target, draft) = models.after(&chain[..i]);
        share.push(min(ratio(1, 1), &share[i] * &target[token] / &draft[token]));
    }
    let owed = |kept: usize| {
        let (target, draft) = models.after(&chain[..kept]);
        excess(&share[kept], target, draft)
    };

    let mut kept = 0;
    for (i, share) in share.iter().enumerate().skip(1) {
        let heads = if i == chain.len() { share.clone() } else { keep(owed(i).iter().sum(), share) };
        if coin(&heads, choose) {
            kept = i;
        }
    }

    let mut text = chain[..kept].to_vec();
    let token = if kept == chain.len() {
        choose(models.target.after(&text))
    } else {
        choose(&Law::proportional_to(owed(kept)))
    };
    text.push(token);
    text
}

/// Where the target is owed nothing and has its whole share, the draft is the target: a later coin is certain to win.
fn keep(owed: Rational, share: &Rational) -> Rational {
    let all = &owed + ratio(1, 1) - share;
    if all == ratio(0, 1) { ratio(1, 1) } else { owed / all }
}
