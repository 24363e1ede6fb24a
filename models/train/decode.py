"""Batched generation with the target: many rows at once, a static cache, one CUDA graph a step.

A wave of prompts starts together. A step's graph covers the first `rows` rows and `width` positions of the cache; both
are chosen from a few sizes, so that short texts read little and finished rows are dropped: the rest moves up.
"""

import math

import torch
import torch.nn.functional as F

from layers import rope_at

WIDTH = 128


class Decoder:
    """Settings that hold for all waves. `rows` is the largest wave, `max_tokens` the longest text in tokens."""

    def __init__(self, target, stops, rows, max_tokens, graphs=None, min_p=0.0):
        self.target, self.rows, self.min_p = target, rows, min_p
        self.device = next(target.parameters()).device
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.max_tokens = -(-max_tokens // WIDTH) * WIDTH
        attention = target.model.layers[0].self_attn
        shape = (len(target.model.layers), 2, rows, attention.kv_heads, self.max_tokens, attention.head_dim)
        dtype = target.model.embed_tokens.weight.dtype
        self.cache = torch.zeros(shape, dtype=dtype, device=self.device)
        self.stops = torch.tensor(stops, device=self.device)
        self.last = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.position = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.temperature = torch.zeros(rows, device=self.device)
        self.captured, self.pool = {}, torch.cuda.graph_pool_handle() if self.graphs else None

    @torch.inference_mode()
    def generate(self, prompts, temperatures, new_tokens):
        """Answers (lists of ids, a stop token included where there was one) to up to `rows` prompts (lists of ids)."""
        n = len(prompts)
        order = sorted(range(n), key=lambda i: len(prompts[i]))
        limits = [min(new_tokens, self.max_tokens - len(prompts[i])) for i in order]
        self.temperature[:n] = torch.tensor([temperatures[i] for i in order], device=self.device)
        self.prefill([prompts[i] for i in order])
        answers = [[] for _ in range(n)]
        alive, limit = torch.arange(n), torch.tensor(limits)  # which answer each row writes, on the host
        done = torch.zeros(n, dtype=torch.bool)
        longest, made, pending = len(prompts[order[-1]]), 0, [self.last[:n].clone()]
        while True:
            made += 1
            # The host looks at tokens every 32 steps only; what a row wrote after its stop is cut here.
            if made % 32 == 0 or made >= new_tokens:
                block = torch.stack(pending, 1)
                done[alive] |= torch.isin(block, self.stops).any(1).cpu() | (limit[alive] <= made)
                for i, tokens in zip(alive.tolist(), block.cpu().tolist()):
                    answers[i].extend(tokens)
                pending = []
                keep = torch.nonzero(~done[alive])[:, 0]
                if len(keep) == 0 or made >= new_tokens:
                    break
                if self.size(len(keep)) < self.size(len(alive)):
                    self.move(keep.to(self.device))
                    alive = alive[keep]
            n_rows = len(alive)
            self.step(self.size(n_rows), min(self.max_tokens, -(-(longest + made) // WIDTH) * WIDTH))
            pending.append(self.last[:n_rows].clone())
        out = [None] * n
        stops = set(self.stops.tolist())
        for place, answer, most in zip(order, answers, limits):
            end = next((i + 1 for i, token in enumerate(answer) if token in stops), len(answer))
            out[place] = answer[: min(end, most)]
        return out

    def size(self, n):
        """The smallest eighth of the largest wave that holds n rows."""
        eighth = -(-self.rows // 8)
        return min(self.rows, -(-n // eighth) * eighth)

    def move(self, keep):
        n = len(keep)
        for layer in self.cache:
            for part in layer:
                part[:n] = part[keep]
        for state in (self.last, self.position, self.temperature):
            state[:n] = state[keep]

    def prefill(self, prompts, tokens=32768):
        """Runs the prompts (sorted by length), fills the cache, and samples each row's first token."""
        start = 0
        while start < len(prompts):
            end = start + 1
            while end < len(prompts) and (end + 1 - start) * len(prompts[end]) <= tokens:
                end += 1
            rows, width = slice(start, end), len(prompts[end - 1])
            ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts[rows]], device=self.device)
            lengths = torch.tensor([len(p) for p in prompts[rows]], device=self.device)
            x = self.target.model.embed_tokens(ids)
            rope = rope_at(torch.arange(width, device=self.device)[None], self.target.config, x.dtype)
            for layer, (keys, values) in zip(self.target.model.layers, self.cache):
                query, key, value = layer.before(x, rope)
                keys[rows, :, :width], values[rows, :, :width] = key, value
                x = layer.after(x, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))
            last = x[torch.arange(end - start, device=self.device), lengths - 1]
            self.last[rows] = self.sample(self.target.model.norm(last), self.temperature[rows])
            self.position[rows] = lengths
            start = end

    def step(self, rows, width):
        """One more token for the first `rows` rows, all of whose texts end before `width`."""
        if not self.graphs:
            return self.advance(rows, width)
        if (rows, width) not in self.captured:
            try:
                self.captured[rows, width] = self.capture(rows, width)
            except RuntimeError as error:
                print(f"no CUDA graphs: {str(error)[:300]}", flush=True)
                self.graphs = False
                return self.advance(rows, width)
        self.captured[rows, width].replay()

    def capture(self, rows, width):
        """A graph of `advance`. The step that warms up is undone: what it wrote to the cache is written again."""
        saved = self.last.clone(), self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.advance(rows, width)
        torch.cuda.current_stream().wait_stream(stream)
        self.last.copy_(saved[0])
        self.position.copy_(saved[1])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.advance(rows, width)
        return graph

    def advance(self, rows, width):
        target, position = self.target, self.position[:rows]
        # A row that has stopped but is still here must not leave the cache.
        position.clamp_(max=self.max_tokens - 1)
        x = target.model.embed_tokens(self.last[:rows])[:, None]
        rope = rope_at(position[:, None], target.config, x.dtype)
        seen = torch.arange(width, device=self.device) <= position[:, None]
        bias = torch.zeros(seen.shape, dtype=x.dtype, device=self.device).masked_fill_(~seen, -torch.inf)[:, None, None]
        row, place = torch.arange(rows, device=self.device), position.clamp(max=width - 1)
        for layer, (keys, values) in zip(target.model.layers, self.cache):
            query, key, value = layer.before(x, rope)
            keys[row, :, place], values[row, :, place] = key[:, :, 0], value[:, :, 0]
            # The query heads of a group stand in for query tokens, so that keys are read once a group.
            grouped = query.view(rows, key.shape[1], -1, query.shape[-1])
            heads = F.scaled_dot_product_attention(
                grouped, keys[:rows, :, :width], values[:rows, :, :width], attn_mask=bias
            )
            x = layer.after(x, heads.reshape(rows, -1, 1, query.shape[-1]))
        self.last[:rows] = self.sample(target.model.norm(x)[:, 0], self.temperature[:rows])
        position += 1

    def sample(self, hidden, temperature):
        """Gumbel-max: argmax of logits + T g, which is greedy for T = 0. [rows, h] -> [rows]"""
        logits = self.target.logits(hidden)
        gumbel = torch.empty_like(logits).exponential_().log_().neg_()
        scores = gumbel.mul_(temperature[:, None]).add_(logits)
        if self.min_p:
            least = logits.amax(1, keepdim=True) + temperature[:, None] * math.log(self.min_p)
            scores.masked_fill_(logits < least, -torch.inf)
        return scores.argmax(1)
