"""RMS norm of a gated tensor in Triton, as Mamba-2 has it between its scan and its last projection.

A row is read once and written once in each direction; Inductor reads it two or three times.
"""

from functools import cache
from itertools import pairwise

import torch

PROGRAMS = 1056  # of the backward pass, at most: 8 on each of an H200's processors


def fused_gated_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """y SiLU(z) over its root mean square, times weight, on CUDA; sums are in float32.

    Args:
        y, z: [..., C] of one type; weight: [C].

    Returns:
        [..., C], of the type of y.
    """
    return _norm(y, z, weight, eps)[0]


@torch.library.custom_op("grafts::gated_norm", mutates_args=())
def _norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> [..., C], and float32 [...] the reciprocal root mean squares"""
    import triton

    forward, _ = _kernels()
    y, (z, stride) = y.contiguous(), _rows(z)
    out, scales = _empty_results(y)
    width = y.shape[-1]
    forward[(scales.numel(),)](
        y, z, weight, out, scales, width, stride, eps,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out, scales


@torch.library.custom_op("grafts::gated_norm_backward", mutates_args=())
def _norm_backward(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of y and z, and float32 [C] of the weight"""
    import triton

    _, backward = _kernels()
    y, (z, stride), grad = y.contiguous(), _rows(z), grad.contiguous()
    rows, width = scales.numel(), y.shape[-1]
    each = triton.cdiv(rows, PROGRAMS)
    parts = triton.cdiv(rows, each)
    dy, dz = y.new_empty(y.shape), y.new_empty(y.shape)
    sums = y.new_empty((parts, width), dtype=torch.float32)
    backward[(parts,)](
        y, z, weight, scales, grad, dy, dz, sums, rows, width, stride, each,
        BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return dy, dz, sums.sum(0)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same as rows at one distance, and that distance in elements."""
    *outer, width = x.shape
    steps = [(n, step) for n, step in zip(outer, x.stride()[:-1], strict=True) if n > 1]
    even = all(a == b * n for (_, a), (n, b) in pairwise(steps))
    if not steps or x.stride(-1) != 1 or not even:
        return x.contiguous(), width
    return x, steps[-1][1]


def _empty_results(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[:-1], dtype=torch.float32)


@_norm.register_fake
def _(y, z, weight, eps):
    return _empty_results(y)


@_norm_backward.register_fake
def _(y, z, weight, scales, grad):
    dy, dz = y.new_empty(y.shape), y.new_empty(y.shape)
    return dy, dz, y.new_empty(y.shape[-1:], dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])


def _backward(ctx, grad, _):
    y, z, weight, scales = ctx.saved_tensors
    dy, dz, dweight = _norm_backward(y, z, weight, scales, grad)
    return dy, dz, dweight.to(weight.dtype), None


_norm.register_autograd(_backward, setup_context=_keep)


@cache
def _kernels():
    """The forward and the backward kernel; imports Triton, which PyTorch's CUDA builds bring."""
    import triton
    import triton.language as tl

    @triton.jit
    def forward(y, z, weight, out, scales, width, z_stride, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        a = tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        a *= gate * tl.sigmoid(gate)
        scale = 1.0 / tl.sqrt(tl.sum(a * a, 0) / width + eps)
        tl.store(out + row * width + column, (a * scale * w).to(out.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)

    @triton.jit(do_not_specialize=["rows", "each"])
    def backward(
        y, z, weight, scales, grad, dy, dz, sums, rows, width, z_stride, each,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        part = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK,), tl.float32)
        row = part.to(tl.int64) * each
        for _ in range(each):
            held = inside & (row < rows)
            at = row * width + column
            a = tl.load(y + at, mask=held, other=0.0).to(tl.float32)
            gate = tl.load(z + row * z_stride + column, mask=held, other=0.0).to(tl.float32)
            g = tl.load(grad + at, mask=held, other=0.0).to(tl.float32)
            scale = tl.load(scales + row, mask=row < rows, other=0.0)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            normed = a * silu * scale
            dweight += g * normed
            g *= w
            d = scale * (g - normed * (tl.sum(g * normed, 0) / width))
            tl.store(dy + at, (d * silu).to(dy.dtype.element_ty), mask=held)
            d *= a * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            tl.store(dz + at, d.to(dz.dtype.element_ty), mask=held)
            row += 1
        tl.store(sums + part * width + column, dweight, mask=inside)

    return forward, backward
