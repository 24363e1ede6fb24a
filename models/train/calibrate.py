"""Sequential temperature scaling of a DSpark checkpoint's confidence head, on held-out greedy text.

    python calibrate.py --target DIR --corpus DIR DRAFTER

The estimate that the first k drafted tokens are accepted is A_k = prod_{i <= k} sigmoid(logit_i / T_i). From the first
slot on, T_k is what gives A_k the least expected calibration error against whether they were. Fitted on every other text
and judged on the rest; proposals are those of the walk, without slots behind the text's end. Writes
`calibration.json` beside the checkpoint.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from corpus import Corpus
from device import prepare
from dspark import load_dspark
from score import join, propose, walk
from target import load_target

BINS = 20
GRID = np.exp(np.linspace(np.log(0.2), np.log(5.0), 161))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    target = load_target(args.target, args.device)
    model = load_dspark(args.drafter, target.model.embed_tokens.weight, target.head, args.device)
    if not hasattr(model, "confidence_head"):
        raise SystemExit(f"{args.drafter} has no confidence head")
    autocast = prepare(args.device)
    corpus = Corpus(args.corpus, "heldout", args.device)
    which = corpus.pick(args.texts, temperature=0.0)
    proposals = join([propose("dspark", model, target, corpus.batch(part), autocast) for part in which.split(48)])
    visited = walk(proposals, proposals.accepted())
    fit = visited[proposals.sequence[visited] % 2 == 0]
    rest = visited[proposals.sequence[visited] % 2 == 1]
    labels = proposals.accepted()[:, None] > np.arange(model.gamma)
    inside = proposals.left[:, None] > np.arange(model.gamma)
    logits = proposals.confidence.astype(np.float64)
    temperatures = scale(logits[fit], labels[fit], inside[fit])
    before = errors(logits[rest], labels[rest], inside[rest], np.ones(model.gamma))
    after = errors(logits[rest], labels[rest], inside[rest], temperatures)
    report = {
        "temperatures": [round(float(t), 4) for t in temperatures],
        "ece_before": before,
        "ece_after": after,
        "bins": BINS,
        "samples": len(fit),
    }
    (args.drafter / "calibration.json").write_text(json.dumps(report, indent=2) + "\n")
    for k in range(model.gamma):
        print(f"depth {k + 1}: T {temperatures[k]:.2f}, ECE {before[k]:.4f} -> {after[k]:.4f}")


def scale(logits, labels, inside):
    """The temperatures [depth], from logits, labels, inside [proposals, depth]."""
    survival, temperatures = np.ones(len(logits)), []
    for k in range(logits.shape[1]):
        use = inside[:, k]
        costs = [ece(survival[use] * sigmoid(logits[use, k] / t), labels[use, k]) for t in GRID]
        temperatures.append(GRID[int(np.argmin(costs))])
        survival = survival * sigmoid(logits[:, k] / temperatures[-1])
    return np.array(temperatures)


def errors(logits, labels, inside, temperatures):
    """ECE by depth."""
    survival = np.cumprod(sigmoid(logits / temperatures), axis=1)
    return [round(ece(survival[inside[:, k], k], labels[inside[:, k], k]), 5) for k in range(logits.shape[1])]


def ece(estimates, labels):
    """Expected calibration error over equal-width bins."""
    if len(estimates) == 0:
        return 0.0
    which = np.minimum((estimates * BINS).astype(int), BINS - 1)
    gaps = np.bincount(which, estimates - labels, minlength=BINS)
    return float(np.abs(gaps).sum() / len(estimates))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


if __name__ == "__main__":
    main()
