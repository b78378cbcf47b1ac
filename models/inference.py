"""What makes a trained model faster to run, and no longer one to train."""

from functools import cache

import torch
from timm.models.vision_transformer import Mlp
from torch import nn

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
FLOAT8_MULTIPLE = 16  # of widths, as the product needs it


def quicken(model: nn.Module, dtype: torch.dtype, float8: bool = False) -> None:
    """Prepares a DiT on its device for inference under autocast to `dtype`, in place.

    The weights of matrix products and patches are stored in `dtype`; autocast would cast them at
    every call, to the same numbers. Norms, tables, scans and their parameters stay as they are.
    On CUDA in bf16 the MLPs' GELU becomes a part of the product before it.

    float8: the products in both slots of all blocks take 8-bit floats, see `Float8Linear`.

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
