"""A Llama (or Qwen3) language model in plain torch, read from a folder in the Hugging Face layout.

The target is one, frozen in bf16; the standalone draft is one, trained in f32. Sequences are padded on the right, so a
causal mask is all that is needed: what lies behind a sequence's end never reaches it.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from layers import Layer, RmsNorm, rope_at


class Backbone(nn.Module):
    def __init__(self, config, qk_norm):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, qk_norm) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])


class Llama(nn.Module):
    def __init__(self, config, qk_norm=False):
        super().__init__()
        self.config = config
        self.model = Backbone(config, qk_norm)
        if not config.get("tie_word_embeddings", False):
            self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    @property
    def head(self):
        """[vocabulary, h]"""
        return self.lm_head.weight if hasattr(self, "lm_head") else self.model.embed_tokens.weight

    def forward(self, ids, taps=()):
        """ids [batch, tokens] -> (taps [batch, tokens, len(taps) * h], last hidden after the norm [batch, tokens, h]).

        Tap l is the residual stream after decoder layer l, before any norm. Tap -1 is the embedding.
        """
        x = self.model.embed_tokens(ids)
        rope = rope_at(torch.arange(ids.shape[1], device=ids.device)[None], self.config, compute_dtype(x))
        kept = {-1: x}
        for i, layer in enumerate(self.model.layers):
            query, key, value = layer.before(x, rope)
            x = layer.after(x, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))
            if i in taps:
                kept[i] = x
        features = torch.cat([kept[i] for i in taps], dim=-1) if taps else None
        return features, self.model.norm(x)

    def logits(self, hidden):
        """[..., h] -> [..., vocabulary] in f32. On a GPU the product is rounded to f16: bf16 would leave ties."""
        if not hidden.is_cuda:
            return (hidden @ self.head.T).float()
        if self.head.requires_grad:  # it changes from step to step
            return (hidden.half() @ self.head.half().T).float()
        if not hasattr(self, "head_f16"):
            self.head_f16 = self.head.half()
        return (hidden.half() @ self.head_f16.T).float()


def compute_dtype(x):
    """What the matrix products of x will give: autocast's type inside it, else its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def read_tensors(folder):
    """All tensors of a checkpoint, one file or sharded."""
    index = Path(folder) / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors = {}
    for name in names:
        tensors |= load_file(Path(folder) / name)
    return tensors


def load_llama(folder, device, dtype):
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] not in ("llama", "qwen3"):
        raise SystemExit(f"{folder} is a {config['model_type']}, known are llama and qwen3")
    with torch.device("meta"):
        model = Llama(config, config["model_type"] == "qwen3")
    model.load_state_dict(read_tensors(folder), assign=True)
    return model.to(device, dtype)


def load_target(folder, device):
    """The frozen target: bf16 on a GPU, f32 on a CPU."""
    model = load_llama(folder, device, torch.bfloat16 if str(device).startswith("cuda") else torch.float32)
    return model.eval().requires_grad_(False)


def stop_tokens(folder, config):
    """Ids that end an answer."""
    path = Path(folder) / "generation_config.json"
    generation = json.loads(path.read_text()) if path.exists() else {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    return stops if isinstance(stops, list) else [stops]
