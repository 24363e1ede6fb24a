"""FlashInfer's latent attention (MLA, absorbed) on one GPU, checked against a float32 reference before being timed.

usage: python latent_attention_peers.py out.json     (FlashInfer 0.6.x, PyTorch, one Hopper GPU)
B requests, prefix L each, N rows behind it, H query heads; bf16, a slot of 512 + 64 elements for all heads, shuffled pages.
FlashInfer has no tree mask for latents. What it is timed with is a chain of N rows (causal): the same slots, rows and heads,
so the same bytes and all but the same products as treespark's tree of N nodes.
A row's times are medians, in us per call, taken as tree_attention_peers.py takes them:
  fi_mla_BACKEND_pP   backend fa3 or fa2, pages of P slots: 16 (treespark's), 64, and 1
  floor               bytes of latents, q and out over the bandwidth of a device copy measured in this run
"""
import json, math, sys
import torch
from tree_attention_peers import dev, timed

LATENT, ROTATED = 512, 64
SCALE = 1 / math.sqrt(128 + ROTATED)  # of a head's key before absorption, as DeepSeek has it
PAGES = (16, 64, 1)
GRID = [(16, 32, 8192, N) for N in (1, 4, 16)] + [(16, 8, 8192, 4), (16, 1, 1024, 4)]
GRID += [(16, 1, 4096, N) for N in (1, 4, 8, 16)] + [(16, 1, 65536, N) for N in (1, 4)] + [(128, 8, 8192, N) for N in (1, 2)]

def normal(*shape):
    return torch.randn(*shape, device=dev, dtype=torch.bfloat16)

def indptr(n, step):
    return torch.arange(0, n + 1, device=dev, dtype=torch.int32) * step

def reference(q, kv, L):
    """q [N, H, 576] and kv [L + N, 576] of one request: out [N, H, 512]; row i sees the prefix and rows up to itself."""
    N, S = q.shape[0], kv.shape[0]
    sees = torch.ones(N, S, dtype=torch.bool, device=dev).tril(L)
    scores = torch.einsum("nhd,sd->hns", q.float(), kv.float()) * SCALE
    weights = torch.softmax(scores.masked_fill(~sees, -math.inf), -1)
    return torch.einsum("hns,sd->nhd", weights, kv[:, :LATENT].float())

def measure(wrapper, q, caches, P, B, L, N, H):
    """us of one call, or how wrong the first one is."""
    S = L + N; pages = -(-S // P)
    order = torch.randperm(B * pages, device=dev).to(torch.int32)
    paged = [c[:B * pages * P].view(B * pages, P, LATENT + ROTATED) for c in caches]
    lengths = torch.full((B,), S, device=dev, dtype=torch.int32)
    wrapper.plan(indptr(B, N), indptr(B, pages), order, lengths, H, LATENT, ROTATED, P, causal=True, sm_scale=SCALE,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    def call(i):
        nope, rope = q[i]
        return wrapper.run(nope, rope, paged[i][..., :LATENT], paged[i][..., LATENT:])
    want = reference(torch.cat([part[:N] for part in q[0]], -1), paged[0][order[:pages].long()].flatten(0, 1)[:S], L)
    error = ((call(0)[:N].float() - want).norm() / want.norm()).item()
    if not error < 0.02: return None, error  # not a number, either
    return timed([lambda i=i: call(i) for i in range(len(caches))]), error

def main(out):
    import flashinfer
    x = torch.empty(1 << 30, dtype=torch.uint8, device=dev); y = torch.empty_like(x)
    bw = 2 * (1 << 30) / timed([lambda: y.copy_(x)], 10) / 1e6
    del x, y
    res = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, flashinfer=flashinfer.__version__, copy_TBps=bw,
               rows=[])
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=dev)
    wrappers = {}
    for backend in ("fa3", "fa2"):
        try:  # compiled once, here, with the very arguments that `plan` has
            flashinfer.mla.get_batch_mla_module(backend, *[torch.bfloat16] * 3, torch.int32, LATENT, ROTATED, False)
            wrappers[backend] = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
        except Exception as ex: res[backend + "_err"] = repr(ex)[-2000:]
    print({k: v for k, v in res.items() if k != "rows"}, flush=True)
    for H, B, L, N in GRID:
        row = dict(mla=H, B=B, L=L, N=N)
        bytes_ = B * (L + N) * (LATENT + ROTATED) * 2
        row["floor"] = (bytes_ + 2 * B * N * H * (LATENT + ROTATED + LATENT)) / (bw * 1e6)
        sets = min(64, int(200e6 // bytes_) + 1)  # together past L2
        slots = B * max(-(-(L + N) // P) * P for P in PAGES)
        caches = [normal(slots, LATENT + ROTATED) for _ in range(sets)]
        q = [(normal(B * N, H, LATENT), normal(B * N, H, ROTATED)) for _ in range(sets)]
        for backend, wrapper in wrappers.items():
            for P in PAGES:
                name = f"fi_mla_{backend}_p{P}"
                try:
                    us, error = measure(wrapper, q, caches, P, B, L, N, H)
                    row.update({name: us} if us else {name + "_wrong": f"{error:.4f}"})
                except Exception as ex: row[name + "_err"] = repr(ex)[:160]
        res["rows"].append(row); json.dump(res, open(out, "w"))
        print(json.dumps({k: (round(v, 2) if isinstance(v, float) else v) for k, v in row.items()}), flush=True)
        del caches, q; torch.cuda.empty_cache()

if __name__ == "__main__":
    main(sys.argv[1])
