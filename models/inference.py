"""What makes a trained model faster to run, and no longer one to train."""

import copy
from functools import cache

import torch
from timm.models.vision_transformer import Mlp
from torch import nn

from models import cublaslt
from models.operators.accelerators import kind_of
from models.restructure import STACKED_ROWS
from models.selection import GraftChoice, GraftPair

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
FLOAT8_MULTIPLE = 16  # of widths, as the product needs it


def quicken(model: nn.Module, dtype: torch.dtype, float8: bool = False) -> list[str]:
    """Prepares a DiT on its device for inference under autocast to `dtype`, in place.

    The weights of matrix products and patches are stored in `dtype`; autocast would cast them at
    every call, to the same numbers. Norms, tables, scans and their parameters stay as they are.
    On CUDA in bf16 the MLPs' GELU becomes a part of the product before it, and parallel pairs whose
    blocks are alike run as one block where samples are few, see `stack`.

    float8: the products in both slots of all blocks take 8-bit floats, see `Float8Linear`.

    Afterwards weights can be loaded into the model, but neither is it moved nor copied: a pair's
    blocks and the one that stands for them hold the same memory.

    Returns:
        Lines for the log: how the pairs run, if there are any.

    Raises:
        ValueError: float8 where there is none.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(dtype)
    device = next(model.parameters()).device
    if float8:
        _check_float8(device, dtype)
        for block in model.blocks:
            gelu = isinstance(block.mlp, Mlp) and _is_tanh_gelu(block.mlp.act)
            _to_float8(block.attn)
            _to_float8(block.mlp)
            if gelu and isinstance(block.mlp.fc2, Float8Linear):
                block.mlp.act, block.mlp.fc2.gelu = nn.Identity(), True
    elif device.type == "cuda" and dtype == torch.bfloat16:
        for block in model.blocks:
            if isinstance(block.mlp, Mlp) and _is_tanh_gelu(block.mlp.act):
                block.mlp.fc1 = GeluLinear(block.mlp.fc1)
                block.mlp.act = nn.Identity()
        return stack_pairs(model)
    return [TWO_PASSES] if model.merges else []


TWO_PASSES = "parallel pairs: two passes, one a block"


def stack_pairs(model: nn.Module) -> list[str]:
    """Gives a DiT's parallel pairs their stacked form, where there is one -> lines for the log."""
    if not model.merges:
        return []
    reason = cublaslt.refusal(next(model.parameters()).device)
    if reason:
        return [f"{TWO_PASSES} (stacked products {reason})"]
    apart = []
    for first, merge in ((int(key), merge) for key, merge in model.merges.items()):
        block = None
        if isinstance(merge, nn.Linear):  # and no open choice
            block = stack(model.blocks[first], model.blocks[first + 1])
        if block is None:
            apart.append(f"{first} and {first + 1}")
        else:
            model.stacks[str(first)] = block
    lines = []
    if model.stacks:
        few = f"up to {STACKED_ROWS} tokens in a pass"
        lines.append(f"parallel pairs: one pass of both blocks {few}: {len(model.stacks)}")
    if apart:
        lines.append(f"{TWO_PASSES}, of blocks that do not stack: {'; '.join(apart)}")
    return lines


def stack(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """Two DiTBlocks as one that gives what both add to B samples, as if these were 2 B: what the
    first one adds to each, then what the second one adds.

    Their linear layers lie side by side in it, and their own weights become views of that. None
    where the blocks differ in more than weights, have tensors outside of linear layers with biases,
    widths that are no multiples of 8, or choices that are still open.
    """
    layers = {n: m for n, m in first.named_modules() if [*m.parameters(recurse=False)]}
    alike = kind_of(first) == kind_of(second) and not [*first.buffers()]
    is_open = any(isinstance(m, (GraftPair, GraftChoice)) for m in first.modules())
    if not alike or is_open or not all(map(_stacks, layers.values())):
        return None
    both = copy.deepcopy(first, {id(p): p for p in first.parameters()})
    for name, layer in layers.items():
        both.set_submodule(name, StackedLinear([layer, second.get_submodule(name)]))
    both.adaLN_modulation.insert(0, Twice())
    return both


def _stacks(layer: nn.Module) -> bool:
    linear = isinstance(layer, (nn.Linear, GeluLinear)) and layer.bias is not None
    return linear and not any(n % 8 for n in layer.weight.shape)


class Twice(nn.Module):
    """Everything once more, after the last: [B, ...] -> [2 B, ...]"""

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        return torch.cat([c, c])


class StackedLinear(nn.Module):
    """Linear layers of one shape side by side: each takes its share of the samples.

    [G * B, ..., in] -> [G * B, ..., out], of G layers. They may be `GeluLinear`s. Their tensors
    become views of the stacked ones.
    """

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.gelu = isinstance(layers[0], GeluLinear)
        with torch.no_grad():
            weight, bias = (
                torch.stack([getattr(layer, name) for layer in layers])
                for name in ("weight", "bias")
            )
        _, self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight, persistent=False)  # the layers' own are stored
        self.register_buffer("bias", bias, persistent=False)
        for layer, own_weight, own_bias in zip(layers, weight, bias, strict=True):
            layer.weight.data, layer.bias.data = own_weight, own_bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups, width, depth = self.weight.shape
        rows = x.to(self.weight.dtype).reshape(groups, -1, depth)
        return stacked_linear(rows, self.weight, self.bias, self.gelu).view(*x.shape[:-1], width)


@torch.library.custom_op("grafts::stacked_linear", mutates_args=())
def stacked_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool
) -> torch.Tensor:
    """x [G,M,K], weight [G,N,K], bias [G,N] -> [G,M,N], or the tanh form of GELU of it."""
    if x.is_cuda:
        return cublaslt.linear(x, weight, bias, gelu)
    return cublaslt.by_pytorch(x, weight, bias, gelu)


@stacked_linear.register_fake
def _(x, weight, bias, gelu):
    return x.new_empty((*x.shape[:2], weight.shape[1]))


class GeluLinear(nn.Module):
    """A linear layer and the tanh form of GELU in one kernel, in half precision on CUDA.

    [..., in] -> [..., out]. Takes over the tensors of `linear`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).to(self.weight.dtype)
        y = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])


class Float8Linear(nn.Module):
    """A linear layer whose product takes 8-bit floats (e4m3), for Ada and Hopper GPUs or newer.

    [..., in] -> [..., out] bf16. Every row of the input and every row of the weight has its own
    scale, so that its largest entry becomes the largest 8-bit float; sums are kept in float32.
    gelu: of the tanh form of GELU of the input.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        weight, scale = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight)  # out in
        self.register_buffer("scale", scale.T.contiguous())  # 1 out
        self.bias, self.gelu = linear.bias, gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = fused_to_float8(x.flatten(0, -2), self.gelu)
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.unflatten(0, x.shape[:-1])


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N,K] -> 8-bit floats [N,K] and the float32 scale [N,1] of each row: rows ~ first * second"""
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / FLOAT8_MAX
    return (rows / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


@torch.library.custom_op("grafts::to_float8", mutates_args=())
def fused_to_float8(rows: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_float8` of rows [N,K], or of their GELU, in one pass; on CUDA."""
    import triton

    rows = rows.contiguous()
    N, K = rows.shape
    small = torch.empty_like(rows, dtype=FLOAT8)
    scale = rows.new_empty((N, 1), dtype=torch.float32)
    block = triton.next_power_of_2(K)
    _float8_kernel()[(N,)](
        rows, small, scale, K, FLOAT8_MAX, GELU=gelu, BLOCK=block, num_warps=4 + 4 * (block > 2048)
    )
    return small, scale


@fused_to_float8.register_fake
def _(rows, gelu):
    return (
        rows.new_empty(rows.shape, dtype=FLOAT8),
        rows.new_empty((len(rows), 1), dtype=torch.float32),
    )


@cache
def _float8_kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(rows, small, scale, K, largest, GELU: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < K
        x = tl.load(rows + row * K + column, mask=inside, other=0.0).to(tl.float32)
        if GELU:  # x * sigmoid(2 u) is 0.5 x (1 + tanh(u))
            x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        factor = tl.maximum(tl.max(tl.abs(x), 0), 1e-12) / largest
        y = tl.minimum(tl.maximum(x / factor, -largest), largest)
        tl.store(small + row * K + column, y.to(small.dtype.element_ty), mask=inside)
        tl.store(scale + row, factor)

    return kernel


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit floats: Ada and Hopper GPUs or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _check_float8(device: torch.device, dtype: torch.dtype) -> None:
    if not has_float8(device):
        raise ValueError("--fp8: needs an Ada or Hopper GPU or a newer one; leave it out")
    if dtype != torch.bfloat16:
        raise ValueError("--fp8: its results are bf16; leave out --precision fp32, or --fp8")


def _to_float8(slot: nn.Module) -> None:
    for module in list(slot.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not (
                layer.in_features % FLOAT8_MULTIPLE or layer.out_features % FLOAT8_MULTIPLE
            ):
                setattr(module, name, Float8Linear(layer))


def _is_tanh_gelu(act: nn.Module) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == "tanh"
