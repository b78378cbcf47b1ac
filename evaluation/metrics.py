"""Statistics of features in float64, and the Frechet distance of two Gaussians."""

from collections.abc import Callable

import numpy as np
import torch


class GaussianStats:
    """Mean and covariance of feature vectors that arrive in batches, in float64.

    Batches are joined by the parallel rule of Chan, Golub and LeVeque (1979), which keeps
    centred sums only and so loses nothing to cancellation when the mean is far from zero.

    count    number of vectors so far
    mean     float64 [D]
    scatter  float64 [D, D], the sum of outer products of centred vectors
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Adds features [B, D]. ValueError when one of them is not finite."""
        features = features.to(self.mean)
        if not torch.isfinite(features).all():
            raise ValueError(
                f"features of images {self.count} to {self.count + len(features) - 1} "
                "hold NaN or infinity; check the feature network's weights"
            )
        count, total = len(features), self.count + len(features)
        mean = features.mean(0)
        centred, delta = features - mean, mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def sum_over(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Joins the statistics of several processes, on each of them.

        total: sums a tensor over the processes (training.distributed.sum_across).
        """
        count = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        everyone = total(count.clone())
        mean = total(self.mean * count) / everyone
        delta = self.mean - mean
        self.scatter = total(self.scatter + torch.outer(delta, delta) * count)
        self.mean = mean
        self.count = round(everyone.item())

    @property
    def sigma(self) -> torch.Tensor:
        """Covariance [D, D] with the divisor N - 1. ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr (sigma1^1/2 sigma2 sigma1^1/2)^1/2.

    With sigma1 = A A^T the last trace is the sum of the square roots of the eigenvalues of
    A^T sigma2 A, a symmetric matrix: no square root of a non-symmetric product is needed.
    Directions in which sigma1 has no variance (to rounding) are left out of A, so covariances
    of fewer images than dimensions need no offset on the diagonal.

    Args: mu [D], sigma [D, D], arrays or tensors; computed in float64 on the device of mu1.
    Raises: ValueError on shapes that do not fit, on NaN or infinity, or when an eigenvalue is
    negative by more than rounding explains.
    """
    device = mu1.device if isinstance(mu1, torch.Tensor) else "cpu"
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(np.asarray(a) if not isinstance(a, torch.Tensor) else a).to(
            device=device, dtype=torch.float64
        )
        for a in (mu1, sigma1, mu2, sigma2)
    )
    dim = len(mu1)
    for name, a, shape in (
        ("mu1", mu1, (dim,)),
        ("mu2", mu2, (dim,)),
        ("sigma1", sigma1, (dim, dim)),
        ("sigma2", sigma2, (dim, dim)),
    ):
        if tuple(a.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(a.shape)}, expected {list(shape)}: "
                "both sides must come from the same feature network"
            )
        if not torch.isfinite(a).all():
            raise ValueError(f"{name} holds NaN or infinity")

    values, vectors = torch.linalg.eigh((sigma1 + sigma1.T) / 2)
    kept = values > _rounding(values, "sigma1")
    root = vectors[:, kept] * values[kept].sqrt()  # [D, rank]
    product = root.T @ ((sigma2 + sigma2.T) / 2) @ root
    if len(product):
        cross = torch.linalg.eigvalsh((product + product.T) / 2)
        cross = cross[cross > _rounding(cross, "sigma2")].sqrt().sum()
    else:
        cross = torch.zeros((), dtype=torch.float64, device=device)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _rounding(values: torch.Tensor, name: str) -> float:
    """The size below which ascending eigenvalues are rounding errors of the matrix."""
    size = values.abs().max().item()
    if values[0].item() < -1e-6 * size:
        raise ValueError(
            f"{name} is not a covariance: it has the eigenvalue {values[0].item():.3g} "
            f"beside {size:.3g}"
        )
    return size * len(values) * torch.finfo(torch.float64).eps
