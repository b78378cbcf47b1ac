"""AdamW and the averages of its weights in one pass: a Triton kernel for CUDA.

PyTorch's two passes read and write eleven tensors of the model's size, among them the gradients,
which its AdamW writes back clipped; this one reads weights, gradients, both moments and averages
and writes all but the gradients: nine. The state is torch.optim.AdamW's own. Of weights with a
working copy (training/working.py) it reads that copy's gradient, and writes the copy too.

Where the tensors lie, the kernel reads from a table on the device. Gradients lie elsewhere at
every eager step, and in a CUDA graph where the capture found them. Their addresses reach the table
as arguments of launches (which is how torch._foreach_add_ passes numbers), not in a copy from the
host: nothing waits, and a graph holds them itself.
"""

import math
from collections.abc import Mapping
from functools import cache

import torch
import torch.distributed as dist

from training.ema import Ema

BLOCK, WARPS = 2048, 8  # numbers that a program updates, and its warps
ROW = 8  # of the table: weight, two moments, average, gradient, size, first program, copy or 0
GRADIENT, SIZE, FIRST, COPY = 4, 5, 6, 7
WIDTH = 4  # numbers that a thread loads at once, where all sizes and addresses are multiples
TOLERANCE = 2e-6  # of the check at first use, by the norm; float32


class FusedStep:
    """Steps of an AdamW whose weights, and no others, an `Ema` averages.

    copies: the working copies of weights, bf16, whose gradients are theirs.
    """

    def __init__(self, optimizer: torch.optim.AdamW, ema: Ema) -> None:
        self.optimizer, self.ema = optimizer, ema
        self.copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] = {}
        self.tables: list[_Table | None] = [None] * len(optimizer.param_groups)

    @torch.no_grad()
    def __call__(self, rates: list[torch.Tensor], scale: torch.Tensor, bad: torch.Tensor) -> None:
        """A step, and one of the averages; of the averages alone where the gradient is `bad`.

        Args:
            rates: the groups' learning rates. scale: what gradients are divided by. bad: 1 to leave
                the step out, else 0. All 0-d float32, on the device.
        """
        rest = set(self.ema.parameters)
        for i, group in enumerate(self.optimizer.param_groups):
            held = [p for p in group["params"] if self._gradient(p) is not None]
            rest.difference_update(held)
            if held:
                self._step(i, held, rates[i], scale, bad)
        if rest:
            self.ema.update([p for p in self.ema.parameters if p in rest])

    def _gradient(self, weight: torch.nn.Parameter) -> torch.Tensor | None:
        return self.copies.get(weight, weight).grad

    def _state(self, weight: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """A weight's moments and its number of steps; as AdamW begins them, where it has none."""
        state = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        return state

    def _step(
        self,
        i: int,
        weights: list[torch.nn.Parameter],
        rate: torch.Tensor,
        scale: torch.Tensor,
        bad: torch.Tensor,
    ) -> None:
        group, states = self.optimizer.param_groups[i], [self._state(p) for p in weights]
        beta1, beta2 = group["betas"]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, [1 - bad] * len(steps))  # alone it would be read as a number
        taken = torch.stack(steps).double()
        corrections = torch.stack([1 - beta1**taken, (1 - beta2**taken).sqrt()], 1).float()
        moved = [weights, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]]
        moved.append([self.ema.average_of[p] for p in weights])
        copies = [self.copies.get(p) for p in weights]
        moved.append(copies)
        places = [
            [0 if t is None else t.data_ptr() for t in tensors]
            for tensors in zip(*moved, strict=True)
        ]
        table = self.tables[i]
        if table is None or table.places != places:  # in a capture this fails: a copy from the host
            table = self.tables[i] = _Table(places, weights)
        gradients = [self._gradient(p).contiguous() for p in weights]
        wide = table.set_gradients([g.data_ptr() for g in gradients])
        _kernel()[(len(table.owner),)](
            table.rows, table.owner, corrections, rate, scale, bad,
            beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], group["weight_decay"],
            1.0 - self.ema.decay, WIDE=wide, ROW=ROW, GRADIENT=GRADIENT, SIZE=SIZE, FIRST=FIRST,
            COPY=COPY, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        changed = [t for tensors in moved for t in tensors if t is not None]
        torch.autograd.graph.increment_version(changed)


class _Table:
    """Where a group's tensors lie, on the device.

    Args:
        places: addresses of each weight, its moments, its average and its working copy, or 0.
    """

    def __init__(self, places: list[list[int]], weights: list[torch.nn.Parameter]) -> None:
        device = weights[0].device
        sizes = torch.tensor([p.numel() for p in weights])
        programs = (sizes + BLOCK - 1) // BLOCK
        rows = torch.zeros(len(weights), ROW, dtype=torch.int64)
        rows[:, [*range(GRADIENT), COPY]] = torch.tensor(places)
        rows[:, SIZE] = sizes
        rows[:, FIRST] = programs.cumsum(0) - programs
        self.places = places
        self.number_bytes = [2 if copy else 4 for *_, copy in places]  # of the gradients
        self.wide = all(p.numel() % WIDTH == 0 for p in weights)
        for *own, copy in places:
            self.wide &= all(place % (4 * WIDTH) == 0 for place in own) and copy % (2 * WIDTH) == 0
        self.rows = rows.to(device)
        self.owner = torch.arange(len(weights)).repeat_interleave(programs).int().to(device)
        self.gradients = self.rows[:, GRADIENT]
        self.each_gradient = self.gradients.unbind()

    def set_gradients(self, addresses: list[int]) -> bool:
        """Enters these -> whether every tensor can be read in wide loads."""
        self.gradients.zero_()
        torch._foreach_add_(self.each_gradient, addresses)
        given = zip(addresses, self.number_bytes, strict=True)
        return self.wide and all(address % (size * WIDTH) == 0 for address, size in given)


def refusal(optimizer: torch.optim.AdamW, ema: Ema) -> str:
    """Why the kernel cannot take the steps of these, or "" when it can."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    device = weights[0].device
    if device.type != "cuda":
        return f"is for CUDA, not {device.type.upper()}"
    if set(weights) != set(ema.parameters):
        return "needs averages of all trained weights and of no others"
    if not all(p.dtype == torch.float32 and p.is_contiguous() for p in weights):
        return "is for contiguous float32 weights"
    reason = _refusal_on(device)
    if dist.is_initialized():  # processes that went different ways would drift apart
        reasons = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        reason = max(reasons)
    return reason


@cache
def _refusal_on(device: torch.device) -> str:
    try:
        error = _disagreement(device)
    except Exception as failure:  # a kernel fails in its own ways; any of them rules it out
        return f"does not run here: {type(failure).__name__}: {failure}".splitlines()[0]
    return "" if error <= TOLERANCE else f"disagrees by {error:.0e}"


def _disagreement(device: torch.device) -> float:
    """How far weights, averages and moments end from float64 PyTorch's, over their norms.

    Not from float32 PyTorch's: on CUDA that takes 1 - beta2 of a beta2 in float32, which is 1.3e-5
    off. Odd and even sizes, in groups with settings of their own, some with working copies;
    gradients that are clipped, not finite, at odd addresses, and missing.
    """
    ends = []
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator(device).manual_seed(0)

        def draw(count: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(count, device=device, generator=generator)

        sizes = (1, 8, BLOCK - 1, BLOCK, 2 * BLOCK + 3, 3 * BLOCK + 12)  # odd in one group
        model = torch.nn.ParameterList(torch.nn.Parameter(draw(n).to(dtype)) for n in sizes)
        settings = {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.0}
        groups = [{"params": list(model)[i::2], **settings[i]} for i in range(2)]
        optimizer, ema = torch.optim.AdamW(groups, foreach=False), Ema(model, 0.9)
        rates = [torch.full((), group["lr"], device=device) for group in groups]
        step = FusedStep(optimizer, ema)
        copied = [i in (1, 4, 5) for i in range(len(sizes))]
        if dtype == torch.float32:
            step.copies = {
                p: torch.nn.Parameter(torch.empty_like(p, dtype=torch.bfloat16))
                for p, has in zip(model, copied, strict=True)
                if has
            }
        for number, divisor in enumerate((1.0, 3.0, torch.nan, 2.0, 1.0)):
            scale = torch.full((), divisor, device=device)
            bad = (~scale.isfinite()).float()
            for i, (p, has) in enumerate(zip(model, copied, strict=True)):
                odd = number == 3
                grad = draw(p.numel() + odd).mul_(scale)
                grad = (grad.bfloat16() if has else grad)[odd:]
                missing = number == 4 and i == 3
                leaf = step.copies.get(p, p)
                leaf.grad = None if missing else grad.to(leaf.dtype)
            if dtype == torch.float32:
                step(rates, scale, bad)
                continue
            if not math.isnan(divisor):
                for p in model:
                    p.grad = None if p.grad is None else p.grad / divisor
                optimizer.step()
            ema.update()
        rounding = 2**-8 if device.type == "cuda" else 2**-7  # Triton's interpreter cuts off
        for p, copy in step.copies.items():
            if ((copy.float() - p).abs() > rounding * p.abs()).any():
                return math.inf
        moments = [[optimizer.state[p][k] for p in model] for k in ("exp_avg", "exp_avg_sq")]
        kinds = (model, ema.averages, *moments)
        ends.append([torch.cat([t.detach().flatten() for t in kind]) for kind in kinds])
    gaps = [(mine - exact).norm() / exact.norm() for exact, mine in zip(*ends, strict=True)]
    return torch.stack(gaps).nan_to_num(torch.inf).max().item()


@cache
def _kernel():
    """The kernel; imports Triton, which PyTorch's CUDA builds bring."""
    import triton
    import triton.language as tl

    @triton.jit
    def adamw_and_average(
        rows, owner, corrections, rate, scale, bad,
        beta1, rest1, beta2, rest2, eps, weight_decay, pull,
        WIDE: tl.constexpr, ROW: tl.constexpr, GRADIENT: tl.constexpr, SIZE: tl.constexpr,
        FIRST: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        tensor = tl.load(owner + program)
        row = rows + tensor * ROW
        start = (program - tl.load(row + FIRST)) * BLOCK  # in 64 bits, as the table is
        left = tl.minimum(tl.load(row + SIZE) - start, BLOCK).to(tl.int32)
        weight = tl.load(row).to(tl.pointer_type(tl.float32))
        moment = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        square = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        average = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        gradient = tl.load(row + GRADIENT)
        copied = tl.load(row + COPY)
        copy = copied.to(tl.pointer_type(tl.bfloat16))
        if WIDE:
            left = tl.multiple_of(left, 4)
            weight = tl.multiple_of(weight, 16)
            moment = tl.multiple_of(moment, 16)
            square = tl.multiple_of(square, 16)
            average = tl.multiple_of(average, 16)
            gradient = tl.multiple_of(gradient, 8)
            copy = tl.multiple_of(copy, 8)
        at = tl.arange(0, BLOCK)
        inside = at < left
        p = tl.load(weight + start + at, mask=inside)
        m = tl.load(moment + start + at, mask=inside)
        v = tl.load(square + start + at, mask=inside)
        a = tl.load(average + start + at, mask=inside)
        if copied != 0:
            low = gradient.to(tl.pointer_type(tl.bfloat16))
            g = tl.load(low + start + at, mask=inside).to(tl.float32)
        else:
            full = gradient.to(tl.pointer_type(tl.float32))
            if WIDE:
                full = tl.multiple_of(full, 16)
            g = tl.load(full + start + at, mask=inside)
        g *= 1.0 / tl.load(scale)
        lr = tl.load(rate)
        step = lr / tl.load(corrections + 2 * tensor)
        root = 1.0 / tl.load(corrections + 2 * tensor + 1)
        good = tl.load(bad) == 0.0
        new_m = beta1 * m + rest1 * g
        new_v = beta2 * v + rest2 * g * g
        new_p = p - (lr * weight_decay) * p - step * new_m / (tl.sqrt(new_v) * root + eps)
        p = tl.where(good, new_p, p)
        tl.store(weight + start + at, p, mask=inside)
        if copied != 0:
            tl.store(copy + start + at, p.to(tl.bfloat16), mask=inside)
        tl.store(moment + start + at, tl.where(good, new_m, m), mask=inside)
        tl.store(square + start + at, tl.where(good, new_v, v), mask=inside)
        # as torch.lerp, which is exact at both ends
        a = tl.where(pull < 0.5, a + pull * (p - a), p - (1.0 - pull) * (p - a))
        tl.store(average + start + at, a, mask=inside)

    return adamw_and_average
