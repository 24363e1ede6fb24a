"""The chat format of a target as token ids, from its own template, and prompts by name of their fold."""

import gzip
import hashlib
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

MARK = "\ue000user\ue000"


class Chat:
    def __init__(self, folder):
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
        self.before_text, self.after_text = text.split(MARK)
        self.before, self.after = self.encode(self.before_text), self.encode(self.after_text)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode([int(i) for i in ids])

    def prompt(self, user):
        """Ids of a chat with one user turn, up to where the answer begins."""
        return self.encode(self.before_text + user + self.after_text)


def read_prompts(path):
    """Rows of a .jsonl or .jsonl.gz file."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def held_out(text):
    """Whether a prompt belongs to the 5% that nothing is trained on. A property of the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20 == 0


def shingles(text, words=10):
    """All runs of `words` words, for telling whether two prompts share one."""
    parts = text.lower().split()
    return {" ".join(parts[i : i + words]) for i in range(len(parts) - words + 1)}


def eval_sets(folder):
    """Name -> prompts (first turns)."""
    paths = sorted(Path(folder).glob("*.jsonl"))
    return {path.stem: [row["turns"][0] for row in read_prompts(path)] for path in paths}
