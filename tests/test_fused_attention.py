"""models/operators/fused_attention.py: the Triton kernels, run by Triton's interpreter on the CPU,
which multiplies no bf16; tests/test_operators_gpu.py runs that."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from test_modulation import interpreted

from models.operators import attention as attention_module
from models.operators import fused_attention as module
from models.operators.attention import FullAttention, dense_window_attention

# tokens, heads, their width, window, scale, queries and keys of a block
CASES = [
    (37, 2, 24, None, None, 16, 16),
    (64, 1, 72, None, 0.3, 64, 32),
    (50, 2, 16, (4, 4), None, 16, 16),
    (64, 2, 24, (3, 9), 0.1, 16, 32),
    (70, 1, 40, (30, 0), None, 32, 16),
    (33, 1, 96, (0, 0), None, 16, 16),
    (1, 1, 8, (5, 5), None, 16, 16),
    (48, 1, 16, (200, 2), None, 32, 16),
    (20, 2, 24, None, None, 32, 32),
]


def defined(qkv, heads, window, scale):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    window = window or (qkv.shape[1], qkv.shape[1])
    return dense_window_attention(q, k, v, window, scale=scale).transpose(1, 2).flatten(2)


def distances(case, dtype, device="cpu"):
    """Of results and gradients from the definition's in float64, over its norms."""
    tokens, heads, width, window, scale, *_ = case
    generator = torch.Generator(device).manual_seed(tokens)

    def draw(*shape):
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    qkv, grad = draw(2, tokens, 3 * heads * width), draw(2, tokens, heads * width)
    exact = qkv.double().requires_grad_()
    expected = defined(exact, heads, window, scale)
    (best,) = torch.autograd.grad(expected, exact, grad.double())
    found = module.fused_attention(qkv.requires_grad_(), heads, window, scale)
    (mine,) = torch.autograd.grad(found, qkv, grad)
    assert found.dtype == mine.dtype == dtype
    with torch.inference_mode():
        assert torch.equal(module.fused_attention(qkv, heads, window, scale), found)
    return apart((found, mine), (expected, best))


def apart(found, expected):
    """Distances over the norms of what is expected."""
    pairs = zip(found, expected, strict=True)
    return [((some - right).norm() / right.norm()).item() for some, right in pairs]


def check_strides():
    """What is given in other strides, and a gradient of one number."""
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (torch.randn(20, 2, width, generator=generator) for width in (96, 32))
    module.PLANS = dict.fromkeys(module.PLANS, ((16, 16, 4, 2),) * 2)
    found = []
    for whole in (False, True):
        some = qkv.transpose(0, 1)
        some = (some.contiguous() if whole else some).requires_grad_()
        y = module.fused_attention(some, 2)
        for dy in (grad.transpose(0, 1), torch.ones(()).expand_as(y)):
            dy = dy.contiguous() if whole else dy
            found.append([y, *torch.autograd.grad(y, some, dy, retain_graph=True)])
        rest = some.detach(), y.detach(), module._attend(some, 2, 20, 20, 0.25)[1].detach()
        rest = rest + (grad.transpose(0, 1), 20, 20, 0.25)
        torch.library.opcheck(module._attend_backward, rest, test_utils=("test_faketensor",))
        torch.library.opcheck(module._attend, (some, 2, 20, 20, 0.25))
    torch.testing.assert_close(found[:2], found[2:])


def check_kernels():
    check_strides()
    for case in CASES:
        queries, keys = case[-2:]
        plans = dict.fromkeys(module.PLANS, ((queries, keys, 4, 2),) * 2)
        module.PLANS = plans | {"backward_keys": ((keys, queries, 4, 2),) * 2}
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
            found = distances(case, dtype)
            assert max(found) < tolerance, (case, dtype, found)


def test_kernels_have_stages():
    assert all(stages > 1 for plans in module.PLANS.values() for *_, stages in plans)


def test_kernels_agree_with_the_definition():
    """Forward and backward, over blocks that tokens do not fill, windows and rests of heads."""
    interpreted("import sys; sys.path.insert(0, 'tests'); "
                "import test_fused_attention as t; t.check_kernels()")  # fmt: skip


def machine_code(kernel, types, options, folder):
    """What Triton makes of a kernel for Hopper, line by line.

    kernel: its file and name. types: of its arguments that have no value in `options`.
    """
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("what is looked for was seen with Triton 3.6")
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "nvdisasm").is_file():
        pytest.skip("this Triton brings no nvdisasm")
    compiled = {name: options[name] for name in ("num_warps", "num_stages")}
    file, name = kernel
    function = getattr(importlib.import_module(f"models.operators.{file}"), name)
    options = {name: value for name, value in options.items() if name in function.arg_names}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name == "heads" or name.endswith(("_width", "_stride"))
    }  # fmt: skip
    source = triton.compiler.ASTSource(function, signature, constexprs=options, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiled)
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [tools / "nvdisasm", "-c", folder / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("window", [None, (4, 4)], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(16, 72), (16, 96), (256, 72)])
@pytest.mark.parametrize("kernel", module.PLANS)
def test_products_find_their_operands(tmp_path, monkeypatch, kernel, tokens, width, window):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("qkv", "out", "grad", "dqkv"), "*bf16")
    types |= dict.fromkeys(("sums", "shares"), "*fp32")
    types |= {"heads": "i32", "scale": "fp32", "plain_scale": "fp32"}
    options = module._settings(kernel, tokens, width, *window or (tokens, tokens))
    check_operands(machine_code(("attention_kernels", kernel), types, options, tmp_path))


def check_operands(lines):
    """No register of a processor's own, where places of operands are kept, is read unwritten."""
    assert any("HGMMA" in line for line in lines)
    written = set()
    for line in lines:
        found = re.search(r"\b(U\w+|S2UR|R2UR)[\w.]* +UR(\d+), *(.*);", line)
        read = found[3] if found else line
        # a product's operands: two pairs, or one where the first operand lies in other registers
        places = re.search(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]", line)
        needed = set(range(2 * bool(places[1]), 4)) if places else set()
        needed = {int(places[2]) + n for n in needed}
        needed |= {int(n) + i for n in re.findall(r"\bdesc\[UR(\d+)\]", line) for i in (0, 1)}
        read = re.sub(r"\w*desc\[UR\d+\]", "", read)
        needed |= {int(n) for n in re.findall(r"\bUR(\d+)", read)}
        assert needed <= written, line
        if found:
            wide = re.search(r"\.64\b|\.WIDE\b", line)
            written |= {int(found[2]), int(found[2]) + bool(wide)}


@pytest.mark.parametrize(("block", "step"), [(16, 16), (16, 64), (64, 16), (48, 32)])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (4, 4), (1, 30), (90, 0), (200, 200)])
def test_turns_reach_all_that_a_block_sees(block, step, left, right):
    tokens = 200
    turns = module._turns(tokens, left, right, block, step)
    needed = []
    for begin in range(0, tokens, block):
        low = max(begin - left, 0) // step * step
        high = min(begin + block - 1 + right, tokens - 1)
        needed.append(high // step - low // step + 1)
    assert max(needed) <= turns <= -(-tokens // step)


def test_attention_of_a_block_is_triton_s_where_that_is_faster(monkeypatch):
    seen = []

    def fused(qkv, heads):
        seen.append(len(qkv))
        return defined(qkv, heads, None, None)

    monkeypatch.setattr(attention_module, "fused_attention", fused)
    torch.manual_seed(0)
    attention = FullAttention(48, 4)
    x = torch.randn(attention_module.MANY, 9, 48)
    expected = attention(x)
    assert not seen
    attention.path = "triton"
    torch.testing.assert_close(attention(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(attention(x), expected)
        torch.testing.assert_close(attention(x[1:]), expected[1:])
    assert seen == [len(x), len(x) - 1]
