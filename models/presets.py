"""The models that a plan can name: their sizes, and a fresh one of each.

DiT (models/dit.py) is told a class, PixArt-Sigma (models/pixart.py) a caption.
"""

from collections import ChainMap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.captions import Captions
from models.dit import PRESETS as DIT_PRESETS
from models.dit import DiT, build_dit
from models.files import read_json

if TYPE_CHECKING:
    from models.graft_plan import GraftPlan

# image_size: the one that the model is made for. interpolation_scale: its position table is that
# of 512 pixels, drawn out. caption_channels: width of the text encoder.
_PIXART = {
    f"PixArt-Sigma-XL-2-{size}": {
        "depth": 28,
        "hidden_size": 1152,
        "num_heads": 16,
        "patch_size": 2,
        "latent_downsample": 8,
        "image_size": size,
        "interpolation_scale": size // 512,
        "caption_channels": 4096,
    }
    for size in (512, 1024, 2048)
}
_PIXART["PixArt-Mini"] = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "patch_size": 2,
    "latent_downsample": 4,
    "image_size": 64,
    "interpolation_scale": 1,
    "caption_channels": 32,
}
PRESETS = ChainMap(DIT_PRESETS, _PIXART)
MAX_TOKENS = 300  # of a caption, in PixArt-Sigma (arXiv 2403.04692)
LATENT_CHANNELS = 4


def is_captioned(name: str) -> bool:
    """Whether a preset is told captions, not classes."""
    return name in _PIXART


def latent_size(name: str, image_size: int) -> int:
    """Side of the square latent of a square image of `image_size` pixels, for one preset.

    ValueError when the image does not divide into whole patches, or is not of the model's size.
    """
    p = PRESETS[name]
    if p.get("image_size", image_size) != image_size:
        raise ValueError(f"image_size {image_size}: {name} makes images of {p['image_size']} px")
    step = p["latent_downsample"] * p["patch_size"]
    if image_size <= 0 or image_size % step:
        raise ValueError(
            f"image_size {image_size} does not divide into the {step}-pixel patches of {name}: "
            f"choose a multiple of {step}"
        )
    return image_size // p["latent_downsample"]


def pixart_config(name: str) -> dict:
    """The constructor arguments of diffusers' PixArtTransformer2DModel for one preset, as the
    published config.json have them. Those that only other models need are left at their default."""
    p = PRESETS[name]
    return {
        "num_attention_heads": p["num_heads"],
        "attention_head_dim": p["hidden_size"] // p["num_heads"],
        "in_channels": LATENT_CHANNELS,
        "out_channels": 2 * LATENT_CHANNELS,
        "num_layers": p["depth"],
        "cross_attention_dim": p["hidden_size"],
        "sample_size": p["image_size"] // p["latent_downsample"],
        "patch_size": p["patch_size"],
        "interpolation_scale": p["interpolation_scale"],
        "caption_channels": p["caption_channels"],
        "use_additional_conditions": False,
    }


def check_config(weights: Path, plan: "GraftPlan") -> None:
    """ValueError when the config.json beside a weight file of diffusers' format is of another model
    than the plan's; the weights alone do not tell the resolution."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return
    given = read_json(path, "fetch the model again")
    for key, value in pixart_config(plan.model_name).items():
        if given.get(key) not in (value, None):
            raise ValueError(
                f"{path}: {key} is {given[key]!r}; {plan.model_name} of {plan.path} has {value!r}: "
                "name the model's own folder in base_ckpt_path, or its weights apart from this file"
            )


def build_model(plan: "GraftPlan") -> DiT:
    """A freshly initialised, ungrafted model of a plan's preset."""
    if not plan.captioned:
        return build_dit(plan.model_name, plan.input_size, num_classes=plan.num_classes)
    from models.pixart import PixArt

    return PixArt(pixart_config(plan.model_name))


def blank_condition(plan: "GraftPlan", batch: int, device: torch.device) -> torch.Tensor | Captions:
    """What a plan's model is told of `batch` images, for timing: class 0, or captions of zeros."""
    if not plan.captioned:
        return torch.zeros(batch, dtype=torch.long, device=device)
    width = PRESETS[plan.model_name]["caption_channels"]
    blank = torch.zeros(1, MAX_TOKENS, width, dtype=torch.float16, device=device)
    mask = torch.ones(1, MAX_TOKENS, dtype=torch.bool, device=device)
    return Captions(blank.repeat(batch, 1, 1), mask.repeat(batch, 1), blank, mask)
