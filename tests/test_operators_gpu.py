"""The operators on a CUDA device: golden outputs on every path that exists there, compiled paths.

python -m pytest -m gpu tests/test_operators_gpu.py

A path whose package is absent, or that cannot run a case, is skipped with the reason.
"""

import copy

import pytest
import torch
from test_fused_attention import distances
from test_fused_scan import distances as scan_distances
from test_operators import golden_cases, relative_error, shapes

from models.operators import OPERATORS, accelerators, build_operator, fused_scan
from models.operators import attention as attention_module
from training.compilation import MODEL_OPTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TORCH = ("dense", "blocked", "torch")  # of these, swa has the first two
PATHS = [("swa", path) for path in ("dense", "blocked", "triton", "flex", "flash-attn")]
PATHS += [("hyena", path) for path in ("torch", "causal-conv1d")]
PATHS += [("mamba2", path) for path in ("torch", "causal-conv1d", "triton", "mamba-ssm")]
TF32_ONLY = ("mamba-ssm",)  # their products are not float32's, and loading says so


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def put_on(operator, path, dtype, tokens):
    """Skips where the path cannot run; fails where it runs and disagrees."""
    reason = accelerators.refusal(operator, path, CUDA, dtype, tokens)
    known = path in TF32_ONLY and dtype == torch.float32
    if "does not run" in reason or ("disagrees" in reason and not known):
        pytest.fail(f"{path} {reason}")
    if reason:
        pytest.skip(f"{path} {reason}")
    accelerators.set_path(operator, path)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(("group", "path"), PATHS)
def test_golden(golden, monkeypatch, group, path, dtype, tolerance):
    if path == "blocked":
        monkeypatch.setattr(attention_module, "DENSE_TOKENS", 0)
    compared = 0
    for name, case, arrays, fill, seed in golden_cases(golden, group):
        if dtype == torch.bfloat16 and not name.endswith("_strong"):
            continue
        for output, spec in zip(case["outputs"], case.get("inputs", []), strict=False):
            operator = build_operator(case["operator"], **case["construct"])
            assert shapes(operator) == case["state_dict"]
            fill.fill_(operator, seed, case["fill"]["scale"])
            operator.to(CUDA)
            x = fill.input_float(spec["name"], spec["shape"], seed, spec["scale"]).to(CUDA)
            if path not in TORCH:
                put_on(operator, path, dtype, x.shape[1])
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
                error = relative_error(operator(x).float().cpu(), arrays[output["key"]])
            assert error < tolerance, f"{name} {output['key']}: {error:.1e}"
            compared += 1
    counts = {"hyena": (16, 7), "swa": (4, 2), "mamba2": (4, 2)}[group]
    assert compared == counts[dtype == torch.bfloat16]


WIDE = {  # as published, but narrower
    "mha": {"dim": 128, "num_heads": 8},
    "swa": {"embed_dim": 128, "num_heads": 8},
    "hyena_se": {"d_model": 128},
    "mamba2": {"d_model": 128, "d_state": 64, "headdim": 16},
    "mlp_hyena_x": {"d_model": 128, "l_max": 300},
}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mha", "triton"),
        ("swa", "triton"),
        ("swa", "flex"),
        ("swa", "flash-attn"),
        ("hyena_se", "causal-conv1d"),
        ("mlp_hyena_x", "causal-conv1d"),
        ("mamba2", "causal-conv1d"),
        ("mamba2", "triton"),
        ("mamba2", "mamba-ssm"),
    ],
)
def test_compiled_paths_follow_pytorch(name, path):
    """Whole, as CUDA graphs, forward and backward: what training and sampling run."""
    torch.manual_seed(0)
    plain = build_operator(name, **WIDE[name]).to(CUDA)
    fast = copy.deepcopy(plain)
    put_on(fast, path, torch.bfloat16, 300)
    options = {**MODEL_OPTIONS, "triton.cudagraphs": True}
    compiled = torch.compile(fast, fullgraph=True, options=options)
    x, weights = torch.randn(2, 2, 300, 128, device=CUDA)
    x.requires_grad_()
    results = {}
    for key, run, operator in (("plain", plain, plain), ("compiled", compiled, fast)):
        for _ in range(3):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = run(x).float()
            grads = torch.autograd.grad((y * weights).sum(), (x, *operator.parameters()))
            results[key] = [t.detach().clone() for t in (y, *grads)]
    for expected, mine in zip(results["plain"], results["compiled"], strict=True):
        assert (mine - expected).norm() < 3e-2 * expected.norm()
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        y = compiled(x.detach()).float()
    assert (y - results["plain"][0]).norm() < 3e-2 * y.norm()


@pytest.mark.parametrize("window", [None, (4, 4), (0, 100)], ids=str)
@pytest.mark.parametrize("tokens", [1, 50, 256, 300])
@pytest.mark.parametrize("width", [8, 64, 72, 96, 128])
def test_fused_attention_is_softmax_attention(width, tokens, window):
    """And the same every time: no sum in it depends on what runs first."""
    case = (tokens, 3, width, window, None)
    found = distances(case, torch.bfloat16, "cuda")
    assert max(found) < 1e-2, found
    assert found == distances(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("tokens", [2, 50, 256, 300])
@pytest.mark.parametrize(
    ("heads", "width", "d_state", "groups"),
    [(144, 16, 64, 1), (8, 8, 16, 1), (6, 32, 32, 3), (4, 64, 128, 2)],
)
@pytest.mark.parametrize("programs", [1, 528])
def test_fused_scan_is_the_scan(monkeypatch, programs, heads, width, d_state, groups, tokens):
    """Divided as many samples are, and few; and the same every time: no sum in it depends on what
    runs first."""
    monkeypatch.setattr(fused_scan, "PROGRAMS", programs)
    case = (2, tokens, heads, width, d_state, groups, 0.1)
    found = scan_distances(case, torch.bfloat16, "cuda")
    assert max(found) < 1e-2, found
    assert found == scan_distances(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", ["mha", "swa"])
def test_blocks_of_dit_attend_by_triton(name):
    """The published widths at 256 tokens; a kernel that disagrees would be refused."""
    operator = build_operator(name, **{OPERATORS[name].width: 1152, "num_heads": 16}).to(CUDA)
    (line,) = accelerators.accelerate(operator, CUDA, torch.bfloat16, tokens=256)
    assert line.startswith(f"{name}: Triton"), line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_accelerate_settles_every_operator(dtype):
    """The published widths and lengths: whatever is installed, the paths agree with PyTorch."""
    torch.manual_seed(0)
    operators = {
        "swa": {"embed_dim": 1152, "num_heads": 16},
        "hyena_y": {"d_model": 1152},
        "mlp_hyena_x": {"d_model": 1152, "l_max": 1024},
        "mamba2": {"d_model": 1152, "d_state": 64, "headdim": 16},
    }
    model = torch.nn.ModuleDict(
        {name: build_operator(name, **config) for name, config in operators.items()}
    ).to(CUDA)
    lines = accelerators.accelerate(model, CUDA, dtype, tokens=1024)
    print(*lines, sep="\n")
    assert [line.partition(":")[0] for line in lines] == list(operators)
    assert not any("disagrees" in line and "mamba-ssm" not in line for line in lines)
    if dtype == torch.float32:
        assert "mamba-ssm 2" not in lines[-1].partition("(")[0]
