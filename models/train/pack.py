"""Rewrites a checkpoint as shards of at most 15 MB with an index, for places that take small files only.

    python pack.py CHECKPOINT OUT [--file medusa_head.safetensors] [--megabytes 15]

Tensors larger than a shard are refused: the Markov matrices of rank 64 take 6.3 MB each in bf16. Readers follow
`model.safetensors.index.json` as for any sharded checkpoint. Other small files are copied.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--file", default="model.safetensors")
    parser.add_argument("--megabytes", type=float, default=15)
    args = parser.parse_args()
    pack(args.checkpoint, args.out, args.file, args.megabytes * 1e6)


def pack(checkpoint, out, file="model.safetensors", limit=15e6):
    out.mkdir(parents=True, exist_ok=True)
    tensors, shards, size = load_file(checkpoint / file), [{}], 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            raise SystemExit(f"{name} has {tensor.nbytes} bytes, more than a shard of {limit:.0f}")
        if size + tensor.nbytes > limit - 65536:  # room for the header
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    stem, weight_map = file.removesuffix(".safetensors"), {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else file
        save_file(shard, out / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, out / path.name)


if __name__ == "__main__":
    main()
