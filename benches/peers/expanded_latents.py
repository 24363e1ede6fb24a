"""Attention over latents (MLA) of a prompt's pass, expanded: keys and values of all heads are made from the latents, then attended to.

usage: python expanded_latents.py out.json     (PyTorch 2.5 or later, one GPU)
R rows of one prompt behind L slots, 16 heads of 128 + 64 (keys) and 128 (values), latents of 512, as DeepSeek-V2-Lite has; bf16.
What absorbed attention over the same rows takes, which needs no keys and values of its own:
  treespark-bench attention --shapes mla16:B1:L4096:N256
Medians, in us, taken as tree_attention_peers.py takes them:
  expand    latents to keys and values, one product, and the rotated part copied behind every head's key
  attend    the faster of cuDNN's and FlashAttention's kernels (values padded to 192 for the latter), rows causal at the end
  together  expand + attend; gathering a paged cache's latents would come on top
"""
import json, sys
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from tree_attention_peers import dev, timed

HEADS, NOPE, ROTATED, VALUE, LATENT = 16, 128, 64, 128, 512
GRID = [(R, L) for R in (256, 512, 1024, 2048) for L in (4096, 16384, 65536)]

def normal(*shape):
    return torch.randn(*shape, device=dev, dtype=torch.bfloat16)

def expand(latents, weight):
    """latents [S, 576] to keys [1, H, S, 192] and values [1, H, S, 128]."""
    S = latents.shape[0]
    both = F.linear(latents[:, :LATENT], weight).view(S, HEADS, NOPE + VALUE)
    rotated = latents[:, None, LATENT:].expand(S, HEADS, ROTATED)
    return torch.cat([both[..., :NOPE], rotated], -1).transpose(0, 1)[None], both[..., NOPE:].transpose(0, 1)[None]

def reference(q, k, v, L):
    R, S = q.shape[2], k.shape[2]
    sees = torch.ones(R, S, dtype=torch.bool, device=dev).tril(L)
    scores = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) / (NOPE + ROTATED) ** 0.5
    return torch.softmax(scores.masked_fill(~sees, float("-inf")), -1) @ v.float()

def attend(q, k, v, backend):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))[..., :VALUE]

def main(out):
    res = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, rows=[])
    print({k: v for k, v in res.items() if k != "rows"}, flush=True)
    weight = normal(HEADS * (NOPE + VALUE), LATENT) * LATENT**-0.5
    for R, L in GRID:
        latents, q = normal(L + R, LATENT + ROTATED), normal(1, HEADS, R, NOPE + ROTATED)
        row = dict(R=R, L=L, expand=timed([lambda: expand(latents, weight)]))
        k, v = expand(latents, weight)
        heads = slice(0, 1)
        want = reference(q[:, heads], k[:, heads], v[:, heads], L)
        for backend, values in ((SDPBackend.CUDNN_ATTENTION, v), (SDPBackend.FLASH_ATTENTION, F.pad(v, (0, ROTATED)))):
            try:
                got = attend(q, k, values, backend)[:, heads]
                error = ((got.float() - want).norm() / want.norm()).item()
                if not error < 0.02: row[backend.name + "_wrong"] = f"{error:.4f}"
                else: row[backend.name] = timed([lambda: attend(q, k, values, backend)])
            except Exception as ex: row[backend.name + "_err"] = repr(ex)[:160]
        row["attend"] = min((row[b.name] for b in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if b.name in row), default=None)
        if row["attend"]: row["together"] = row["expand"] + row["attend"]
        res["rows"].append(row)
        print(row, flush=True)
        json.dump(res, open(out, "w"), indent=1)

if __name__ == "__main__":
    main(sys.argv[1])
