"""The feature network of the miniature testbed: 64 numbers for a 64x64 picture.

A Frechet distance in this space is named `fd_mini`. It ranks samplers and grafts of the
miniature model quickly and offline; it is no FID and cannot be compared with one.
`scripts/train_mini_features.py` makes the weights from the testbed's pictures alone.
"""

from pathlib import Path

import torch
from torch import nn

from evaluation.features import Activations
from models.files import file_sha256, write_whole
from models.weights import read_state

WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "mini" / "feature_net.safetensors"
SIZE = 64
DIM = 64


class MiniNet(nn.Module):
    """A plain convolutional network, 0.50 M parameters.

    Its last map keeps a 4x4 layout before the projection, so that where things are counts too,
    and the projection is whitened by a batch norm without scale: a distance of 1 is one standard
    deviation of one feature over the training batches.
    """

    def __init__(self):
        super().__init__()
        widths = ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1))
        widths += ((96, 128, 2), (128, 128, 1))
        self.trunk = nn.Sequential(*(_layer(*width) for width in widths))
        self.squeeze = nn.Conv2d(128, 32, 1)
        self.project = nn.Linear(32 * 4 * 4, DIM)
        self.whiten = nn.BatchNorm1d(DIM, affine=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, 64, 64] in 0..1 -> features [B, 64]."""
        x = self.trunk(images * 2 - 1)  # [B, 128, 8, 8]
        x = nn.functional.avg_pool2d(self.squeeze(x), 2)  # [B, 32, 4, 4]
        return self.whiten(self.project(x.flatten(1)))


def _layer(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.SiLU(),
    )


class MiniFeatures:
    """The trained MiniNet as a FeatureNet (see evaluation/features.py), in float32."""

    name = "mini"
    protocol = "mini"
    metric = "fd_mini"
    dim = DIM
    spatial_dim = 0
    num_logits = 0
    minimum = 4 * DIM  # fewer leave the covariance of 64 features badly determined

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        weights = Path(weights or WEIGHTS)
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights} is missing; make it with: python scripts/train_mini_features.py"
            )
        self.sha256 = file_sha256(weights)
        self.net = MiniNet().eval().requires_grad_(False)
        state = {name: tensor.float() for name, tensor in read_state(weights).items()}
        for name, buffer in self.net.named_buffers():
            if name.endswith("num_batches_tracked"):  # the file leaves these counters out
                state[name] = buffer
        self.net.load_state_dict(state, strict=True)
        self.net.to(device)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, 64, 64] -> float32 [B, 64]. ValueError for another size: these features
        judge sharpness, which a resize would change."""
        if images.shape[2:] != (SIZE, SIZE):
            raise ValueError(
                f"the mini feature network takes {SIZE}x{SIZE} images, not "
                f"{images.shape[3]}x{images.shape[2]}; use --feature-net inception for others"
            )
        return self.net(images.float() / 255)

    def activations(self, images: torch.Tensor) -> Activations:
        """uint8 [B, 3, 64, 64] -> float32 [B, 64]; spatial features and logits it has none."""
        return Activations(self(images))


def save_weights(net: MiniNet, path: str | Path, **metadata) -> None:
    """Writes a MiniNet in float16, whole or not at all."""
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().cpu().half().contiguous()
        for name, tensor in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    words = {name: str(value) for name, value in metadata.items()}
    write_whole(path, lambda partial: save_file(state, partial, metadata=words))
