"""Two operators of one kind run as one: the branches of a parallel pair.

Their inputs lie along a leading dimension of 2, every pair of linear maps is one batched product,
every pair of depthwise convolutions one convolution of twice the channels, and attention sees twice
the batch. At small batches, where one branch leaves most of a GPU idle, that takes hardly longer
than one branch. The parameters stay the operators' own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Mlp
from torch import nn

from models.operators.attention import SlidingWindowAttention
from models.operators.hyena import CausalConv, HyenaSE, HyenaX, HyenaY, MlpHyenaX, causal_conv


def obstacle(first: nn.Module, second: nn.Module) -> str:
    """Why two operators cannot run as one, for a log line; "" when they can."""
    kind = type(first)
    if kind is not type(second):
        return f"{kind.__name__} beside {type(second).__name__}"
    if kind not in STACKED:
        return f"{kind.__name__} has no stacked form"
    if _watched(first) or _watched(second):
        return f"{kind.__name__} is watched by hooks"
    settings_of, _ = STACKED[kind]
    settings = settings_of(first)
    if settings is None or settings != settings_of(second):
        return f"{kind.__name__} of other settings"
    return ""


def run_both(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[first(x[0]), second(x[1])] as one: [2,B,T,D] -> [2,B,T,D]; `obstacle` must be ""."""
    _, run = STACKED[type(first)]
    return run(first, second, x)


def linear_both(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Two linear maps of equal shapes as one product: [2, ..., in] -> [2, ..., out].

    One after the other where they are more than plain nn.Linear, such as with LoRA updates.
    """
    if type(first) is not nn.Linear or type(second) is not nn.Linear:
        return torch.stack([first(x[0]), second(x[1])])
    if hasattr(first, "both_weights"):
        weight = first.both_weights
    else:
        weight = torch.stack([first.weight, second.weight])  # 2 out in
    y = torch.bmm(x.flatten(1, -2), weight.transpose(1, 2))  # 2 rows out
    if first.bias is not None:
        # not by baddbmm, which first copies the bias into every row of the result
        y = y + torch.stack([first.bias, second.bias]).to(y.dtype)[:, None]
    return y.unflatten(1, x.shape[1:-1])


def lay_side_by_side(first: nn.Module, second: nn.Module) -> None:
    """Lets the linear maps of two like modules lie in one tensor, for inference, in place.

    `linear_both` would copy the weights at every call.
    """
    for one, other in zip(first.modules(), second.modules(), strict=True):
        if type(one) is nn.Linear and type(other) is nn.Linear:
            both = torch.stack([one.weight.detach(), other.weight.detach()])
            one.register_buffer("both_weights", both, persistent=False)
            one.weight.data, other.weight.data = both[0], both[1]


def conv_both(first: CausalConv, second: CausalConv, x: torch.Tensor) -> torch.Tensor:
    """Two causal depthwise convolutions as one: [2, B, channels, L] -> the same."""
    weight = torch.cat([first.weight, second.weight])
    bias = None if first.bias is None else torch.cat([first.bias, second.bias])
    y = causal_conv(x.transpose(0, 1).flatten(1, 2), weight, bias, first.path)  # B 2channels L
    return y.unflatten(1, (2, -1)).transpose(0, 1)


def _watched(operator: nn.Module) -> bool:
    return bool(operator._forward_hooks or operator._forward_pre_hooks)


def _both_biases(*modules: nn.Module) -> tuple[bool, ...]:
    return tuple(m.bias is not None for m in modules)


# -- attention -----------------------------------------------------------------


def _attention_settings(m: Attention) -> tuple | None:
    """None for what DiT's attention does not have: norms, a gate."""
    if m.gate is not None or any(
        not isinstance(norm, nn.Identity) for norm in (m.q_norm, m.k_norm, m.norm)
    ):
        return None
    drops = m.attn_drop.p, m.proj_drop.p
    return (m.num_heads, m.qkv.out_features, *drops, *_both_biases(m.qkv, m.proj))


def _run_attention(first: Attention, second: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads(linear_both(first.qkv, second.qkv, x), first.num_heads).unbind(2)
    drop = first.attn_drop.p if first.training else 0.0
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # 2B heads T d
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2)
    y = y.reshape(*x.shape[:-1], -1)  # 2 B T D
    return first.proj_drop(linear_both(first.proj, second.proj, y))


def _window_settings(m: SlidingWindowAttention) -> tuple:
    return (
        m.num_heads, m.window_size, m.dropout, m.softmax_scale, m.path,
        *_both_biases(m.Wqkv, m.out_proj),
    )  # fmt: skip


def _run_window(
    first: SlidingWindowAttention, second: SlidingWindowAttention, x: torch.Tensor
) -> torch.Tensor:
    qkv = _heads(linear_both(first.Wqkv, second.Wqkv, x), first.num_heads)
    y = first.attend(qkv).reshape(x.shape)
    return linear_both(first.out_proj, second.out_proj, y)


def _heads(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """[2,B,T,3D] -> [2B,T,3,heads,d]"""
    return qkv.flatten(0, 1).unflatten(2, (3, heads, -1))


# -- others --------------------------------------------------------------------


def _mlp_settings(m: Mlp) -> tuple | None:
    if not isinstance(m.norm, nn.Identity):
        return None
    act = type(m.act), getattr(m.act, "approximate", None)
    return (m.fc1.out_features, act, m.drop1.p, m.drop2.p, *_both_biases(m.fc1, m.fc2))


def _run_mlp(first: Mlp, second: Mlp, x: torch.Tensor) -> torch.Tensor:
    h = first.drop1(first.act(linear_both(first.fc1, second.fc1, x)))
    return first.drop2(linear_both(first.fc2, second.fc2, h))


def _hyena_settings(m: nn.Module) -> tuple:
    return (m.l_max, m.in_proj.out_features, *((c.weight.shape, c.path) for c in _convs(m)))


def _convs(m: nn.Module) -> list[CausalConv]:
    return [c for c in m.children() if isinstance(c, CausalConv)]


def _run_hyena(first: nn.Module, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    qkv = linear_both(first.in_proj, second.in_proj, x).transpose(2, 3)  # 2 B 3D T
    if hasattr(first, "short_filter"):
        qkv = conv_both(first.short_filter, second.short_filter, qkv)
    q, k, v = qkv.chunk(3, dim=2)
    kv = k * v  # 2 B D T
    if hasattr(first, "inner_filter"):
        kv = conv_both(first.inner_filter, second.inner_filter, kv)
    return linear_both(first.out_proj, second.out_proj, (q * kv).transpose(2, 3))


def _run_mlp_hyena(first: MlpHyenaX, second: MlpHyenaX, x: torch.Tensor) -> torch.Tensor:
    qkv = linear_both(first.in_proj, second.in_proj, x)  # 2 B T 3rD
    q, k, v = conv_both(first.short_filter, second.short_filter, qkv).chunk(3, dim=-1)
    return linear_both(first.out_proj, second.out_proj, q * (k * v))


# kind -> what two of it must have in common (None: cannot be stacked), and how they run
STACKED: dict[type[nn.Module], tuple[Callable, Callable]] = {
    Attention: (_attention_settings, _run_attention),
    SlidingWindowAttention: (_window_settings, _run_window),
    Mlp: (_mlp_settings, _run_mlp),
    HyenaSE: (_hyena_settings, _run_hyena),
    HyenaX: (_hyena_settings, _run_hyena),
    HyenaY: (_hyena_settings, _run_hyena),
    MlpHyenaX: (_hyena_settings, _run_mlp_hyena),
}
