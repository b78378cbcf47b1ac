"""The plain MLP of the mlp slot, at any expansion ratio."""

import math

import torch
from timm.models.vision_transformer import Mlp
from torch import nn

from models.operators.fused_gelu import bias_apart, fused_gelu


class TanhGelu(nn.GELU):
    """The tanh form of GELU: x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Compiled as x sigmoid(2 u), the same: Inductor's kernels for tanh are bound by its arithmetic,
    not by memory.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class GeluMlp(Mlp):
    """timm's Mlp with the tanh form of GELU: [..., D] -> [..., D].

    `path` names what computes GELU, and the gradient of the bias before it, in training: "torch" or
    "triton" (accelerators.py chooses).
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0):
        super().__init__(width, hidden, act_layer=TanhGelu, drop=dropout)
        self.path = "torch"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path != "triton" or not torch.is_grad_enabled():
            return super().forward(x)
        y, bias = bias_apart(self.fc1, x)
        y = self.act(y) if bias is None else fused_gelu(y, bias)
        return self.drop2(self.fc2(self.drop1(y)))


def build_mlp(d_model: int, expansion_ratio: float = 4.0, dropout: float = 0.0) -> GeluMlp:
    """`GeluMlp`: [B,T,D] -> [B,T,D].

    The hidden width is `expansion_ratio * d_model`; ValueError when that is no whole number.
    """
    hidden = d_model * expansion_ratio
    if hidden != int(hidden):
        raise ValueError(
            f"mlp: expansion_ratio {expansion_ratio} of d_model {d_model} gives {hidden} hidden "
            "channels: choose a ratio that gives a whole number"
        )
    return GeluMlp(d_model, int(hidden), dropout)
