"""Writes verify-tests/fixtures/medusa/: Medusa heads of random weights for a tiny Llama, and what they say.

    python make_medusa_fixtures.py --target ../../verify-tests/fixtures/parity/tiny-llama --out ../../verify-tests/fixtures/medusa

In f32 on a CPU, with torch and transformers. `shared/` goes through the target's head, `own/` has a matrix for each head.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HEADS = 4
PROMPT = 23


def write_heads(folder: Path, prefix: str, hidden: int, vocab: int, own: bool) -> dict:
    tensors = {}
    for i in range(HEADS):
        tensors[f"{prefix}{i}.0.linear.weight"] = torch.randn(hidden, hidden) / hidden**0.5
        tensors[f"{prefix}{i}.0.linear.bias"] = torch.randn(hidden) * 0.1
        if own:
            tensors[f"{prefix}{i}.1.weight"] = torch.randn(vocab, hidden) / hidden**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ("medusa_lm_head.safetensors" if own else "model.safetensors"))
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    vocab, hidden = model.config.vocab_size, model.config.hidden_size
    tokens = torch.randint(vocab, (1, PROMPT))
    with torch.no_grad():
        states = model.model(tokens).last_hidden_state[0]
        for name, prefix, own in [("shared", "medusa_head.", False), ("own", "", True)]:
            heads = write_heads(args.out / name, prefix, hidden, vocab, own)
            expected = {"tokens": tokens[0].to(torch.int32), "last": model.lm_head(states[-1])}
            logits = []
            for i in range(HEADS):
                weight, bias = heads[f"{prefix}{i}.0.linear.weight"], heads[f"{prefix}{i}.0.linear.bias"]
                x = states[-1] + torch.nn.functional.silu(weight @ states[-1] + bias)
                logits.append(heads[f"{prefix}{i}.1.weight"] @ x if own else model.lm_head(x))
            expected["logits"] = torch.stack(logits)
            save_file(expected, args.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
