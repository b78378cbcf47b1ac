"""Inception features as the literature's FID uses them, by two protocols of preparing images.

The network is the `pytorch-fid` package's port of the original TensorFlow graph of 2015-12-05.
"pytorch-fid": pixels 0..1, resized to 299 by half-pixel bilinear interpolation, then 2x - 1.
"adm": pixels 0..255, resized by TensorFlow 1's bilinear rule, then (x - 128) / 128; this is what
the evaluator of "Diffusion Models Beat GANs" (Dhariwal and Nichol 2021) does, and so what DiT's
and later papers report. The two differ in the second decimal of an FID.
"""

import pickle
import urllib.error
import zipfile
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from evaluation.features import Activations
from models.files import file_sha256
from models.weights import read_state

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
HASH_PREFIX = "6726825d"
# How torch.save began a file before PyTorch 1.6: a pickled number. The published file is one.
OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
SIDE = 299
SPATIAL_CHANNELS = 7
PROTOCOLS = ("pytorch-fid", "adm")
REPOSITORY = Path(__file__).resolve().parent.parent


class InceptionFeatures:
    """Features, spatial features and logits, as a FeatureNet (see evaluation/features.py), float32.

    features  pool_3, 2048 numbers
    spatial   the first 7 channels of the 17x17 map behind the 1x1 convolution of TensorFlow's
              mixed_6, in the order row, column, channel: sFID (Nash et al. 2021) as ADM has it
    logits    1008, by the network's last matrix without its bias, as for the Inception score

    Args:
        protocol: "pytorch-fid" or "adm".
        weights: a weight file; None looks where `find_weights` says.

    Raises:
        FileNotFoundError: as `find_weights`.
        ValueError: an unknown protocol, or a file that is torn or holds another network.
    """

    name = "inception"
    metric = "fid"
    dim = 2048
    spatial_dim = 17 * 17 * SPATIAL_CHANNELS
    num_logits = 1008
    minimum = 2048

    def __init__(
        self,
        protocol: str = "pytorch-fid",
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")
        self.protocol = protocol
        path = find_weights(weights)
        self.sha256 = file_sha256(path)
        if path.name == FILE_NAME and not self.sha256.startswith(HASH_PREFIX):
            raise ValueError(
                f"{path} is damaged: its sha256 starts with {self.sha256[:8]}, "
                f"not {HASH_PREFIX}; delete it and fetch it again"
            )
        state = read_weights(path)
        try:
            self.net = build_network(state)
        except RuntimeError as error:  # load_state_dict lists hundreds of tensors
            first = str(error).splitlines()[1].strip()[:100]
            raise ValueError(
                f"--inception-weights {path} is not the Inception of pytorch-fid ({first} ...): "
                f"give {FILE_NAME}"
            ) from error
        self.classifier = self.net.fc.weight.to(device)  # [1008, 2048]
        self.net.fc = nn.Identity()
        self.net.to(device, memory_format=torch.channels_last)
        self._map = None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._map = output[:, :SPATIAL_CHANNELS]  # [B, 7, 17, 17]

    @torch.inference_mode()
    def activations(self, images: torch.Tensor) -> Activations:
        """uint8 [B, 3, H, W] -> float32 [B, 2048], [B, 2023] and [B, 1008]."""
        features = self.net(prepare(images, self.protocol))
        spatial = self._map.permute(0, 2, 3, 1).flatten(1)
        return Activations(features, spatial, features @ self.classifier.T)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 2048]."""
        return self.activations(images).features


def prepare(images: torch.Tensor, protocol: str) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, 299, 299] in about -1..1, by the protocol's rule."""
    if protocol == "adm":
        return (legacy_resize(images.float(), SIDE) - 128) / 128
    size = (SIDE, SIDE)
    return F.interpolate(images.float() / 255, size, mode="bilinear", align_corners=False) * 2 - 1


def legacy_resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's ResizeBilinear with align_corners=False: float [B, C, H, W] -> side x side.

    The source coordinate of output pixel i is i * in / out in float32, without half-pixel shift
    and without antialiasing; the last rows and columns repeat the edge.
    """
    for axis in (3, 2):
        length = x.shape[axis]
        scale = torch.tensor(length, dtype=torch.float32) / side
        source = (torch.arange(side, dtype=torch.float32) * scale).to(x.device)
        low = source.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = source - low
        weight = weight[:, None] if axis == 2 else weight
        x_low, x_high = x.index_select(axis, low), x.index_select(axis, high)
        x = x_low + (x_high - x_low) * weight
    return x


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a weight file. ValueError when it is torn or no weight file."""
    if path.suffix == ".safetensors" or zipfile.is_zipfile(path):
        return read_state(path)
    with open(path, "rb") as file:
        known = file.read(len(OLD_FORMAT)) == OLD_FORMAT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True) if known else None
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"--inception-weights {path} is torn or no weight file: give {FILE_NAME}")
    return state


def build_network(state: dict[str, torch.Tensor]) -> nn.Module:
    """pytorch-fid's patched Inception with all of its 1008 outputs, holding `state`.

    Its builder always downloads, so for the length of the call its loader hands out `state`.
    """
    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.fid_inception_v3().eval().requires_grad_(False)


def find_weights(path: str | Path | None = None) -> Path:
    """`path`; or pretrained/ below the working directory or the repository; or torch hub's cache,
    filled by download when empty.

    Raises: FileNotFoundError when the file named is not there or the download fails.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--inception-weights {path} does not exist")
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    for folder in (Path("pretrained"), REPOSITORY / "pretrained", cached.parent):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    from pytorch_fid.inception import FID_WEIGHTS_URL

    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(cached), HASH_PREFIX, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the Inception weights cannot be downloaded ({error}): fetch {FID_WEIGHTS_URL} "
            f"elsewhere and put it at pretrained/{FILE_NAME} or name it with --inception-weights"
        ) from error
    return cached
