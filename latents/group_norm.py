"""The group norms of a VAE, and what stands beside them, for maps whose channels lie together.

    y = silu((x + addend - mean) / sqrt(variance + eps) * weight + bias)

with mean and variance of each sample over the pixels and channels of a group, in float32. Autocast
gives group norms to float32, PyTorch's leaves the channels-last layout, and Inductor reads a group
of 4 channels as 8 bytes here and there. The Triton kernels read and write rows of all channels:
once for the moments of each channel, which are then put together, and once to normalise. For
inference: there are no gradients.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# Elements of a program and those it holds at once; programs of a sample, whose moments are summed
ELEMENTS, TILE, MOST_PARTS = 32768, 2048, 512
TOLERANCE = 1e-2  # of the check at load, by the norm; bf16 in, bf16 out


class Norm(nn.Module):
    """A GroupNorm with its parameters, and SiLU where `silu`."""

    def __init__(self, norm: nn.GroupNorm, silu: bool):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def forward(self, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        """x [B,C,...] and what is added to every pixel [C] -> like x, channels-last."""
        return group_norm(x, addend, self.weight, self.bias, self.groups, self.eps, self.silu)


class Block(nn.Module):
    """A ResnetBlock2D of diffusers whose norms and sums are the kernels', biases with them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.conv1 = Norm(block.norm1, silu=True), block.conv1
        self.norm2, self.conv2 = Norm(block.norm2, silu=True), block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """[B,C,H,W] -> [B,C',H,W]"""
        h = F.conv2d(self.norm1(x), self.conv1.weight, padding=self.conv1.padding)
        h = self.norm2(h, self.conv1.bias)
        h = F.conv2d(h, self.conv2.weight, padding=self.conv2.padding)
        bias = self.conv2.bias
        if self.conv_shortcut is not None:
            x = F.conv2d(x, self.conv_shortcut.weight)
            bias = bias + self.conv_shortcut.bias
        if torch.compiler.is_compiling():  # Inductor joins the sum with what follows
            return (x + h + bias[:, None, None]).to(x.dtype)
        return add(x, h, bias)


class Upsample(nn.Module):
    """An Upsample2D of diffusers: doubled, and a convolution. diffusers leaves channels-last from
    64 images on, and PyTorch's kernel copies an element at a time."""

    def __init__(self, upsample: nn.Module):
        super().__init__()
        self.conv = upsample.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,H,W] -> [B,C',2H,2W]"""
        B, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).contiguous()
        wide = pixels.view(torch.int64) if C % 4 == 0 else pixels  # 8 bytes an element
        doubled = wide[:, :, None, :, None].expand(B, H, 2, W, 2, -1).reshape(B, 2 * H, 2 * W, -1)
        return self.conv(doubled.view(x.dtype).permute(0, 3, 1, 2))


def accelerate(
    vae: nn.Module, device: torch.device, dtype: torch.dtype, kernels: str = "auto"
) -> list[str]:
    """Puts the kernels into a diffusers AutoencoderKL on its device, before it is compiled.

    dtype: of autocast; float32 for none. kernels: "auto", or "torch" for PyTorch alone. The names
    in the state dict stay. -> lines for the log; none on the CPU, where nothing changes.
    """
    if device.type != "cuda":
        return []
    if kernels == "torch":
        return ["group norms of the VAE: PyTorch (as --kernels says)"]
    reason = refusal(vae, device, dtype)
    if reason:
        return [f"group norms of the VAE: PyTorch (Triton {reason})"]
    fuse(vae)
    return ["group norms of the VAE: Triton"]


def refusal(vae: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot serve this VAE, or "" when they can."""
    if dtype == torch.float32:
        return "is for bf16 and fp16"
    if vae.config.act_fn not in ("silu", "swish"):
        return f"is for SiLU, not {vae.config.act_fn}"
    sizes = {(m.num_channels, m.num_groups) for m in vae.modules() if isinstance(m, nn.GroupNorm)}
    try:
        error = max(_disagreement(*size, device, dtype) for size in sorted(sizes))
    except Exception as failure:  # a kernel fails in its own ways; any of them rules it out
        return f"does not run here: {type(failure).__name__}: {failure}".splitlines()[0]
    return "" if error <= TOLERANCE else f"disagrees by {error:.0e}"


def fuse(module: nn.Module) -> None:
    """Puts Block, Norm and Upsample where diffusers' modules are, with their parameters."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for name, child in module.named_children():
        if isinstance(child, ResnetBlock2D):
            setattr(module, name, Block(child))
        elif isinstance(child, nn.GroupNorm):
            setattr(module, name, Norm(child, silu=name == "conv_norm_out"))
        elif isinstance(child, Upsample2D):
            setattr(module, name, Upsample(child))
        elif name == "conv_act":  # after conv_norm_out
            setattr(module, name, nn.Identity())
        else:
            fuse(child)


@torch.no_grad()
def _disagreement(channels: int, groups: int, device: torch.device, dtype: torch.dtype) -> float:
    """How far results are from float32 PyTorch's, at most, over their norms."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    rows = 2 * _rows(1, channels) + 16  # that do not fill the last program
    x, other = (draw(2, channels, rows).to(dtype) for _ in range(2))
    addend, weight, bias = draw(3, channels)
    worst = 0.0
    for extra, silu in ((None, False), (None, True), (addend, True)):
        mine = group_norm(x, extra, weight, bias, groups, 1e-6, silu)
        shifted = x.float() if extra is None else x.float() + extra[:, None]
        exact = F.group_norm(shifted, groups, weight, bias, 1e-6)
        exact = F.silu(exact) if silu else exact
        worst = max(worst, _distance(mine, exact))
    exact = x.float() + other.float() + addend[:, None]
    return max(worst, _distance(add(x, other, addend), exact))


def _distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mine.float() - exact).norm() / exact.norm()).nan_to_num(torch.inf).item()


# The kernels as operations of our own, opaque to torch.compile. Both take maps [B,C,...] of any
# layout, and give channels-last ones of the type of x.


@torch.library.custom_op("grafts::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor,
    addend: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> torch.Tensor:
    """y of the module's docstring; addend, weight and bias [C]."""
    pixels = _pixels(x)
    B, P, C = pixels.shape
    y, rows = _room(x), _rows(P, C)
    parts = -(-P // rows)
    moments = pixels.new_empty((B, parts, 2, C), dtype=torch.float32)
    affine = pixels.new_empty((B, 2, C), dtype=torch.float32)
    measure, combine, normalise, _ = _kernels()
    sizes = {"C": C, "SPAN": rows}
    measure[(B, parts)](pixels, moments, P, **sizes, **_tile(C))
    width = C // groups
    combine[(B, groups)](
        moments, addend, weight, affine, P, parts, eps,
        WIDTH=width, BLOCK=1 << (width - 1).bit_length(), MOST=MOST_PARTS, PARTS=64, **sizes,
    )  # fmt: skip
    normalise[(B, parts)](pixels, affine, bias, y, P, SILU=silu, **sizes, **_tile(C))
    return _maps(y, x)


@torch.library.custom_op("grafts::add", mutates_args=())
def add(x: torch.Tensor, branch: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + branch + bias, of two maps and [C]."""
    pixels, others = _pixels(x), _pixels(branch)
    B, P, C = pixels.shape
    y, rows = _room(x), _rows(P, C)
    _kernels()[3][(B, -(-P // rows))](pixels, others, bias, y, P, C=C, SPAN=rows, **_tile(C))
    return _maps(y, x)


@group_norm.register_fake
def _(x, addend, weight, bias, groups, eps, silu):
    return _maps(_room(x), x)


@add.register_fake
def _(x, branch, bias):
    return _maps(_room(x), x)


def _pixels(maps: torch.Tensor) -> torch.Tensor:
    """[B,C,...] -> [B,P,C], contiguous; a view of channels-last maps."""
    return maps.flatten(2).transpose(1, 2).contiguous()


def _room(maps: torch.Tensor) -> torch.Tensor:
    """What `_pixels` has, not written yet."""
    return maps.new_empty((len(maps), maps.shape[2:].numel(), maps.shape[1]))


def _maps(pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B,P,C] -> [B,C,...], channels-last"""
    return pixels.transpose(1, 2).view(like.shape)


def _rows(pixels: int, channels: int) -> int:
    """How many a program takes: a power of two."""
    least = max(ELEMENTS // channels, -(-pixels // MOST_PARTS), 1)
    return 1 << (least - 1).bit_length()


def _tile(channels: int) -> dict[str, int]:
    block = 1 << (channels - 1).bit_length()
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4}


@cache
def _kernels():
    """The four kernels; imports Triton, which PyTorch's CUDA builds bring."""
    import triton
    import triton.language as tl

    @triton.jit
    def measure(
        x, moments, P,
        C: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        start = part * SPAN
        count = tl.minimum(SPAN, P - start)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)
        inside = column < C
        x += (sample * P + start) * C
        # Less the first row: then squares of n rows lose n times float32's rounding at most,
        # however large the mean is beside the deviation.
        first = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        square = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.range(0, SPAN, ROWS, num_stages=3):  # the next rows are on their way
            held = (i + row < count) & inside[None, :]
            value = tl.load(x + (i + row) * C + column[None, :], mask=held, other=0.0)
            value = tl.where(held, value.to(tl.float32) - first[None, :], 0.0)
            total += value
            square += value * value
        mean = tl.sum(total, 0) / count
        apart = tl.maximum(tl.sum(square, 0) - mean * mean * count, 0.0)
        moments += (sample * tl.num_programs(1) + part) * 2 * C
        tl.store(moments + column, first + mean, mask=inside)
        tl.store(moments + C + column, apart, mask=inside)

    @triton.jit(do_not_specialize=["parts"])
    def combine(
        moments, addend, weight, affine, P, parts, eps,
        C: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
        MOST: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        sample = tl.program_id(0).to(tl.int64)
        within = tl.arange(0, BLOCK)
        inside = within < WIDTH
        channel = tl.program_id(1) * WIDTH + within
        extra = tl.zeros((BLOCK,), tl.float32)
        if addend is not None:
            extra += tl.load(addend + channel, mask=inside, other=0.0).to(tl.float32)
        moments += sample * parts * 2 * C
        total = tl.zeros((PARTS, BLOCK), tl.float32)
        for i in range(0, MOST, PARTS):
            part = i + tl.arange(0, PARTS)[:, None]
            held = (part < parts) & inside[None, :]
            at = moments + part * 2 * C + channel[None, :]
            means = tl.load(at, mask=held, other=0.0) + extra[None, :]
            total += tl.where(held, means, 0.0) * tl.minimum(SPAN, P - part * SPAN)
        mean = tl.sum(tl.sum(total, 0), 0) / P / WIDTH
        total = tl.zeros((PARTS, BLOCK), tl.float32)
        for i in range(0, MOST, PARTS):
            part = i + tl.arange(0, PARTS)[:, None]
            held = (part < parts) & inside[None, :]
            at = moments + part * 2 * C + channel[None, :]
            gap = tl.load(at, mask=held, other=0.0) + extra[None, :] - mean
            gap = tl.where(held, gap, 0.0)
            total += tl.load(at + C, mask=held, other=0.0)
            total += gap * gap * tl.minimum(SPAN, P - part * SPAN)
        rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(total, 0), 0) / P / WIDTH + eps)
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) * rstd
        affine += sample * 2 * C
        tl.store(affine + channel, mean - extra, mask=inside)
        tl.store(affine + C + channel, scale, mask=inside)

    @triton.jit
    def normalise(
        x, affine, bias, y, P, SILU: tl.constexpr,
        C: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
        count = tl.minimum(SPAN, P - start)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        inside = column < C
        centre = tl.load(affine + sample * 2 * C + column, mask=inside, other=0.0)
        scale = tl.load(affine + sample * 2 * C + C + column, mask=inside, other=0.0)
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        x += (sample * P + start) * C
        y += (sample * P + start) * C
        for i in range(0, SPAN, ROWS):
            held = (i + row < count) & inside
            at = (i + row) * C + column
            value = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
            value = (value - centre) * scale + shift
            if SILU:
                value = value / (1.0 + tl.exp(-value))
            tl.store(y + at, value.to(y.dtype.element_ty), mask=held)

    @triton.jit
    def total(
        x, branch, bias, y, P,
        C: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        sample, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
        count = tl.minimum(SPAN, P - start)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
        inside = column < C
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        offset = (sample * P + start) * C
        for i in range(0, SPAN, ROWS):
            held = (i + row < count) & inside
            at = offset + (i + row) * C + column
            value = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
            value += tl.load(branch + at, mask=held, other=0.0).to(tl.float32)
            tl.store(y + at, (value + shift).to(y.dtype.element_ty), mask=held)

    return measure, combine, normalise, total
