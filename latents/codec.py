"""The VAE between pixels and latents, behind the two calls that the pipeline makes of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffusion import noise
from models.files import file_sha256, read_json

REPOSITORY = Path(__file__).resolve().parent.parent
HUB_NAMES = {
    "ema": "stabilityai/sd-vae-ft-ema",
    "mse": "stabilityai/sd-vae-ft-mse",
    "sdxl": "stabilityai/sdxl-vae",
}
PUBLISHED_SCALE = 0.18215
SCALES = {"ema": PUBLISHED_SCALE, "mse": PUBLISHED_SCALE, "sdxl": 0.13025}
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# Pixels that pass the network at once: bounds its memory whatever batch the caller holds. It is a
# constant because another split of a batch may round differently.
PASS_PIXELS = 64 * 256 * 256
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers clamps to it before it draws; finite in fp16


@dataclass(frozen=True)
class Codec:
    """A frozen AutoencoderKL (latent diffusion, arXiv 2112.10752).

    Attributes:
        scale: latents are multiplied by it for the diffusion model (0.18215 for sd-vae-ft-*,
            0.13025 for the VAE of SDXL).
        downsample: pixels of a latent's side (8 for sd-vae-ft-*, 4 for the miniature VAE).
        channels: C of the latents.
        id: the VAE as it was asked for: "ema", "mse", "sdxl" or a folder, as the user wrote it.
        sha256: of the weight file.
        images: how many images the encoder always takes at once, a short batch being filled up;
            None where it takes any number.
    """

    vae: torch.nn.Module
    scale: float
    downsample: int
    channels: int
    id: str
    sha256: str
    device: torch.device
    dtype: torch.dtype
    images: int | None = None

    def compiled(self, batch: int, image_size: int) -> "Codec":
        """The codec with its encoder compiled, on CUDA, for batches of up to `batch` images;
        elsewhere as it is. Decoding is left alone: beside the kernels of group_norm.py it would
        gain less than compiling takes.

        image_size: pixels.
        """
        if self.device.type != "cuda":
            return self
        self.vae.encoder.compile(dynamic=False)
        passes = math.ceil(batch / _images_a_pass(image_size, image_size))
        return replace(self, images=math.ceil(batch / passes))

    def _filled(self, images: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
        """What passes the encoder at once, and how many of it count."""
        for part in images.split(self.images or _images_a_pass(*images.shape[2:])):
            number = len(part)
            if self.images is not None and number < self.images:
                part = part[torch.arange(self.images, device=part.device) % number]
            yield part, number

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        kind = self.dtype if enabled else torch.bfloat16
        return torch.autocast(self.device.type, dtype=kind, enabled=enabled)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 to unscaled moments [B, 2C, h, w] float32: mean, logvar.

        Raises ValueError when H or W is no multiple of `downsample`.
        """
        _, _, H, W = images.shape
        if H % self.downsample or W % self.downsample:
            raise ValueError(
                f"images of {H}x{W} pixels: VAE {self.id} needs sides divisible by "
                f"{self.downsample}; choose another image size"
            )
        parts = []
        for part, number in self._filled(images):
            part = part.to(self.device, torch.float32, memory_format=torch.channels_last)
            with self._autocast():
                moments = self.vae.encode(part).latent_dist.parameters  # [b, 2C, h, w]
            mean, logvar = moments[:number].float().chunk(2, dim=1)
            parts.append(torch.cat((mean, logvar.clamp(*LOGVAR_RANGE)), dim=1))
        return torch.cat(parts).contiguous()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [B, C, h, w] to uint8 images [B, H, W, 3] on the codec's device."""
        _, _, h, w = latents.shape
        parts = []
        for part in latents.split(_images_a_pass(h * self.downsample, w * self.downsample)):
            part = part.to(self.device, torch.float32) / self.scale
            with self._autocast():
                images = self.vae.decode(part.contiguous(memory_format=torch.channels_last)).sample
            # -1..1; uint8 cuts, so rounds
            images = (images.float() * 127.5 + 128.0).clamp(0, 255)
            parts.append(images.to(torch.uint8).permute(0, 2, 3, 1))
        return torch.cat(parts).contiguous()


def _images_a_pass(height: int, width: int) -> int:
    return max(1, PASS_PIXELS // (height * width))


def encode_rows(
    codec: Codec, images: torch.Tensor, places: torch.Tensor, mirrors: int, sample_seed: int | None
) -> np.ndarray:
    """Rows of a latent store, float16 [b, mirrors, 2C, h, w].

    Args:
        images: uint8 [b, 3, S, S]; places: theirs in the listing, int64 [b].
        mirrors: 1, or 2 for the mirror image too.
        sample_seed: of one scaled draw from each posterior, [b, mirrors, C, h, w] then; None keeps
            the moments.
    """
    x = images.to(codec.device, non_blocking=True).float() / 127.5 - 1
    views = [x, x.flip(3)][:mirrors]
    moments = codec.encode(torch.cat(views))  # [mirrors*b, 2C, h, w]
    moments = moments.unflatten(0, (len(views), len(x))).transpose(0, 1)  # [b, mirrors, 2C, h, w]
    if sample_seed is not None:
        mean, logvar = moments.chunk(2, dim=2)
        index = places.to(codec.device)
        draws = [
            noise.normal(sample_seed, noise.POSTERIOR, index, mean.shape[2:], step=mirror)
            for mirror in range(len(views))
        ]
        moments = (mean + torch.exp(0.5 * logvar) * torch.stack(draws, dim=1)) * codec.scale
    return moments.to(torch.float16).cpu().numpy()


def scale_of(vae: str | Path) -> float:
    """The factor of a VAE's latents, without its weights: a name of HUB_NAMES, or a folder.

    Raises:
        FileNotFoundError, ValueError: the folder's config.json is missing or damaged.
    """
    if vae in HUB_NAMES:
        return SCALES[vae]
    path = Path(vae) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"VAE {vae}: {path} is missing; name a diffusers AutoencoderKL folder"
        )
    scale = read_json(path, f"VAE {vae} needs its {CONFIG} anew")
    scale = scale.get("scaling_factor", PUBLISHED_SCALE)  # the library's default too
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"VAE {vae}: {path}: scaling_factor {scale!r} must be a number above 0")
    return float(scale)


def load_codec(
    vae: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> Codec:
    """Opens a VAE for inference.

    Args:
        vae: "ema", "mse" (stabilityai/sd-vae-ft-*) or "sdxl" (stabilityai/sdxl-vae): the folder of
            that name in pretrained/ where it exists, else the hub; or a folder that diffusers'
            AutoencoderKL.save_pretrained wrote.
        dtype: what the convolutions compute in (autocast); the weights stay float32.
        name: recorded as `Codec.id` where `vae` is a path that was resolved; None records `vae`.

    Raises:
        FileNotFoundError: no such folder or files, or the hub cannot be reached.
        ValueError: a file is torn, the weights do not fit config.json, or the VAE's latents need
            more than one factor to be scaled.
    """
    folder = _find_folder(str(vae))
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"VAE {vae}: {folder / file} is missing; put a diffusers AutoencoderKL folder "
                f"({CONFIG} and {WEIGHTS}) there"
            )
    device = torch.device(device)
    model = _read_model(folder, str(vae))
    if getattr(model.config, "shift_factor", None):
        raise ValueError(
            f"VAE {vae}: {folder / CONFIG} has shift_factor {model.config.shift_factor}; only VAEs "
            "whose latents are scaled but not shifted (shift_factor null) are supported"
        )
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Codec(
        vae=model,
        scale=float(model.config.scaling_factor),
        downsample=2 ** (len(model.config.block_out_channels) - 1),
        channels=model.config.latent_channels,
        id=name or str(vae),
        sha256=file_sha256(folder / WEIGHTS),
        device=device,
        dtype=dtype,
    )


def _read_model(folder: Path, vae: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL
    from diffusers.utils import logging
    from safetensors import SafetensorError

    read_json(folder / CONFIG, f"VAE {vae} needs its {CONFIG} anew")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list all tensors that do not fit
    try:
        model, info = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        odd = [*info["missing_keys"], *info["unexpected_keys"]]
        cause = f"tensor {min(odd)} is in one of the two only" if odd else None
    except (OSError, RuntimeError, TypeError, LookupError, ValueError, SafetensorError) as error:
        lines = str(error).splitlines() or [repr(error)]
        # the first line of a mismatch only announces a list
        cause = (lines[1] if lines[0].endswith(":") and lines[1:] else lines[0]).strip(" \t.")
    finally:
        logging.set_verbosity(verbosity)
    if cause is not None:
        raise ValueError(
            f"VAE {vae}: {folder / WEIGHTS} cannot be read or does not fit {CONFIG} ({cause}); "
            "fetch the VAE again, or name another"
        )
    return model


def _find_folder(vae: str) -> Path:
    if vae in HUB_NAMES:
        return published_folder(f"VAE {vae}", HUB_NAMES[vae], [CONFIG, WEIGHTS])
    folder = Path(vae)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"VAE {vae}: no such folder; use {', '.join(HUB_NAMES)} or a diffusers AutoencoderKL "
            "folder"
        )
    return folder


def published_folder(what: str, repo: str, files: list[str]) -> Path:
    """The folder pretrained/<name> of a published model, or where the hub's client keeps it.

    Args:
        what: for messages.
        repo: <organisation>/<name>.
        files: patterns of those that are wanted.

    Raises:
        FileNotFoundError: neither is there; says what belongs where.
    """
    local = Path("pretrained") / repo.rpartition("/")[2]
    for folder in (local, REPOSITORY / local):
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except (OSError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{what}: {local} does not exist and {repo} cannot be downloaded "
            f"({type(error).__name__}); put its {' and '.join(files)} into {local}"
        ) from error
