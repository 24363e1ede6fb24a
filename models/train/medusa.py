"""Medusa-1: heads on the target's last hidden state, each one residual block, all through the target's own lm_head.

Head i turns the hidden state h of position t (after the final norm) into h + SiLU(W_i h + b_i), whose logits predict
token t + 2 + i: token t + 1 is the target's own. The checkpoint is `medusa_head.safetensors` with
`medusa_head.{i}.0.linear.{weight,bias}`; that `medusa_head.{i}.1.weight` is absent means that lm_head is shared.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from losses import head_loss


class Block(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.linear = nn.Linear(h, h)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return x + F.silu(self.linear(x))


class Medusa(nn.Module):
    def __init__(self, config, head):
        """head [vocabulary, h] is the target's."""
        super().__init__()
        self.config = config
        blocks = (nn.Sequential(Block(config["hidden_size"])) for _ in range(config["medusa_num_heads"]))
        self.medusa_head = nn.ModuleList(blocks)
        self.register_buffer("head", head.half() if head.is_cuda else head, persistent=False)

    def forward(self, hidden):
        """[rows, h] -> [rows, heads, h]"""
        return torch.stack([block(hidden) for block in self.medusa_head], dim=1)

    def logits(self, hidden):
        """[rows, h] -> [rows, heads, vocabulary] in f32"""
        return (self(hidden).to(self.head.dtype) @ self.head.T).float()

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "medusa_head.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")


def medusa_config(target, heads=5):
    return {
        "medusa_num_heads": heads,
        "medusa_num_layers": 1,
        "hidden_size": target["hidden_size"],
        "vocab_size": target["vocab_size"],
    }


def load_medusa(folder, target_head, device):
    model = Medusa(json.loads((Path(folder) / "config.json").read_text()), target_head.to(device))
    model.load_state_dict(load_file(Path(folder) / "medusa_head.safetensors"))
    return model.to(device).eval()


def medusa_loss(model, target, batch, autocast):
    """Mean over positions of sum 0.8^i CE_i, on answer tokens."""
    with torch.no_grad():
        _, hidden = target(batch.ids)
    heads = len(model.medusa_head)
    # Position t predicts t + 2 .. t + 1 + heads; t begins one before the answer, whose first token is the anchor.
    row, t = torch.nonzero(batch.answer_mask(1), as_tuple=True)
    with autocast():
        x = model(hidden[row, t - 1])
    ahead = t[:, None] + 1 + torch.arange(heads, device=t.device)
    weights = 0.8 ** torch.arange(heads, device=t.device) * (ahead < batch.lengths[row][:, None])
    tokens = batch.ids[row[:, None], ahead.clamp(max=batch.ids.shape[1] - 1)]
    used = torch.nonzero(weights.flatten())[:, 0]
    rows, weights = x.float().flatten(0, 1)[used], weights.flatten()[used]
    total, terms = head_loss(rows, model.head, None, tokens.flatten()[used], weights, (1.0, 0.0, 0.0))
    first = terms[:, 0][used % heads == 0].mean()
    return total / len(row), {"ce of head 0": first}, len(used)
