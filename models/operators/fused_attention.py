"""Softmax attention in Triton, between the projection that gives queries, keys and values side by
side and the one that takes what the heads gave, for the short sequences of DiT, and for windows.

PyTorch's own kernels are made for long sequences. At 256 tokens in heads of 72 channels, cuDNN pads
the heads to 128, launches three kernels for a backward pass, and hands back three gradients that
have to be copied side by side. Here heads are cut into a power of two and a rest, and a backward
pass is two kernels, which write the gradients where they belong.
"""

import math

import torch

LOG2_E = 1 / math.log(2)
LEAST_DOT = 16  # channels of a product in Triton

# Tokens of a block, by kernel, and how Triton compiles it: where queries see most keys, and where
# they see a few beside them. All have more than one stage: see `_settings`.
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
) -> torch.Tensor:
    """Attention of queries, keys and values that lie side by side, on CUDA in half precision.

    Args:
        qkv: [B, T, 3 * heads * d]; of a token all queries, then all keys, then all values. d: at
            most 128.
        window: token i sees tokens i - window[0] .. i + window[1]; None: all.
        scale: of the products of queries and keys; None: 1 / sqrt(d).

    Returns:
        [B, T, heads * d]
    """
    width = qkv.shape[-1] // (3 * heads)
    left, right = qkv.shape[1:2] * 2 if window is None else window
    return _attend(qkv, heads, left, right, width**-0.5 if scale is None else scale)[0]


# The kernels as operations of our own: opaque to torch.compile, and with their gradients.


@torch.library.custom_op("grafts::attention", mutates_args=())
def _attend(
    qkv: torch.Tensor, heads: int, left: int, right: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> [B, T, heads * d]; and float32 [B, heads, T] the logarithms (to base 2) of the sums."""
    from models.operators import attention_kernels

    qkv = qkv.contiguous()
    out, sums = _empty_results(qkv, heads)
    B, T, _ = qkv.shape
    settings = _settings("attention", T, qkv.shape[2] // (3 * heads), left, right)
    attention_kernels.attention[(B * heads * -(-T // settings["QUERIES"]),)](
        qkv, out, sums, heads, scale * LOG2_E, **settings
    )
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
) -> torch.Tensor:
    """-> gradient of qkv"""
    from models.operators import attention_kernels

    B, heads, T = sums.shape
    qkv, grad = qkv.contiguous(), grad.contiguous()
    dqkv, shares = torch.empty_like(qkv), torch.empty_like(sums)
    shape = T, qkv.shape[2] // (3 * heads), left, right
    settings = _settings("backward_queries", *shape)
    rest = shares, heads, scale * LOG2_E, scale
    attention_kernels.backward_queries[(B * heads * -(-T // settings["QUERIES"]),)](
        qkv, out, sums, grad, dqkv, *rest, **settings
    )
    settings = _settings("backward_keys", *shape)
    attention_kernels.backward_keys[(B * heads * -(-T // settings["KEYS"]),)](
        qkv, sums, grad, dqkv, *rest, **settings
    )
    return dqkv


def _empty_results(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), qkv.new_empty((B, heads, T), dtype=torch.float32)


@_attend.register_fake
def _(qkv, heads, left, right, scale):
    return _empty_results(qkv, heads)


@_attend_backward.register_fake
def _(qkv, out, sums, grad, left, right, scale):
    return qkv.new_empty(qkv.shape)


def _keep(ctx, inputs, output):
    qkv, _, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output)


def _backward(ctx, grad, _):
    return _attend_backward(*ctx.saved_tensors, grad, *ctx.rest), *[None] * 4


_attend.register_autograd(_backward, setup_context=_keep)


def _settings(kernel: str, tokens: int, width: int, left: int, right: int) -> dict[str, int]:
    """What a kernel is compiled for: tokens, their windows and blocks, and how a head of `width`
    channels is cut.

    A loop of one turn, or of one stage, becomes straight code. Of that with two products a step
    Triton 3.6's ptxas (12.8) takes the place of an operand from a register that nothing has
    written: wrong sums, or reads outside of memory. There a head stays whole.
    """
    queries, keys, warps, stages = PLANS[kernel][left + right < tokens // 4]
    left, right = min(left, tokens), min(right, tokens)
    block, step = (keys, queries) if kernel == "backward_keys" else (queries, keys)
    turns = _turns(tokens, left, right, block, step)
    main = max(LEAST_DOT, 1 << (width.bit_length() - 1))
    rest = max(0, width - main)
    if rest and turns == 1:
        main, rest = 2 * main, 0
    return {
        "TOKENS": tokens,
        "LEFT": left,
        "RIGHT": right,
        "D": width,
        "MAIN": main,
        "TAIL": max(LEAST_DOT, 1 << (rest - 1).bit_length()) if rest else 0,
        "QUERIES": queries,
        "KEYS": keys,
        "TURNS": turns,
        "num_warps": warps,
        "num_stages": stages,
    }


def _turns(tokens: int, left: int, right: int, block: int, step: int) -> int:
    """How many blocks of `step` tokens, which begin at its multiples, a block of as many as `block`
    can see, or can be seen by."""
    touched = block + left + right + step - 2
    return min(touched // step + 1, -(-tokens // step))
