"""The pieces that the target, the standalone draft and the DSpark backbone share: RMSNorm, rope, SwiGLU, attention.

Parameters keep the names of the Hugging Face checkpoints, so that a state dict is a checkpoint. `h` is the hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, f = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Projections of one layer, with the norms of q and k where the checkpoint has them (Qwen3)."""

    def __init__(self, config, qk_norm):
        super().__init__()
        h, self.head_dim = config["hidden_size"], head_dim(config)
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        bias = config.get("attention_bias", False)
        self.q_proj = nn.Linear(h, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(h, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(h, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, h, bias=bias)
        norm = (lambda: RmsNorm(self.head_dim, config["rms_norm_eps"])) if qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def split(self, x, heads):
        """[..., tokens, heads * head_dim] -> [..., heads, tokens, head_dim]"""
        return x.unflatten(-1, (heads, self.head_dim)).transpose(-3, -2)

    def query(self, x, rope):
        return rotate(self.q_norm(self.split(self.q_proj(x), self.heads)), rope)

    def key_value(self, x, rope):
        key = rotate(self.k_norm(self.split(self.k_proj(x), self.kv_heads)), rope)
        return key, self.split(self.v_proj(x), self.kv_heads)

    def output(self, heads):
        """[..., heads, tokens, head_dim] -> [..., tokens, h]"""
        return self.o_proj(heads.transpose(-3, -2).flatten(-2))


class Layer(nn.Module):
    """One decoder layer. What lies before and after the attention is apart, because decoding, training and drafting
    attend each in their own way."""

    def __init__(self, config, qk_norm):
        super().__init__()
        h, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(h, eps), RmsNorm(h, eps)
        self.self_attn, self.mlp = Attention(config, qk_norm), Mlp(config)

    def before(self, x, rope):
        """[..., tokens, h] -> query, key, value [..., heads, tokens, head_dim]"""
        x = self.input_layernorm(x)
        return self.self_attn.query(x, rope), *self.self_attn.key_value(x, rope)

    def after(self, x, heads):
        x = x + self.self_attn.output(heads)
        return x + self.mlp(self.post_attention_layernorm(x))


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope_theta(config):
    """The base of the rope, from either dialect; scaled ropes are refused."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise SystemExit(f"rope {rope} is not known here, only the plain one")
    return rope.get("rope_theta", config.get("rope_theta", 10000.0))


def rope_at(positions, config, dtype):
    """(cos, sin), each [..., 1, tokens, head_dim], for positions [..., tokens]."""
    d = head_dim(config)
    frequencies = rope_theta(config) ** (-torch.arange(0, d, 2, device=positions.device).float() / d)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-3)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def init_linear(module, std=0.02):
    """Normal weights, zero biases; norms stay at 1."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def compile_layers(layers):
    """Fuses what surrounds attention. All layers share the compiled code."""
    torch._dynamo.config.recompile_limit = 32  # with and without gradients, f32 and bf16, norms of q and k or none
    for layer in layers:
        layer.before = torch.compile(layer.before, dynamic=True)
        layer.after = torch.compile(layer.after, dynamic=True)


def uncompile_layers(layers):
    for layer in layers:
        for name in ("before", "after"):
            layer.__dict__.pop(name, None)
