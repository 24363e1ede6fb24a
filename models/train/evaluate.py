"""Measures drafters: tokens per round on the evaluation sets, greedy, and with --rules sampled.

    python evaluate.py --target DIR --eval DIR [--first 20] [--rules] [--out report.json] DRAFTER...

The target answers each first turn (greedily, up to 256 new tokens); answers that loop are dropped and counted. The
drafter is run on the true text at every position, and the walk (see score.py) tells what decoding would do.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from chat import Chat, eval_sets
from corpus import Batch, loops
from decode import Decoder
from device import prepare
from dspark import load_dspark
from medusa import load_medusa
from rules import compare
from score import ROWS, by_depth, dspark_slots, join, kind_of, propose, tokens_per_round
from target import load_llama, load_target, stop_tokens

TOP = 16
AT_A_TIME = 48


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", type=Path, nargs="+", help="folders that train.py wrote")
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True, help="folder of .jsonl files with turns")
    parser.add_argument("--first", type=int, help="use the first N prompts of each set")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--answers", type=Path, help="keeps the target's greedy answers for the next run")
    parser.add_argument("--rules", action="store_true", help="compare acceptance rules at temperatures 0.6 and 1")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(1)
    target = load_target(args.target, args.device)
    autocast = prepare(args.device)
    report = {"new_tokens": args.new_tokens, "first": args.first, "drafters": {}}
    greedy = answers(target, args, 0.0)
    report["texts"] = {name: {"kept": len(kept), "loops dropped": dropped} for name, (kept, dropped) in greedy.items()}
    print("texts:", json.dumps(report["texts"]), flush=True)
    sampled = {t: answers(target, args, t) for t in (0.6, 1.0)} if args.rules else {}
    for folder in args.drafters:
        began, model = time.time(), load_drafter(folder, target, args.device)
        kind = kind_of(model)
        result = {"kind": kind, "sets": {}, "hits_by_rank": rank_table(kind, model, target, greedy, autocast, args.device)}
        for name, (kept, _) in greedy.items():
            parts = [propose(kind, model, target, batch, autocast) for batch in batches(kept, args.device)]
            result["sets"][name] = summary(join(parts)) if parts else None
        if kind == "dspark":
            result["rules"] = {
                str(t): {name: mean_rules(model, target, kept, t, autocast, args.device) for name, (kept, _) in sets.items()}
                for t, sets in sampled.items()
            }
        report["drafters"][folder.name] = result
        print(f"{folder.name} ({kind}, {time.time() - began:.0f} s): {json.dumps(result)}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def answers(target, args, temperature):
    """Set -> (sequences (ids, prompt length) without those that loop, how many loop)."""
    key, path = str(temperature), args.answers
    cached = json.loads(path.read_text()) if path and path.exists() else {}
    if key not in cached:
        chat, stops, cached[key] = Chat(args.target), stop_tokens(args.target, target.config), {}
        for name, texts in eval_sets(args.eval).items():
            prompts = [chat.prompt(text) for text in texts[: args.first]]
            decoder = Decoder(target, stops, len(prompts), max(map(len, prompts)) + args.new_tokens)
            made = decoder.generate(prompts, [temperature] * len(prompts), args.new_tokens)
            cached[key][name] = [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, made)]
        if path:
            path.write_text(json.dumps(cached))
    sets = {}
    for name, made in cached[key].items():
        kept = [(ids, prompt) for ids, prompt in made if not loops(ids[prompt:]) and len(ids) - prompt > 1]
        sets[name] = kept, len(made) - len(kept)
    return sets


def batches(sequences, device):
    for start in range(0, len(sequences), AT_A_TIME):
        part = sequences[start : start + AT_A_TIME]
        lengths = [len(ids) for ids, _ in part]
        width = -(-max(lengths) // 64) * 64
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=device)
        prompts = torch.tensor([prompt for _, prompt in part], device=device)
        yield Batch(ids, torch.tensor(lengths, device=device), prompts)


def load_drafter(folder, target, device):
    config = json.loads((folder / "config.json").read_text())
    if "medusa_num_heads" in config:
        return load_medusa(folder, target.head, device)
    if config["architectures"] == ["Qwen3DSparkModel"]:
        return load_dspark(folder, target.model.embed_tokens.weight, target.head, device)
    return load_llama(folder, device, torch.float32).eval()


def summary(proposals):
    accepted = proposals.accepted()
    return {
        "tokens_per_round": round(tokens_per_round(proposals, accepted), 4),
        "mean_over_positions": round(float((accepted + 1).mean()), 4),
        "by_depth": by_depth(proposals, accepted),
        "anchors": len(accepted),
    }


def rank_table(kind, model, target, sets, autocast, device):
    """hits[k][j]: how often the drafter's j-th choice for depth k + 1 is the true token, the tokens before it being true.

    Over all positions of all sets. A Medusa head sees no drafted token, so its rows are what a static tree is made from.
    """
    if kind == "standalone":
        return None
    depth = model.gamma if kind == "dspark" else len(model.medusa_head)
    hits, tries = torch.zeros(depth, TOP, device=device), torch.zeros(depth, device=device)
    with torch.no_grad():
        for kept, _ in sets.values():
            for batch in batches(kept, device):
                for row, at, logits in ranked(kind, model, target, batch, autocast):
                    ahead = at[:, None] + 1 + torch.arange(depth, device=device)
                    truth = batch.ids[row[:, None], ahead.clamp(max=batch.ids.shape[1] - 1)]
                    inside = ahead < batch.lengths[row][:, None]
                    top = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
                    found = (top == truth[:, :, None]) & inside[:, :, None]
                    hits[:, : found.shape[2]] += found.sum(0)
                    tries += inside.sum(0)
    return [[round(float(hit), 4) for hit in row] for row in hits / tries[:, None].clamp(min=1)]


def ranked(kind, model, target, batch, autocast):
    """Yields (row, anchor, logits [n, depth, vocabulary]) with the true tokens before each depth."""
    row, at = torch.nonzero(batch.answer_mask(1), as_tuple=True)
    if kind == "medusa":
        _, hidden = target(batch.ids)
        for r, a in zip(row.split(ROWS), at.split(ROWS)):
            yield r, a, model.logits(hidden[r, a - 1].float())
        return
    steps = torch.arange(model.gamma, device=at.device)
    for which, slots, _ in dspark_slots(model, target, batch, row, at, autocast):
        for part, slot in zip(which.split(ROWS), slots.split(ROWS)):
            places = (at[part][:, None] + steps).clamp(max=batch.ids.shape[1] - 1)
            previous = model.previous(batch.ids[row[part][:, None], places])
            yield row[part], at[part], model.base(slot) + model.bias(previous)


def mean_rules(model, target, kept, temperature, autocast, device):
    """Rule -> tokens per round; batches count by their texts."""
    tables = [(len(b.ids), compare(model, target, b, temperature, autocast)) for b in batches(kept, device)]
    total = sum(n for n, _ in tables)
    return {rule: round(sum(n * table[rule] for n, table in tables) / total, 4) for rule in tables[0][1]} if tables else None


if __name__ == "__main__":
    main()
