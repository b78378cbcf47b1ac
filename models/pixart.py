"""PixArt-Sigma (arXiv 2403.04692), the text-to-image transformer, with slots like DiT's.

The parts are those of diffusers' PixArtTransformer2DModel, and so are the names of their tensors;
only a block's self-attention and MLP stand in the slots `attn` and `mlp`, which take any operator
[B,T,D] -> [B,T,D], or a GraftPair or GraftChoice of several (`models.weights` translates). The
slots' originals are diffusers' own modules. PixArt-Sigma's paper compresses keys and values in its
training at 2048 pixels; diffusers' class and its published weights have no such layer, so that
attention here sees all 16 384 tokens.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from models.captions import Captions
from models.dit import DiT, embed_patches, modulate
from models.recompute import run_block
from models.selection import check_keep, run_slot
from models.weights import diffusers_name

MASKED = -10_000.0  # added to the scores of tokens that are none, as in diffusers


class Condition(NamedTuple):
    """What every block reads beside the tokens.

    Attributes:
        parts: shifts, scales and gates from the timestep, [B, 6D].
        time: the embedded timestep, [B, D], for the last layer.
        text: the projected captions, [B, L, D]. bias: 0 or `MASKED` a token of them, [B, 1, L].
    """

    parts: torch.Tensor
    time: torch.Tensor
    text: torch.Tensor
    bias: torch.Tensor


class Modulation(nn.Module):
    """adaLN-single: a block's own table on top of what all blocks share, [B,6D] -> [B,6D]."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.scale_shift_table = table  # 6 D

    def forward(self, parts: torch.Tensor) -> torch.Tensor:
        return parts + self.scale_shift_table.flatten()


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the caption, and MLP; of diffusers' block."""

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn1
        self.attn2 = block.attn2
        self.norm2, self.mlp = block.norm2, block.ff
        self.adaLN_modulation = Modulation(block.scale_shift_table)

    def forward(
        self, x: torch.Tensor, c: Condition, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B,T,D], this block's keep (see PixArt.forward) -> [B,T,D]"""
        parts = self.adaLN_modulation(c.parts).chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts
        h = modulate(self.norm1(x), shift_attn, scale_attn)
        x = x + gate_attn.unsqueeze(1) * run_slot(self.attn, h, keep)
        x = x + self.attn2(x, encoder_hidden_states=c.text, attention_mask=c.bias)
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp.unsqueeze(1) * run_slot(self.mlp, h, keep)


class PixArt(nn.Module):
    """Predicts noise and its variance for a noisy latent x at time t, given a caption.

    Args:
        config: arguments of diffusers' PixArtTransformer2DModel, see `models.presets`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = dict(config)
        whole = PixArtTransformer2DModel(**config)
        self.input_size, self.patch_size = config["sample_size"], config["patch_size"]
        self.in_channels, self.out_channels = config["in_channels"], config["out_channels"]
        self.hidden_size, self.num_heads = whole.inner_dim, config["num_attention_heads"]
        self.depth = config["num_layers"]
        self.grid = self.input_size // self.patch_size
        self.num_tokens = self.grid**2

        self.pos_embed = whole.pos_embed
        with torch.device("cpu"):  # no file holds the table: it is made where all else is empty
            table = PatchEmbed(
                height=self.input_size,
                width=self.input_size,
                patch_size=self.patch_size,
                in_channels=1,
                embed_dim=self.hidden_size,
                interpolation_scale=config["interpolation_scale"],
            ).pos_embed
        self.pos_embed.register_buffer("pos_embed", table, persistent=False)  # 1 T D
        self.adaln_single = whole.adaln_single
        self.caption_projection = whole.caption_projection
        self.blocks = nn.ModuleList(PixArtBlock(block) for block in whole.transformer_blocks)
        self.merges = nn.ModuleDict()  # as DiT's; no pairs run in parallel here
        self.recomputes = False  # models/recompute.py
        self.norm_out = whole.norm_out
        self.scale_shift_table = whole.scale_shift_table
        self.proj_out = whole.proj_out

    unpatchify = DiT.unpatchify

    @property
    def layers(self) -> list[tuple[int, ...]]:
        """The blocks in the order in which they run, as `DiT.layers`; none runs beside another."""
        return [(i,) for i in range(len(self.blocks))]

    def regions(self) -> list[nn.Module]:
        """The parts that torch.compile takes one by one."""
        return list(self.blocks)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: Captions,
        keep: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B,C,H,W], t [B] in 0..999, captions of B images -> [B,2C,H,W].

        keep: as `DiT.forward`. drop bool [B]: captions to replace by the empty one; none is dropped
        unasked. ValueError for wrong shapes, or for a model whose slots are open and that gets no
        keep.
        """
        x, c = self.run_blocks(x, t, y, keep, drop)
        return self.unpatchify(self.final_layer(x, c))

    def run_blocks(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: Captions,
        keep: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        hidden: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Condition]:
        """`forward` up to the last block; hidden: a list that takes the tokens after every one."""
        self._check_shapes(x, t, y, keep, drop)
        x, c = self.embed(x, t, y, drop)
        shares = [None] * len(self.blocks)
        if keep is not None:
            shares = keep.unbind(-1 if keep.ndim < 3 else 1)  # 0-d, [B], or [B, 1 + variants]
        for block, share in zip(self.blocks, shares, strict=True):
            x = run_block(self, block, x, c, share)
            if hidden is not None:
                hidden.append(x)
        return x, c

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, y: Captions, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Condition]:
        """What enters the first block: tokens [B,T,D], and what all blocks read."""
        y = y if drop is None else y.dropped(drop)
        dtype = self.proj_out.weight.dtype
        x = embed_patches(x, self.pos_embed.proj) + self.pos_embed.pos_embed  # B T D
        parts, time = self.adaln_single(t, batch_size=len(x), hidden_dtype=dtype)  # B 6D, B D
        text = self.caption_projection(y.embeddings.to(dtype))  # B L D
        bias = torch.where(y.mask, 0.0, MASKED).to(dtype).unsqueeze(1)  # B 1 L
        return x, Condition(parts, time, text, bias)

    def final_layer(self, x: torch.Tensor, c: Condition) -> torch.Tensor:
        """Tokens [B,T,D] -> patches [B,T, patch * patch * 2C]"""
        shift, scale = (self.scale_shift_table + c.time.unsqueeze(1)).unbind(1)  # B D
        return self.proj_out(modulate(self.norm_out(x), shift, scale))

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: Captions,
        cfg_scale: float,
        cfg_channels: int | str = "all",
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Classifier-free guidance on all noise channels, as `DiT.forward_with_cfg`.

        y: `Captions.guided`; its second half is the empty caption. ValueError for an odd batch or
        other `cfg_channels`.
        """
        if len(x) % 2:
            raise ValueError(f"guidance needs two halves, but the batch holds {len(x)} samples")
        if cfg_channels != "all":
            raise ValueError(f"cfg_channels {cfg_channels!r}: PixArt is guided on all of them")
        first = x[: len(x) // 2]
        eps, rest = self(torch.cat([first, first]), t, y, keep=keep).split(self.in_channels, dim=1)
        cond, uncond = eps.chunk(2)
        mixed = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

    def _check_shapes(self, x, t, y, keep, drop) -> None:
        B, side, width = x.shape[0], self.input_size, self.config["caption_channels"]
        wanted = {"x": (x, (B, self.in_channels, side, side)), "t": (t, (B,))}
        L = y.mask.shape[-1]
        wanted |= {"captions": (y.embeddings, (B, L, width)), "their mask": (y.mask, (B, L))}
        if drop is not None:
            wanted["drop"] = (drop, (B,))
        for name, (value, shape) in wanted.items():
            if tuple(value.shape) != shape:
                raise ValueError(f"{name}: shape {list(value.shape)}; legal here is {list(shape)}")
        check_keep(keep, B, len(self.blocks))


def write_diffusers(state: dict[str, torch.Tensor], config: dict, folder: Path) -> None:
    """Writes an ungrafted model as diffusers' PixArtTransformer2DModel.save_pretrained does.

    Raises:
        ValueError: the state holds tensors that diffusers' class has no place for, such as grafts.
    """
    with torch.device("meta"):
        whole = PixArtTransformer2DModel(**config)
    theirs = {diffusers_name(name): tensor for name, tensor in state.items()}
    odd = sorted(theirs.keys() ^ whole.state_dict().keys())
    if odd:
        raise ValueError(
            f"{folder}: diffusers' format has no place for grafts ({odd[0]} is in one of the two "
            "only); write a .safetensors file instead"
        )
    whole.load_state_dict(theirs, strict=True, assign=True)
    whole.save_pretrained(folder)
