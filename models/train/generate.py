"""Writes the text that drafters are trained on: the target's own answers.

    python generate.py --target DIR --prompts train_prompts.jsonl.gz --out CORPUS --minutes 3 [--shard 0/4]

Prompts come from a file and from the target itself (Magpie: given only the head of a user turn, it writes the turn).
Each is answered greedily, at temperature 0.8 and at 1.0, in random order until the clock stops. Answers that loop are
dropped and counted. 5% of the prompts, by hash, go to `heldout-*`. Several GPUs write one folder, a shard each.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch

from chat import Chat, eval_sets, held_out, read_prompts, shingles
from corpus import loops, write_shards
from decode import Decoder
from device import prepare
from target import load_target, stop_tokens

TEMPERATURES = (0.0, 0.8, 1.0)
MAGPIE = {"temperature": 1.0, "min_p": 0.05, "new_tokens": 80}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="rows of turns, source, licence")
    parser.add_argument("--eval", type=Path, help="folder of evaluation sets; turns that share ten words are dropped")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="wall clock, loading included")
    parser.add_argument("--magpie", type=int, default=24000, help="user turns to write in this shard")
    parser.add_argument("--shard", default="0/1", help="i/n: this is the i-th of n processes")
    parser.add_argument("--rows", type=int, default=4096, help="texts at a time")
    parser.add_argument("--max-prompt", type=int, default=256, help="longest prompt in tokens")
    parser.add_argument("--new-tokens", type=int, default=384, help="longest answer in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    start = time.time()
    shard, shards = map(int, args.shard.split("/"))
    torch.manual_seed(args.seed * 1000 + shard)
    random.seed(args.seed * 1000 + shard)
    prepare(args.device)
    target = load_target(args.target, args.device)
    stops, chat = stop_tokens(args.target, target.config), Chat(args.target)

    rows = read_prompts(args.prompts)[shard::shards] if args.prompts else []
    prompts = [(chat.prompt(row["turns"][0]), row["turns"][0], row["source"], row["licence"]) for row in rows]
    forbidden = set()
    for texts in eval_sets(args.eval).values() if args.eval else []:
        forbidden |= set().union(*map(shingles, texts))
    counts = Counter()
    prompts += magpie(target, chat, stops, args, forbidden, counts)
    counts["prompts too long"] = sum(len(ids) > args.max_prompt for ids, *_ in prompts)
    prompts = [prompt for prompt in prompts if len(prompt[0]) <= args.max_prompt]
    print(f"{len(prompts)} prompts after {time.time() - start:.0f} s: {dict(counts)}", flush=True)

    deadline = start + 60 * args.minutes
    train, kept_out = answer(target, stops, prompts, args, deadline, counts)
    write(args.out, f"{shard}-of-{shards}", train, kept_out, chat, counts, args)
    print(f"wrote {args.out} after {time.time() - start:.0f} s", flush=True)


def magpie(target, chat, stops, args, forbidden, counts):
    """Distinct user turns that the target writes: (ids of the whole prompt, text, source, licence)."""
    room, turns, started = MAGPIE["new_tokens"], {}, time.time()
    if not args.magpie:
        return []
    decoder = Decoder(target, stops, args.rows, len(chat.before) + room, min_p=MAGPIE["min_p"])
    while len(turns) < args.magpie and time.time() < started + 60 * args.minutes / 3:
        wave = decoder.generate([chat.before] * args.rows, [MAGPIE["temperature"]] * args.rows, room)
        for ids in wave:
            counts["magpie attempts"] += 1
            text = chat.decode(ids[:-1]).strip()
            if ids[-1] not in stops or len(ids) < 4:
                counts["magpie unfinished"] += 1
            elif text in turns:
                counts["magpie repeated"] += 1
            elif forbidden & shingles(text):
                counts["magpie in an evaluation set"] += 1
            else:
                turns[text] = None
    print(f"magpie: {len(turns)} turns in {time.time() - started:.0f} s", flush=True)
    licence = "output of the target"
    return [(chat.prompt(text), text, "magpie", licence) for text in list(turns)[: args.magpie]]


def answer(target, stops, prompts, args, deadline, counts):
    """(train, held out) sequences: (ids, prompt length, temperature)."""
    decoder = Decoder(target, stops, args.rows, args.max_prompt + args.new_tokens)
    tasks = [(prompt, temperature) for prompt in prompts for temperature in TEMPERATURES]
    random.shuffle(tasks)
    train, kept_out, started, tokens, wave_s = [], [], time.time(), 0, 0.0
    for at in range(0, len(tasks), args.rows):
        wave = tasks[at : at + args.rows]
        began = time.time()
        if began + 1.1 * wave_s + 5 > deadline:
            print("the clock stops generation", flush=True)
            break
        answers = decoder.generate([task[0][0] for task in wave], [task[1] for task in wave], args.new_tokens)
        for ((ids, text, source, licence), temperature), new in zip(wave, answers):
            kind = "greedy" if temperature == 0 else "sampled"
            if loops(new):
                counts[f"{kind} answers that loop"] += 1
            elif len(new) < 2:
                counts["empty answers"] += 1
            else:
                (kept_out if held_out(text) else train).append((ids + new, len(ids), temperature))
                counts[f"{kind} answers"] += 1
                counts["finished answers"] += new[-1] in stops
                counts[f"from {source} ({licence})"] += 1
        tokens += sum(map(len, answers))
        wave_s = time.time() - began
        rate = tokens / (time.time() - started)
        left = deadline - time.time()
        print(f"{at + len(wave)} of {len(tasks)} answers, {tokens / 1e6:.2f} M new tokens, {rate / 1e3:.0f} k/s, "
              f"{left:.0f} s left", flush=True)  # fmt: skip
    return train, kept_out


def write(out, name, train, kept_out, chat, counts, args):
    sizes = {"train": write_shards(out, f"train-{name}", train), "heldout": write_shards(out, f"heldout-{name}", kept_out)}
    lengths = Counter(min(len(ids) - prompt, args.new_tokens) // 32 * 32 for ids, prompt, _ in train)
    report = {
        "tokens": sizes,
        "sequences": {"train": len(train), "heldout": len(kept_out)},
        "answer_tokens": sum(len(ids) - prompt for ids, prompt, _ in train),
        "counts": dict(sorted(counts.items())),
        "answer_lengths_from": {str(length): lengths[length] for length in sorted(lengths)},
        "temperatures": TEMPERATURES,
        "magpie": MAGPIE,
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("target", "out", "prompts", "eval")},
    }
    (out / f"corpus-{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    texts = [f"=== temperature {temperature}\n{chat.decode(ids)}\n" for ids, _, temperature in train[:24]]
    (out / f"samples-{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    print(json.dumps(report, indent=2), flush=True)


if __name__ == "__main__":
    main()
