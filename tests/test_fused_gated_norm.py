"""models/operators/fused_gated_norm.py, by Triton's interpreter on the CPU."""

import torch
from test_fused_attention import apart
from test_fused_scan import count_turns
from test_modulation import interpreted

from models.operators import fused_gated_norm as module
from models.operators.mamba2 import NORM_EPS, GatedRMSNorm

SHAPES = ((2, 9, 40), (300, 128), (1, 1, 8), (3, 5, 7, 24))


def distances(shape, dtype, device="cpu"):
    """Of results and all gradients from float64, over its norms; all of them in other strides."""
    generator = torch.Generator(device).manual_seed(len(shape))

    def draw(*shape):
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    norm = GatedRMSNorm(shape[-1], 1, False).to(device)
    with torch.no_grad():
        norm.weight.add_(0.3 * draw(shape[-1]))
    y, z = (draw(*shape[:-1], 2 * shape[-1] + 3)[..., 3 : 3 + shape[-1]] for _ in range(2))
    y, z, grad = y.requires_grad_(), z.requires_grad_(), draw(2, *shape)[1]
    found = module.fused_gated_norm(y, z, norm.weight, NORM_EPS)
    mine = torch.autograd.grad(found, (y, z, norm.weight), grad)
    assert [t.dtype for t in (found, *mine)] == [dtype, dtype, dtype, torch.float32]
    norm = norm.double()
    exact = [t.detach().double().requires_grad_() for t in (y, z)]
    expected = norm(*exact)
    best = torch.autograd.grad(expected, (*exact, norm.weight), grad.double())
    return apart((found, *mine), (expected, *best))


def check_kernels():
    count_turns()
    module.PROGRAMS = 4
    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
            found = distances(shape, dtype)
            assert max(found) < tolerance, (shape, dtype, found)
    y, z = torch.randn(2, 3, 4, 8).unbind(0)
    weight = torch.ones(8)
    odd = torch.randn(60).as_strided((3, 1, 8), (8, 5, 1))  # the 5 means nothing
    expected = GatedRMSNorm(8, 1, False)(odd.contiguous(), odd.contiguous())
    torch.testing.assert_close(module.fused_gated_norm(odd, odd, weight, NORM_EPS), expected)
    torch.library.opcheck(module._norm, (y, z.requires_grad_(), weight, 1e-5))
    scales = module._norm(y, z.detach(), weight, 1e-5)[1]
    given = (y, z.detach(), weight, scales, torch.ones(()).expand_as(y))
    torch.library.opcheck(module._norm_backward, given, test_utils=("test_faketensor",))


def test_kernels_agree_with_pytorch():
    """Over rows that fill no program, and strides of other tensors."""
    interpreted("import sys; sys.path.insert(0, 'tests'); "
                "import test_fused_gated_norm as t; t.check_kernels()")  # fmt: skip
