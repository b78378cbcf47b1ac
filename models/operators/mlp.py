"""The plain MLP of the mlp slot, at any expansion ratio."""

from functools import partial

from timm.models.vision_transformer import Mlp
from torch import nn


def build_mlp(d_model: int, expansion_ratio: float = 4.0, dropout: float = 0.0) -> Mlp:
    """timm's Mlp with the tanh form of GELU: [B,T,D] -> [B,T,D].

    The hidden width is `expansion_ratio * d_model`; ValueError when that is no whole number.
    """
    hidden = d_model * expansion_ratio
    if hidden != int(hidden):
        raise ValueError(
            f"mlp: expansion_ratio {expansion_ratio} of d_model {d_model} gives {hidden} hidden "
            "channels: choose a ratio that gives a whole number"
        )
    gelu = partial(nn.GELU, approximate="tanh")
    return Mlp(d_model, hidden_features=int(hidden), act_layer=gelu, drop=dropout)
