"""training/fused_step.py: the Triton kernel, run by Triton's interpreter on the CPU."""

import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import fused_step
from training.ema import Ema
from training.optimizer import StepGuard, adamw

CPU = torch.device("cpu")


def interpreted(function: str) -> None:
    """Calls a function of this file where kernels are interpreted, in a process of its own."""
    folder = Path(__file__).resolve().parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder.parent)}
    command = [sys.executable, "-c", f"import test_fused_step; test_fused_step.{function}()"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_trial():
    assert fused_step._disagreement(CPU) < 5e-7


def test_kernel_agrees_with_pytorch():
    """As at first use: sizes, groups, clipping, a skipped step, addresses, a missing gradient."""
    interpreted("check_trial")


def test_trial_notices_what_is_wrong(monkeypatch):
    """Nothing happens after the first step."""

    def idle(self, *_):
        for p in (
            self.optimizer.param_groups[0]["params"] + self.optimizer.param_groups[1]["params"]
        ):
            self._state(p)
        for p, copy in self.copies.items():
            copy.data.copy_(p)

    monkeypatch.setattr(fused_step.FusedStep, "__call__", idle)
    assert 0.1 < fused_step._disagreement(CPU) < math.inf


def train(fused: bool, decay: float, folder: Path | None = None) -> list[torch.Tensor]:
    """Seven guarded steps, one of them not finite, between two the state goes through a dict."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 100), torch.nn.Tanh(), torch.nn.Linear(100, 3))
    model[0].bias.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.03}]
    ema, optimizer = Ema(model, decay), adamw(groups, 0.1)
    guard = StepGuard(optimizer, 0.5, ema)
    if fused:
        guard.fused = fused_step.FusedStep(optimizer, ema)
    norms = []
    for step, factor in enumerate((1.0, 1e-3, 10.0, torch.nan, 1.0, 1e-3, 3.0)):
        optimizer.zero_grad(set_to_none=True)
        (model(torch.randn(5, 24)).square().mean() * factor).backward()
        guard.set_rates()
        norms.append(guard.step().nan_to_num())
        groups[1]["lr"] *= 0.9
        if step == 4:
            optimizer.load_state_dict(optimizer.state_dict())
    assert guard.skipped == 1 and guard.in_a_row == 0
    assert all(optimizer.state[p]["step"] == 6 for p in weights)
    assert set(optimizer.state[weights[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert max(norms) > 0.5 > min(norms)
    states = [tensor for p in weights for tensor in optimizer.state[p].values()]
    return [*norms, *weights, *ema.averages, *states]


def check_guarded_steps():
    for decay in (0.0, 0.9, 0.9999):
        torch.testing.assert_close(train(True, decay), train(False, decay), rtol=3e-6, atol=2e-6)


def test_guarded_steps_are_those_of_pytorch():
    interpreted("check_guarded_steps")


class Waits(TorchDispatchMode):
    """Notes what brings a number to the host: on CUDA a wait, and refused in a capture."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_steps_wait_for_nothing(monkeypatch):
    """All but the kernel's own launch, with the tables as they stand from the step before."""
    launch = defaultdict(lambda: lambda *_, **__: None)
    monkeypatch.setattr(fused_step, "_kernel", lambda: launch)
    weights = [torch.nn.Parameter(torch.randn(8)) for _ in range(3)]
    optimizer = adamw([{"params": weights[:2]}, {"params": weights[2:]}], 0.1)
    guard = StepGuard(optimizer, 0.5, ema := Ema(torch.nn.ParameterList(weights), 0.9))
    guard.fused = fused_step.FusedStep(optimizer, ema)
    for _ in range(2):
        for p in weights:
            p.grad = torch.randn(8)
        guard.step()
    with Waits() as waits:
        guard.step()
    assert all(optimizer.state[p]["step"] == 3 for p in weights)
    assert not waits.seen


def test_table_covers_every_number_once():
    """Programs of a tensor follow each other, and together they hold all of it."""
    block = fused_step.BLOCK
    sizes = [1, block, 4, block + 1, 3 * block - 4]
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    places = [[16 * (5 * i + j + 1) for j in range(5)] for i in range(len(sizes))]
    table = fused_step._Table(places, weights)
    assert table.owner.tolist() == [0, 1, 2, 3, 3, 4, 4, 4]
    assert table.rows[:, 5].tolist() == sizes
    assert table.rows[:, 6].tolist() == [0, 1, 2, 3, 5]
    high = 0x7F12_3456_7890
    for addresses in ([high + 16 * i for i in range(5)], [high + 8, 0, 0, 0, 0]):
        assert not table.set_gradients(addresses)
        assert table.rows[:, [0, 1, 2, 3, 7, 4]].tolist() == [
            [*row, a] for row, a in zip(places, addresses, strict=True)
        ]


@pytest.mark.parametrize(("places", "addresses", "wide"), [
    ([16, 32, 48, 64, 0], [80], True), ([16, 32, 48, 68, 0], [80], False),
    ([16, 32, 48, 64, 0], [88], False), ([16, 32, 48, 64, 24], [88], True),
    ([16, 32, 48, 64, 28], [88], False), ([16, 32, 48, 64, 24], [84], False),
])  # fmt: skip
def test_wide_loads_need_even_addresses(places, addresses, wide):
    """Of 16 bytes where numbers have 4, of 8 where a copy and its gradient have 2."""
    table = fused_step._Table([places], [torch.nn.Parameter(torch.zeros(8))])
    assert table.set_gradients(addresses) is wide


def test_kernel_says_where_it_does_not_serve():
    model = torch.nn.Linear(3, 2)
    optimizer = adamw([{"params": list(model.parameters()), "lr": 0.1}], 0.0)
    ema = Ema(model, 0.9)
    assert fused_step.refusal(optimizer, ema) == "is for CUDA, not CPU"
    said = StepGuard(optimizer, 1.0, ema).line
    assert said == "optimiser and averages: PyTorch (Triton is for CUDA, not CPU)"
    said = StepGuard(optimizer, 1.0, ema, "torch").line
    assert said == "optimiser and averages: PyTorch (as --kernels says)"
