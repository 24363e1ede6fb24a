"""Settings of the device that every script shares."""

import contextlib

import torch


def prepare(device):
    """Returns the context in which drafters run: bf16 autocast over f32 weights on a GPU, nothing on a CPU."""
    if not str(device).startswith("cuda"):
        return contextlib.nullcontext
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and shapes vary here
    return lambda: torch.autocast("cuda", torch.bfloat16)
