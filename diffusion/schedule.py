"""Noise schedule, its respacing to fewer steps, and the tables that follow from them.

Notation of DDPM (Ho et al. 2020, arXiv 2006.11239): q(x_t | x_0) = N(sqrt(abar_t) x_0,
(1 - abar_t) I) with abar_t the running product of 1 - beta_t. Respacing is that of Improved
DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672, section 4): a subset of the steps keeps its
abar, and betas are derived anew so that the shorter chain has the same marginals.
"""

import re

import numpy as np

TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02

_FORMS = (
    f'"" (all {TRAIN_STEPS} steps), a number of steps such as "250", one number for each of '
    f'several equal parts such as "10,15,20", or "ddimN" with N steps of one integer '
    'stride, such as "ddim25"'
)


def linear_betas() -> np.ndarray:
    """Betas of the full chain, [1000] float64 (DDPM, section 4)."""
    return np.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=np.float64)


def respaced_timesteps(respacing: str) -> np.ndarray:
    """Original timesteps that a respaced chain keeps, ascending, [N] int64 in 0..999.

    `respacing` as in `create_diffusion`. Raises ValueError for any other string, for a part
    with no step or more steps than it has room for, for fewer than 2 steps altogether (the
    variance of the last step is that of the one before), and for "ddimN" when no
    integer stride from timestep 0 gives N steps (the smallest that does is taken).
    """
    if respacing == "":
        return np.arange(TRAIN_STEPS, dtype=np.int64)

    def refuse(why: str) -> ValueError:
        return ValueError(f"respacing {respacing!r}: {why}; use {_FORMS}.")

    if not isinstance(respacing, str) or not re.fullmatch(
        r"(ddim)?[0-9]{1,9}|[0-9]{1,9}(,[0-9]{1,9})+", respacing
    ):
        raise refuse("not a known form")

    if respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        stride = -(-TRAIN_STEPS // count) if count >= 2 else 1
        kept = np.arange(0, TRAIN_STEPS, stride, dtype=np.int64)
        if count < 2 or len(kept) != count:
            raise refuse(f"no integer stride gives {count} steps")
        return kept

    counts = [int(part) for part in respacing.split(",")]
    if sum(counts) < 2:
        raise refuse("a chain needs at least 2 steps")
    parts = np.array_split(np.arange(TRAIN_STEPS), len(counts))  # a remainder goes to the first
    kept = []
    for count, part in zip(counts, parts, strict=True):
        if not 1 <= count <= len(part):
            raise refuse(f"{count} steps where 1..{len(part)} are possible")
        # First and last step of the part and a constant fractional stride between. The stride is
        # summed up rather than multiplied: where a sum ends on one half, its rounding error
        # decides, and so it does in the samplers that published results were made with.
        stride = (len(part) - 1) / max(count - 1, 1)
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        kept.append(part[0] + np.rint(offsets).astype(np.int64))
    return np.concatenate(kept)


class Schedule:
    """Tables of a (respaced) chain, one float64 value a step, index 0 = least noisy.

    timestep_map                 [N] int64, ascending: the timestep the model was trained with
    betas                        1 - abar_t / abar_{t-1}
    alphas_cumprod, *_prev       abar_t; abar_{t-1}, with abar_{-1} = 1
    sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod
                                 x_t = first * x_0 + second * eps
    sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod
                                 x_0 = first * x_t - second * eps
    posterior_mean_coef1, *2     mean of q(x_{t-1} | x_t, x_0) = coef1 * x_0 + coef2 * x_t
    posterior_variance           its variance (DDPM, equations 6 and 7); 0 at step 0
    posterior_log_variance_clipped
                                 its logarithm; step 0 takes the value of step 1
    """

    def __init__(self, timesteps: np.ndarray):
        """`timesteps`: [N] int64, strictly ascending, within 0..999, N >= 2."""
        full = np.cumprod(1.0 - linear_betas())[timesteps]
        self.timestep_map = np.asarray(timesteps, dtype=np.int64)
        self.num_timesteps = len(timesteps)
        self.betas = 1.0 - full / np.concatenate([[1.0], full[:-1]])

        alphas = 1.0 - self.betas
        self.alphas_cumprod = abar = np.cumprod(alphas)
        self.alphas_cumprod_prev = prev = np.concatenate([[1.0], abar[:-1]])
        self.sqrt_alphas_cumprod = np.sqrt(abar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - abar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / abar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / abar - 1.0)
        self.posterior_mean_coef1 = self.betas * np.sqrt(prev) / (1.0 - abar)
        self.posterior_mean_coef2 = (1.0 - prev) * np.sqrt(alphas) / (1.0 - abar)
        self.posterior_variance = self.betas * (1.0 - prev) / (1.0 - abar)
        positive = self.posterior_variance.copy()
        positive[0] = positive[1]
        self.posterior_log_variance_clipped = np.log(positive)
