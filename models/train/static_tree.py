"""Writes the best static tree of a size, from measured hit rates: a text that `treespark --tree FILE` reads.

    python static_tree.py report.json medusa --nodes 16 --out tree.txt

`report.json` is evaluate.py's: `hits_by_rank[d][r]` is how often the token of rank r at depth d + 1 was the target's. A
path is taken to be right as often as the product of its ranks' rates (Medusa, Cai et al. 2024, appendix C); the nodes with
the largest products are a tree, since products only shrink along a path.
"""

import argparse
import heapq
import json
from pathlib import Path


def best_paths(rates: list[list[float]], nodes: int) -> list[tuple[int, ...]]:
    """The likeliest paths of ranks, likeliest first."""
    heap, paths = [(-rates[0][rank], (rank,)) for rank in range(len(rates[0]))], []
    heapq.heapify(heap)
    while heap and len(paths) < nodes:
        value, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < len(rates):
            for rank, rate in enumerate(rates[len(path)]):
                heapq.heappush(heap, (value * rate, (*path, rank)))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("drafter", help="its name in the report")
    parser.add_argument("--nodes", type=int, default=16, help="root included")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rates = json.loads(args.report.read_text())["drafters"][args.drafter]["hits_by_rank"]
    paths = best_paths(rates, args.nodes - 1)
    text = "paths:" + ";".join(".".join(map(str, path)) for path in paths)
    args.out.write_text(text + "\n")
    expected = 1 + sum(product(rates, path) for path in paths)
    print(f"{text}\n{expected:.2f} tokens a round are expected over positions")


def product(rates: list[list[float]], path: tuple[int, ...]) -> float:
    value = 1.0
    for depth, rank in enumerate(path):
        value *= rates[depth][rank]
    return value


if __name__ == "__main__":
    main()
