"""Statistics of features in float64, the Frechet distance and the Inception score."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

IS_BLOCK = 5000  # images that the Inception score is computed over at a time, as ADM does
CHUNK = 4096  # rows in float64 at a time
FOLD = 2048  # rows that are worth a product of their own


class GaussianStats:
    """Mean and covariance of feature vectors that arrive in batches, in float64.

    Batches are joined by the parallel rule of Chan, Golub and LeVeque (1979), which keeps
    centred sums only and so loses nothing to cancellation when the mean is far from zero.

    Small batches wait until they are worth a large product.

    count    number of vectors so far
    mean     float64 [D]
    scatter  float64 [D, D], the sum of outer products of centred vectors
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._folded = 0
        self._waiting: list[torch.Tensor] = []

    def update(self, features: torch.Tensor) -> None:
        """Adds features [B, D]. ValueError when one of them is not finite."""
        if not torch.isfinite(features).all():
            raise ValueError(
                f"features of images {self.count} to {self.count + len(features) - 1} "
                "hold NaN or infinity; check the feature network's weights"
            )
        self._waiting.append(features.to(self._mean, copy=True))
        self.count += len(features)
        if self.count - self._folded >= FOLD:
            self._fold()

    def _fold(self) -> None:
        """Brings what waits into mean and scatter."""
        if not self._waiting:
            return
        features = torch.cat(self._waiting)
        self._waiting.clear()
        count, total = len(features), self._folded + len(features)
        mean = features.mean(0)
        delta = mean - self._mean
        features -= mean
        self._scatter.addmm_(features.T, features)
        self._scatter.addr_(delta, delta, alpha=self._folded * count / total)
        self._mean += delta * (count / total)
        self._folded = total

    @property
    def mean(self) -> torch.Tensor:
        self._fold()
        return self._mean

    @property
    def scatter(self) -> torch.Tensor:
        self._fold()
        return self._scatter

    def sum_over(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Joins the statistics of several processes, on each of them.

        total: sums a tensor over the processes (training.distributed.sum_across).
        """
        count = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        everyone = total(count.clone())
        mean = total(self.mean * count) / everyone
        delta = self.mean - mean
        self._scatter = total(self.scatter + torch.outer(delta, delta) * count)
        self._mean = mean
        self.count = self._folded = round(everyone.item())

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
    mu1, sigma1, mu2, sigma2 = _gaussians(mu1, sigma1, mu2, sigma2)
    return _distance_from(mu1, sigma1, _root(sigma1, "sigma1"), mu2, sigma2)


def inception_score(logits: torch.Tensor, block: int = IS_BLOCK) -> float:
    """exp of the mean KL divergence of p(y|x) from p(y) (Salimans et al. 2016): 1 to K.

    As ADM's evaluator computes it: the mean over blocks of images in their order, the last block
    as short as it happens to be.

    Args: logits [N, K]; computed in float64, block by block.
    """
    scores = []
    for part in logits.split(block):
        chance, certainty = _class_chances(part)
        scores.append((certainty.mean() - torch.xlogy(*[chance.mean(0)] * 2).sum()).exp())
    return torch.stack(scores).mean().item()


def bootstrap_frechet(
    mu, sigma, features: torch.Tensor, rounds: int, seed: int = 0
) -> torch.Tensor:
    """Frechet distances [rounds] of resampled `features` [N, D] from a fixed Gaussian, float64.

    Their standard deviation estimates the standard error that the choice of the samples leaves;
    the error of the reference is not in it. Their mean lies above the distance itself, since a
    resample holds fewer distinct images.
    """
    mu, sigma = (torch.as_tensor(a).to(features.device, torch.float64) for a in (mu, sigma))
    root = _root(sigma, "sigma")
    distances = []
    for counts in _resamples(len(features), rounds, seed):
        drawn = counts.nonzero().squeeze(1)
        rows, weights = features[drawn.to(features.device)], counts[drawn].to(mu)
        mean = torch.zeros_like(mu)
        scatter = torch.zeros_like(sigma)
        parts = list(zip(rows.split(CHUNK), weights.split(CHUNK), strict=True))
        for part, weight in parts:
            mean += weight @ part.double() / len(features)
        for part, weight in parts:
            centred = (part.double() - mean) * weight.sqrt()[:, None]
            scatter.addmm_(centred.T, centred)
        distances.append(_distance_from(mu, sigma, root, mean, scatter / (len(features) - 1)))
    return torch.tensor(distances, dtype=torch.float64)


def bootstrap_inception(
    logits: torch.Tensor, rounds: int, seed: int = 0, block: int = IS_BLOCK
) -> torch.Tensor:
    """Inception scores [rounds] of resampled images, each block resampled by itself, float64."""
    scores = torch.zeros(rounds, dtype=torch.float64)
    parts = logits.split(block)
    for number, part in enumerate(parts):
        chance, certainty = _class_chances(part)
        for i, counts in enumerate(_resamples(len(part), rounds, seed + number)):
            weight = counts.to(chance) / len(part)
            marginal = weight @ chance
            divergence = weight @ certainty - torch.xlogy(marginal, marginal).sum()
            scores[i] += divergence.exp().item() / len(parts)
    return scores


def _class_chances(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [N, K] and their negative entropies [N], float64."""
    log_chance = logits.double().log_softmax(1)
    chance = log_chance.exp()
    return chance, (chance * log_chance).sum(1)


def _resamples(count: int, rounds: int, seed: int) -> Iterator[torch.Tensor]:
    """How often each of `count` things is drawn when `count` are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        drawn = torch.randint(count, (count,), generator=generator)
        yield torch.bincount(drawn, minlength=count)


def _gaussians(mu1, sigma1, mu2, sigma2) -> list[torch.Tensor]:
    """The four in float64 on the device of mu1. ValueError as frechet_distance."""
    device = mu1.device if isinstance(mu1, torch.Tensor) else "cpu"
    named = {
        name: torch.as_tensor(np.asarray(a) if not isinstance(a, torch.Tensor) else a).to(
            device=device, dtype=torch.float64
        )
        for name, a in (("mu1", mu1), ("mu2", mu2), ("sigma1", sigma1), ("sigma2", sigma2))
    }
    dim = len(named["mu1"])
    for name, a in named.items():
        shape = (dim,) if name.startswith("mu") else (dim, dim)
        if tuple(a.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(a.shape)}, expected {list(shape)}: "
                "both sides must come from the same feature network"
            )
        if not torch.isfinite(a).all():
            raise ValueError(f"{name} holds NaN or infinity")
    return [named[name] for name in ("mu1", "sigma1", "mu2", "sigma2")]


def _root(sigma: torch.Tensor, name: str) -> torch.Tensor:
    """A [D, rank] with A A^T = sigma."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    kept = values > _rounding(values, name)
    return vectors[:, kept] * values[kept].sqrt()


def _distance_from(mu1, sigma1, root1, mu2, sigma2) -> float:
    """frechet_distance, with the root of sigma1 given."""
    product = root1.T @ ((sigma2 + sigma2.T) / 2) @ root1
    cross = torch.linalg.eigvalsh((product + product.T) / 2) if len(product) else mu1.new_zeros(1)
    cross = cross[cross > _rounding(cross, "sigma2")].sqrt().sum()
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
