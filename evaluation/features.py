"""What a score needs from a feature network, and the statistics file of a set of images."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from evaluation.metrics import GaussianStats
from evaluation.readers import naming_damage, npz_keys
from models.files import write_whole

# Images that pass a network at once, always: another number may round otherwise.
CPU_PASS, PASS = 8, 64


class Activations(NamedTuple):
    """What a network says of B images, float32; `spatial` and `logits` are None for mini."""

    features: torch.Tensor  # [B, D]
    spatial: torch.Tensor | None = None  # [B, S]
    logits: torch.Tensor | None = None  # [B, K]


class FeatureNet(Protocol):
    """A network in eval mode that maps images to vectors; one object has one protocol.

    name         "inception" or "mini"
    protocol     how images are prepared: "pytorch-fid", "adm" or "mini"
    metric       name of the Frechet distance in this space: "fid" or "fd_mini"
    dim          length D of a feature vector
    spatial_dim  length S of a vector of spatial features; 0: it has none
    num_logits   number K of class logits; 0: it has none
    sha256       hash of the weight file
    minimum      the number of images below which the covariance is not to be trusted
    """

    name: str
    protocol: str
    metric: str
    dim: int
    spatial_dim: int
    num_logits: int
    sha256: str
    minimum: int

    def activations(self, images: torch.Tensor) -> Activations:
        """uint8 images [B, 3, H, W] on the network's device -> all that the scores need."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, 3, H, W] on the network's device -> float32 features [B, D]."""


@dataclass(frozen=True)
class Statistics:
    """What the scores need of a set of images; tensors on any one device.

    mu, sigma      mean [D] and covariance [D, D] of the features, float64
    count          number of images; None where a file does not say
    mu_s, sigma_s  the same of the spatial features, [S] and [S, S]; None where there are none
    features       float32 [M, D], of all images or of some spread evenly over them; None where a
                   file holds none
    logits         float32 [N, K] in the order of the images; None where they were not asked for
    known_space    whether the file says which feature space it is of, as only ours do
    """

    mu: torch.Tensor
    sigma: torch.Tensor
    count: int | None
    mu_s: torch.Tensor | None = None
    sigma_s: torch.Tensor | None = None
    features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    known_space: bool = True


def measure(
    net: FeatureNet,
    batches: Iterable[torch.Tensor],
    count: int,
    device: torch.device | str,
    *,
    share: tuple[int, int] = (0, 1),
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    keep: int = 0,
    logits: bool = False,
) -> Statistics:
    """Everything about a set of `count` images in one pass; the same on every process.

    Spatial features only pass through; features are kept as far as `keep` asks for them.

    Args:
        batches: uint8 [B, 3, H, W], this process's share of the images in order.
        share: (r, n): this process has every n-th image from the r-th on.
        total: sums a tensor over the processes (training.distributed.sum_across).
        keep: features of so many images, spread evenly, are kept; at most `count`.
        logits: keep the class logits of all images, where the network has any.

    Raises:
        ValueError: the number of images is not `count`, or below 2; features that are not finite.
    """
    pooled = GaussianStats(net.dim, device=device)
    spatial = GaussianStats(net.spatial_dim, device=device) if net.spatial_dim else None
    keep = min(keep, count)
    chosen = torch.arange(keep) * count // max(keep, 1)  # which images
    place = torch.full((count,), -1).index_put((chosen,), torch.arange(keep))
    features = torch.zeros(keep, net.dim, device=device) if keep else None
    all_logits = torch.zeros(count, net.num_logits, device=device) if logits else None
    if not net.num_logits:
        all_logits = None
    images = torch.arange(count)[share[0] :: share[1]]
    done = 0
    for batch in batches:
        found = _in_passes(net, batch.to(device, non_blocking=True))
        index = images[done : done + len(batch)]
        done += len(batch)
        pooled.update(found.features)
        if spatial is not None:
            spatial.update(found.spatial)
        if features is not None:
            row = place[index]
            kept = row >= 0
            features[row[kept].to(device)] = found.features[kept.to(device)]
        if all_logits is not None:
            all_logits[index.to(device)] = found.logits
    for stats in filter(None, (pooled, spatial)):
        stats.sum_over(total)
    # Each row was filled by one process and is zero on the others
    features = None if features is None else total(features)
    all_logits = None if all_logits is None else total(all_logits)
    if pooled.count != count:
        raise ValueError(f"{count} images were to come, {pooled.count} did")
    return Statistics(
        pooled.mean,
        pooled.sigma,
        count,
        None if spatial is None else spatial.mean,
        None if spatial is None else spatial.sigma,
        features,
        all_logits,
    )


def _in_passes(net: FeatureNet, images: torch.Tensor) -> Activations:
    """The network's answer to images [B, 3, H, W], each the same in whatever batch it comes."""
    size = CPU_PASS if images.device.type == "cpu" else PASS
    parts = []
    for part in images.split(size):
        filling = part.new_zeros(size - len(part), *part.shape[1:])
        found = net.activations(torch.cat([part, filling]))
        parts.append([None if tensor is None else tensor[: len(part)] for tensor in found])
    columns = zip(*parts, strict=True)
    return Activations(*(None if column[0] is None else torch.cat(column) for column in columns))


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


def has_images(path: str | Path) -> bool:
    """Whether an .npz holds images too (`arr_0`), as ADM's reference batches do."""
    return "arr_0" in npz_keys(path)


def stats_source(path: str | Path) -> str | None:
    """What our own statistics file was made from; None of another tool's file."""
    with naming_damage(path), np.load(path, allow_pickle=False) as archive:
        return json.loads(str(archive["made_by"]))["source"] if "made_by" in archive else None


def save_stats(path: str | Path, stats: Statistics, net: FeatureNet, source: str) -> None:
    """Writes an .npz with mu, sigma (so pytorch-fid reads it too), count and the feature space;
    mu_s, sigma_s and the features that were kept, where there are any."""
    arrays = {
        name: getattr(stats, name).cpu().numpy()
        for name in ("mu", "sigma", "mu_s", "sigma_s", "features")
        if getattr(stats, name) is not None
    }

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # given a name, np.savez would append .npz to it
            np.savez(
                file,
                **arrays,
                count=np.int64(-1 if stats.count is None else stats.count),
                made_by=json.dumps(
                    {"format": 1, "feature_net": describe_net(net), "source": source}
                ),
            )

    write_whole(path, write)


def load_stats(path: str | Path, net: FeatureNet, device: torch.device | str = "cpu") -> Statistics:
    """Reads what any of the three kinds of file holds, apart from images.

    Raises: ValueError when the features have another length, or when the file says (ours do)
    that another network, protocol or weight file made it.
    """
    found = {}
    with naming_damage(path), np.load(path, allow_pickle=False) as archive:
        for name, kind in (
            ("mu", np.float64),
            ("sigma", np.float64),
            ("mu_s", np.float64),
            ("sigma_s", np.float64),
            ("features", np.float32),
        ):
            if name in archive:
                found[name] = torch.from_numpy(archive[name].astype(kind))
        made_by = json.loads(str(archive["made_by"])) if "made_by" in archive else None
        count = int(archive["count"]) if made_by else -1
    mu, sigma = found["mu"], found["sigma"]
    if tuple(mu.shape) != (net.dim,) or tuple(sigma.shape) != (net.dim, net.dim):
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
    spatial = [found[name] for name in ("mu_s", "sigma_s") if name in found]
    size = net.spatial_dim
    if spatial and [tuple(a.shape) for a in spatial] != [(size,), (size, size)]:
        raise ValueError(
            f"{path}: mu_s and sigma_s have shapes {[list(a.shape) for a in spatial]}, expected "
            f"[{size}] and [{size}, {size}] for --feature-net {net.name}"
        )
    return Statistics(
        count=count if count >= 0 else None,
        known_space=made_by is not None,
        **{name: tensor.to(device) for name, tensor in found.items()},
    )
