"""The operators against golden outputs, against naive float64 versions, and their configuration."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.operators import OPERATORS, _note_hint, build_operator, complete_config, mamba2
from models.operators import attention as attention_module
from models.operators.mlp import TanhGelu

SMALL = {  # one small configuration of every operator
    "mha": {"dim": 32, "num_heads": 4},
    "swa": {"embed_dim": 32, "num_heads": 4},
    "hyena_se": {"d_model": 32},
    "hyena_x": {"d_model": 32},
    "hyena_y": {"d_model": 32},
    "mamba2": {"d_model": 32, "d_state": 16, "headdim": 8, "chunk_size": 4},
    "mlp": {"d_model": 32, "expansion_ratio": 3},
    "mlp_hyena_x": {"d_model": 32, "l_max": 10},
}
MODEL = {"hidden_size": 32, "num_heads": 4, "num_tokens": 10}


def relative_error(mine, golden):
    golden = torch.as_tensor(golden)
    assert mine.shape == golden.shape
    return ((mine - golden).abs().max() / golden.abs().max()).item()


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def golden_cases(golden, group):
    doc, arrays, fill = golden(group)
    for name, case in doc["cases"].items():
        yield name, case, arrays, fill, doc["seed"]


def run_golden(case, output, spec, arrays, fill, seed):
    op = build_operator(case["operator"], **case["construct"])
    assert shapes(op) == case["state_dict"]
    fill.fill_(op, seed, case["fill"]["scale"])
    x = fill.input_float(spec["name"], spec["shape"], seed, spec["scale"])
    return relative_error(op(x), arrays[output["key"]])


def test_fill_draws_the_expected_streams(golden):
    doc, _, fill = golden("hyena")
    for name, expected in doc["fill_check"]["values"].items():
        if name.startswith("input."):
            continue
        np.testing.assert_array_equal(
            fill.weight_array(name, (4,), doc["seed"]), np.float32(expected)
        )


@pytest.mark.parametrize("group", ["hyena", "swa", "mamba2"])
def test_operators_match_golden(golden, group):
    compared = 0
    for name, case, arrays, fill, seed in golden_cases(golden, group):
        for output, spec in zip(case["outputs"], case.get("inputs", []), strict=False):
            error = run_golden(case, output, spec, arrays, fill, seed)
            assert error < 1e-5, f"{name} {output['key']}: {error:.1e}"
            compared += 1
    assert compared == {"hyena": 16, "swa": 4, "mamba2": 4}[group]


def test_hyena_edge_cases(golden):
    doc, _, _ = golden("hyena")
    case = doc["cases"]["hyena_se_filter_length"]
    assert shapes(build_operator("hyena_se", **case["construct"])) == case["state_dict"]

    case = doc["cases"]["hyena_y_beyond_lmax"]
    op = build_operator("hyena_y", **case["construct"])
    with pytest.raises(ValueError, match="20 tokens.*l_max 12"):
        op(torch.zeros(case["inputs"][0]["shape"]))

    op = build_operator("mlp_hyena_x", **doc["cases"]["mlp_hyena_x"]["construct"])
    for tokens in (15, 17):
        with pytest.raises(ValueError, match=f"{tokens} tokens"):
            op(torch.zeros(2, tokens, 32))


def test_full_size_names_shapes_and_counts(golden):
    doc, _, _ = golden("state_dicts")
    cases = {n: c for n, c in doc["cases"].items() if n.startswith("operator:")}
    assert len(cases) == 6
    for name, case in cases.items():
        operator = name.removeprefix("operator:")
        with torch.device("meta"):
            op = build_operator(operator, **case["construct"])
        assert shapes(op) == case["state_dict"], name
        assert sum(p.numel() for p in op.parameters()) == case["parameters"]["total"], name
        spec = OPERATORS[operator]
        assert spec.tensors <= op.state_dict().keys() <= spec.tensors | spec.optional_tensors


@pytest.mark.parametrize("name", OPERATORS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    op = build_operator(name, **SMALL[name])
    x = torch.randn(2, 10, 32, requires_grad=True)
    y = op(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for key, parameter in op.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
        assert parameter.grad.isfinite().all(), key
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_tables_describe_the_operator(name):
    spec = OPERATORS[name]
    names = build_operator(name, **SMALL[name]).state_dict().keys()
    assert spec.tensors <= names <= spec.tensors | spec.optional_tensors
    assert not spec.tensors & spec.optional_tensors
    assert spec.inherits.keys() <= names
    original = build_operator(
        "mha" if spec.slot == "mha" else "mlp", **SMALL["mha" if spec.slot == "mha" else "mlp"]
    ).state_dict()
    assert set(spec.inherits.values()) <= original.keys()


MIN_CUT = "aot_eager_decomp_partition"  # divides forward and backward as Inductor does


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_gelu_is_its_tanh_form(mode):
    """Value and gradient against float64; nothing is kept for the gradient but the input."""
    act = TanhGelu()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.gelu(exact, approximate="tanh").sum().backward()
    with hooks:
        y = (torch.compile(act, backend=MIN_CUT) if mode == "compiled" else act)(x)
    y.sum().backward()
    torch.compiler.reset()
    expected = torch.nn.functional.gelu(exact, approximate="tanh")
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=5e-6, rtol=0)
    assert len(kept) == 1


def test_mlp_uses_the_tanh_gelu():
    torch.manual_seed(0)
    op = build_operator("mlp", d_model=8, expansion_ratio=3)
    x = 3 * torch.randn(2, 3, 8)
    h = op.fc1(x)
    h = 0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(op(x), op.fc2(h), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compile_whole(name):
    torch.manual_seed(0)
    op = build_operator(name, **SMALL[name])
    x = torch.randn(2, 10, 32)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), op(x))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_run_in_bf16_autocast(name):
    torch.manual_seed(0)
    op = build_operator(name, **SMALL[name])
    x = torch.randn(2, 10, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op(x)
    assert relative_error(y.float(), op(x)) < 5e-2


def test_mamba2_scans_and_norms_in_float32_under_autocast(monkeypatch):
    torch.manual_seed(0)
    op = build_operator("mamba2", **SMALL["mamba2"])
    scan, given = mamba2.chunked_scan, []

    def note(*tensors):
        assert not torch.is_autocast_enabled("cpu")  # its products would be bf16
        given.extend(t.dtype for t in tensors if torch.is_tensor(t))

    def seen(*arguments):
        note(*arguments)
        return scan(*arguments)

    monkeypatch.setattr(mamba2, "chunked_scan", seen)
    op.norm.register_forward_pre_hook(lambda *_: note())
    with torch.autocast("cpu", torch.bfloat16):
        op(torch.randn(2, 10, 32))
    assert given == [torch.float32] * 5  # u, dt, A, b, c
    y, z = torch.randn(2, 3, op.d_inner).bfloat16().unbind(0)
    assert torch.equal(op.norm(y, z), op.norm(y.float(), z.float()))


def naive_window(q, k, v, window, scale):
    """One query at a time, in float64."""
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        low, high = max(0, i - window[0]), i + window[1] + 1
        scores = (q[:, :, i : i + 1] @ k[:, :, low:high].transpose(-1, -2)) * scale
        out[:, :, i : i + 1] = scores.softmax(-1) @ v[:, :, low:high]
    return out


@pytest.mark.parametrize(
    ("tokens", "window", "scale"),
    [
        (1, (4, 4), None),
        (7, (4, 4), None),
        (40, (3, 0), 0.7),
        (65, (4, 4), None),
        (150, (0, 9), None),
    ],
)
def test_window_attention_matches_naive(tokens, window, scale):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    expected = naive_window(q, k, v, window, scale or 8**-0.5)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for attend in (
        attention_module.dense_window_attention,
        attention_module.blocked_window_attention,
    ):
        mine = attend(q, k, v, window, scale=scale)
        torch.testing.assert_close(mine, expected)
        grads = torch.autograd.grad((mine * weights).sum(), (q, k, v))
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b)


def test_swa_is_the_same_on_both_sides_of_the_dense_limit(monkeypatch):
    torch.manual_seed(0)
    op = build_operator("swa", embed_dim=32, num_heads=4, window_size=[4, 4])
    x = torch.randn(1, 150, 32)
    dense = op(x)
    monkeypatch.setattr(attention_module, "DENSE_TOKENS", 100)
    torch.testing.assert_close(op(x), dense, rtol=1e-5, atol=1e-6)


def test_swa_takes_long_sequences_and_adds_no_state():
    op = build_operator("swa", embed_dim=16, num_heads=2)
    assert op(torch.randn(1, 5000, 16)).shape == (1, 5000, 16)
    assert not list(op.buffers())


def naive_mamba2(op, x):
    """The recurrence token by token in float64, from the operator's own weights."""
    w = {name: tensor.double() for name, tensor in op.state_dict().items()}
    x = x.double()
    B, T, _ = x.shape
    H, P, G, N = op.heads, op.headdim, op.ngroups, op.d_state
    projected = F.linear(x, w["in_proj.weight"], w.get("in_proj.bias"))
    z, xbc, dt = projected.split([H * P, H * P + 2 * G * N, H], dim=-1)
    taps = w["conv1d.weight"].shape[-1]
    conv = torch.zeros_like(xbc) + w.get("conv1d.bias", 0)
    for i in range(T):
        for tap in range(taps):
            j = i - (taps - 1) + tap
            if j >= 0:
                conv[:, i] += w["conv1d.weight"][:, 0, tap] * xbc[:, j]
    u, b, c = F.silu(conv).split([H * P, G * N, G * N], dim=-1)
    dt = F.softplus(dt + w["dt_bias"])
    low, high = op.dt_limit
    dt = dt.clamp(low, math.inf if high is None else high)
    A = -w["A_log"].exp()
    D = w["D"].view(H, -1)
    state = torch.zeros(B, H, P, N, dtype=torch.float64)
    ys = []
    for i in range(T):
        ui = u[:, i].view(B, H, P)
        bi, ci = (v[:, i].view(B, G, N).repeat_interleave(H // G, dim=1) for v in (b, c))
        state = state * (dt[:, i] * A).exp()[..., None, None]
        state = state + (dt[:, i, :, None] * ui)[..., None] * bi[:, :, None, :]
        ys.append(((state * ci[:, :, None, :]).sum(-1) + D * ui).flatten(1))
    y, gate = torch.stack(ys, 1), F.silu(z)
    if op.norm is None:
        y = y * gate
    else:
        y = y if op.norm.norm_before_gate else y * gate
        parts = y.view(B, T, G, -1)
        parts = parts / (parts.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = parts.view(B, T, -1) * w["norm.weight"]
        y = y * gate if op.norm.norm_before_gate else y
    return F.linear(y, w["out_proj.weight"], w.get("out_proj.bias"))


@pytest.mark.parametrize(
    ("tokens", "config"),
    [
        (1, {}),
        (3, {"chunk_size": 8}),
        (37, {"chunk_size": 8, "dt_limit": [0.0, None]}),
        (64, {"chunk_size": 16, "ngroups": 2, "bias": True, "conv_bias": False}),
        (45, {"chunk_size": 7, "norm_before_gate": True, "ngroups": 4, "D_has_hdim": True}),
        (33, {"rmsnorm": False, "dt_limit": (0.05, 0.2), "d_conv": 3}),
        (130, {}),
    ],
)
def test_mamba2_matches_the_recurrence(golden, tokens, config):
    _, _, fill = golden("mamba2")
    op = build_operator("mamba2", d_model=24, d_state=12, headdim=6, **config)
    fill.fill_(op, seed=tokens, scale=0.3)
    x = fill.input_float("x", (2, tokens, 24), seed=tokens)
    assert relative_error(op(x).double(), naive_mamba2(op, x)) < 5e-6


def test_mamba2_keeps_small_decays_beside_large_ones(golden):
    """Step sizes from 1e-3 to 10 in one chunk: running sums alone lose the small decays."""
    _, _, fill = golden("mamba2")
    op = build_operator("mamba2", d_model=24, d_state=12, headdim=6, chunk_size=64)
    fill.fill_(op, seed=5, scale=0.3)
    with torch.no_grad():
        op.in_proj.weight[-op.heads :] *= 4
    x = fill.input_float("x", (2, 200, 24), seed=5)
    assert relative_error(op(x).double(), naive_mamba2(op, x)) < 3e-6


def test_published_initialisation():
    torch.manual_seed(0)
    for name in ("hyena_se", "hyena_y"):
        op = build_operator(name, d_model=8)
        expected = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(8, 1, 4)
        assert torch.equal(op.inner_filter.weight, expected)
        assert not op.inner_filter.bias.any()
    op = build_operator("mamba2", d_model=256, headdim=1)
    A, dt = op.A_log.exp(), F.softplus(op.dt_bias)
    assert A.min() >= 0.999 and A.max() <= 16.001 and 7.5 < A.mean() < 9.5
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.2
    assert torch.equal(op.D, torch.ones(512))


PUBLISHED = {
    "swa": {
        "embed_dim": 32, "num_heads": 4, "num_heads_kv": None, "cross_attn": False,
        "qkv_proj_bias": True, "out_proj_bias": True, "dropout": 0.0, "softmax_scale": None,
        "causal": False, "layer_idx": None, "dwconv": False, "rotary_emb_dim": 0,
        "rotary_emb_base": 10000.0, "rotary_emb_scale_base": None,
        "rotary_emb_interleaved": False, "window_size": [4, 4], "fused_bias_fc": False,
        "use_flash_attn": True, "return_residual": False, "checkpointing": False,
        "device": None, "dtype": None,
    },
    "hyena_se": {
        "d_model": 32, "l_max": 1000000, "order": 2, "inner_factor": 1, "num_heads": 1,
        "num_blocks": 1, "short_filter_order": 4, "inner_filter_len": 4, "fused_bias_fc": True,
    },
    "mlp_hyena_x": {
        "d_model": 32, "l_max": 16, "expansion_ratio": 2, "order": 2, "inner_factor": 1,
        "num_heads": 1, "num_blocks": 1, "short_filter_order": 4, "inner_filter_len": 4,
    },
    "mamba2": {
        "d_model": 32, "d_state": 16, "d_conv": 4, "expand": 2, "headdim": 8, "chunk_size": 8,
        "ngroups": 1, "rmsnorm": True, "norm_before_gate": False, "bias": False,
        "conv_bias": True, "D_has_hdim": False, "dt_limit": [0.0, None],
    },
    "mlp": {"d_model": 32, "expansion_ratio": 6, "dropout": 0.0},
    "mha": {"dim": 32, "qkv_bias": True, "num_heads": 4},
}  # fmt: skip


def test_keys_of_published_configurations_are_accepted():
    for name, config in PUBLISHED.items():
        build_operator(name, **config)
    for name in ("hyena_x", "hyena_y"):
        build_operator(name, **PUBLISHED["hyena_se"])
    assert shapes(build_operator("mlp", d_model=8, expansion_ratio=3.0))["fc1.weight"] == [24, 8]


def test_hints_are_noted_once(caplog):
    _note_hint.cache_clear()
    with caplog.at_level(logging.INFO, logger="models.operators"):
        for _ in range(2):
            build_operator("swa", **PUBLISHED["swa"])
    assert [r.getMessage().split(" is ")[0] for r in caplog.records] == ["swa: use_flash_attn"]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("swa", {"causal": True}, "causal True.*false"),
        ("swa", {"cross_attn": True}, "cross_attn True.*false"),
        ("swa", {"rotary_emb_dim": 16}, "rotary_emb_dim 16.*0"),
        ("swa", {"num_heads_kv": 2}, "num_heads_kv 2.*num_heads 4"),
        ("swa", {"window_size": 4}, "window_size 4.*two whole numbers"),
        ("swa", {"window_size": [-1, -1]}, "two whole numbers"),
        ("swa", {"dwconv": True}, "dwconv"),
        ("swa", {"return_residual": True}, "return_residual"),
        ("swa", {"num_heads": 5}, "num_heads 5.*embed_dim 32"),
        ("mha", {"num_heads": 5}, "num_heads 5.*dim 32"),
        ("hyena_se", {"order": 3}, "order 3.*2"),
        ("hyena_se", {"num_heads": 2}, "num_heads 2"),
        ("hyena_se", {"filter_order": 2}, "unknown key 'filter_order'.*short_filter_order"),
        ("mamba2", {"headdim": 7}, "headdim 7.*64"),
        ("mamba2", {"ngroups": 3}, "ngroups 3.*8 heads"),
        ("mamba2", {"dt_limit": [0.1, 0.0]}, "dt_limit"),
        ("mamba2", {"d_state": "16"}, "d_state '16'.*whole number"),
        ("mlp", {"expansion_ratio": 0.33}, "expansion_ratio 0.33.*whole number"),
        ("mlp", {"dropout": 1.0}, "dropout 1.0"),
        ("mlp_hyena_x", {"l_max": True}, "l_max True"),
    ],
)
def test_unsupported_settings_are_refused(name, change, words):
    with pytest.raises(ValueError, match=words):
        build_operator(name, **PUBLISHED[name] | change)


def test_unknown_operator_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match="'performer'.*mamba2"):
        build_operator("performer")
    with pytest.raises(ValueError, match="d_model, l_max missing"):
        build_operator("mlp_hyena_x", expansion_ratio=2)


def test_complete_config_takes_widths_from_the_model():
    hyena = {"d_model": 32, "l_max": 1_000_000}
    expected = {
        "mha": {"dim": 32, "num_heads": 4, "qkv_bias": True},
        "swa": {
            "embed_dim": 32,
            "num_heads": 4,
            "window_size": [4, 4],
            "qkv_proj_bias": True,
            "out_proj_bias": True,
            "dropout": 0.0,
            "softmax_scale": None,
        },
        "hyena_se": {**hyena, "short_filter_order": 4},
        "hyena_x": {**hyena, "short_filter_order": 4},
        "hyena_y": {**hyena, "inner_filter_len": 4},
        "mamba2": {
            "d_model": 32,
            "d_state": 16,
            "d_conv": 4,
            "expand": 2,
            "headdim": 64,
            "chunk_size": 32,
            "ngroups": 1,
            "rmsnorm": True,
            "norm_before_gate": False,
            "bias": False,
            "conv_bias": True,
            "D_has_hdim": False,
            "dt_limit": [0.0, None],
        },
        "mlp": {"d_model": 32, "expansion_ratio": 4.0, "dropout": 0.0},
        "mlp_hyena_x": {
            "d_model": 32,
            "l_max": 10,
            "expansion_ratio": 2,
            "short_filter_order": 4,
        },
    }
    assert expected.keys() == OPERATORS.keys()
    for name, arguments in expected.items():
        given = {"d_state": 16} if name == "mamba2" else {}
        before = dict(given)
        assert complete_config(name, given, **MODEL) == arguments
        assert given == before
        assert complete_config(name, arguments, **MODEL) == arguments
        build_operator(name, **arguments)


def test_complete_config_drops_what_has_no_effect():
    given = {"fused_bias_fc": True, "order": 2, "short_filter_order": 4, "inner_filter_len": 9}
    assert complete_config("hyena_x", given, **MODEL) == complete_config("hyena_x", {}, **MODEL)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("swa", {"embed_dim": 64}, "embed_dim 64.*hidden size 32"),
        ("mha", {"num_heads": 5}, "num_heads 5.*hidden size 32"),
        ("swa", {"num_heads_kv": 2}, "num_heads_kv 2.*num_heads 4"),
        ("hyena_y", {"l_max": 9}, "l_max 9.*10 tokens"),
        ("hyena_x", {"inner_filter_len": 4}, "inner_filter_len without short_filter_order"),
        ("hyena_y", {"short_filter_order": 4}, "short_filter_order without inner_filter_len"),
        ("mlp_hyena_x", {"l_max": 11}, "l_max 11.*10 tokens"),
        ("mamba2", {"headdim": 5}, "headdim 5"),
        ("mamba2", {"chunks": 5}, "unknown key 'chunks'"),
        ("mlp", {"expansion_ratio": 0}, "expansion_ratio 0"),
    ],
)
def test_complete_config_refuses_what_cannot_run(name, config, words):
    with pytest.raises(ValueError, match=words):
        complete_config(name, config, **MODEL)
