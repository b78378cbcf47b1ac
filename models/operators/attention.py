"""Softmax attention of the mha slot: over all tokens (mha) and within a sliding window (swa)."""

from functools import cache

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.operators.fused_attention import fused_attention

DENSE_TOKENS = 256  # up to here the T x T mask is cheaper than gathering windows
QUERY_BLOCK = 64
FLEX_BLOCK = 128
MANY = 32  # sequences from which PyTorch is the faster one where there is no backward pass


class FullAttention(Attention):
    """Softmax attention over all tokens, as timm defines it: [B,T,D] -> [B,T,D].

    `path` names what computes it: "torch" or "triton" (accelerators.py chooses), of which the
    latter leaves to the former what `exception` says.
    """

    exception = f"PyTorch for {MANY} and more sequences without a backward pass"

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__(dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.path = "torch"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path == "triton" and (torch.is_grad_enabled() or len(x) < MANY):
            return self.proj(fused_attention(self.qkv(x), self.num_heads))
        return super().forward(x)


def build_mha(dim: int, num_heads: int, qkv_bias: bool = True) -> FullAttention:
    """`FullAttention`; ValueError when the heads do not divide `dim`."""
    _check_heads("mha", "dim", dim, num_heads)
    return FullAttention(dim, num_heads, qkv_bias)


class SlidingWindowAttention(nn.Module):
    """Local softmax attention: token i sees tokens i-left..i+right that exist. [B,T,D] -> [B,T,D]

    Parameters are named as in flash-attn's MHA; the rows of `Wqkv` are ordered as in timm's `qkv`,
    so the weights of full attention carry over unchanged. `softmax_scale` None means
    1 / sqrt(head width). Takes any number of tokens, in memory linear in it.

    `path` names what computes it: "torch", "triton", "flex" or "flash-attn" (accelerators.py
    chooses).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window_size: tuple[int, int] = (4, 4),
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
    ):
        super().__init__()
        _check_heads("swa", "embed_dim", embed_dim, num_heads)
        self.num_heads = num_heads
        self.window_size = tuple(window_size)
        self.dropout = dropout
        self.softmax_scale = softmax_scale
        self.path = "torch"
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        if self.path == "triton":
            qkv = self.Wqkv(x)
            y = fused_attention(qkv, self.num_heads, self.window_size, self.softmax_scale)
        else:
            qkv = self.Wqkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
            y = self.attend(qkv).reshape(B, T, D)
        return self.out_proj(y)

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """What is between the projections: [B,T,3,heads,d] -> [B,T,heads,d]"""
        options = {
            "scale": self.softmax_scale,
            "dropout_p": self.dropout if self.training else 0.0,
        }
        if self.path == "flash-attn":
            return flash_window_attention(qkv, self.window_size, **options)
        if self.path == "flex":
            attend = flex_window_attention
        else:
            dense = qkv.shape[1] <= DENSE_TOKENS
            attend = dense_window_attention if dense else blocked_window_attention
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B heads T d
        return attend(q, k, v, self.window_size, **options).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


def dense_window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int], **options
) -> torch.Tensor:
    """Window attention by one mask over all pairs: [B, heads, T, d] each -> [B, heads, T, d].

    `options` are those of scaled_dot_product_attention (scale, dropout_p).
    """
    position = torch.arange(q.shape[2], device=q.device)
    offset = position[None, :] - position[:, None]  # key minus query
    seen = (offset >= -window[0]) & (offset <= window[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)


def blocked_window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: tuple[int, int], **options
) -> torch.Tensor:
    """The result of `dense_window_attention`, from one block of queries and its keys at a time.

    Time and memory grow with T * (QUERY_BLOCK + window) instead of T * T.
    """
    B, H, T, d = q.shape
    left, right = window
    S = QUERY_BLOCK
    span = left + S + right
    blocks = -(-T // S)
    fill = blocks * S - T

    def windows(x):
        padded = F.pad(x, (0, 0, left, right + fill)).reshape(B * H, -1, d)
        return padded.unfold(1, span, S).transpose(2, 3)  # BH blocks span d

    query = torch.arange(blocks * S, device=q.device).view(blocks, S, 1)
    first = torch.arange(blocks, device=q.device).view(blocks, 1, 1) * S - left
    key = first + torch.arange(span, device=q.device)  # blocks 1 span
    seen = (key >= query - left) & (key <= query + right)
    # queries past the end are cut off below; they see padding, as a row must see something
    seen &= ((key >= 0) & (key < T)) | (query >= T)

    q = F.pad(q, (0, 0, 0, fill)).reshape(B * H, blocks, S, d)
    y = F.scaled_dot_product_attention(q, windows(k), windows(v), attn_mask=seen, **options)
    return y.reshape(B, H, blocks * S, d)[:, :, :T]


def flash_window_attention(
    qkv: torch.Tensor,
    window: tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The same by flash-attn, on CUDA in half precision: [B,T,3,heads,d] -> [B,T,heads,d]"""
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv, dropout_p, softmax_scale=scale, window_size=window)


def flex_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: tuple[int, int],
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The result of `dense_window_attention` by FlexAttention, which reads only the blocks of keys
    that the window touches. On CUDA it is compiled; on the CPU it has no gradient. ValueError for
    dropout, which it does not know."""
    if dropout_p > 0:
        raise ValueError(f"FlexAttention has no dropout, and dropout is {dropout_p}: use 0")
    tokens = q.shape[2]
    if torch.compiler.is_compiling():  # becomes a part of what is being compiled
        mask, attend = window_mask(tokens, window, q.device), flex_attention
    else:
        mask = _cached_mask(tokens, window, q.device)
        attend = _compiled_flex() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask, scale=scale)


def window_mask(tokens: int, window: tuple[int, int], device: torch.device) -> BlockMask:
    """Which keys a query sees, and which blocks of keys hold any of them, in memory linear in the
    tokens but for one integer a pair of blocks."""
    left, right = window
    blocks = -(-tokens // FLEX_BLOCK)
    index = torch.arange(blocks, device=device)
    start = index * FLEX_BLOCK  # of a block of queries
    first = (start - left).div(FLEX_BLOCK, rounding_mode="floor").clamp(min=0)
    last = ((start + FLEX_BLOCK - 1 + right) // FLEX_BLOCK).clamp(max=blocks - 1)
    touched = (first[:, None] + index).clamp(max=blocks - 1)  # its first `last - first + 1` count

    def seen(b, h, query, key):
        return (key >= query - left) & (key <= query + right)

    return BlockMask.from_kv_blocks(
        (last - first + 1).int()[None, None],
        touched.int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=seen,
        seq_lengths=(tokens, tokens),
    )


@cache
def _cached_mask(tokens: int, window: tuple[int, int], device: torch.device) -> BlockMask:
    return window_mask(tokens, window, device)


@cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def _check_heads(operator: str, key: str, width: int, num_heads: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"{operator}: num_heads {num_heads} does not divide {key} {width}: choose a divisor"
        )
