"""Trains a drafter for a target on the corpus that generate.py wrote.

    python train.py dspark|medusa|standalone --target DIR --corpus DIR --out DIR --minutes 9 [--stop 8.5] [--resume]

The learning rate follows the clock, not the steps: warm-up, then a cosine over `--minutes` in all. `--stop` ends this
call earlier; `--resume` goes on with the time that is left. The target's features are computed anew for every batch:
storing them would take 7 kB a token, computing them 20 s for 20 M tokens.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from corpus import Corpus
from device import prepare
from dspark import DSpark, dspark_config, dspark_loss
from layers import compile_layers, uncompile_layers
from medusa import Medusa, medusa_config, medusa_loss
from score import quick_score
from standalone import save_standalone, standalone_config, standalone_loss, start_standalone
from target import load_target

RATES = {"dspark": 8e-4, "medusa": 1e-3, "standalone": 1.5e-3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(RATES))
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="training time in all")
    parser.add_argument("--stop", type=float, help="wall clock of this call in minutes, loading and saving included")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--steps", type=int, help="stop after this many steps at the latest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a batch, padding included")
    parser.add_argument("--max-tokens", type=int, default=640, help="sequences are cut here")
    parser.add_argument("--layers", type=int, default=3, help="dspark: layers")
    parser.add_argument("--rank", type=int, default=64, help="dspark: Markov rank, 0 for DFlash")
    parser.add_argument("--taps", default="1,8,15,21,27", help="dspark: target layers, counted from 0")
    parser.add_argument("--mask-token", type=int, default=16, help="dspark: an id that no text contains")
    parser.add_argument("--anchors", type=int, default=64, help="dspark: blocks a sequence")
    parser.add_argument("--heads", type=int, default=5, help="medusa: heads")
    parser.add_argument("--hidden", type=int, default=256, help="standalone: hidden size")
    parser.add_argument("--eager", action="store_true", help="do not try torch.compile")
    parser.add_argument("--score-every", type=float, default=60, help="seconds between looks at held-out text")
    parser.add_argument("--log-every", type=float, default=5, help="seconds between lines of the log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    Run(parser.parse_args()).train()


class Run:
    """Model, optimizer and clock of one training."""

    def __init__(self, args):
        self.args, self.begun = args, time.time()
        torch.manual_seed(args.seed)
        self.autocast = prepare(args.device)
        self.target = load_target(args.target, args.device)
        self.corpus = Corpus(args.corpus, "train", args.device, args.max_tokens)
        self.heldout = Corpus(args.corpus, "heldout", args.device, args.max_tokens)
        self.model = self.make_model().to(args.device)
        slow, fast = [], []
        for name, parameter in self.model.named_parameters():
            (fast if args.kind == "dspark" and name == "norm.weight" else slow).append(parameter)
        # DSpark's last norm starts at a tenth of its size and has far to go.
        groups = [{"params": slow, "scale": 1.0}] + ([{"params": fast, "scale": 10.0}] if fast else [])
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=args.device.startswith("cuda")
        )
        self.step, self.elapsed, self.rows = 0, 0.0, 0
        if args.resume:
            self.load()
        self.batches = self.corpus.batches(args.tokens, args.seed + self.step)
        size = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"{args.kind}: {size / 1e6:.2f} M parameters, {len(self.corpus)} sequences of "
              f"{int(self.corpus.lengths.sum()) / 1e6:.1f} M tokens; step {self.step}, {self.elapsed:.0f} s so far; "
              f"loaded in {time.time() - self.begun:.0f} s", flush=True)  # fmt: skip

    def make_model(self):
        args, target = self.args, self.target
        embed = target.model.embed_tokens.weight
        if args.kind == "medusa":
            return Medusa(medusa_config(target.config, args.heads), target.head)
        if args.kind == "standalone":
            return start_standalone(standalone_config(target.config, args.hidden), embed)
        taps = [int(tap) for tap in args.taps.split(",")]
        config = dspark_config(target.config, args.layers, args.rank, taps, args.mask_token)
        model = DSpark(config, embed, target.head).to(args.device)
        model.start(target.model.norm.weight)
        batch = self.heldout.batch(self.heldout.pick(64))
        with torch.no_grad():
            features = target(batch.ids, taps)[0][batch.answer_mask(0)].float()
        model.scale.copy_(features.square().mean(0).add(1e-6).rsqrt())
        return model

    def loss(self, batch, progress):
        if self.args.kind == "dspark":
            return dspark_loss(self.model, self.target, batch, self.args.anchors, progress, self.autocast)
        loss = medusa_loss if self.args.kind == "medusa" else standalone_loss
        return loss(self.model, self.target, batch, self.autocast)

    def compile(self):
        """Tries compiled layers on one batch, forward and backward; goes on without them if that fails."""
        own = {"dspark": lambda: self.model.layers, "standalone": lambda: self.model.model.layers, "medusa": list}
        layers = [*self.target.model.layers, *own[self.args.kind]()]
        if self.args.eager or not self.args.device.startswith("cuda"):
            return print("layers run eagerly", flush=True)
        began = time.time()
        try:
            compile_layers(layers)
            for _ in range(2):
                self.loss(next(self.batches), 0.0)[0].backward()
            print(f"layers compiled in {time.time() - began:.0f} s", flush=True)
        except Exception as error:  # whatever the compiler throws, the run goes on
            uncompile_layers(layers)
            print(f"layers run eagerly: torch.compile failed with {type(error).__name__}: {str(error)[:300]}", flush=True)
        self.optimizer.zero_grad(set_to_none=True)

    def train(self):
        args = self.args
        self.compile()
        total, before = 60 * args.minutes, self.elapsed
        stop = min(total, before + 60 * args.stop - (time.time() - self.begun) - 5 if args.stop else total)
        started, logged, scored, first = time.time(), 0.0, time.time(), self.step
        while self.elapsed < stop and (args.steps is None or self.step - first < args.steps):
            progress = self.elapsed / total
            for group in self.optimizer.param_groups:
                group["lr"] = group["scale"] * (args.rate or RATES[args.kind]) * schedule(progress)
            loss, log, rows = self.loss(next(self.batches), progress)
            loss.backward()
            log = {"loss": loss.detach(), **{name: value.detach() for name, value in log.items()}}
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if not torch.isfinite(norm):
                print(f"step {self.step}: the gradient is not finite; the step is left out", flush=True)
            else:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step, self.rows = self.step + 1, self.rows + rows
            self.elapsed = before + time.time() - started
            if time.time() - logged >= args.log_every:
                logged = time.time()
                values = " ".join(f"{name} {float(value):.3f}" for name, value in log.items())
                rate = self.rows / (time.time() - started)
                print(f"{self.elapsed:.0f}/{total:.0f} s, step {self.step}: {values} norm {float(norm):.2f} "
                      f"lr {group['lr']:.1e}; {rate / 1e3:.0f} k rows/s", flush=True)  # fmt: skip
            if time.time() - scored > args.score_every:
                self.score()
                self.save()
                scored = time.time()
        self.save()
        self.score()
        print(f"saved {args.out} after {self.step} steps, {time.time() - self.begun:.0f} s in this call", flush=True)

    def score(self):
        began = time.time()
        text = quick_score(self.args.kind, self.model, self.target, self.heldout, self.autocast)
        print(f"  held out: {text} ({time.time() - began:.1f} s)", flush=True)

    def save(self):
        """The checkpoint that is shipped, and what a resumed run needs."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        if self.args.kind == "standalone":
            save_standalone(self.model, self.args.out, self.args.target)
        else:
            self.model.save(self.args.out)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "elapsed": self.elapsed}
        torch.save(state, self.args.out / "state.part")
        (self.args.out / "state.part").replace(self.args.out / "state.pt")

    def load(self):
        state = torch.load(self.args.out / "state.pt", map_location=self.args.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]


def schedule(progress):
    """Warm-up over 4% of the time, then a cosine to a hundredth."""
    if progress < 0.04:
        return max(progress / 0.04, 0.01)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.04) / 0.96)))


if __name__ == "__main__":
    main()
