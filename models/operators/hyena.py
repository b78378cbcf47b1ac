"""Gated short-convolution operators: three for the mha slot, one for the mlp slot.

The token mixers are the Hyena-SE, Hyena-X and Hyena-Y of "Exploring Diffusion Transformer Designs
via Grafting" (arXiv 2506.05340); tokens are read in raster order and the convolutions are causal.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv(nn.Module):
    """Depthwise causal convolution over the last dimension: [B, channels, L] -> [B, channels, L].

    Position i reads positions i-taps+1..i of its own channel, with zeros before the start; the last
    tap multiplies the current position. `identity` starts as a pass-through, otherwise the filter
    starts like nn.Conv1d: uniform within 1 / sqrt(taps).

    `path` names what computes it: "torch" or "causal-conv1d" (accelerators.py chooses).
    """

    def __init__(self, channels: int, taps: int, bias: bool = True, identity: bool = False):
        super().__init__()
        self.identity = identity
        self.path = "torch"
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        channels, _, taps = self.weight.shape
        bound = 1 / math.sqrt(taps)
        with torch.no_grad():
            if self.identity:
                self.weight.zero_()[..., -1] = 1
            else:
                self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                if self.identity:
                    self.bias.zero_()
                else:
                    self.bias.uniform_(-bound, bound)

    def forward(self, x: torch.Tensor, silu: bool = False) -> torch.Tensor:
        """`silu`: SiLU of the convolution."""
        return causal_conv(x, self.weight, self.bias, self.path, silu)

    def extra_repr(self) -> str:
        channels, _, taps = self.weight.shape
        return f"{channels}, taps={taps}, bias={self.bias is not None}"


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    path: str = "torch",
    silu: bool = False,
) -> torch.Tensor:
    """The function of CausalConv: x [B, channels, L], weight [channels, 1, taps] -> like x."""
    channels, _, taps = weight.shape
    if path == "causal-conv1d":
        return fused_causal_conv(x, weight.squeeze(1), bias, silu)
    padded = F.conv1d(x, weight, bias, padding=taps - 1, groups=channels)
    y = padded[..., : x.shape[-1]]
    return F.silu(y) if silu else y


# causal-conv1d's kernel as an operation of our own: opaque to torch.compile, and with its gradient.


@torch.library.custom_op("grafts::causal_conv", mutates_args=())
def fused_causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """CausalConv by causal-conv1d, on CUDA: x [B, channels, L], weight [channels, taps] -> like x.

    Taps 2 to 4. In memory x runs along L or along the channels, then in multiples of 8.
    """
    from causal_conv1d.cpp_functions import causal_conv1d_fwd_function

    return causal_conv1d_fwd_function(x, weight, bias, None, None, None, silu)


@torch.library.custom_op("grafts::causal_conv_backward", mutates_args=())
def _causal_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

    dx, dweight, dbias, _ = causal_conv1d_bwd_function(
        x, weight, bias, grad, None, None, None, None, False, silu
    )
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


@fused_causal_conv.register_fake
def _(x, weight, bias, silu):
    return torch.empty_like(x)


@_causal_conv_backward.register_fake
def _(grad, x, weight, bias, silu):
    empty = weight.new_empty(0)
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        empty if bias is None else torch.empty_like(bias),
    )


def _keep_for_backward(ctx, inputs, output):
    x, weight, bias, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _causal_conv_backward(grad, x, weight, bias, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None


fused_causal_conv.register_autograd(_backward, setup_context=_keep_for_backward)


class _TokenHyena(nn.Module):
    """q * f(k * v) between two projections; the subclasses choose where the convolutions are.

    `in_proj` yields q, k and v side by side, `short_filter` (the featurizer) convolves all three
    along the tokens before they meet, `inner_filter` convolves k * v.
    """

    def __init__(self, d_model: int, l_max: int, short_taps: int | None, inner_taps: int | None):
        super().__init__()
        self.d_model = d_model
        self.l_max = l_max
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        if short_taps is not None:
            self.short_filter = CausalConv(3 * d_model, short_taps)
        if inner_taps is not None:
            self.inner_filter = CausalConv(d_model, inner_taps, identity=True)

    def featurize(self, qkv: torch.Tensor) -> torch.Tensor:
        """[B, 3D, T] -> [B, 3D, min(T, l_max)]"""
        return self.short_filter(qkv)[..., : self.l_max]

    def mix(self, kv: torch.Tensor) -> torch.Tensor:
        """[B, D, T] -> [B, D, T]"""
        return self.inner_filter(kv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.featurize(self.in_proj(x).transpose(1, 2))  # B 3D T
        q, k, v = qkv.chunk(3, dim=1)
        y = q * self.mix(k * v)  # B D T
        return self.out_proj(y.transpose(1, 2))


class HyenaSE(_TokenHyena):
    """Featurizer and inner filter, both of `short_filter_order` taps. [B,T,D] -> [B,T,D]

    Beyond `l_max` tokens only the first `l_max` come out.
    """

    def __init__(self, d_model: int, l_max: int = 1_000_000, short_filter_order: int = 4):
        super().__init__(d_model, l_max, short_filter_order, short_filter_order)


class HyenaX(_TokenHyena):
    """Featurizer only: q * (k * v). [B,T,D] -> [B,T,D]; only the first `l_max` tokens come out."""

    def __init__(self, d_model: int, l_max: int = 1_000_000, short_filter_order: int = 4):
        super().__init__(d_model, l_max, short_filter_order, None)

    def mix(self, kv: torch.Tensor) -> torch.Tensor:
        return kv


class HyenaY(_TokenHyena):
    """Inner filter only: q * conv(k * v). [B,T,D] -> [B,T,D]

    Raises ValueError beyond `l_max` tokens.
    """

    def __init__(self, d_model: int, l_max: int = 1_000_000, inner_filter_len: int = 4):
        super().__init__(d_model, l_max, None, inner_filter_len)

    def featurize(self, qkv: torch.Tensor) -> torch.Tensor:
        if qkv.shape[-1] > self.l_max:
            raise ValueError(
                f"hyena_y got {qkv.shape[-1]} tokens but was built with l_max {self.l_max}: "
                "raise l_max in its configuration"
            )
        return qkv


class MlpHyenaX(nn.Module):
    """q * (k * v) over channels, for the mlp slot. [B, l_max, D] -> [B, l_max, D]

    q, k and v are `expansion_ratio * d_model` wide. The convolution runs causally along the
    channels, before q, k and v are split, with one filter per token position; tokens do not mix.
    Raises ValueError for any other number of tokens than `l_max`.
    """

    def __init__(
        self, d_model: int, l_max: int, expansion_ratio: int = 2, short_filter_order: int = 4
    ):
        super().__init__()
        width = expansion_ratio * d_model
        self.l_max = l_max
        self.in_proj = nn.Linear(d_model, 3 * width)
        self.out_proj = nn.Linear(width, d_model)
        self.short_filter = CausalConv(l_max, short_filter_order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != self.l_max:
            raise ValueError(
                f"mlp_hyena_x got {x.shape[1]} tokens but has one filter for each of "
                f"{self.l_max}: set l_max to the number of tokens"
            )
        q, k, v = self.short_filter(self.in_proj(x)).chunk(3, dim=-1)  # B T rD each
        return self.out_proj(q * (k * v))
