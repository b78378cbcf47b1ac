"""What makes a trained model faster to run, and no longer one to train."""

import torch
from timm.models.vision_transformer import Mlp
from torch import nn

from models.operators.stacked import lay_side_by_side, obstacle
from models.weights import SLOTS

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
FLOAT8_MULTIPLE = 16  # of widths, as the product needs it


def quicken(model: nn.Module, dtype: torch.dtype, float8: bool = False) -> None:
    """Prepares a DiT on its device for inference under autocast to `dtype`, in place.

    The weights of matrix products and patches are stored in `dtype`; autocast would cast them at
    every call, to the same numbers. Norms, tables, scans and their parameters stay as they are.
    The weights of parallel pairs come to lie side by side. On CUDA in bf16 the MLPs' GELU becomes a
    part of the product before it.

    float8: the products in both slots of all blocks take 8-bit floats, see `Float8Linear`.

    Raises:
        ValueError: float8 where there is none, or with parallel pairs.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.to(dtype)
    for first in map(int, model.merges):
        pair = model.blocks[first], model.blocks[first + 1]
        lay_side_by_side(*(block.adaLN_modulation for block in pair))
        for slot in SLOTS.values():
            operators = [getattr(block, slot) for block in pair]
            if not obstacle(*operators):
                lay_side_by_side(*operators)
    device = next(model.parameters()).device
    alone = [model.blocks[layer[0]] for layer in model.layers if len(layer) == 1]
    if float8:
        _check_float8(device, dtype, len(alone) == len(model.layers))
        for block in alone:
            for slot in (block.attn, block.mlp):
                _to_float8(slot)
    elif device.type == "cuda" and dtype == torch.bfloat16:
        for block in alone:
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
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight)  # out in
        self.register_buffer("scale", scale.T.contiguous())  # 1 out
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, scale = to_float8(x.flatten(0, -2))
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


def _check_float8(device: torch.device, dtype: torch.dtype, no_pairs: bool) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError("--fp8: needs an Ada or Hopper GPU or a newer one; leave it out")
    if dtype != torch.bfloat16:
        raise ValueError("--fp8: its results are bf16; leave out --precision fp32, or --fp8")
    if not no_pairs:
        raise ValueError("--fp8: parallel pairs stack weights, which 8-bit ones are not made for")


def _to_float8(slot: nn.Module) -> None:
    for module in list(slot.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not (
                layer.in_features % FLOAT8_MULTIPLE or layer.out_features % FLOAT8_MULTIPLE
            ):
                setattr(module, name, Float8Linear(layer))


def _is_tanh_gelu(act: nn.Module) -> bool:
    return isinstance(act, nn.GELU) and act.approximate == "tanh"
