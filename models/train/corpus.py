"""Token sequences on disk and as batches: each is one chat with one answer, and the answer is what is learned.

A shard `train-*.safetensors` or `heldout-*.safetensors` holds
    ids          u16 [tokens]         the sequences, one behind the other
    offsets      i64 [sequences + 1]  where each begins
    answers      i32 [sequences]      length of the prompt; from there to the end all is the assistant's
    temperatures f32 [sequences]      what the answer was sampled at; 0 is greedy
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

SHARD_TOKENS = 7_000_000  # 14 MB


def loops(answer):
    """Whether the last 64 tokens repeat a 4-gram six times or more. Any drafter predicts such text."""
    last = [int(token) for token in answer[-64:]]
    counts = {}
    for i in range(len(last) - 3):
        gram = tuple(last[i : i + 4])
        counts[gram] = counts.get(gram, 0) + 1
    return max(counts.values(), default=0) >= 6


def write_shards(folder, name, sequences):
    """sequences: (ids, prompt length, temperature). Returns the tokens written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    part, size, total, n = [], 0, 0, 0
    for i, sequence in enumerate(sequences):
        part.append(sequence)
        size += len(sequence[0])
        if size >= SHARD_TOKENS or i == len(sequences) - 1:
            ids, answers, temperatures = zip(*part)
            shard = {
                "ids": np.concatenate(ids).astype(np.uint16),
                "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
                "answers": np.array(answers, np.int32),
                "temperatures": np.array(temperatures, np.float32),
            }
            save_file(shard, Path(folder) / f"{name}-{n:02}.safetensors")
            part, size, total, n = [], 0, total + size, n + 1
    return total


class Batch:
    """ids i64 [batch, tokens] padded on the right, lengths and answers (prompt lengths) i64 [batch]."""

    def __init__(self, ids, lengths, answers):
        self.ids, self.lengths, self.answers = ids, lengths, answers

    def answer_mask(self, ahead):
        """[batch, tokens]: positions of answer tokens with at least `ahead` tokens behind them."""
        at = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (at >= self.answers[:, None]) & (at + ahead < self.lengths[:, None])

    def anchors(self, n):
        """n random anchors of each sequence, without repetition: (positions, whether there is one) [batch, n]."""
        mask = self.answer_mask(1)
        n = min(n, mask.shape[1])
        keys, places = torch.where(mask, torch.rand(mask.shape, device=mask.device), -1.0).topk(n, dim=1)
        return places, keys >= 0


class Corpus:
    """All shards of one kind, on the device."""

    def __init__(self, folder, kind, device, max_tokens=None):
        shards = [load_file(path) for path in sorted(Path(folder).glob(f"{kind}-*.safetensors"))]
        if not shards:
            raise SystemExit(f"{folder} has no shards {kind}-*.safetensors: run generate.py")
        starts = np.cumsum([0, *(len(shard["ids"]) for shard in shards)])
        offsets = np.concatenate([shard["offsets"][:-1] + start for shard, start in zip(shards, starts)])
        lengths = np.concatenate([np.diff(shard["offsets"]) for shard in shards])
        ids = np.concatenate([shard["ids"] for shard in shards]).astype(np.int32)
        self.ids = torch.from_numpy(ids).to(device)
        self.offsets, self.lengths = torch.from_numpy(offsets), torch.from_numpy(lengths)
        if max_tokens:
            self.lengths = self.lengths.clamp(max=max_tokens)
        self.answers = torch.from_numpy(np.concatenate([shard["answers"] for shard in shards])).long()
        self.temperatures = torch.from_numpy(np.concatenate([shard["temperatures"] for shard in shards]))
        self.device = device

    def __len__(self):
        return len(self.lengths)

    def batch(self, which):
        """The sequences `which` (indices), padded to a multiple of 64."""
        lengths, answers = self.lengths[which], self.answers[which]
        width = -(-int(lengths.max()) // 64) * 64
        offsets = self.offsets[which].to(self.device)
        lengths, answers = lengths.to(self.device), answers.to(self.device)
        at = torch.arange(width, device=self.device)
        ids = self.ids[(offsets[:, None] + at).clamp(max=len(self.ids) - 1)].long()
        return Batch(torch.where(at < lengths[:, None], ids, 0), lengths, answers)

    def batches(self, tokens, seed):
        """Endless random batches of about `tokens` tokens, padding included, of sequences of like length."""
        generator = torch.Generator().manual_seed(seed)
        usable = torch.nonzero(self.lengths > self.answers + 1)[:, 0]
        while True:
            order = usable[torch.randperm(len(usable), generator=generator)]
            for group in order.split(8192):
                group = group[self.lengths[group].argsort(stable=True)]
                widths, ready, start = -(-self.lengths[group] // 64) * 64, [], 0
                for end in range(1, len(group) + 1):
                    if end == len(group) or (end + 1 - start) * int(widths[end]) > tokens:
                        ready.append(group[start:end])
                        start = end
                for i in torch.randperm(len(ready), generator=generator).tolist():
                    yield self.batch(ready[i])

    def pick(self, n, temperature=None):
        """Indices of up to n sequences spread over the corpus, of one temperature if it is given."""
        usable = self.lengths > self.answers + 1
        if temperature is not None:
            usable &= (self.temperatures - temperature).abs() < 1e-6
        which = torch.nonzero(usable)[:, 0]
        return which[torch.linspace(0, len(which) - 1, min(n, len(which))).long()] if len(which) else which
