"""All scores of one set of samples against one reference."""

from dataclasses import dataclass

from evaluation.features import FeatureNet, Statistics
from evaluation.manifolds import NEIGHBOURS, precision_recall
from evaluation.metrics import (
    bootstrap_frechet,
    bootstrap_inception,
    frechet_distance,
    inception_score,
)


@dataclass(frozen=True)
class Scores:
    """What one comparison gave.

    values   fid, sfid, is, precision, recall; of mini fd_mini, precision, recall; None: not known
    errors   standard errors, of the scores that were resampled
    reasons  why a value is None, one sentence each
    """

    values: dict[str, float | None]
    errors: dict[str, float]
    reasons: dict[str, str]


def score(
    net: FeatureNet, reference: Statistics, samples: Statistics, bootstrap: int = 0
) -> Scores:
    """The scores that `net` can give, on the device that holds the statistics.

    bootstrap: resamples for the standard errors of the Frechet distance and the Inception score.
    """
    values, errors, reasons = {}, {}, {}
    values[net.metric] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    if bootstrap:
        rounds = bootstrap_frechet(reference.mu, reference.sigma, samples.features, bootstrap)
        errors[net.metric] = rounds.std().item()
    if net.spatial_dim:
        if reference.mu_s is None or reference.sigma_s is None:
            values["sfid"] = None
            reasons["sfid"] = "the reference holds no mu_s and sigma_s"
        else:
            values["sfid"] = frechet_distance(
                samples.mu_s, samples.sigma_s, reference.mu_s, reference.sigma_s
            )
    if net.num_logits:
        values["is"] = inception_score(samples.logits)
        if bootstrap:
            errors["is"] = bootstrap_inception(samples.logits, bootstrap).std().item()
    values |= {"precision": None, "recall": None}
    if reference.features is None:
        why = "the reference holds no images, and mean and covariance do not tell"
    elif min(len(reference.features), len(samples.features)) <= NEIGHBOURS:
        why = f"manifolds of {NEIGHBOURS} neighbours need at least {NEIGHBOURS + 1} images a side"
    else:
        values["precision"], values["recall"] = precision_recall(
            reference.features, samples.features
        )
        return Scores(values, errors, reasons)
    return Scores(values, errors, reasons | dict.fromkeys(("precision", "recall"), why))
