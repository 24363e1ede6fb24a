"""A tiny Llama that drafts on its own: the target's tokenizer, its own layers, distilled from the target.

Loss: 0.5 KL(target || draft) + 0.5 CE on answer tokens. The checkpoint is a plain `LlamaForCausalLM` folder.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from layers import init_linear, rope_at, rope_theta
from losses import head_loss
from target import Llama, compute_dtype

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def standalone_config(target, hidden=256, layers=4, heads=4, kv_heads=2):
    """The feed-forward part is 11/4 of the hidden size: 704 of 256."""
    same = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        **{key: target.get(key) for key in same},
        "rope_theta": rope_theta(target),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def start_standalone(config, embed):
    """A model to train; its embedding holds the first principal components of the target's (embed [vocabulary, h])."""
    model = Llama(config).to(embed.device)
    model.apply(init_linear)
    centred = embed.float() - embed.float().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = centred @ directions[:, -config["hidden_size"] :]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(components * (0.02 / components.std()))
    return model


def save_standalone(model, folder, target_folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    for name in FILES:
        if (Path(target_folder) / name).exists():
            shutil.copy(Path(target_folder) / name, folder / name)


def standalone_loss(model, target, batch, autocast):
    with torch.no_grad():
        _, teacher = target(batch.ids)
    with autocast():
        _, hidden = model(batch.ids)
    # The token before the answer predicts its first token.
    row, t = torch.nonzero(batch.answer_mask(0), as_tuple=True)
    x, weights = hidden[row, t - 1].float(), torch.ones(len(row), device=row.device)
    mix = (0.5, 0.0, 0.5)
    total, terms = head_loss(
        x, None, model.head, batch.ids[row, t], weights, mix, (teacher[row, t - 1], target.head)
    )
    return total / len(row), {"ce": terms[:, 0].mean(), "kl": terms[:, 2].mean()}, len(row)


@torch.no_grad()
def standalone_chains(model, ids, depth=4):
    """Greedy chains from every position: [batch, tokens, depth], of which [b, s] follows ids[b, : s + 1].

    The chains of all positions run together: a drafted token looks at the true tokens up to its s and at its own chain.
    """
    layers, config, tokens = model.model.layers, model.config, ids.shape[1]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
    context, chain, drafted = [None] * len(layers), [[] for _ in layers], []
    last, positions = ids, torch.arange(tokens, device=ids.device)[None]
    for step in range(depth):
        x = model.model.embed_tokens(last)
        rope = rope_at(positions + step, config, compute_dtype(x))
        for i, layer in enumerate(layers):
            query, key, value = layer.before(x, rope)
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            if step == 0:
                context[i] = key, value
            else:
                chain[i].append((key, value))
            scores = (query @ context[i][0].transpose(-1, -2)).masked_fill(~causal, -torch.inf)
            own = [(query * k).sum(-1, keepdim=True) for k, _ in chain[i]]
            weights = torch.softmax(torch.cat([scores, *own], dim=-1).float() / query.shape[-1] ** 0.5, dim=-1).to(value.dtype)
            heads = weights[..., :tokens] @ context[i][1]
            for j, (_, v) in enumerate(chain[i]):
                heads = heads + weights[..., tokens + j, None] * v
            x = layer.after(x, heads)
        last = model.logits(model.model.norm(x)).argmax(-1)
        drafted.append(last)
    return torch.stack(drafted, dim=2)
