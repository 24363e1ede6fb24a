"""Losses over a large vocabulary, and their gradients, without keeping the logits of more than a few thousand rows.

For a row with logits z, q = softmax(z), true token y, and the teacher's p:

    loss = ce * -log q[y]  +  l1 * sum |q - p|  +  kl * sum p log(p / q)
    dz   = ce * (q - 1[y]) +  l1 * q * (s - sum s q), s = sign(q - p)  +  kl * (q - p)

The gradient is formed where the logits were, while they are at hand, so there is no second forward pass. Products run
in f16 on a GPU: its mantissa is three bits longer than bf16's, and logits and gradients fit its range.
"""

import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = 8192


def head_loss(x, frozen, trained, tokens, weights, mix, teacher=None):
    """Sum over rows of weight * loss, and the terms (CE, L1, KL) of each row [rows, 3], detached.

    x [rows, d] is multiplied with the head [vocabulary, d], of which the first columns are `frozen` and the last are
    `trained`; either may be None. tokens [rows], weights [rows], mix (ce, l1, kl), teacher (hidden [rows, h],
    head [vocabulary, h]) or None where only ce counts. Call it outside autocast.
    """
    return HeadLoss.apply(x, frozen, trained, tokens, weights.float(), mix, teacher)


class HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frozen, trained, tokens, weights, mix, teacher):
        dtype = torch.float16 if x.is_cuda else torch.float32
        parts = [part.detach().to(dtype) for part in (frozen, trained) if part is not None]
        head = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        rows = x.detach().to(dtype)
        terms = torch.empty(len(x), 3, device=x.device)
        dx = torch.empty_like(x)
        dtrained = None if trained is None else torch.zeros(trained.shape, device=x.device)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            z = rows[part] @ head.T
            t = None if teacher is None else teacher[0][part].to(dtype) @ teacher[1].to(dtype).T
            terms[part] = terms_into_gradient(z, t, tokens[part], weights[part], mix)
            dx[part] = (z @ head).to(dx.dtype)
            if trained is not None:
                dtrained += z.T @ rows[part, head.shape[1] - trained.shape[1] :]
        ctx.save_for_backward(dx, dtrained)
        ctx.mark_non_differentiable(terms)
        return (terms @ terms.new_tensor(mix) * weights).sum(), terms

    @staticmethod
    def backward(ctx, grad, _):
        dx, dtrained = ctx.saved_tensors
        return grad * dx, None, None if dtrained is None else grad * dtrained, None, None, None, None


def terms_into_gradient(z, t, tokens, weights, mix):
    """Returns the terms [rows, 3] and replaces z [rows, vocabulary] by weight * dz. t is the teacher's logits."""
    rows = fused if z.is_cuda and kernel_works(z.device) else plain
    return rows(z, t, tokens, weights, mix)


@functools.cache
def kernel_works(device):
    """Tries the kernel once against `plain`, and says which of the two will run."""
    generator = torch.Generator(device).manual_seed(1)
    z, t = (4 * torch.randn(64, 5000, device=device, generator=generator).half() for _ in range(2))
    tokens, weights = torch.arange(64, device=device) * 7, torch.ones(64, device=device)
    try:
        results = []
        for rows in (plain, fused):
            gradient = z.clone()
            results.append((rows(gradient, t, tokens, weights, (0.2, 0.9, 0.3)), gradient))
        for a, b in zip(*results):
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-3)
    except Exception as error:  # whatever the compiler throws, the run goes on
        print(f"losses run in plain torch: the kernel failed with {type(error).__name__}: {str(error)[:300]}", flush=True)
        return False
    print("losses run in the fused kernel", flush=True)
    return True


def plain(z, t, tokens, weights, mix):
    ce, l1, kl = mix
    log_q = torch.log_softmax(z.float(), dim=1)
    q = log_q.exp()
    terms = torch.zeros(len(z), 3, device=z.device)
    terms[:, 0] = -log_q.gather(1, tokens[:, None])[:, 0]
    dz = (ce + kl) * q
    if t is not None:
        log_p = torch.log_softmax(t.float(), dim=1)
        p = log_p.exp()
        sign = (q - p).sign()
        terms[:, 1] = (q - p).abs().sum(1)
        terms[:, 2] = (p * (log_p - log_q)).sum(1)
        dz += l1 * q * (sign - (sign * q).sum(1, keepdim=True)) - kl * p
    dz.scatter_add_(1, tokens[:, None], torch.full_like(dz[:, :1], -ce))
    z.copy_(dz * weights[:, None])
    return terms


def fused(z, t, tokens, weights, mix, block=4096):
    terms = torch.zeros(len(z), 3, device=z.device)
    block = min(block, triton.next_power_of_2(z.shape[1]))
    row_kernel[(len(z),)](
        z, z if t is None else t, tokens, weights, terms, *mix, N=z.shape[1], TEACHER=t is not None, BLOCK=block, num_warps=8
    )
    return terms


if triton is not None:

    @triton.jit
    def row_kernel(z, t, tokens, weights, terms, ce, l1, kl, N: tl.constexpr, TEACHER: tl.constexpr, BLOCK: tl.constexpr):
        """One row a program: sums of exponentials, then the terms, then the gradient over the logits."""
        row = tl.program_id(0).to(tl.int64)
        z += row * N
        t += row * N
        token = tl.load(tokens + row)
        weight = tl.load(weights + row)
        top_z = -float("inf")
        top_t = -float("inf")
        sum_z = 0.0
        sum_t = 0.0
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            a = tl.load(z + at, at < N, other=-float("inf")).to(tl.float32)
            top = tl.maximum(top_z, tl.max(a, 0))
            sum_z = sum_z * tl.exp(top_z - top) + tl.sum(tl.exp(a - top), 0)
            top_z = top
            if TEACHER:
                b = tl.load(t + at, at < N, other=-float("inf")).to(tl.float32)
                top = tl.maximum(top_t, tl.max(b, 0))
                sum_t = sum_t * tl.exp(top_t - top) + tl.sum(tl.exp(b - top), 0)
                top_t = top
        log_z = top_z + tl.log(sum_z)
        tl.store(terms + row * 3, log_z - tl.load(z + token).to(tl.float32))
        log_t = 0.0
        signed = 0.0
        if TEACHER:
            log_t = top_t + tl.log(sum_t)
            distance = 0.0
            divergence = 0.0
            for start in range(0, N, BLOCK):
                at = start + tl.arange(0, BLOCK)
                a = tl.load(z + at, at < N, other=0.0).to(tl.float32) - log_z
                b = tl.load(t + at, at < N, other=0.0).to(tl.float32) - log_t
                q = tl.where(at < N, tl.exp(a), 0.0)
                p = tl.where(at < N, tl.exp(b), 0.0)
                distance += tl.sum(tl.abs(q - p), 0)
                signed += tl.sum(tl.where(q > p, q, tl.where(q < p, -q, 0.0)), 0)
                divergence += tl.sum(p * (b - a), 0)
            tl.store(terms + row * 3 + 1, distance)
            tl.store(terms + row * 3 + 2, divergence)
        for start in range(0, N, BLOCK):
            at = start + tl.arange(0, BLOCK)
            q = tl.exp(tl.load(z + at, at < N, other=-float("inf")).to(tl.float32) - log_z)
            gradient = (ce + kl) * q - tl.where(at == token, ce, 0.0)
            if TEACHER:
                p = tl.exp(tl.load(t + at, at < N, other=-float("inf")).to(tl.float32) - log_t)
                sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
                gradient += l1 * q * (sign - signed) - kl * p
            tl.store(z + at, (weight * gradient).to(z.dtype.element_ty), at < N)
