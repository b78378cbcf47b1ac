"""Which kernels operators run on: chosen, refused with a reason, and equal to the PyTorch paths."""

import dataclasses
import importlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from test_operators import SMALL, relative_error
from torch import nn
from torch.nn.attention import flex_attention as flex_module

from models.operators import OPERATORS, accelerators, build_operator
from models.operators import attention as attention_module
from models.operators import mamba2 as mamba2_module
from models.operators import mlp as mlp_module
from models.operators.attention import (
    FullAttention,
    SlidingWindowAttention,
    dense_window_attention,
    flex_window_attention,
    window_mask,
)
from models.operators.hyena import CausalConv
from models.operators.mamba2 import Mamba2, chunked_scan
from models.operators.mlp import GeluMlp
from models.selection import GraftPair
from training import arguments

CPU = torch.device("cpu")
FAST = [name for name, _ in accelerators.PREFERRED.values()]


# -- stand-ins for the packages, in PyTorch -------------------------------------


def with_backward(forward):
    """(output's gradient, *arguments of `forward`) -> gradient of each, None for what has none.

    It works in a thread of its own, as autograd is off within an operation.
    """

    def backward(grad, *inputs):
        inputs = [t.detach().requires_grad_() if torch.is_tensor(t) else t for t in inputs]
        tensors = [t for t in inputs if torch.is_tensor(t)]
        grads = iter(torch.autograd.grad(forward(*inputs), tensors, grad))
        return [next(grads) if torch.is_tensor(t) else None for t in inputs]

    def in_thread(*args):
        with ThreadPoolExecutor(1) as threads:
            return threads.submit(backward, *args).result()

    return in_thread


def conv(x, weight, bias, silu):
    taps = weight.shape[1]
    y = sum(F.pad(x, (shift, 0))[..., : x.shape[-1]] * weight[:, taps - 1 - shift, None]
            for shift in range(taps))  # fmt: skip
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if silu else y


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, final, silu):
    return torch.empty_like(x).copy_(conv(x, weight, bias, silu))


def causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dinit, silu):
    dx, dweight, dbias, _ = with_backward(conv)(dout, x, weight, bias, silu)
    return torch.empty_like(x).copy_(dx), dweight, dbias, None


def scan(x, dt, A, B, C, D, dt_bias, low, high):
    dt = F.softplus(dt.float() + dt_bias).clamp(low, high)
    y = chunked_scan(x.float(), dt, A, B.float(), C.float(), 16)
    return (y + x * (D if D.ndim == 2 else D[:, None])).to(x.dtype)


def _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, chunk, *, D, dt_bias, dt_softplus, dt_limit):
    assert dt_softplus
    return scan(x, dt, A, B, C, D, dt_bias, *dt_limit), None


def _mamba_chunk_scan_combined_bwd(
    dout, x, dt, A, B, C, out, chunk, *, D, dt_bias, dt_softplus, dt_limit
):
    grads = with_backward(scan)(dout, x, dt, A, B, C, D, dt_bias, *dt_limit)
    dx, ddt, dA, dB, dC, dD, dbias, *_ = grads
    return dx, ddt, dA, dB, dC, dD, None, dbias, None


def flash_attn_qkvpacked_func(qkv, dropout_p, softmax_scale, window_size):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = dense_window_attention(q, k, v, window_size, scale=softmax_scale, dropout_p=dropout_p)
    return y.transpose(1, 2)


def fused_attention(qkv, heads, window=None, scale=None):
    qkv = qkv.unflatten(-1, (3, heads, -1))
    window = window or (qkv.shape[1], qkv.shape[1])
    return flash_attn_qkvpacked_func(qkv, 0.0, scale, window).flatten(2)


def fused_gated_norm(y, z, weight, eps):
    gated = y.float() * F.silu(z.float())
    return (F.rms_norm(gated, weight.shape, weight.float(), eps)).to(y.dtype)


def fused_scan(xbc, dt, steps, skip, groups, d_state):
    heads, keys = dt.shape[-1], groups * d_state
    x, b, c = xbc.float().split([xbc.shape[-1] - 2 * keys, keys, keys], -1)
    x, (b, c) = x.unflatten(-1, (heads, -1)), (v.unflatten(-1, (groups, -1)) for v in (b, c))
    taken = x * (dt / -steps)[..., None]
    y = chunked_scan(taken, -steps, -steps.new_ones(heads), b, c, 16)
    return (y + x * skip.view(heads, -1)).flatten(2).to(xbc.dtype)


def fused_gelu(x, bias):
    return F.gelu(x + (bias - bias.detach()), approximate="tanh")


PACKAGES = {
    "causal-conv1d": (causal_conv1d_fwd_function, causal_conv1d_bwd_function),
    "mamba-ssm": (_mamba_chunk_scan_combined_fwd, _mamba_chunk_scan_combined_bwd),
    "flash-attn": (flash_attn_qkvpacked_func,),
}
AGREEING = {path: {f.__name__: f for f in functions} for path, functions in PACKAGES.items()}


class NothingInstalled:
    """Finds none of `packages`, wherever they are."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def install(monkeypatch):
    """`install(path, **functions)` makes the package of a path; before that there is none.

    The CPU counts as a device with kernels, and FlexAttention has a gradient there.
    """
    monkeypatch.setattr(accelerators, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)

    # Triton itself stays, as PyTorch uses it
    ours = dataclasses.replace(
        accelerators.KERNELS["triton"], module="our_triton", distribution="our_triton"
    )
    monkeypatch.setitem(accelerators.KERNELS, "triton", ours)
    monkeypatch.setattr(attention_module, "fused_attention", fused_attention)
    monkeypatch.setattr(mlp_module, "fused_gelu", fused_gelu)
    monkeypatch.setattr(mamba2_module, "fused_scan", fused_scan)
    monkeypatch.setattr(mamba2_module, "fused_gated_norm", fused_gated_norm)
    tops = {accelerators.KERNELS[path].module.partition(".")[0] for path in ("triton", *AGREEING)}
    for name in list(sys.modules):
        if name.partition(".")[0] in tops:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NothingInstalled(tops), *sys.meta_path])

    def make(path, **functions):
        name = ""
        for part in accelerators.KERNELS[path].module.split("."):
            name = f"{name}.{part}".lstrip(".")
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(functions)

    return make


def lines(model, dtype=torch.float32, tokens=10, **options):
    return accelerators.accelerate(model, CPU, dtype, tokens, **options)


def paths(model):
    kinds = (FullAttention, SlidingWindowAttention, GeluMlp, CausalConv, Mamba2)
    return [m.path for m in model.modules() if isinstance(m, kinds)]


# -- without CUDA, and without packages -------------------------------------------


def test_on_the_cpu_pytorch_runs_and_nothing_is_imported(monkeypatch):
    def refuse(name):
        raise AssertionError(f"imported {name}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    model = nn.ModuleList(build_operator(name, **SMALL[name]) for name in OPERATORS)
    accelerators.set_path(model, "flash-attn")
    assert lines(model) == ["operators: PyTorch (on the CPU)"]
    assert paths(model) == ["torch"] * 10
    cuda = torch.device("cuda")
    torchs = accelerators.accelerate(model, cuda, torch.bfloat16, 10, "torch")
    assert torchs == ["operators: PyTorch (as --kernels says)"]
    assert lines(nn.Linear(2, 2)) == []


def test_what_is_missing_or_broken_is_named(install, monkeypatch, tmp_path):
    model = nn.ModuleList(build_operator(name, **SMALL[name]) for name in ("swa", "hyena_y"))
    assert lines(model, torch.bfloat16) == [
        "swa: PyTorch (Triton is not installed; flash-attn is not installed)",
        "hyena_y: PyTorch (causal-conv1d is not installed)",
    ]
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[1:])
    (tmp_path / "causal_conv1d.py").write_text("raise ImportError('undefined symbol: _Z1\\nx')")
    monkeypatch.syspath_prepend(tmp_path)
    assert lines(model[1]) == [
        "hyena_y: PyTorch (causal-conv1d does not load: ImportError: undefined symbol: _Z1)"
    ]
    (tmp_path / "causal_conv1d.py").write_text("import nothing_of_that_name")
    importlib.invalidate_caches()
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in lines(model[1])[0]
    assert paths(model) == ["torch", "torch"]


# -- kernels that agree, and that do not -----------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_a_kernel_that_agrees_is_taken(install, name, dtype):
    for path, functions in (("triton", {}), *AGREEING.items()):
        install(path, **functions)
    torch.manual_seed(0)
    operator = build_operator(name, **SMALL[name])
    before = {k: v.clone() for k, v in operator.state_dict().items()}
    drawn = torch.get_rng_state()
    takes = "takes bfloat16 and float16 only"
    expected = dict.fromkeys(("mha", "swa", "mlp"), "Triton")
    expected["mamba2"] = "Triton + causal-conv1d"
    text = expected.get(name, "causal-conv1d")
    if dtype == torch.float32 and name == "mamba2":
        text = f"mamba-ssm + causal-conv1d (Triton {takes})"
    if dtype == torch.float32 and text == "Triton":
        text = f"PyTorch (Triton {takes}"
        text += f"; flash-attn {takes})" if name == "swa" else ")"
    if text == "Triton" and name == "mha":
        text += " (PyTorch for 32 and more sequences without a backward pass)"
    assert lines(operator, dtype) == [f"{name}: {text}"]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(v, before[k]) for k, v in operator.state_dict().items())
    assert all(p.grad is None for p in operator.parameters())
    assert ("torch" in paths(operator)) == text.startswith("PyTorch")


MAMBAS = [
    {"D_has_hdim": True, "dt_limit": [0.1, 0.3]},
    {"ngroups": 2, "norm_before_gate": True, "conv_bias": False, "bias": True},
    {"rmsnorm": False, "d_conv": 3},
]


@pytest.mark.parametrize("config", MAMBAS, ids=str)
def test_mamba2_hands_its_settings_to_the_kernels(install, config):
    for path in ("causal-conv1d", "mamba-ssm"):
        install(path, **AGREEING[path])
    operator = build_operator("mamba2", **SMALL["mamba2"], **config)
    for path in ("causal-conv1d", "triton", "mamba-ssm"):
        assert accelerators.disagreement(operator, path, CPU, torch.float32, 21) < 1e-5


@pytest.mark.parametrize("name", ["hyena_se", "mlp_hyena_x", "mamba2"])
def test_kernels_compile_whole(install, name):
    for path in ("causal-conv1d", "mamba-ssm"):
        install(path, **AGREEING[path])
    torch.manual_seed(0)
    operator = build_operator(name, **SMALL[name])
    x = torch.randn(2, 10, 32)
    lines(operator)
    assert "torch" not in paths(operator)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (compiled, operator):
        y = run(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), list(operator.parameters()))])
    torch.testing.assert_close(*grads)


def passed_through(x, weight, bias, seq_idx, initial, final, silu):
    return x.clone()


def wrong_bias_gradient(*args):
    dx, dweight, dbias, dinitial = causal_conv1d_bwd_function(*args)
    return dx, dweight, 2 * dbias, dinitial


def crashing(*args):
    raise RuntimeError("no kernel image is available\nmore")


@pytest.mark.parametrize(
    ("forward", "backward", "words"),
    [
        (passed_through, causal_conv1d_bwd_function, "disagrees by .* in float32"),
        (causal_conv1d_fwd_function, wrong_bias_gradient, r"disagrees by 1e\+00 in float32"),
        (crashing, crashing, "does not run here: RuntimeError: no kernel image is available"),
    ],
)
def test_a_kernel_that_is_wrong_is_refused(install, forward, backward, words):
    """A fresh hyena_y convolves with the identity, and a kernel that ignores the filter agrees."""
    install(
        "causal-conv1d",
        causal_conv1d_fwd_function=forward,
        causal_conv1d_bwd_function=backward,
    )
    operator = build_operator("hyena_y", **SMALL["hyena_y"])
    (line,) = lines(operator)
    assert re.fullmatch(rf"hyena_y: PyTorch \(causal-conv1d {words}\)", line)
    assert paths(operator) == ["torch"]


def test_a_kernel_of_tf32_is_not_float32(install):
    def rounded(*args, **options):
        out, _ = _mamba_chunk_scan_combined_fwd(*args, **options)
        return out * (1 + 3e-4), None

    name = "_mamba_chunk_scan_combined_fwd"
    install("mamba-ssm", **AGREEING["mamba-ssm"] | {name: rounded})
    operator = build_operator("mamba2", **SMALL["mamba2"], rmsnorm=False)
    assert "mamba-ssm disagrees by 3e-04 in float32" in lines(operator)[0]
    assert lines(operator, torch.bfloat16)[0].startswith("mamba2: mamba-ssm (")


def test_what_a_kernel_cannot_run_is_named(install):
    for path, functions in AGREEING.items():
        install(path, **functions)

    def line(name, dtype=torch.bfloat16, **config):
        return lines(build_operator(name, **SMALL[name] | config), dtype, tokens=300)[0]

    assert line("hyena_y", inner_filter_len=5) == (
        "hyena_y: PyTorch (causal-conv1d takes 2 to 4 taps, not 5)"
    )
    assert "multiples of 8, not 36)" in line("hyena_y", d_model=36)
    assert "with 9 heads" in line("mamba2", d_model=36)
    swa = line("swa", embed_dim=48, dropout=0.1)
    assert swa == (
        "swa: PyTorch (Triton has no dropout, here 0.1; flash-attn takes heads of 8, 16 .. 256, "
        "not 12; FlexAttention has no dropout, here 0.1)"
    )
    install("triton")
    assert line("mamba2", d_model=32, headdim=4) == (
        "mamba2: mamba-ssm + causal-conv1d (Triton takes heads of 8, 16, 32 or 64, not 4)"
    )
    assert "(Triton takes a d_state of 16, 32, 64 or 128, not 24)" in line("mamba2", d_state=24)
    assert line("swa", torch.float32) == (
        "swa: FlexAttention (Triton takes bfloat16 and float16 only; flash-attn takes bfloat16 and "
        "float16 only)"
    )


def test_attention_is_triton_s_on_the_gpus_it_was_measured_on(install, monkeypatch):
    install("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major, names in ((8, ["swa", "mlp"]), (9, ["mha", "swa", "mlp"]), (10, ["swa", "mlp"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        said = [
            lines(build_operator(n, **SMALL[n]), torch.bfloat16)[0] for n in ("mha", "swa", "mlp")
        ]
        assert [s.partition(":")[0] for s in said if ": Triton" in s] == names
        assert ("was measured on Hopper GPUs alone" in said[0]) == (major != 9)


def test_the_table_decides_by_length(install, monkeypatch):
    monkeypatch.setitem(
        accelerators.PREFERRED, SlidingWindowAttention, ("swa", ((0, ()), (100, ("flex",))))
    )
    operator = build_operator("swa", **SMALL["swa"])
    assert lines(operator, tokens=100) == ["swa: FlexAttention"]
    assert paths(operator) == ["flex"]
    assert lines(operator, tokens=99) == ["swa: PyTorch (fastest at 99 tokens)"]
    assert paths(operator) == ["torch"]


def test_each_kind_is_checked_once_wherever_it_is(install, monkeypatch):
    install("causal-conv1d", **AGREEING["causal-conv1d"])
    small = SMALL["hyena_y"]
    pair = GraftPair(build_operator("mha", **SMALL["mha"]), build_operator("hyena_y", **small))
    same, shorter = build_operator("hyena_y", **small), build_operator("hyena_y", **small, l_max=20)
    checked = []
    plain = accelerators.disagreement
    monkeypatch.setattr(
        accelerators, "disagreement", lambda op, *a: checked.append(op) or plain(op, *a)
    )
    model = nn.ModuleList([pair, same, shorter]).requires_grad_(False)
    said = lines(model)
    assert said[0].startswith("mha: PyTorch (") and said[1:] == ["hyena_y: causal-conv1d"]
    assert checked == [pair.graft, shorter]
    assert paths(model) == ["torch"] + ["causal-conv1d"] * 3
    with torch.inference_mode():
        assert lines(build_operator("hyena_y", **small)) == ["hyena_y: causal-conv1d"]


# -- FlexAttention ------------------------------------------------------------------


@pytest.mark.parametrize("window", [(4, 4), (3, 0), (0, 9), (200, 5), (130, 300)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
def test_flex_attention_is_dense_attention(install, tokens, window):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 8, requires_grad=True) for _ in "qkv")
    weights = torch.randn(2, 3, tokens, 8)
    results = []
    for attend in (dense_window_attention, flex_window_attention):
        y = attend(q, k, v, window, scale=0.7)
        results.append([y, *torch.autograd.grad((y * weights).sum(), (q, k, v))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(4, 4), (3, 0), (0, 9), (200, 5), (130, 300)], ids=str)
@pytest.mark.parametrize("tokens", [1, 128, 129, 700])
def test_flex_attention_visits_the_blocks_that_hold_seen_keys(tokens, window):
    """The unfused path on the CPU reads the mask alone; the kernels go by these blocks."""
    left, right = window

    def seen(b, h, query, key):
        return (key >= query - left) & (key <= query + right)

    whole = flex_module.create_block_mask(seen, None, None, tokens, tokens, device="cpu")
    assert torch.equal(window_mask(tokens, window, CPU).to_dense().bool(), whole.to_dense().bool())


def test_flex_attention_compiles_whole_and_has_no_dropout(install):
    torch.manual_seed(0)
    operator = build_operator("swa", **SMALL["swa"])
    x = torch.randn(2, 150, 32)
    expected = operator(x)
    operator.path = "flex"
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), expected.detach()) < 1e-5
    operator.dropout = 0.1
    with pytest.raises(ValueError, match=r"no dropout.*0\.1"):
        operator(x)


# -- flags ------------------------------------------------------------------------


def test_the_flag():
    parser = arguments.parser("")
    arguments.add_machine(parser)
    assert parser.parse_args([]).kernels == "auto"
    assert parser.parse_args(["--kernels", "torch"]).kernels == "torch"
