"""models/operators/modulation.py: the Triton kernels, run by Triton's interpreter on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from models.operators import modulation

CHECK = """
import torch
from models.operators import modulation

cpu = torch.device("cpu")
for rows in (2, 64):
    modulation.LEAST_ROWS = rows
    exact = modulation._disagreement(48, cpu, torch.float32)
    with torch.inference_mode():  # as sampling calls it
        half = modulation._disagreement(48, cpu, torch.bfloat16)
    assert exact < 1e-6 and half < 6e-3, (rows, exact, half)
torch.manual_seed(0)
x, branch = torch.randn(2, 5, 24), torch.randn(4, 5, 24)
gate, shift, scale = torch.randn(3, 4, 24)
for given in ((None, None), (branch, gate), (branch[:2], gate[:2])):
    expected, mine = (
        modulation.add_norm_modulate(x, *given, shift, scale, path) for path in ("torch", "triton")
    )
    assert len(mine[0]) == (2 if given[0] is None else len(given[0])) and len(mine[1]) == 4
    for one, other in zip(expected, mine, strict=True):
        torch.testing.assert_close(one, other)
for path in ("torch", "triton"):
    try:
        modulation.add_norm_modulate(branch, None, None, gate[:1], scale[:1], path)
        raise SystemExit("fewer shifts than samples")
    except ValueError as error:
        assert "4 and 4 and 1 samples do not go together" in str(error)
try:
    modulation.add_norm_modulate(x.requires_grad_(), branch, gate, shift, scale, "triton")
    raise SystemExit("gradients of tokens that stand for several samples")
except RuntimeError as error:
    assert "have no gradient" in str(error)
"""


MODEL = """
import sys
import torch
sys.path.insert(0, "tests")
from restructured import inputs, tiny

found = []
for path in ("torch", "triton"):
    model = tiny(depth=5, pairs=((0, 1), (2, 3))).float()
    for block in model.blocks:
        block.path = path
    x, t, y = inputs()
    out = model(x.float(), t, y)
    out.square().sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x.float(), t, y), out)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found.append([out.detach(), *gradients])
for exact, mine in zip(*found, strict=True):
    assert (mine - exact).norm() <= 1e-5 * exact.norm()
"""


def interpreted(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    folder = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_kernels_agree_with_pytorch():
    """Forward and backward, with and without a branch, over rows that do not fill a program."""
    interpreted(CHECK)


def test_a_model_of_pairs_is_the_same_on_the_kernels():
    """Pairs beside each other and before a block alone, forward and backward."""
    interpreted(MODEL)


def test_kernels_say_where_they_do_not_serve():
    said = modulation.refusal(1152, torch.device("cpu"), torch.bfloat16)
    assert said == "is for CUDA, not CPU"


def test_open_end_of_a_block_is_what_the_next_one_adds():
    torch.manual_seed(0)
    x, branch = torch.randn(2, 2, 5, 16)
    gate, shift, scale = torch.randn(3, 2, 16)
    total, h = modulation.add_norm_modulate(x, branch, gate, shift, scale)
    torch.testing.assert_close(total, x + gate[:, None] * branch)
    again, same = modulation.add_norm_modulate(total, None, None, shift, scale)
    assert again is total and torch.equal(same, h)
