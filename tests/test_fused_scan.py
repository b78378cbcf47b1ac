"""models/operators/fused_scan.py: the Triton kernels, run by Triton's interpreter on the CPU, which
multiplies no bf16; tests/test_operators_gpu.py runs that."""

import pytest
import torch
import torch.nn.functional as F
from test_fused_attention import check_operands, machine_code
from test_modulation import interpreted

from models.operators import fused_scan as module
from models.operators.mamba2 import chunked_scan

# samples, tokens, heads, their width, d_state, groups, decay of a step; tokens of a chunk, programs
CASES = [
    ((2, 37, 4, 16, 16, 1, 0.1), 16, 1),
    ((1, 33, 6, 8, 32, 2, 0.1), 16, 20),
    ((2, 11, 3, 16, 16, 1, 0.3), 64, 1),
    ((1, 64, 1, 32, 16, 1, 0.01), 32, 8),
    ((1, 70, 5, 16, 16, 1, 5.0), 32, 8),
    ((2, 2, 2, 64, 16, 2, 0.1), 64, 1),
]


def inputs(case, dtype, device="cpu"):
    """xbc, dt, A, D and a gradient of y."""
    B, T, heads, P, N, groups, decay = case
    generator = torch.Generator(device).manual_seed(T)

    def draw(*shape):
        return torch.randn(shape, device=device, generator=generator)

    width = heads * P
    xbc, grad = draw(B, T, width + 2 * groups * N).to(dtype), draw(B, T, width).to(dtype)
    dt, A = F.softplus(draw(B, T, heads)), -decay * F.softplus(draw(heads)) - decay
    return xbc, dt, A, draw(heads), grad


def defined(xbc, dt, A, D, groups, d_state):
    heads, keys = len(A), groups * d_state
    x, b, c = xbc.split([xbc.shape[-1] - 2 * keys, keys, keys], -1)
    x = x.unflatten(-1, (heads, -1))
    b, c = (v.unflatten(-1, (groups, -1)) for v in (b, c))
    return (chunked_scan(x, dt, A, b, c, 16) + x * D.view(heads, -1)).flatten(2)


def distances(case, dtype, device="cpu"):
    """Of results and gradients from the definition's in float64, over its norms."""
    sizes = case[5], case[4]
    *given, grad = inputs(case, dtype, device)
    exact = [v.double().requires_grad_() for v in given]
    expected = defined(*exact, *sizes)
    expected = expected, *torch.autograd.grad(expected, exact, grad.double())
    xbc, dt, A, D = given = [v.requires_grad_() for v in given]
    y = module.fused_scan(xbc, dt, dt * A, D, *sizes)
    found = y, *torch.autograd.grad(y, given, grad)
    assert [v.dtype for v in found] == [dtype, *(v.dtype for v in given)]
    with torch.inference_mode():
        assert torch.equal(module.fused_scan(xbc, dt, dt * A, D, *sizes), y)
    pairs = zip(found, expected, strict=True)
    return [((some - right).norm() / right.norm()).item() for some, right in pairs]


def count_turns():
    """NumPy 2.4 reads no number from the arrays that Triton 3.6's interpreter holds it in."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_more(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_more


def check_strides():
    """What is given in other strides, and a gradient of one number; and what compilers are told."""
    xbc, dt, A, D, grad = inputs(CASES[0][0], torch.float32)
    found = []
    for whole in (False, True):
        some, steps, sizes = (
            v.transpose(0, 1).contiguous().transpose(0, 1) for v in (xbc, dt * A, dt)
        )
        if whole:
            some, steps, sizes = (v.contiguous() for v in (some, steps, sizes))
        given = [v.requires_grad_() for v in (some, sizes, steps, D)]
        y = module.fused_scan(*given, 1, 16)
        for dy in (grad.mT.contiguous().mT, torch.ones(()).expand_as(y)):
            dy = dy.contiguous() if whole else dy
            found.append([y, *torch.autograd.grad(y, given, dy, retain_graph=True)])
        rest = grad.mT.contiguous().mT, *(v.detach() for v in given), 1, 16
        torch.library.opcheck(module._scan_backward, rest, test_utils=("test_faketensor",))
        torch.library.opcheck(module._scan, (*given, 1, 16))
    torch.testing.assert_close(found[:2], found[2:])


def check_kernels():
    count_turns()
    module.CHUNK = 16
    check_strides()
    check_half_parameters()
    for case, module.CHUNK, module.PROGRAMS in CASES:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            found = distances(case, dtype)
            tolerance = max(tolerance, 3e-5 * case[-1])
            assert max(found) < tolerance, (case, dtype, found)


def check_half_parameters():
    """Of a model in half precision."""
    xbc, dt, A, D, grad = inputs(CASES[0][0], torch.float16)
    given = [v.requires_grad_() for v in (xbc, dt, dt * A, D.half())]
    torch.library.opcheck(module._scan, (*given, 1, 16))
    rest = grad, *(v.detach() for v in given), 1, 16
    torch.library.opcheck(module._scan_backward, rest, test_utils=("test_faketensor",))


def test_kernels_have_stages():
    assert all(stages > 1 for _, _, stages in module.PLANS.values())


@pytest.mark.parametrize("samples", [1, 256])
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kernel", module.PLANS)
def test_products_find_their_operands(tmp_path, monkeypatch, kernel, other, samples):
    """Of DiT-XL/2's grafts; other: the walk back, and chunks that stand alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    halves = ("xbc", "values", "keys", "states", "dstates", "y", "grad", "dxbc")
    floats = ("sizes", "sums", "skip", "notes", "shares")
    numbers = "tokens chunks heads parts each value_width key_width share_stride share_width"
    types = dict.fromkeys(halves, "*bf16") | dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(numbers.split(), "i32")
    types |= {"shares": "*bf16"} if samples > 1 else {}
    xbc, dt = (torch.empty(1, 64, width) for width in (144 * 16 + 128, 144))
    _, each, options = module.Shape(xbc, dt, 1, 64).divided(kernel, samples)
    options |= {"groups": 1, "HEADS": each, "BACK": other, "CARRIED": not other}
    check_operands(machine_code(("scan_kernels", kernel), types, options, tmp_path))


def test_kernels_agree_with_the_definition():
    """Forward and backward, over chunks that tokens do not fill, groups, and parts of heads."""
    interpreted("import sys; sys.path.insert(0, 'tests'); "
                "import test_fused_scan as t; t.check_kernels()")  # fmt: skip
