"""The DSpark drafter: a Qwen3-style backbone over a block of slots, a Markov head and a confidence head.

    e_t  = hidden_norm(fc features_t)                      for each committed token, shared by all layers
    H    = embed [anchor, MASK, ..., MASK]                 `block_size` slots at positions start, start + 1, ...
    each layer: every slot attends to k, v of all e_t with t < start and of all slots of its own block; no causal mask
    h_k  = norm(H)[k - 1],  logits_k = lm_head h_k + W2 W1[x_{k-1}],  confidence_k = w [h_k ; W1[x_{k-1}]] + b

Parameters have the names of DeepSpec's checkpoints. With `markov_rank` 0 it is DFlash as DeepSpec writes it: no Markov
head, no confidence head. `embed_tokens` and `lm_head` are the target's, frozen; they are no parameters here.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from layers import Layer, RmsNorm, head_dim, init_linear, rope_at, rope_theta
from losses import head_loss
from target import compute_dtype, read_tensors


def dspark_config(target, layers, rank, taps, mask_token, block=7):
    """config.json of a drafter for a target with the configuration `target`."""
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    more = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
    if max(taps) >= target["num_hidden_layers"] - 1 or list(taps) != sorted(set(taps)):
        raise SystemExit(f"target layers {taps} must rise and leave out the last one")
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        **{key: target.get(key) for key in same + more},
        "head_dim": head_dim(target),
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": rope_theta(target), "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "block_size": block,
        "mask_token_id": mask_token,
        "target_layer_ids": list(taps),
        "num_target_layers": target["num_hidden_layers"],
        "num_anchors": 512,
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": rank > 0,
        "confidence_head_with_markov": rank > 0,
        "dtype": "bfloat16",
    }


class Markov(nn.Module):
    def __init__(self, vocabulary, rank):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)


class Confidence(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.proj = nn.Linear(size, 1)


class DSpark(nn.Module):
    def __init__(self, config, embed, head):
        """embed and head [vocabulary, h] are the target's."""
        super().__init__()
        self.config, h, rank = config, config["hidden_size"], config["markov_rank"]
        self.gamma, self.mask, self.taps = config["block_size"], config["mask_token_id"], config["target_layer_ids"]
        self.fc = nn.Linear(len(self.taps) * h, h, bias=False)
        self.hidden_norm, self.norm = RmsNorm(h, config["rms_norm_eps"]), RmsNorm(h, config["rms_norm_eps"])
        self.layers = nn.ModuleList(Layer(config, qk_norm=True) for _ in range(config["num_hidden_layers"]))
        if rank:
            self.markov_head = Markov(config["vocab_size"], rank)
        if config["enable_confidence_head"]:
            self.confidence_head = Confidence(h + (rank if config["confidence_head_with_markov"] else 0))
        self.register_buffer("embed", embed, persistent=False)
        self.register_buffer("head", head.half() if head.is_cuda else head, persistent=False)
        # Taps differ in size by orders of magnitude. They are brought to one size in training; `save` folds it into fc.
        self.register_buffer("scale", torch.ones(len(self.taps) * h))

    def start(self, target_norm):
        """Weights to train from. The last norm starts small: full-sized random logits cost 46 nats a token."""
        self.apply(init_linear)
        with torch.no_grad():
            self.norm.weight.copy_(0.1 * target_norm)
            if hasattr(self, "markov_head"):
                self.markov_head.markov_w2.weight.zero_()

    def forward(self, features, ids, anchors):
        """Last hidden of the slots, [batch, anchors, gamma, h].

        features [batch, tokens, taps * h], ids [batch, tokens], anchors [batch, anchors]: positions of anchor tokens.
        """
        (batch, tokens), n = ids.shape, anchors.shape[1]
        e = self.hidden_norm(self.fc(features * self.scale.to(features.dtype)))
        block = torch.full((batch, n, self.gamma), self.mask, device=ids.device)
        block[:, :, 0] = ids.gather(1, anchors)
        x = F.embedding(block.flatten(1), self.embed)
        x = x.to(compute_dtype(x))
        positions = (anchors[:, :, None] + torch.arange(self.gamma, device=ids.device)).flatten(1)
        rope = rope_at(positions, self.config, x.dtype)
        context_rope = rope_at(torch.arange(tokens, device=ids.device)[None], self.config, x.dtype)
        bias = block_bias(anchors, tokens, self.gamma, x.dtype)
        for layer in self.layers:
            query, key, value = layer.before(x, rope)
            context_key, context_value = layer.self_attn.key_value(e, context_rope)
            key, value = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            x = layer.after(x, F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        return self.norm(x).unflatten(1, (n, self.gamma))

    def previous(self, tokens):
        """W1[x_{k-1}], [..., rank]; rank 0 without a Markov head."""
        if hasattr(self, "markov_head"):
            return self.markov_head.markov_w1(tokens)
        return torch.zeros(*tokens.shape, 0, device=tokens.device)

    def base(self, hidden):
        """Logits of the parallel stage in f32, [..., vocabulary]."""
        return (hidden.to(self.head.dtype) @ self.head.T).float()

    def bias(self, previous):
        """What the Markov head adds, [..., vocabulary] in f32."""
        if not hasattr(self, "markov_head"):
            return 0.0
        return (previous.to(self.head.dtype) @ self.markov_head.markov_w2.weight.to(self.head.dtype).T).float()

    def confidence(self, hidden, previous):
        """Confidence logits in f32, [...]."""
        if self.config["confidence_head_with_markov"]:
            hidden = torch.cat([hidden.float(), previous.float()], dim=-1)
        return self.confidence_head.proj(hidden.float())[..., 0]

    @torch.no_grad()
    def chain(self, hidden, anchors):
        """The greedy chain: tokens [rows, gamma] and confidence logits [rows, gamma] (None without that head).

        hidden [rows, gamma, h], anchors [rows]: token ids.
        """
        tokens, confidences, last = [], [], anchors
        for k in range(self.gamma):
            previous = self.previous(last)
            last = (self.base(hidden[:, k]) + self.bias(previous)).argmax(-1)
            tokens.append(last)
            if hasattr(self, "confidence_head"):
                confidences.append(self.confidence(hidden[:, k], previous))
        return torch.stack(tokens, 1), torch.stack(confidences, 1) if confidences else None

    def save(self, folder, with_head=False):
        """A checkpoint as DeepSpec writes it, in bf16; `embed_tokens` and `lm_head` only on request."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.float() for name, tensor in self.state_dict().items() if name != "scale"}
        tensors["fc.weight"] = tensors["fc.weight"] * self.scale
        if with_head:
            tensors |= {"embed_tokens.weight": self.embed, "lm_head.weight": self.head}
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def load_dspark(folder, target_embed, target_head, device):
    """Reads a checkpoint into f32; takes the target's embedding and head where it has none."""
    config = json.loads((Path(folder) / "config.json").read_text())
    tensors = read_tensors(folder)
    embed = tensors.pop("embed_tokens.weight", target_embed).to(device)
    head = tensors.pop("lm_head.weight", target_head).to(device)
    model = DSpark(config, embed, head)
    missing = model.load_state_dict(tensors, strict=False)
    if missing.unexpected_keys or missing.missing_keys != ["scale"]:
        raise SystemExit(f"{folder} is no DSpark checkpoint of a vanilla Markov head: {missing}")
    return model.to(device).eval()


def block_bias(anchors, tokens, gamma, dtype):
    """[batch, 1, anchors * gamma, tokens + anchors * gamma]: 0 where a slot may look, else minus infinity."""
    batch, n = anchors.shape
    context = torch.arange(tokens, device=anchors.device) < anchors[:, :, None, None]
    context = context.expand(batch, n, gamma, tokens).flatten(1, 2)
    owner = torch.arange(n * gamma, device=anchors.device) // gamma
    own = (owner[:, None] == owner).expand(batch, -1, -1)
    seen = torch.cat([context, own], dim=2)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def dspark_loss(model, target, batch, anchors, progress, autocast):
    """(mean loss, what to log, rows). progress is the elapsed share of the time, 0 to 1.

    Weights exp(-(k - 1) / 4) by slot; 0.1 CE + 0.9 L1 + 1.0 BCE of the confidence against 1 - L1 / 2. L1 has next to no
    gradient far from the target, so CE counts fully for the first fifth.
    """
    with torch.no_grad():
        features, hidden = target(batch.ids, model.taps)
    places, valid = batch.anchors(anchors)
    with autocast():
        slots = model(features, batch.ids, places)
    at = places[:, :, None] + torch.arange(model.gamma, device=places.device)
    row, anchor, k = torch.nonzero(valid[:, :, None] & (at + 1 < batch.lengths[:, None, None]), as_tuple=True)
    at = at[row, anchor, k]
    h, previous = slots[row, anchor, k].float(), model.previous(batch.ids[row, at])
    weights = torch.exp(-k / 4)
    w2 = model.markov_head.markov_w2.weight if hasattr(model, "markov_head") else None
    mix = (1.0 if progress < 0.2 else 0.1, 0.9, 0.0)
    x = torch.cat([h, previous], dim=1)
    total, terms = head_loss(x, model.head, w2, batch.ids[row, at + 1], weights, mix, (hidden[row, at], model.head))
    loss, norm = total / weights.sum(), weights.sum()
    log = {"ce": (terms[:, 0] * weights).sum() / norm, "l1": (terms[:, 1] * weights).sum() / norm}
    if hasattr(model, "confidence_head"):
        accepted = (1 - terms[:, 1] / 2).clamp(0, 1)
        bce = F.binary_cross_entropy_with_logits(model.confidence(h, previous), accepted, reduction="none")
        log["bce"] = (bce * weights).sum() / norm
        loss = loss + log["bce"]
    return loss, log, len(row)
