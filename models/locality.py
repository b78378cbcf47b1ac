"""Band-k attention mass: how much of its attention a block pays to tokens near by.

L_k = (1/N) sum_ij A_ij [|i - j| <= k] of N tokens in raster order, A the softmax attention averaged
over heads (arXiv 2506.05340). 1 says that no token looks further than k places; attention that is
the same everywhere has `uniform_mass`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import isnan
from pathlib import Path

import torch
from timm.models.vision_transformer import Attention

from models.dit import DiT

MAX_SCORES = 2**24  # attention scores held at a time: 64 MiB in float32
TIMESTEPS = 1000


def uniform_mass(num_tokens: int, band: int) -> float:
    """L_k of attention that spreads evenly over all tokens."""
    k = min(band, num_tokens - 1)
    return (num_tokens * (2 * k + 1) - k * (k + 1)) / num_tokens**2


def default_band(num_tokens: int) -> int:
    """The k that the paper calls local: 32 of 256 tokens, and the same share of others."""
    return max(1, num_tokens // 8)


def timestep_bins(bins: int) -> list[list[int]]:
    """First and last timestep of each of so many equal parts of 0..999."""
    edges = [-(-i * TIMESTEPS // bins) for i in range(bins + 1)]
    return [[first, end - 1] for first, end in pairwise(edges)]


def attention_rows(module: Attention, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The attention of `module` on its input x [B,T,D], averaged over heads, some rows at a time.

    Yields (queries, [B, rows, T]), in float32 at least, whatever autocast the model runs under.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(module.qkv.weight.dtype)
        B, T, _ = x.shape
        qkv = module.qkv(x).view(B, T, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = module.q_norm(qkv[0]), module.k_norm(qkv[1])  # B heads T head_width
        precise = torch.promote_types(q.dtype, torch.float32)
        q, k = module.scale * q.to(precise), k.to(precise).transpose(-2, -1)
        rows = max(1, MAX_SCORES // (B * module.num_heads * T))
        for first in range(0, T, rows):
            queries = slice(first, min(first + rows, T))
            yield queries, (q[:, :, queries] @ k).softmax(dim=-1).mean(dim=1)


class BandMass:
    """Measures the full-attention blocks of a model while it runs, inside a `with`.

        with BandMass(model, bands=(4, 32)) as meter:
            model(x, t, y)
        meter.mass()[0]      # of block 0; None where a block holds no full attention

    Args:
        model: its blocks are watched from the first line of the `with` to its end.
        bands: the k of L_k.
        bins: equal parts of the timesteps 0..999 that are also kept apart.
    """

    def __init__(self, model: DiT, bands: Sequence[int], bins: int = 5) -> None:
        self.model, self.bands, self.bins = model, tuple(bands), bins
        self.watched = {
            i: block.attn
            for i, block in enumerate(model.blocks)
            if isinstance(block.attn, Attention)
        }
        device, T = model.pos_embed.device, model.num_tokens
        place = torch.arange(T, device=device)
        distance = (place[:, None] - place[None, :]).abs()
        # What lies outside is summed, so that a band of all tokens holds 1, free of rounding.
        self._outside = torch.stack([distance > k for k in self.bands], dim=-1).double()  # T T K
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._maps = {i: zeros(T, T) for i in self.watched}
        self._sums = {i: zeros(bins, len(self.bands)) for i in self.watched}
        self._counts = zeros(bins)
        self._handles: list = []

    def __enter__(self) -> "BandMass":
        add = self.model.register_forward_pre_hook
        self._handles = [add(self._note_timesteps, with_kwargs=True)]
        for i, module in self.watched.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._measure, i)))
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def _note_timesteps(self, model: DiT, args: tuple, kwargs: dict) -> None:
        t = kwargs["t"] if "t" in kwargs else args[1]
        part = t.long() * self.bins // TIMESTEPS
        self._parts = torch.nn.functional.one_hot(part, self.bins).double()  # B bins
        self._counts += self._parts.sum(0)

    @torch.no_grad()
    def _measure(self, i: int, module: Attention, args: tuple) -> None:
        for queries, rows in attention_rows(module, args[0]):
            rows = rows.double()
            outside = rows.flatten(1) @ self._outside[queries].flatten(0, 1)  # B K
            self._sums[i] += self._parts.T @ outside
            self._maps[i][queries] += rows.sum(0)

    def mass(self) -> list[dict[int, float] | None]:
        """A block's L_k by k, averaged over all that ran; None for a block that was not watched."""
        return [self._of_block(i) for i in range(len(self.model.blocks))]

    def mass_by_timestep(self) -> list[dict[int, list[float | None]] | None]:
        """As `mass`, apart for each bin of timesteps, the least noisy first; None: none ran."""
        return [self._of_block(i, apart=True) for i in range(len(self.model.blocks))]

    def _of_block(self, i: int, apart: bool = False) -> dict | None:
        if i not in self.watched:
            return None
        sums, counts = self._sums[i], self._counts
        if not apart:
            sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        shares = 1 - sums / (counts[:, None] * self.model.num_tokens)  # bins or 1, K
        found = [[None if isnan(x) else x for x in column] for column in shares.T.tolist()]
        return {k: x if apart else x[0] for k, x in zip(self.bands, found, strict=True)}

    def maps(self) -> dict[int, torch.Tensor]:
        """Block -> attention averaged over heads and all that ran, float64 [T,T] on the CPU."""
        return {i: (total / self._counts.sum()).cpu() for i, total in self._maps.items()}


def draw(path: Path, content: dict, maps: dict[int, torch.Tensor]) -> None:
    """Draws L_k by block, a line each k; the same as a heat-map; some blocks' attention maps.

    content: as in locality.json; maps: of the measured blocks, from `BandMass.maps`.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bands, N = content["bands"], content["num_tokens"]
    table = torch.full((len(bands), len(content["blocks"])), torch.nan)
    for i in maps:
        table[:, i] = torch.tensor(list(content["blocks"][i]["mass"].values()))
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 1])
    lines, heat = upper.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for row, k in enumerate(bands):
        colour = colormaps["viridis"](0.9 * row / max(1, len(bands) - 1))
        lines.plot(table[row].numpy(), "o-", color=colour, markersize=4, label=f"k = {k}")
        lines.axhline(content["uniform"][str(k)], color=colour, linewidth=1, linestyle=":")
    lines.axhline(0.5, color="black", linewidth=1)
    lines.set(ylim=(0, 1.1), ylabel="L_k: attention within k tokens")
    lines.set_title(f"{content['plan']['model_name']}, {N} tokens; dotted: uniform attention")
    lines.legend(ncols=len(bands), loc="upper right", fontsize=8)
    heat.imshow(table.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, column in table.isfinite().nonzero().tolist():
        value = float(table[row, column])
        colour = "white" if value < 0.6 else "black"
        text = f"{value:.2f}".removeprefix("0")
        heat.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    heat.set(yticks=range(len(bands)), yticklabels=bands, ylabel="k", xlabel="block")
    heat.set_xticks(range(len(content["blocks"])))
    row = bands.index(default_band(N)) if default_band(N) in bands else len(bands) // 2
    order = sorted(maps, key=lambda i: -table[row, i])
    chosen = order if len(order) <= 8 else order[:4] + order[-4:]
    for place, i in enumerate(chosen, start=1):
        axis = lower.add_subplot(1, len(chosen), place, xticks=[], yticks=[])
        axis.imshow(maps[i].sqrt().numpy(), cmap="magma", vmin=0)
        axis.set_title(f"block {i}: L_{bands[row]} = {table[row, i]:.2f}", fontsize=8)
    about = f"attention of the most and the least local blocks by k = {bands[row]}: "
    about += "query down, key across; square root, each on a scale of its own"
    lower.supxlabel(about, fontsize=9)
    figure.savefig(path, format="png", dpi=110)
