"""What a drafter proposes at every position of given texts, and the walk that decoding would take through them.

The texts are the target's own greedy answers, so a drafted token is accepted where it equals the text. A walk begins
at the first answer token; a round at anchor s that accepts a tokens goes on at s + a + 1. Tokens per round include
the bonus token, and count no token behind the end of the text.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from medusa import Medusa
from standalone import standalone_chains

ROWS = 1024


@dataclass
class Proposals:
    """Of each anchor: hits [anchors, depth] (drafted token equals the text), confidence logits alike or None."""

    sequence: np.ndarray  # [anchors], index in the batch
    anchor: np.ndarray  # [anchors], position of the anchor token
    left: np.ndarray  # [anchors], tokens of the text behind the anchor
    hits: np.ndarray
    confidence: np.ndarray | None

    def accepted(self):
        return np.cumprod(self.hits, axis=1).sum(axis=1)

    def first(self):
        """Whether an anchor is the first of its sequence. Anchors of a sequence lie together, in order."""
        return np.r_[True, self.sequence[1:] != self.sequence[:-1]]


@torch.no_grad()
def propose(kind, model, target, batch, autocast):
    row, at = torch.nonzero(batch.answer_mask(1), as_tuple=True)
    confidence = None
    if kind == "dspark":
        tokens, confidence = dspark_chains(model, target, batch, row, at, autocast)
    elif kind == "medusa":
        _, hidden = target(batch.ids)
        parts = hidden[row, at - 1].float().split(ROWS)
        tokens = torch.cat([model.logits(part).argmax(-1) for part in parts])
    else:
        parts = batch.ids.split(16)
        with autocast():
            tokens = torch.cat([standalone_chains(model, part) for part in parts])[row, at]
    ahead = at[:, None] + 1 + torch.arange(tokens.shape[1], device=at.device)
    truth = batch.ids[row[:, None], ahead.clamp(max=batch.ids.shape[1] - 1)]
    left = batch.lengths[row] - 1 - at
    hits = (tokens == truth) & (ahead < batch.lengths[row][:, None])
    arrays = [value.cpu().numpy() for value in (row, at, left, hits)]
    return Proposals(*arrays, None if confidence is None else confidence.float().cpu().numpy())


@torch.no_grad()
def dspark_slots(model, target, batch, row, at, autocast, every=64):
    """Yields (which of the anchors, last hidden of their slots [n, gamma, h], the target's last hidden [batch, tokens, h]).

    Anchors come as (row, at), sorted; each sequence gives up to `every` of them at a time.
    """
    features, hidden = target(batch.ids, model.taps)
    nth = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # in its own sequence
    for start in range(0, int(nth.max()) + 1, every):
        which = torch.nonzero((nth >= start) & (nth < start + every))[:, 0]
        places = torch.zeros(len(batch.ids), every, dtype=torch.long, device=row.device)
        places[row[which], nth[which] - start] = at[which]
        with autocast():
            slots = model(features, batch.ids, places)
        yield which, slots[row[which], nth[which] - start], hidden


def dspark_chains(model, target, batch, row, at, autocast):
    tokens = torch.zeros(len(row), model.gamma, dtype=torch.long, device=row.device)
    confidence = torch.zeros(len(row), model.gamma, device=row.device) if hasattr(model, "confidence_head") else None
    for which, slots, _ in dspark_slots(model, target, batch, row, at, autocast):
        for part, hidden in zip(which.split(ROWS), slots.split(ROWS)):
            tokens[part], logits = model.chain(hidden, batch.ids[row[part], at[part]])
            if confidence is not None:
                confidence[part] = logits
    return tokens, confidence


def walk(proposals, accepted):
    """Indices of the anchors that decoding visits, given how many tokens each would accept."""
    visited, wanted = [], 0
    for i, (first, anchor) in enumerate(zip(proposals.first(), proposals.anchor)):
        if first:
            wanted = anchor
        if anchor == wanted:
            visited.append(i)
            wanted = anchor + accepted[i] + 1
    return np.array(visited)


def tokens_per_round(proposals, accepted):
    visited = walk(proposals, accepted)
    return float(np.minimum(accepted[visited] + 1, proposals.left[visited]).mean())


def by_depth(proposals, accepted):
    """Over the visited anchors: share of tries at depth k that succeed after success at all depths before."""
    visited = walk(proposals, accepted)
    accepted, left, depth = accepted[visited], proposals.left[visited], proposals.hits.shape[1]
    tries = [int(((accepted >= k) & (left > k)).sum()) for k in range(depth)]
    return [round(float((accepted > k).sum()) / n, 4) if n else None for k, n in enumerate(tries)]


def join(parts):
    """Proposals of several batches as those of one."""
    starts = np.cumsum([0, *(int(part.sequence.max()) + 1 for part in parts)])
    confidence = None if parts[0].confidence is None else np.concatenate([part.confidence for part in parts])
    sequence = np.concatenate([part.sequence + start for part, start in zip(parts, starts)])
    return Proposals(sequence, *(np.concatenate([getattr(p, n) for p in parts]) for n in ("anchor", "left", "hits")), confidence)


def quick_score(kind, model, target, heldout, autocast, sequences=64):
    """One line on held-out text, for the log of a training."""
    which = heldout.pick(sequences, temperature=0.0)
    which = which if len(which) else heldout.pick(sequences)
    proposals = propose(kind, model, target, heldout.batch(which), autocast)
    accepted = proposals.accepted()
    text = f"{tokens_per_round(proposals, accepted):.3f} tokens per round, by depth {by_depth(proposals, accepted)}"
    if proposals.confidence is not None:
        reached = (accepted[:, None] >= np.arange(proposals.hits.shape[1])) & (
            proposals.left[:, None] > np.arange(proposals.hits.shape[1])
        )
        logits, labels = torch.from_numpy(proposals.confidence[reached]), torch.from_numpy(proposals.hits[reached]).float()
        text += f", confidence BCE {F.binary_cross_entropy_with_logits(logits, labels):.3f}"
    return text


def kind_of(model):
    return "medusa" if isinstance(model, Medusa) else "dspark" if hasattr(model, "gamma") else "standalone"
