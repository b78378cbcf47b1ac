"""Softmax attention in Triton, between the projection that gives queries, keys and values side by
side and the one that takes what the heads gave, for the short sequences of DiT.

PyTorch's own kernels are made for long ones. At 256 tokens in heads of 72 channels, cuDNN pads the
heads to 128, launches three kernels for a backward pass, and hands back three gradients that have
to be copied side by side. Here heads are cut into a power of two and a rest, and a backward pass is
two kernels, which write the gradients where they belong.
"""

import math

import torch

LOG2_E = 1 / math.log(2)
LEAST_DOT = 16  # channels of a product in Triton

# Tokens of a block, by kernel, and how Triton compiles it: where queries see most keys, and where
# they see a few beside them. The blocks of queries in one backward kernel are as long as those of
# keys in the other. With one stage Triton 3.6 has made wrong sums of "attention".
PLANS = {
    "attention": ((64, 64, 4, 2), (64, 16, 4, 4)),
    "backward_queries": ((64, 32, 4, 2), (64, 16, 4, 3)),
    "backward_keys": ((64, 64, 4, 3), (16, 64, 4, 3)),
}


def fused_attention(
    qkv: torch.Tensor,
    heads: int,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries, keys and values that lie side by side, on CUDA in half precision.

    Args:
        qkv: [B, T, 3 * heads * d]; of a token all queries, then all keys, then all values.
        window: token i sees tokens i - window[0] .. i + window[1]; None: all.
        scale: of the products of queries and keys; None: 1 / sqrt(d).
        bias: [3 * heads * d], of the projection that gave qkv, by `bias_apart`.

    Returns:
        [B, T, heads * d]
    """
    width = qkv.shape[-1] // (3 * heads)
    left, right = qkv.shape[1:2] * 2 if window is None else window
    return _attend(qkv, bias, heads, left, right, width**-0.5 if scale is None else scale)[0]


# The kernels as operations of our own: opaque to torch.compile, and with their gradients.


@torch.library.custom_op("grafts::attention", mutates_args=())
def _attend(
    qkv: torch.Tensor, bias: torch.Tensor | None, heads: int, left: int, right: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> [B, T, heads * d]; and float32 [B, heads, T] the logarithms (to base 2) of the sums."""
    from models.operators import attention_kernels

    qkv = qkv.contiguous()
    out, sums = _empty_results(qkv, heads)
    B, T, _ = qkv.shape
    settings, plan = _settings(qkv, heads, left, right), _plan("attention", left, right, T)
    attention_kernels.attention[(B * heads * -(-T // plan["QUERIES"]),)](
        qkv, out, sums, heads, scale * LOG2_E,
        TURNS=_turns(settings, plan["QUERIES"], plan["KEYS"]), **settings, **plan,
    )  # fmt: skip
    return out, sums


@torch.library.custom_op("grafts::attention_backward", mutates_args=())
def _attend_backward(
    qkv: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    left: int,
    right: int,
    scale: float,
    biased: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradient of qkv; and if `biased` its sums over all tokens, float32 [3 * heads * d]"""
    from models.operators import attention_kernels

    B, heads, T = sums.shape
    qkv, grad = qkv.contiguous(), grad.contiguous()
    dqkv, shares = torch.empty_like(qkv), torch.empty_like(sums)
    settings = _settings(qkv, heads, left, right)
    plan = _plan("backward_queries", left, right, T)
    blocks = -(-T // plan["QUERIES"])
    totals = sums.new_empty((B * blocks, qkv.shape[2]) if biased else (0, 0))
    rest = shares, totals, heads, scale * LOG2_E, scale
    attention_kernels.backward_queries[(B * heads * blocks,)](
        qkv, out, sums, grad, dqkv, *rest, TOTALS=biased,
        TURNS=_turns(settings, plan["QUERIES"], plan["KEYS"]), **settings, **plan,
    )  # fmt: skip
    plan = _plan("backward_keys", left, right, T)
    attention_kernels.backward_keys[(B * heads * blocks,)](
        qkv, sums, grad, dqkv, *rest, TOTALS=biased,
        TURNS=_turns(settings, plan["KEYS"], plan["QUERIES"]), **settings, **plan,
    )  # fmt: skip
    return dqkv, totals.sum(0)


def _empty_results(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), qkv.new_empty((B, heads, T), dtype=torch.float32)


@_attend.register_fake
def _(qkv, bias, heads, left, right, scale):
    return _empty_results(qkv, heads)


@_attend_backward.register_fake
def _(qkv, out, sums, grad, left, right, scale, biased):
    total = sums.new_empty(qkv.shape[2] if biased else 0)
    return qkv.new_empty(qkv.shape), total


def _keep(ctx, inputs, output):
    qkv, bias, _, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.bias = None if bias is None else bias.dtype


def _backward(ctx, grad, _):
    rest = *ctx.rest, ctx.bias is not None
    dqkv, total = _attend_backward(*ctx.saved_tensors, grad, *rest)
    return dqkv, None if ctx.bias is None else total.to(ctx.bias), *[None] * 4


_attend.register_autograd(_backward, setup_context=_keep)


def _plan(kernel: str, left: int, right: int, tokens: int) -> dict[str, int]:
    queries, keys, warps, stages = PLANS[kernel][left + right < tokens // 4]
    return {"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def _settings(qkv: torch.Tensor, heads: int, left: int, right: int) -> dict[str, int]:
    """What both kernels are compiled for: tokens, their windows, and how a head is cut."""
    tokens, width = qkv.shape[1], qkv.shape[2] // (3 * heads)
    main = max(LEAST_DOT, 1 << (width.bit_length() - 1))
    rest = max(0, width - main)
    return {
        "TOKENS": tokens,
        "LEFT": min(left, tokens),
        "RIGHT": min(right, tokens),
        "D": width,
        "MAIN": main,
        "TAIL": max(LEAST_DOT, 1 << (rest - 1).bit_length()) if rest else 0,
    }


def _turns(settings: dict[str, int], block: int, step: int) -> int:
    """How many blocks of `step` tokens, which begin at its multiples, a block of as many as `block`
    can see, or can be seen by."""
    touched = block + settings["LEFT"] + settings["RIGHT"] + step - 2
    return min(touched // step + 1, -(-settings["TOKENS"] // step))
