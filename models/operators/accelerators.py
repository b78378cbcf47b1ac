"""Which kernels the operators of a model run on: PyTorch's, which define them, or faster ones.

    for line in accelerate(model, device, torch.bfloat16, model.num_tokens):
        print(line)                                  # swa: Triton 3.6.0

Every operator with faster equivalents has modules with a `path`, "torch" to begin with. On CUDA a
kernel is taken where PREFERRED names it, its package can be imported, and on a small input its
output and gradients agree with PyTorch's in the precision that will be used. Nothing here
fails because a package is missing or broken: the line of the operator says what ran instead, and
why.
"""

import contextlib
import copy
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from models.operators import modulation
from models.operators.attention import FullAttention, SlidingWindowAttention
from models.operators.hyena import CausalConv, HyenaSE, HyenaX, HyenaY, MlpHyenaX
from models.operators.mamba2 import Mamba2
from models.operators.mlp import GeluMlp
from models.operators.modulation import Modulated

# Of `disagreement`. Products of TF32 are off by about 3e-4 and more: they do not pass as float32.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
CHECKED_BATCH = 2
DEVICES = ("cuda",)  # where there are kernels
# What importing a package that was built for another PyTorch, CUDA or Python may raise
BROKEN = (ImportError, OSError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Kernel:
    """A faster path of one kind of module.

    name: for the log. sites: the classes whose `path` names it. module: what has to be importable.
    distribution: the package, None for PyTorch itself. unfit: of an operator and a precision, why
    it cannot run, or "".
    """

    name: str
    sites: tuple[type[nn.Module], ...]
    module: str
    distribution: str | None
    unfit: Callable[[nn.Module, torch.dtype], str]


def _no_dropout(operator: nn.Module, dtype: torch.dtype) -> str:
    return f"has no dropout, here {operator.dropout}" if operator.dropout else ""


def _half_precision(operator: nn.Module, dtype: torch.dtype, most: int = 256) -> str:
    if dtype == torch.float32:
        return "takes bfloat16 and float16 only"
    projection = operator.proj if isinstance(operator, FullAttention) else operator.out_proj
    width = projection.in_features // operator.num_heads
    return f"takes heads of 8, 16 .. {most}, not {width}" if width % 8 or width > most else ""


def _our_triton(operator: nn.Module, dtype: torch.dtype) -> str:
    other = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9
    if isinstance(operator, FullAttention) and other:
        return "was measured on Hopper GPUs alone"
    if isinstance(operator, GeluMlp | Mamba2) and dtype == torch.float32:
        return "takes bfloat16 and float16 only"
    if isinstance(operator, GeluMlp):
        return ""
    if isinstance(operator, Mamba2):
        if operator.headdim not in (8, 16, 32, 64):
            return f"takes heads of 8, 16, 32 or 64, not {operator.headdim}"
        fits = operator.d_state in (16, 32, 64, 128)
        return "" if fits else f"takes a d_state of 16, 32, 64 or 128, not {operator.d_state}"
    if isinstance(operator, SlidingWindowAttention) and operator.dropout:
        return _no_dropout(operator, dtype)
    return _half_precision(operator, dtype, most=128)


def _short_filters(operator: nn.Module, dtype: torch.dtype) -> str:
    for conv in _sites(operator, CausalConv):
        channels, _, taps = conv.weight.shape
        if not 2 <= taps <= 4:
            return f"takes 2 to 4 taps, not {taps}"
        if channels % 8 and not isinstance(operator, MlpHyenaX):  # whose memory runs along L
            return f"takes channels in multiples of 8, not {channels}"
    if isinstance(operator, Mamba2) and (operator.d_inner % 8 or operator.heads % 8):
        return f"takes widths in multiples of 8, not {operator.d_inner} with {operator.heads} heads"
    return ""


KERNELS = {
    "triton": Kernel(
        "Triton",
        (FullAttention, SlidingWindowAttention, GeluMlp, Mamba2),
        "triton",
        "triton",
        _our_triton,
    ),
    "flash-attn": Kernel(
        "flash-attn", (SlidingWindowAttention,), "flash_attn", "flash-attn", _half_precision
    ),
    "flex": Kernel(
        "FlexAttention",
        (SlidingWindowAttention,),
        "torch.nn.attention.flex_attention",
        None,
        _no_dropout,
    ),
    "causal-conv1d": Kernel(
        "causal-conv1d",
        (CausalConv,),
        "causal_conv1d.cpp_functions",
        "causal-conv1d",
        _short_filters,
    ),
    "mamba-ssm": Kernel(
        "mamba-ssm",
        (Mamba2,),
        "mamba_ssm.ops.triton.ssd_combined",
        "mamba-ssm",
        lambda operator, dtype: "",
    ),
}

# From how many tokens on which kernels are faster than PyTorch, best first: docs/performance.md has
# the measurements. Kernels of different modules of an operator do not exclude each other.
PREFERRED: dict[type[nn.Module], tuple[str, tuple[tuple[int, tuple[str, ...]], ...]]] = {
    FullAttention: ("mha", ((0, ("triton",)), (257, ()))),
    GeluMlp: ("mlp", ((0, ("triton",)),)),
    SlidingWindowAttention: (
        "swa",
        ((0, ("triton", "flash-attn")), (257, ("triton", "flash-attn", "flex"))),
    ),
    HyenaSE: ("hyena_se", ((0, ("causal-conv1d",)),)),
    HyenaX: ("hyena_x", ((0, ("causal-conv1d",)),)),
    HyenaY: ("hyena_y", ((0, ("causal-conv1d",)),)),
    MlpHyenaX: ("mlp_hyena_x", ((0, ("causal-conv1d",)),)),
    Mamba2: ("mamba2", ((0, ("triton", "mamba-ssm", "causal-conv1d")),)),
}


def accelerate(
    model: nn.Module, device: torch.device, dtype: torch.dtype, tokens: int, kernels: str = "auto"
) -> list[str]:
    """Sets the path of every operator of a model on its device, before anything is compiled.

    dtype: of autocast; float32 for none. tokens: the length that the operators will see. kernels:
    "auto", or "torch" for PyTorch alone. -> lines for the log, one for each kind of operator (class
    and configuration); none where no operator has a choice.
    """
    kinds: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if type(module) in PREFERRED:
            kinds.setdefault(kind_of(module), []).append(module)
    blocks = [module for module in model.modules() if isinstance(module, Modulated)]
    for operator in (*itertools.chain(*kinds.values()), *blocks):
        reset(operator)
    if device.type not in DEVICES:
        return [f"operators: PyTorch (on the {device.type.upper()})"] if kinds else []
    if kernels == "torch":
        return ["operators: PyTorch (as --kernels says)"] if kinds else []
    lines = [_settle(operators, device, dtype, tokens) for operators in kinds.values()]
    return list(dict.fromkeys([*lines, *_settle_modulation(blocks, device, dtype)]))


def _settle(
    operators: list[nn.Module], device: torch.device, dtype: torch.dtype, tokens: int
) -> str:
    """Sets the paths of operators of one kind -> their line."""
    name, ranges = PREFERRED[type(operators[0])]
    wanted = [paths for least, paths in ranges if tokens >= least][-1]
    taken: dict[type, str] = {}
    refused = [] if wanted else [f"fastest at {tokens} tokens"]
    for path in wanted:
        kernel = KERNELS[path]
        if taken.keys() & set(kernel.sites):
            continue
        reason = refusal(operators[0], path, device, dtype, tokens)
        if reason:
            refused.append(f"{kernel.name} {reason}")
            continue
        taken |= dict.fromkeys(kernel.sites, versioned(path))
        for operator in operators:
            set_path(operator, path)
    ran = " + ".join(dict.fromkeys(taken.values())) or "PyTorch"
    notes = refused or ([operators[0].exception] if hasattr(operators[0], "exception") else [])
    return f"{name}: {ran}" + (f" ({'; '.join(notes)})" if notes else "")


def _settle_modulation(
    blocks: list[Modulated], device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Sets the path of norms and modulation of the blocks of a model -> a line for each width."""
    lines = []
    for width in dict.fromkeys(block.width for block in blocks):
        reason = modulation.refusal(width, device, dtype)
        for block in blocks:
            if block.width == width and not reason:
                block.path = "triton"
        lines.append(f"norm and modulation: {f'PyTorch (Triton {reason})' if reason else 'Triton'}")
    return lines


def refusal(
    operator: nn.Module, path: str, device: torch.device, dtype: torch.dtype, tokens: int
) -> str:
    """Why `operator` cannot run on `path`, or "" when it can; the operator is left as it is."""
    kernel = KERNELS[path]
    reason = kernel.unfit(operator, dtype)
    if reason:
        return reason
    try:
        importlib.import_module(kernel.module)
    except BROKEN as error:
        top = kernel.module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            return "is not installed"
        return f"does not load: {_first_line(error)}"
    try:
        error = disagreement(operator, path, device, dtype, tokens)
    except Exception as failure:  # a kernel fails in its own ways; any of them rules it out
        return f"does not run here: {_first_line(failure)}"
    if not error <= TOLERANCES[dtype]:  # NaN is no agreement
        return f"disagrees by {error:.0e} in {str(dtype).removeprefix('torch.')}"
    return ""


def disagreement(
    operator: nn.Module, path: str, device: torch.device, dtype: torch.dtype, tokens: int
) -> float:
    """How far `path` is from PyTorch on random weights and inputs, two sequences of `tokens`.

    Measured from PyTorch in float32, over its norm: what `path` is farther off than PyTorch is in
    the same precision, at most over the output and the gradients of the input and of every
    parameter. Draws no global random numbers.
    """
    with torch.inference_mode(False), torch.enable_grad(), _exact_products():
        generator = torch.Generator(device).manual_seed(0)
        trial = copy.deepcopy(operator).eval().requires_grad_()
        for parameter in trial.parameters():
            _perturb(parameter, generator)
        width = next(m.in_features for m in trial.modules() if isinstance(m, nn.Linear))
        shape = (CHECKED_BATCH, tokens, width)
        x = torch.randn(shape, device=device, generator=generator).requires_grad_()
        weights = torch.randn(shape, device=device, generator=generator)

        def results(use: str | None, dtype: torch.dtype) -> list[torch.Tensor]:
            reset(trial)
            if use is not None:
                set_path(trial, use)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                y = trial(x).float()
            loss = (y * weights[:, : y.shape[1]]).sum()
            return [y.detach(), *torch.autograd.grad(loss, (x, *trial.parameters()))]

        exact = results(None, torch.float32)
        plain = exact if dtype == torch.float32 else results(None, dtype)
        mine = results(path, dtype)
        gaps = zip(_distances(mine, exact), _distances(plain, exact), strict=True)
        return max(ours - pytorchs for ours, pytorchs in gaps)


def _distances(some: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Norms of the differences over the norms of `exact`; infinity where something is NaN."""
    return [
        ((a.double() - b).norm() / b.double().norm().clamp(min=1e-30)).nan_to_num(torch.inf).item()
        for a, b in zip(some, exact, strict=True)
    ]


def reset(operator: nn.Module) -> None:
    """Every part of `operator` on PyTorch."""
    for module in _sites(operator, Modulated, *(s for k in KERNELS.values() for s in k.sites)):
        module.path = "torch"


def set_path(operator: nn.Module, path: str) -> None:
    """The parts of `operator` that can run on `path`, on that; its other parts stay."""
    for module in _sites(operator, *KERNELS[path].sites):
        module.path = path


def versioned(path: str) -> str:
    """The path's name for the log, with the version of its package."""
    kernel = KERNELS[path]
    if kernel.distribution is None:
        return kernel.name
    try:
        return f"{kernel.name} {importlib.metadata.version(kernel.distribution)}"
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, not installed
        return kernel.name


def _sites(operator: nn.Module, *kinds: type[nn.Module]) -> Iterator[nn.Module]:
    return (module for module in operator.modules() if isinstance(module, kinds))


def kind_of(operator: nn.Module) -> str:
    """The same for modules of the same classes, settings and shapes of parameters."""
    parts = []
    for module in operator.modules():
        settings = [(k, v) for k, v in vars(module).items() if k[0] != "_" and k != "path"]
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        parts.append((type(module).__name__, settings, shapes))
    return repr(parts)


def _perturb(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Filters and maps that start as the identity or zero would hide a wrong kernel."""
    noise = torch.randn(parameter.shape, device=parameter.device, generator=generator)
    with torch.no_grad():
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * noise)


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products without TF32, as the reference has to be."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
