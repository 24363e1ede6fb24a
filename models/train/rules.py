"""Tokens per round of a sampled DSpark chain under different acceptance rules, from text that the target sampled.

Every rule emits text with the target's law. So the text can be fixed first, and the question becomes: given that
round's output, how many of its tokens came from the draft? With p, q the laws of target and draft at a token y of the
text, after the true tokens before it:

    argmax       the draft proposes its best token: accepted if that is y
    independent  the draft samples on its own and must match: accepted with probability q(y)
    coupled      both take the argmax of their logits plus the same Gumbel noise: noise is drawn given the target's y
    token        rejection sampling: accept min(1, p/q). Given y: min(1, q(y) / p(y))
    block        block verification, P_0 = 1, P_i = min(1, P_{i-1} p / q). Given y: min(1, q(y) / (P_{i-1} p(y)))

The last line: the joint mass of "at least i accepted" and the output y_1..y_i is q(y_1..y_i) P_i, and that of "at least
i accepted" with one more output token is q(y_1..y_i) P_i p(y_{i+1}), so given both, token i + 1 came from the draft with
probability min(q, P_i p) / (P_i p).
"""

import numpy as np
import torch

from score import ROWS, Proposals, dspark_slots, tokens_per_round

RULES = ("argmax", "independent", "coupled", "token", "block")


@torch.no_grad()
def measure(model, target, batch, temperature, autocast):
    """(anchors as Proposals whose hits are the coupled ones, log p and log q of the text [anchors, gamma], argmax hits)."""
    row, at = torch.nonzero(batch.answer_mask(1), as_tuple=True)
    shape = (len(row), model.gamma)
    log_p, log_q = (torch.zeros(shape, device=row.device) for _ in range(2))
    best, coupled = (torch.zeros(shape, dtype=torch.bool, device=row.device) for _ in range(2))
    for which, slots, hidden in dspark_slots(model, target, batch, row, at, autocast):
        for part, slot in zip(which.split(ROWS), slots.split(ROWS)):
            for k in range(model.gamma):
                place = (at[part] + k).clamp(max=batch.ids.shape[1] - 2)
                y = batch.ids[row[part], place + 1][:, None]
                p = torch.log_softmax(target.logits(hidden[row[part], place]) / temperature, dim=1)
                z = model.base(slot[:, k]) + model.bias(model.previous(batch.ids[row[part], place]))
                q = torch.log_softmax(z / temperature, dim=1)
                log_p[part, k], log_q[part, k] = p.gather(1, y)[:, 0], q.gather(1, y)[:, 0]
                best[part, k] = q.argmax(1) == y[:, 0]
                coupled[part, k] = (q + noise_given(p, y)).argmax(1) == y[:, 0]
    left = batch.lengths[row] - 1 - at
    proposals = Proposals(*(value.cpu().numpy() for value in (row, at, left, coupled)), None)
    return proposals, log_p.double().cpu().numpy(), log_q.double().cpu().numpy(), best.cpu().numpy()


def noise_given(log_p, y):
    """Gumbel noise [rows, vocabulary] from its law given that argmax(log_p + noise) is y [rows, 1]."""
    gumbel = -torch.empty_like(log_p).exponential_().clamp_min_(1e-30).log_()
    top = -torch.empty_like(log_p[:, :1]).exponential_().clamp_min_(1e-30).log_()
    noise = -torch.logaddexp(log_p - top, -gumbel)
    return noise.scatter_(1, y, top - log_p.gather(1, y))


def accepted(rule, log_p, log_q, best, coupled, left, generator):
    """How many tokens each anchor's round accepts, [anchors], drawn once."""
    coins = generator.random(log_p.shape)
    ratio = np.exp(np.minimum(log_q - log_p, 0))  # min(1, q / p)
    if rule == "argmax":
        hits = best
    elif rule == "coupled":
        hits = coupled
    elif rule == "independent":
        hits = coins < np.exp(log_q)
    elif rule == "token":
        hits = coins < ratio
    else:
        hits, log_prefix = np.zeros(log_p.shape, bool), np.zeros(len(log_p))
        for k in range(log_p.shape[1]):
            log_odds = log_q[:, k] - log_p[:, k] - log_prefix
            hits[:, k] = coins[:, k] < np.exp(np.minimum(log_odds, 0))
            log_prefix = np.minimum(0, -log_odds)
    hits = hits & (left[:, None] > np.arange(hits.shape[1]))
    return np.cumprod(hits, axis=1).sum(axis=1)


def compare(model, target, batch, temperature, autocast, repeats=8, seed=1):
    """Rule -> tokens per round of the walk, the mean over `repeats` draws."""
    proposals, log_p, log_q, best = measure(model, target, batch, temperature, autocast)
    generator, table = np.random.default_rng(seed), {}
    for rule in RULES:
        draws = 1 if rule in ("argmax", "coupled") else repeats
        counts = (accepted(rule, log_p, log_q, best, proposals.hits, proposals.left, generator) for _ in range(draws))
        table[rule] = round(float(np.mean([tokens_per_round(proposals, count) for count in counts])), 4)
    return table
