"""What stands between the operators of a block: residual, norm and modulation, as one.

    x' = x + gate * branch        h = norm(x') * (1 + scale) + shift

with a layer norm without weights, in float32. In plain PyTorch that is several passes over the
tokens, and torch.compile still reads rows of DiT-XL/2's 1152 channels twice; the Triton kernels
here read and write everything once, forward and backward.
"""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

Addend = tuple[torch.Tensor, torch.Tensor]  # what an operator gave [B,T,D], and its gate [B,D]

EPS = 1e-6
# Rows that a program of the backward pass sums over: few enough that there are programs for the
# whole GPU, no more than that the sums of the programs cost little to add.
PROGRAMS, LEAST_ROWS, MOST_ROWS = 256, 2, 64
TOLERANCE = 2e-2  # of the check at load, by the norm; bf16 in, bf16 out


class Modulated(nn.Module):
    """What holds operators between norms and modulations of `width` channels.

    `path` names what computes these: "torch" or "triton" (accelerators.py chooses).
    """

    def __init__(self, width: int):
        super().__init__()
        self.width, self.path = width, "torch"


def add(x: torch.Tensor, addend: Addend) -> torch.Tensor:
    """x + gate * branch"""
    branch, gate = addend
    return x + gate.unsqueeze(1) * branch


def norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Adaptive layer norm's affine part: x [B,T,D], shift and scale [B,D] -> [B,T,D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def add_norm_modulate(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    gate: torch.Tensor | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    path: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x' and h of the module's docstring.

    Args:
        x: tokens [B,T,D]; float32 comes out on the path "triton".
        branch, gate: what an operator gave [B,T,D] and its gate [B,D]; None: x' is x.
        shift, scale: [B,D].
        path: "torch", or "triton" on CUDA, where h has the type of `shift`, which is autocast's.

    x, or x and branch, may have fewer samples, which then stand for those after them too; x' has as
    many as the larger of both. Gradients are for equal numbers alone.
    """
    _check_fits(len(x), len(x if branch is None else branch), len(shift))
    if path == "triton":
        x = x.float()
        if branch is None:
            return x, fused_norm_modulate(x, shift, scale)[0]
        return fused_add_norm_modulate(x, branch, gate, shift, scale)[:2]
    if branch is not None:
        x = add(_repeated(x, len(branch)), (branch, gate))
    return x, modulate(norm(_repeated(x, len(shift))), shift, scale)


def _repeated(x: torch.Tensor, samples: int) -> torch.Tensor:
    return x if len(x) == samples else x.repeat(samples // len(x), 1, 1)


def _check_fits(*counts: int) -> None:
    """Of samples, each a multiple of those before it."""
    if any(more % few for few, more in pairwise(counts)):
        raise ValueError(f"{' and '.join(map(str, counts))} samples do not go together")


def refusal(width: int, device: torch.device, dtype: torch.dtype) -> str:
    """Why the path "triton" cannot serve blocks of `width` channels here, or "" when it can."""
    if device.type != "cuda":
        return f"is for CUDA, not {device.type.upper()}"
    if dtype == torch.float32:
        return "is for bf16"
    try:
        _kernels()
        error = _disagreement(width, device, dtype)
    except Exception as failure:  # a kernel fails in its own ways; any of them rules it out
        return f"does not run here: {type(failure).__name__}: {failure}".splitlines()[0]
    return "" if error <= TOLERANCE else f"disagrees by {error:.0e}"


def _disagreement(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """How far results and gradients are from float32 PyTorch's, at most, over their norms."""
    worst = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        B, T = 2, 3 * MOST_ROWS + 1  # rows that do not fill the last program
        given = [draw(B, T, width), draw(B, T, width), *(draw(B, width) for _ in range(3))]
        weights = draw(2, B, T, width)
        for held in (slice(None), (0, 3, 4)):
            found = []
            for path in ("torch", "triton"):
                lower = torch.float32 if path == "torch" else dtype
                inputs = [t.to(dtype).to(lower) if i else t.clone() for i, t in enumerate(given)]
                inputs = [t.requires_grad_() for t in inputs]
                used = inputs if held == slice(None) else [inputs[i] for i in held]
                branch = inputs[1:3] if len(used) == 5 else (None, None)
                results = add_norm_modulate(inputs[0], *branch, *inputs[3:], path)
                loss = sum((r.float() * w).sum() for r, w in zip(results, weights, strict=True))
                gradients = torch.autograd.grad(loss, used)
                found.append([t.detach().float() for t in (*results, *gradients)])
            for exact, mine in zip(*found, strict=True):
                gap = ((mine - exact).norm() / exact.norm()).nan_to_num(torch.inf).item()
                worst = max(worst, gap)
    return worst


# The kernels as operations of our own: opaque to torch.compile, and with their gradients.


@torch.library.custom_op("grafts::add_norm_modulate", mutates_args=())
def fused_add_norm_modulate(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_norm_modulate` -> x' of the type of x, h of that of shift, and for the backward pass
    float32 [B,T,2], of every row of h the mean and the reciprocal deviation before the norm."""
    x, branch = x.contiguous(), branch.contiguous()
    total = _empty_total(x, branch)
    return total, *_launch_forward(x, branch, gate, shift, scale, total)


@torch.library.custom_op("grafts::norm_modulate", mutates_args=())
def fused_norm_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h of x itself, of the type of shift; and [B,T,2] as above."""
    return _launch_forward(x.contiguous(), None, None, shift, scale, None)


@torch.library.custom_op("grafts::add_norm_modulate_backward", mutates_args=())
def _add_norm_modulate_backward(
    total: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    stats: torch.Tensor,
    grad_total: torch.Tensor,
    grad_h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of x and branch, and [3, B, D] those of gate, shift and scale."""
    dx, dbranch = torch.empty_like(total), torch.empty_like(branch)
    sums = _launch_backward(total, branch, gate, scale, stats, grad_total, grad_h, dx, dbranch)
    return dx, dbranch, sums


@torch.library.custom_op("grafts::norm_modulate_backward", mutates_args=())
def _norm_modulate_backward(
    x: torch.Tensor, scale: torch.Tensor, stats: torch.Tensor, grad_h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradient of x, and [2, B, D] those of shift and scale."""
    dx = torch.empty_like(x)
    return dx, _launch_backward(x, None, None, scale, stats, None, grad_h, dx, None)[1:].clone()


def _empty_total(x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return x.new_empty((max(len(x), len(branch)), *x.shape[1:]))


def _empty_results(x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for h and for the mean and reciprocal deviation of every row."""
    h = x.new_empty((len(shift), *x.shape[1:]), dtype=shift.dtype)
    return h, x.new_empty((*h.shape[:2], 2), dtype=torch.float32)


@fused_add_norm_modulate.register_fake
def _(x, branch, gate, shift, scale):
    return _empty_total(x, branch), *_empty_results(x, shift)


@fused_norm_modulate.register_fake
def _(x, shift, scale):
    return _empty_results(x, shift)


@_add_norm_modulate_backward.register_fake
def _(total, branch, gate, scale, stats, grad_total, grad_h):
    sums = total.new_empty((3, *gate.shape), dtype=torch.float32)
    return torch.empty_like(total), torch.empty_like(branch), sums


@_norm_modulate_backward.register_fake
def _(x, scale, stats, grad_h):
    return torch.empty_like(x), x.new_empty((2, *scale.shape), dtype=torch.float32)


def _keep_all(ctx, inputs, output):
    x, branch, gate, shift, scale = inputs
    _check_samples(x, branch, shift)
    total, _, stats = output
    ctx.save_for_backward(total, branch.contiguous(), gate, scale, stats)
    ctx.shift = shift.dtype


def _check_samples(*tensors: torch.Tensor) -> None:
    if len({len(t) for t in tensors}) > 1:
        raise RuntimeError("tokens that stand for several samples have no gradient")


def _backward_all(ctx, grad_total, grad_h, _):
    total, branch, gate, scale, stats = ctx.saved_tensors
    grads = grad_total.contiguous(), grad_h.contiguous()
    dx, dbranch, sums = _add_norm_modulate_backward(total, branch, gate, scale, stats, *grads)
    return dx, dbranch, sums[0].to(gate.dtype), sums[1].to(ctx.shift), sums[2].to(scale.dtype)


def _keep_norm(ctx, inputs, output):
    x, shift, scale = inputs
    _check_samples(x, shift)
    ctx.save_for_backward(x.contiguous(), scale, output[1])
    ctx.shift = shift.dtype


def _backward_norm(ctx, grad_h, _):
    x, scale, stats = ctx.saved_tensors
    dx, sums = _norm_modulate_backward(x, scale, stats, grad_h.contiguous())
    return dx, sums[0].to(ctx.shift), sums[1].to(scale.dtype)


fused_add_norm_modulate.register_autograd(_backward_all, setup_context=_keep_all)
fused_norm_modulate.register_autograd(_backward_norm, setup_context=_keep_norm)


def _launch_forward(x, branch, gate, shift, scale, total) -> tuple[torch.Tensor, torch.Tensor]:
    import triton

    forward, _ = _kernels()
    B, T, D = x.shape
    h, stats = _empty_results(x, shift)
    # what is not there is not read, but needs an address
    given = (x if branch is None else branch, shift if gate is None else gate)
    forward[(len(shift) * T,)](
        x, *given, shift, scale, h if total is None else total, h, stats,
        T, D, B, len(given[0]), B if total is None else len(total),
        given[1].stride(0), shift.stride(0), scale.stride(0), EPS,
        BRANCH=branch is not None, BLOCK=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
    return h, stats


def _launch_backward(
    total, branch, gate, scale, stats, grad_total, grad_h, dx, dbranch
) -> torch.Tensor:
    import triton

    _, backward = _kernels()
    B, T, D = total.shape
    rows = max(LEAST_ROWS, min(MOST_ROWS, triton.next_power_of_2(B * T // PROGRAMS)))
    parts = triton.cdiv(T, rows)
    sums = total.new_empty((3, B, parts, D), dtype=torch.float32)
    given = (total if branch is None else branch, scale if gate is None else gate)
    backward[(B, parts)](
        total, *given, scale, stats, total if grad_total is None else grad_total, grad_h,
        dx, dx if dbranch is None else dbranch, sums,
        T, D, given[1].stride(0), scale.stride(0), B * parts * D,
        BRANCH=branch is not None, ROWS=rows, BLOCK=triton.next_power_of_2(D), num_warps=8,
    )  # fmt: skip
    return sums.sum(2)


@cache
def _kernels():
    """The forward and the backward kernel; imports Triton, which PyTorch's CUDA builds bring."""
    import triton
    import triton.language as tl

    @triton.jit
    def forward(
        x, branch, gate, shift, scale, total, h, stats,
        T, D, samples, branches, totals, gate_stride, shift_stride, scale_stride, eps,
        BRANCH: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        sample = row // T
        column = tl.arange(0, BLOCK)
        inside = column < D
        of_x = row % (samples * T)
        y = tl.load(x + of_x * D + column, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            of_branch = row % (branches * T)
            b = tl.load(branch + of_branch * D + column, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(gate + sample % branches * gate_stride + column, mask=inside, other=0.0)
            y += g.to(tl.float32) * b
            of_total = row % (totals * T)  # if others write there too, the same
            tl.store(total + of_total * D + column, y, mask=inside)
        mean = tl.sum(y, 0) / D
        centred = tl.where(inside, y - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        a = tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(shift + sample * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
        out = centred * rstd * (1.0 + a) + s
        tl.store(h + row * D + column, out.to(h.dtype.element_ty), mask=inside)
        tl.store(stats + 2 * row, mean)
        tl.store(stats + 2 * row + 1, rstd)

    @triton.jit
    def backward(
        total, branch, gate, scale, stats, grad_total, grad_h, dx, dbranch, sums,
        T, D, gate_stride, scale_stride, sums_stride,
        BRANCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        column = tl.arange(0, BLOCK)
        inside = column < D
        a = tl.load(scale + sample * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros((BLOCK,), tl.float32)
        dshift = tl.zeros((BLOCK,), tl.float32)
        dscale = tl.zeros((BLOCK,), tl.float32)
        row = sample * T + part * ROWS
        held = inside & (part * ROWS < T)
        at = row * D + column
        y = tl.load(total + at, mask=held, other=0.0)
        dh = tl.load(grad_h + at, mask=held, other=0.0)
        if BRANCH:
            dtotal = tl.load(grad_total + at, mask=held, other=0.0)
            b = tl.load(branch + at, mask=held, other=0.0)
        for i in range(ROWS):
            # the next row is on its way while this one is summed
            next_held = inside & (i + 1 < ROWS) & (part * ROWS + i + 1 < T)
            next_at = at + D
            next_y = tl.load(total + next_at, mask=next_held, other=0.0)
            next_dh = tl.load(grad_h + next_at, mask=next_held, other=0.0)
            if BRANCH:
                next_dtotal = tl.load(grad_total + next_at, mask=next_held, other=0.0)
                next_b = tl.load(branch + next_at, mask=next_held, other=0.0)
            there = part * ROWS + i < T
            mean = tl.load(stats + 2 * (row + i), mask=there, other=0.0)
            rstd = tl.load(stats + 2 * (row + i) + 1, mask=there, other=0.0)
            normed = tl.where(held, y.to(tl.float32) - mean, 0.0) * rstd
            dshift += dh.to(tl.float32)
            dscale += dh.to(tl.float32) * normed
            dn = dh.to(tl.float32) * (1.0 + a)
            first, second = tl.split(tl.sum(tl.join(dn, dn * normed), 0))  # in one round
            grad = rstd * (dn - first / D - normed * (second / D))
            if BRANCH:
                grad += dtotal.to(tl.float32)
                dgate += tl.where(held, grad * b.to(tl.float32), 0.0)
                tl.store(dbranch + at, (grad * g).to(dbranch.dtype.element_ty), mask=held)
                dtotal, b = next_dtotal, next_b
            tl.store(dx + at, grad, mask=held)
            y, dh, held, at = next_y, next_dh, next_held, next_at
        at = (sample * tl.num_programs(1) + part) * D + column
        tl.store(sums + at, dgate, mask=inside)
        tl.store(sums + sums_stride + at, dshift, mask=inside)
        tl.store(sums + 2 * sums_stride + at, dscale, mask=inside)

    return forward, backward
