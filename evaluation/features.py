"""What a score needs from a feature network, and the statistics file of a set of images."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from evaluation.metrics import GaussianStats
from evaluation.readers import npz_keys
from models.files import write_whole


class FeatureNet(Protocol):
    """A network in eval mode that maps images to vectors; one object has one protocol.

    name      "inception" or "mini"
    protocol  how images are prepared: "pytorch-fid", "adm" or "mini"
    metric    name of the Frechet distance in this space: "fid" or "fd_mini"
    dim       length D of a feature vector
    sha256    hash of the weight file
    minimum   the number of images below which the covariance is not to be trusted
    """

    name: str
    protocol: str
    metric: str
    dim: int
    sha256: str
    minimum: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, 3, H, W] on the network's device -> float32 features [B, D]."""


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] in float64; `count` is None where the file does not say.

    `known_space`: whether the file says which feature space it is of, as only ours do.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None
    known_space: bool = True


def gather_stats(net: FeatureNet, batches: Iterable[torch.Tensor], device) -> GaussianStats:
    """Mean and covariance of the features of uint8 batches [B, 3, H, W], in one pass."""
    stats = GaussianStats(net.dim, device=device)
    for images in batches:
        stats.update(net(images.to(device, non_blocking=True)))
    return stats


def describe_net(net: FeatureNet) -> dict:
    """What identifies a feature space; two distances compare only when this is the same."""
    return {"name": net.name, "protocol": net.protocol, "dim": net.dim, "sha256": net.sha256}


def is_stats(path: str | Path) -> bool:
    """Whether a file is an .npz with `mu` and `sigma`: ADM's, pytorch-fid's or our own."""
    path = Path(path)
    return path.is_file() and {"mu", "sigma"} <= npz_keys(path)


def save_stats(path: str | Path, stats: Statistics, net: FeatureNet, source: str) -> None:
    """Writes an .npz with mu, sigma (so pytorch-fid reads it too), count and the feature space."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a name, np.savez would append .npz to it
            np.savez(
                file,
                mu=stats.mu,
                sigma=stats.sigma,
                count=np.int64(-1 if stats.count is None else stats.count),
                made_by=json.dumps(
                    {"format": 1, "feature_net": describe_net(net), "source": source}
                ),
            )

    write_whole(path, write)


def load_stats(path: str | Path, net: FeatureNet) -> Statistics:
    """Reads mu and sigma of any of the three kinds of file.

    Raises: ValueError when the features have another length, or when the file says (ours do)
    that another network, protocol or weight file made it.
    """
    with np.load(path, allow_pickle=False) as archive:
        mu = archive["mu"].astype(np.float64)
        sigma = archive["sigma"].astype(np.float64)
        made_by = json.loads(str(archive["made_by"])) if "made_by" in archive else None
        count = int(archive["count"]) if made_by else -1
    if mu.shape != (net.dim,) or sigma.shape != (net.dim, net.dim):
        raise ValueError(
            f"{path} holds statistics of {mu.shape[0] if mu.ndim else 0} features, "
            f"--feature-net {net.name} has {net.dim}"
        )
    if made_by and made_by["feature_net"] != describe_net(net):
        theirs, ours = made_by["feature_net"], describe_net(net)
        key = next(key for key in ours if theirs.get(key) != ours[key])
        raise ValueError(
            f"{path} was made with {key} {theirs.get(key)}, this run has {ours[key]}: "
            "use the same feature network, protocol and weights, or make the file anew"
        )
    return Statistics(mu, sigma, count if count >= 0 else None, known_space=made_by is not None)
