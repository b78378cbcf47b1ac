"""The class-conditional diffusion transformer DiT (arXiv 2212.09748) and its presets.

Tensor names and shapes are those of the published checkpoints. The two slots of a block, `attn` and
`mlp`, take any operator [B,T,D] -> [B,T,D], or a GraftPair or GraftChoice of several. Neighbouring
blocks may run as parallel pairs (models/restructure.py).
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import PatchEmbed
from torch import nn

from models.operators.attention import FullAttention
from models.operators.mlp import GeluMlp
from models.operators.modulation import (
    Addend,
    Modulated,
    add,
    add_norm_modulate,
    modulate,
    norm,
)
from models.recompute import run_block
from models.restructure import STACKED_ROWS, PairEnd, run_pair
from models.selection import check_keep, run_slot
from models.streams import ahead

TIMESTEP_FEATURES = 256
MAX_PERIOD = 10_000

_SIZES = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
}
# latent_downsample: pixels per latent position, a property of the VAE the preset goes with
PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{size}/{patch}": {**widths, "patch_size": patch, "latent_downsample": 8}
    for size, widths in _SIZES.items()
    for patch in (2, 4, 8)
}
PRESETS["DiT-Mini/2"] = {
    "depth": 28,
    "hidden_size": 128,
    "num_heads": 4,
    "patch_size": 2,
    "latent_downsample": 4,
}
PRESETS["DiT-Mini-D14/2"] = {**PRESETS["DiT-Mini/2"], "depth": 14}  # every second block dropped


def preset(name: str) -> dict[str, int]:
    """The entry of PRESETS; ValueError listing the legal names for any other."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def build_dit(name: str, input_size: int, num_classes: int = 1000, **overrides) -> "DiT":
    """A freshly initialised DiT of one preset; `overrides` are further arguments of DiT.

    input_size: side of the latent, see `models.presets`. ValueError for unknown names.
    """
    sizes = {key: value for key, value in preset(name).items() if key != "latent_downsample"}
    return DiT(**{**sizes, "input_size": input_size, "num_classes": num_classes, **overrides})


def sincos_table(side: int, width: int) -> torch.Tensor:
    """Position table of a side x side grid in raster order -> float32 [1, side*side, width].

    The first half of the channels encodes the column, the second half the row; each half holds
    sines, then cosines, of frequencies MAX_PERIOD ** (-k / (width / 4)).
    """
    quarter = width // 4
    k = torch.arange(quarter, dtype=torch.float64)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * MAX_PERIOD ** (-k / quarter)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # side width/2
    columns = line[None, :, :].expand(side, -1, -1)
    rows = line[:, None, :].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width).float()


def embed_patches(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """What a convolution over patches gives for x [B,C,H,W], as tokens [B,T,D] in raster order.

    As a product of matrices: the tokens are contiguous, where cuDNN leaves channels outermost, for
    every pass after it to stride over or copy.
    """
    B, C, H, W = x.shape
    P = layer.kernel_size[0]
    patches = x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.reshape(B, -1, C * P * P), layer.weight.flatten(1), layer.bias)


class Patches(PatchEmbed):
    """x [B,C,H,W] -> tokens [B,T,D]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return embed_patches(x, self.proj)


class TimestepEmbedder(nn.Module):
    """Diffusion time t [B] -> [B,D]: sinusoids in float32, then a two-layer MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIMESTEP_FEATURES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = TIMESTEP_FEATURES // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(MAX_PERIOD) * k / half)
        angles = t.float()[:, None] * frequencies  # B half
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class label y [B] -> [B,D]. With dropout the table has one more row, the null class."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.null_class = num_classes if class_dropout_prob > 0 else None
        rows = num_classes + (self.null_class is not None)
        self.embedding_table = nn.Embedding(rows, hidden_size)
        self.class_dropout_prob = class_dropout_prob

    def forward(self, y: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        if drop is None and self.training and self.null_class is not None:
            drop = torch.rand(y.shape[0], device=y.device) < self.class_dropout_prob
        if drop is not None:
            if self.null_class is None:
                raise ValueError(
                    "drop needs a null class, but this model was built with class_dropout_prob 0: "
                    "build it with a value above 0"
                )
            y = torch.where(drop, self.null_class, y)
        return self.embedding_table(y)


class DiTBlock(Modulated):
    """x + gate * slot(modulate(norm(x))), once for the mha slot `attn` and once for `mlp`."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__(hidden_size)
        self.attn = FullAttention(hidden_size, num_heads)
        self.mlp = GeluMlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        keep: torch.Tensor | None = None,
        before: Addend | None = None,
        ended: bool = True,
        parts: torch.Tensor | None = None,
        apart: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Addend] | tuple[torch.Tensor, tuple[Addend, Addend]]:
        """x [B,T,D], condition c [B,D], this block's keep (see DiT.forward) -> [B,T,D]

        So that the sum which ends a block can be taken together with the norm that begins the next:
        with `ended` False -> x without what the MLP adds, and that: its output [B,T,D] and its gate
        [B,D], which the next block takes as `before`.

        parts: what `adaLN_modulation` gives for c, where that is there already. apart: -> x with
        `before` and nothing more, and what `attn` and `mlp` add.
        """
        parts = self.adaLN_modulation(c) if parts is None else parts
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = parts.chunk(6, dim=1)
        branch, gate = (None, None) if before is None else before
        x, h = add_norm_modulate(x, branch, gate, shift_attn, scale_attn, self.path)
        branch = run_slot(self.attn, h, keep)
        y, h = add_norm_modulate(x, branch, gate_attn, shift_mlp, scale_mlp, self.path)
        last = run_slot(self.mlp, h, keep), gate_mlp
        if apart:
            return x, ((branch, gate_attn), last)
        return add(y, last) if ended else (y, last)


class FinalLayer(nn.Module):
    """Tokens [B,T,D] and condition [B,D] -> patches [B,T, patch * patch * out_channels]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(norm(x), shift, scale))


class DiT(nn.Module):
    """Predicts noise, and with `learn_sigma` the variance, of a noisy latent x at time t, class y.

    input_size: side of the square latent. class_dropout_prob: share of labels replaced by the null
    class (index num_classes) in training; 0 builds a model without a null class. ValueError when
    the patches do not divide the latent, or the heads or the position table the hidden size.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide input_size {input_size}: choose a divisor"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4"
            )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.grid = input_size // patch_size
        self.num_tokens = self.grid**2

        self.x_embedder = Patches(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # a parameter, because the published state dicts hold it, but never trained
        self.pos_embed = nn.Parameter(sincos_table(self.grid, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)
        )
        self.merges = nn.ModuleDict()  # of parallel pairs, by their first block
        self.stacks = nn.ModuleDict()  # blocks that stand for both of a pair (models/inference.py)
        self.end_pair = PairEnd()
        self.recomputes = False  # models/recompute.py
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """adaLN-zero (arXiv 2212.09748): every block starts as the identity, the output as zero.

        Sets what a freshly built model holds; operators grafted later keep their own start.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))  # as a linear layer
        nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*modulations, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        keep: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B,C,H,W], t [B] in 0..999, y [B] -> [B, 2C or C, H, W].

        keep [depth] or [B, depth]: for blocks that hold a GraftPair, 1 keeps the original operator,
        0 takes the graft, values between mix; entries of other blocks are not read. [1 or B, depth,
        1 + variants] for a model of GraftChoices: the share of the original and of each variant.
        drop bool [B]: labels to replace by the null class; None draws them in training with
        class_dropout_prob. ValueError for wrong shapes, or for a model whose slots are open and
        that gets no keep.
        """
        x, c = self.run_blocks(x, t, y, keep, drop)
        return self.unpatchify(self.final_layer(x, c))

    def run_blocks(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        keep: torch.Tensor | None = None,
        drop: torch.Tensor | None = None,
        hidden: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` up to the last block -> tokens [B,T,D] and condition [B,D].

        hidden: a list that takes the tokens after every layer, see `layers`.
        """
        self._check_shapes(x, t, y, keep, drop)
        x, c = self.embed(x, t, y, drop)
        if keep is None:
            shares = [None] * len(self.blocks)
        else:
            shares = keep.unbind(-1 if keep.ndim < 3 else 1)  # 0-d, [B], or [B, 1 + variants]
        few = not torch.is_grad_enabled() and x.shape[0] * x.shape[1] <= STACKED_ROWS
        stacks = dict(self.stacks) if few else {}
        layers = self.layers
        held = [
            [stacks[str(layer[0])]]
            if len(layer) == 2 and str(layer[0]) in stacks
            else [self.blocks[i] for i in layer]
            for layer in layers
        ]
        parts = [None] * len(self.blocks)
        if not torch.is_grad_enabled():  # they wait for c alone, and no block need wait for them
            modulations = [block.adaLN_modulation for blocks in held for block in blocks]
            parts = ahead([partial(modulation, c) for modulation in modulations], x.device)
        one = torch.ones_like(c) if self.merges else None  # the gate of what a pair adds
        parts, before = iter(parts), None
        for layer, blocks in zip(layers, held, strict=True):
            ended = hidden is not None or layer is layers[-1]
            if len(layer) == 1:
                given = (shares[layer[0]], before, ended, next(parts))
                x = run_block(self, *blocks, x, c, *given)
            else:
                merge, keeps = self.merges[str(layer[0])], [shares[i] for i in layer]
                given = (merge, keeps, before, [next(parts) for _ in blocks], self.end_pair)
                x, change = run_block(self, run_pair, x, c, blocks, *given)
                x = x + change if ended else (x, (change, one))
            x, before = (x, None) if ended else x
            if hidden is not None:
                hidden.append(x)
        return x, c

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the first block: tokens [B,T,D] and condition [B,D]."""
        x = self.x_embedder(x) + self.pos_embed  # B T D
        return x, self.t_embedder(t) + self.y_embedder(y, drop)  # B D

    @property
    def layers(self) -> list[tuple[int, ...]]:
        """The blocks in the order in which they run, those of a parallel pair together."""
        seconds = {int(first) + 1 for first in self.merges}
        return [
            (i, i + 1) if i + 1 in seconds else (i,)
            for i in range(len(self.blocks))
            if i not in seconds
        ]

    def regions(self) -> list[nn.Module]:
        """The parts that torch.compile takes one by one."""
        blocks = [module for module in self.modules() if isinstance(module, DiTBlock)]
        modulations = [block.adaLN_modulation for block in blocks]
        return [*blocks, *modulations, self.end_pair, self.t_embedder, self.final_layer]

    def forward_with_cfg(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        cfg_scale: float,
        cfg_channels: int | str = 3,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Classifier-free guidance: u + cfg_scale * (c - u) on the noise, in both halves.

        The batch is [conditional half, unconditional half]: only the first half of x is read and
        stands for both, the second half of y is the null class. cfg_channels: the first 3 noise
        channels, as published results have it, or "all". The other channels keep each half's own
        values. No label is dropped. -> like forward. ValueError for an odd batch.
        """
        B = x.shape[0]
        if B % 2:
            raise ValueError(f"guidance needs two halves, but the batch holds {B} samples")
        if cfg_channels == "all":
            guided = self.in_channels
        elif cfg_channels == 3 and self.in_channels >= 3:
            guided = 3
        else:
            raise ValueError(
                f"cfg_channels {cfg_channels!r} is not supported with {self.in_channels} latent "
                'channels: use "all", or 3 where there are as many'
            )
        first = x[: B // 2]
        drop = None
        if self.training and self.y_embedder.null_class is not None:
            drop = torch.zeros(B, dtype=torch.bool, device=y.device)
        out = self(torch.cat([first, first]), t, y, keep=keep, drop=drop)
        cond, uncond = out[:, :guided].chunk(2)
        mixed = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), out[:, guided:]], dim=1)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, patch * patch * C] -> [B, C, H, W]"""
        x = x.unflatten(1, (self.grid, self.grid))  # B h w ppC
        x = x.unflatten(3, (self.patch_size, self.patch_size, self.out_channels))
        x = x.permute(0, 5, 1, 3, 2, 4)  # B C h p w p
        return x.reshape(x.shape[0], self.out_channels, self.input_size, self.input_size)

    def _check_shapes(self, x, t, y, keep, drop) -> None:
        B, side = x.shape[0], self.input_size
        if tuple(x.shape[1:]) != (self.in_channels, side, side):
            raise ValueError(
                f"x has shape {list(x.shape)}; this model takes [B, {self.in_channels}, {side}, "
                f"{side}]"
            )
        for name, value in (("t", t), ("y", y), ("drop", drop)):
            if value is not None and tuple(value.shape) != (B,):
                raise ValueError(f"{name} has shape {list(value.shape)}; for this x it is [{B}]")
        check_keep(keep, B, len(self.blocks))
