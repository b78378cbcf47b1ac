"""models/operators/fused_gelu.py, by Triton's interpreter on the CPU, and the biases before it."""

import pytest
import torch
import torch.nn.functional as F
from test_fused_attention import apart
from test_modulation import interpreted
from torch import nn

from models.operators import mlp as mlp_module
from models.operators.fused_gelu import bias_apart, fused_gelu
from models.operators.mlp import GeluMlp


def distances(shape, dtype, device="cpu"):
    """Of results and both gradients from float64, over its norms."""
    generator = torch.Generator(device).manual_seed(shape[0])
    x, grad = (3 * torch.randn(2, *shape, device=device, generator=generator)).to(dtype)
    bias = x.new_zeros(shape[-1]).requires_grad_()
    found = fused_gelu(x.requires_grad_(), bias)
    mine = torch.autograd.grad(found, (x, bias), grad)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    (best,) = torch.autograd.grad(expected, exact, grad.double())
    assert all(t.dtype == dtype for t in (found, *mine))
    return apart((found, *mine), (expected, best, best.flatten(0, -2).sum(0)))


def check_kernels():
    for shape in ((2, 9, 40), (300, 256), (1, 1), (5, 77, 300)):
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
            found = distances(shape, dtype)
            assert max(found) < tolerance, (shape, dtype, found)


def test_kernels_agree_with_pytorch():
    """Over rows and columns that fill no program, and several programs."""
    interpreted("import sys; sys.path.insert(0, 'tests'); "
                "import test_fused_gelu as t; t.check_kernels()")  # fmt: skip


def test_a_bias_apart_is_in_the_output_and_not_in_its_graph():
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 3), torch.randn(2, 4)
    y, bias = bias_apart(linear, x)
    assert bias is linear.bias and torch.equal(y, linear(x))
    y.sum().backward()
    assert linear.weight.grad is not None and linear.bias.grad is None


class Adapter(nn.Linear):
    """More than a linear layer."""


@pytest.mark.parametrize(
    "linear",
    [Adapter(4, 3), nn.Linear(4, 3, bias=False), nn.Linear(4, 3).requires_grad_(False)],
    ids=["adapter", "no bias", "frozen"],
)
def test_other_biases_stay(linear):
    x = torch.randn(2, 4)
    y, bias = bias_apart(linear, x)
    assert bias is None and torch.equal(y, linear(x))


def test_no_bias_is_apart_where_nothing_has_a_gradient():
    with torch.no_grad():
        assert bias_apart(nn.Linear(4, 3), torch.randn(2, 4))[1] is None


def test_an_mlp_is_the_same_on_triton(monkeypatch):
    """Its gradients too, that of the first bias among them."""

    def fused(x, bias):
        return F.gelu(x + (bias - bias.detach()), approximate="tanh")

    monkeypatch.setattr(mlp_module, "fused_gelu", fused)
    torch.manual_seed(0)
    mlp, x = GeluMlp(8, 32), torch.randn(2, 5, 8)
    found = []
    for path in ("torch", "triton"):
        mlp.path = path
        y = mlp(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(mlp.parameters()))])
    torch.testing.assert_close(*found)
