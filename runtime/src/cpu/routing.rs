//! Which experts a row has, and what each counts for: [`Op::Route`](treespark_kernel_gen::Op::Route) for one row, on the host.

use treespark_kernel_gen::op::{GroupScore, Routing, Scoring};

/// Chooses as many experts as there are places, by falling score.
pub fn choose(routing: &Routing, logits: &[f32], bias: Option<&[f32]>, experts: &mut [u32], weights: &mut [f32]) {
    let scores = scores(routing.scoring, logits);
    let mut ranked: Vec<f32> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
        None => scores.clone(),
    };
    leave_best_groups(routing, &mut ranked);
    for (expert, weight) in experts.iter_mut().zip(weights.iter_mut()) {
        let best = largest(&ranked);
        ranked[best] = f32::NEG_INFINITY;
        (*expert, *weight) = (best as u32, scores[best]);
    }
    let total = if routing.normalise { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|weight| *weight = *weight / total * routing.scale);
}

fn scores(scoring: Scoring, logits: &[f32]) -> Vec<f32> {
    match scoring {
        Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut scores: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
            let total: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|score| *score /= total);
            scores
        }
    }
}

/// What is in no group that is worth most cannot be chosen.
fn leave_best_groups(routing: &Routing, ranked: &mut [f32]) {
    if routing.top_groups == routing.groups {
        return;
    }
    let size = ranked.len() / routing.groups;
    let worth = |group: &[f32]| {
        let best = largest(group);
        let second = group.iter().enumerate().filter(|(i, _)| *i != best).map(|(_, x)| *x);
        match routing.group_score {
            GroupScore::Largest => group[best],
            GroupScore::TwoLargest => group[best] + second.fold(f32::NEG_INFINITY, f32::max),
        }
    };
    let mut worths: Vec<f32> = ranked.chunks(size).map(worth).collect();
    let mut left = vec![false; routing.groups];
    for _ in 0..routing.top_groups {
        let best = largest(&worths);
        (worths[best], left[best]) = (f32::NEG_INFINITY, true);
    }
    for (group, _) in ranked.chunks_mut(size).zip(left).filter(|(_, left)| !left) {
        group.fill(f32::NEG_INFINITY);
    }
}

/// Ties to the lowest.
fn largest(values: &[f32]) -> usize {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap_or(0)
}
