"""GELU by Triton, and in its backward pass the gradient of the bias before it.

That is the sum of the gradients of GELU's input over all tokens. The kernel that makes these holds
them already; PyTorch reads them again.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# Of the backward pass: what a program holds at once, and how often it adds up as much
ROWS, COLUMNS, STEPS = 32, 128, 8


def bias_apart(linear: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's output, and its bias, to which the output's graph then does not lead.

    None for a bias that has no gradient, and where `linear` is more than that, as with an adapter.
    """
    bias = linear.bias if type(linear) is nn.Linear else None
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled():
        return linear(x), None
    return F.linear(x, linear.weight, bias.detach()), bias


def fused_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The tanh form of GELU of a linear layer's output, on CUDA in half precision.

    Args:
        x: [..., N]. bias: [N], that layer's, by `bias_apart`.
    """
    return _gelu(x, bias)


@torch.library.custom_op("grafts::gelu", mutates_args=())
def _gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    forward, _ = _kernels()
    block = 4096
    forward[(-(-x.numel() // block),)](x, y, x.numel(), BLOCK=block, num_warps=8)
    return y


@torch.library.custom_op("grafts::gelu_backward", mutates_args=())
def _gelu_backward(x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of x, and float32 [N] of the bias"""
    x, grad = x.contiguous(), grad.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    parts = -(-rows // (ROWS * STEPS))
    dx = torch.empty_like(x)
    sums = x.new_empty((parts, width), dtype=torch.float32)
    _, backward = _kernels()
    backward[(parts, -(-width // COLUMNS))](
        x, grad, dx, sums, rows, width, ROWS=ROWS, COLUMNS=COLUMNS, STEPS=STEPS, num_warps=8
    )
    return dx, sums.sum(0)


@_gelu.register_fake
def _(x, bias):
    return x.new_empty(x.shape)


@_gelu_backward.register_fake
def _(x, grad):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=torch.float32)


def _keep(ctx, inputs, output):
    x, bias = inputs
    ctx.save_for_backward(x)
    ctx.bias = bias.dtype


def _backward(ctx, grad):
    dx, dbias = _gelu_backward(*ctx.saved_tensors, grad)
    return dx, dbias.to(ctx.bias)


_gelu.register_autograd(_backward, setup_context=_keep)


@cache
def _kernels():
    """The forward and the backward kernel; imports Triton, which PyTorch's CUDA builds bring."""
    import triton
    import triton.language as tl

    # x sigmoid(z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is the tanh form

    @triton.jit
    def gelu(x, y, size, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        out = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def gelu_backward(
        x, grad, dx, sums, rows, width,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(0)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        row = part.to(tl.int64) * ROWS * STEPS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(STEPS):
            at = row[:, None] * width + column[None, :]
            inside = (row[:, None] < rows) & (column[None, :] < width)
            a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
            slope = 1.5957691216057308 * (1.0 + 0.134145 * a * a)
            d = g * s * (1.0 + a * (1.0 - s) * slope)
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
            total += d
            row += ROWS
        tl.store(sums + part * width + column, tl.sum(total, 0), mask=column < width)

    return gelu, gelu_backward
