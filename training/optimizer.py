"""AdamW, learning-rate schedules, and a step that every process takes or skips together."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from training import fused_step
from training.ema import Ema

SCHEDULES = ("constant", "cosine", "milestones")


def adamw(groups: list[dict], weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (CPU and CUDA) over parameter groups that each carry their own `lr`."""
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)


def schedule(
    optimizer: torch.optim.Optimizer,
    kind: str,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    end_factor: float = 0.5,
    milestones: Sequence[int] = (),
    gamma: float = 0.5,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate over steps, as a factor on each group's own.

    Linear from 0 over `warmup_steps`, then "constant", "cosine" down to `end_factor` at
    `total_steps`, or "milestones", at each of which it is multiplied by `gamma`.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"--lr-schedule {kind}: use {' or '.join(SCHEDULES)}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if kind == "constant":
            return 1.0
        if kind == "milestones":
            return gamma ** sum(step >= milestone for milestone in milestones)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def ramp(ends: list[float], done: float) -> float:
    """Linear from ends[0] to ends[1] as `done` goes from 0 to 1."""
    return ends[0] + (ends[1] - ends[0]) * done


class StepGuard:
    """Clips, then steps unless the gradient is not finite; no transfer to the host in a step.

    Gradients are averaged over processes before the norm is taken, so a NaN on one process is a
    NaN on all: all skip together, and parameters, moments and step counts stay identical.

    Args:
        optimizer: a fused AdamW.
        max_norm: gradient-norm clip; None leaves gradients alone.
        ema: averages that take a step with each of the optimiser's, also with one left out.
        kernels: "auto", or "torch" for PyTorch alone.
        patience: skipped steps in a row after which `check` raises.

    Attributes:
        skipped, in_a_row: 0-d tensors, steps left out in all and up to now without a good one.
        line: for the log, what computes a step with averages.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        max_norm: float | None,
        ema: Ema | None = None,
        kernels: str = "auto",
        patience: int = 20,
    ) -> None:
        self.optimizer, self.ema = optimizer, ema
        self.max_norm = math.inf if max_norm is None else max_norm
        self.patience = patience
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        if kernels == "torch":
            reason = "as --kernels says"
        elif ema is None:
            reason = "there are no averages"
        elif reason := fused_step.refusal(optimizer, ema):
            reason = f"Triton {reason}"
        self.fused = None if reason else fused_step.FusedStep(optimizer, ema)
        self.copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] = {}
        self.line = f"optimiser and averages: {f'PyTorch ({reason})' if reason else 'Triton'}"

    def use_copies(self, copies: Mapping[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        """Steps take the gradients of these working copies (bf16) from now on, and refresh them.

        Only where Triton takes the steps.
        """
        self.copies = self.fused.copies = copies

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for p in self.parameters:
            self.copies.get(p, p).grad = None

    def set_rates(self) -> None:
        """Hands the schedule's learning rates to the device; before each `step`.

        Apart from it, because a captured step reads them where they lie.
        """
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    def step(self) -> torch.Tensor:
        """One step of optimiser and averages; returns the gradient norm before clipping, 0-d."""
        leaves = [self.copies.get(p, p) for p in self.parameters]
        gradients = [p.grad for p in leaves if p.grad is not None]
        full = [g for g in gradients if g.dtype == torch.float32]
        half = [g for g in gradients if g.dtype != torch.float32]
        norms = [
            n
            for each in (full, half)
            if each
            for n in torch._foreach_norm(each, 2.0, torch.float32)
        ]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        bad = (~torch.isfinite(norm)).float()
        # The optimiser itself divides by one and leaves its step out for the other, which spares
        # a pass over all gradients.
        scale = (norm / self.max_norm).clamp(min=1.0)
        if self.fused is not None:
            self.fused(self.rates, scale, bad)
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = scale, bad
            with self._rates_on_device():
                self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.skipped += bad
        self.in_a_row.add_(bad).mul_(bad)
        return norm

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Within it the optimiser can be captured; schedules and checkpoints hold plain numbers."""
        groups = self.optimizer.param_groups if self.rates[0].is_cuda else []
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=False):
            group["lr"], group["capturable"] = rate, True
        yield
        for group, number in zip(groups, numbers, strict=True):
            group["lr"], group["capturable"] = number, False

    def state_dict(self) -> dict:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        """Takes the counts back."""
        self.skipped.copy_(state["skipped"])
        self.in_a_row.copy_(state["in_a_row"])

    def check(self, step: int, where: Callable[[], str]) -> int:
        """Number of skipped steps so far (waits for the device).

        Args:
            where: says what is not finite, see `training.nonfinite.where`; called before raising.

        Raises:
            ValueError: after too many in a row, on every process.
        """
        in_a_row = int(self.in_a_row.item())
        if in_a_row >= self.patience:
            raise ValueError(
                f"step {step}: the gradient was not finite for {in_a_row} steps in a row: "
                f"{where()}; lower --lr, add --warmup-steps, or look at the data"
            )
        return int(self.skipped.item())


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of scalars in `parameters`."""
    return sum(p.numel() for p in parameters)
