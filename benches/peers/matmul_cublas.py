"""cuBLAS, through PyTorch, on the products that `treespark-bench matmul` measures.

usage: python matmul_cublas.py out.json     (PyTorch, one NVIDIA GPU)
out[m, n] = x[m, k] @ weight[n, k].T, all bf16, into an output that is there. A time is a median, in us a call: calls take
turns on copies of the weight, 200 MB of them or more, inside one CUDA graph, whose time is divided by its calls. The product
alone is timed: no norm, no residual, no activation. Checked against float32 first.
"""
import json, statistics, sys
import torch

MODELS = {  # hidden, ffn, heads, kv heads, head dim, vocabulary
    "qwen3-8b": (4096, 12288, 32, 8, 128, 151936),
    "smollm2-135m": (576, 1536, 9, 3, 64, 49152),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 151936),
    "llama-3.1-8b": (4096, 14336, 32, 8, 128, 128256),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REPEATS = 30


def sizes(hidden, ffn, heads, kv_heads, dim, vocab):
    return {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "o": (hidden, heads * dim),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
        "head": (vocab, hidden),
    }


def timed(call, calls):
    """Median us of call(0), call(1), ... in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(calls):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 / calls for a, b in zip(marks, marks[1:]))


def main(out_path):
    torch.manual_seed(0)
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, cuda=torch.version.cuda, rows=[])
    for model, config in MODELS.items():
        for op, (n, k) in sizes(*config).items():
            copies = 200_000_000 // (2 * n * k) + 1
            weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5 for _ in range(copies)]
            for m in ROWS:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
                torch.matmul(x, weights[0].T, out=out)
                want = x.float() @ weights[0][:64].float().T
                error = ((out[:, :64].float() - want).norm() / want.norm()).item()
                row = dict(model=model, op=op, n=n, k=k, m=m, error=error)
                if error < 0.02:
                    row["us"] = timed(lambda i: torch.matmul(x, weights[i % copies].T, out=out), max(16, copies))
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
            with open(out_path, "w") as file:
                json.dump(result, file)
            del weights
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
