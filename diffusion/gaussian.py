"""Training loss and reverse steps of a noise-predicting DiT with a learned variance range.

The model maps x_t [B,C,H,W] and original timesteps [B] to [B,2C,H,W]: the predicted noise, then
values v (about -1..1) that place the log variance between its two bounds. Papers: DDPM (arXiv
2006.11239), Improved DDPM (2102.09672) for the learned variance and the hybrid loss, DDIM
(2010.02502).

All arithmetic here is float32, also under autocast: the model's output is cast first. Constants
are computed in float64, rounded once and kept on the device. Nothing reads a tensor back to the
host, so a loss or a reverse step can be compiled or captured into a CUDA graph with its model.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from diffusion.schedule import Schedule

Model = Callable[..., torch.Tensor]
StepNoise = Callable[[int], torch.Tensor]


def _columns(rows: torch.Tensor, ndim: int) -> list[torch.Tensor]:
    """Columns of rows [K] (one step for the batch) or [B,K], ready to multiply [B, ...] tensors."""
    return [c.reshape(-1, *[1] * (ndim - 1)) for c in rows.unbind(-1)]


def _split(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Model output [B,2C,...] -> predicted noise and variance values, each [B,C,...] float32."""
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"the model returned {output.shape[1]} channels for {channels} input channels; it must "
            f"return {2 * channels}: the predicted noise, then the variance (learn_sigma=True)."
        )
    eps, v = output.float().chunk(2, dim=1)
    return eps, v


def reverse_update(
    x: torch.Tensor,
    output: torch.Tensor,
    rows: torch.Tensor,
    noise: torch.Tensor | None = None,
    clip_denoised: bool = False,
) -> torch.Tensor:
    """One reverse step after the model ran: x_t [B,C,H,W] float32 -> x_{t-1}.

    `output`: model output [B,2C,H,W]. `rows`: constants of the step, [K] or [B,K], taken from
    `Diffusion.ancestral_rows` or `ddim_rows`; both samplers are this one function. `noise`: unit
    normal like x, or None for a step that adds none. `clip_denoised` limits the predicted x_0 to
    -1..1. Pure: the same operations for every step, only the tensors differ.
    """
    eps, v = _split(output, x.shape[1])
    from_x, from_eps, keep_x, keep_x0, log_std, log_std_v, gate = _columns(rows, x.ndim)
    x0 = from_x * x - from_eps * eps
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
    x = keep_x * x + keep_x0 * x0
    if noise is not None:
        x = x + gate * torch.exp(log_std + log_std_v * v) * noise
    return x


def _normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Normal distribution function in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415).

    DiT was trained with it; the exact one moves the decoder term by 1e-4.
    """
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def _decoder_nll(x0: torch.Tensor, gap: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """-log p(x_0 | x_1) in nats for x_0 in one of 256 bins of -1..1 (DDPM, equation 13).

    `gap` is x_0 minus the mean of p. The outermost bins are open.
    """
    half_bin = 1.0 / 255.0
    inv_std = torch.exp(-0.5 * log_variance)
    below = _normal_cdf(inv_std * (gap - half_bin))
    upto = _normal_cdf(inv_std * (gap + half_bin))
    mass = torch.where(x0 < -0.999, upto, torch.where(x0 > 0.999, 1.0 - below, upto - below))
    return -torch.log(mass.clamp(min=1e-12))


class Diffusion(Schedule):
    """A (respaced) diffusion process; `create_diffusion` makes one. Tables: see `Schedule`."""

    def __init__(self, timesteps: np.ndarray):
        super().__init__(timesteps)
        # Learned range (Improved DDPM, equation 15): log variance = middle + v * halfwidth,
        # between the posterior's (v = -1) and beta's (v = 1).
        log_beta, log_posterior = np.log(self.betas), self.posterior_log_variance_clipped
        self._log_middle = 0.5 * (log_beta + log_posterior)
        self._log_halfwidth = 0.5 * (log_beta - log_posterior)
        self._on_device: dict[tuple[str, torch.device], torch.Tensor] = {}

    # ---- constants ----

    def _cached(
        self, name: str, device: torch.device, make: Callable[[], np.ndarray]
    ) -> torch.Tensor:
        """Device copy of a table, made once: float64 becomes float32, integers stay."""
        key = (name, device)
        if key not in self._on_device:
            with torch.inference_mode(False):  # a table made while sampling also serves training
                table = torch.from_numpy(make())
                if table.is_floating_point():
                    table = table.float()  # before the move: not every device has float64
                self._on_device[key] = table.to(device)
        return self._on_device[key]

    def timesteps(self, device: torch.device | str) -> torch.Tensor:
        """`timestep_map` as an int64 tensor [N] on `device`."""
        return self._cached("timesteps", torch.device(device), lambda: self.timestep_map)

    def ancestral_rows(self, device: torch.device | str) -> torch.Tensor:
        """Constants of DDPM steps for `reverse_update`, [N,K] float32; row i is step i.

        x_{t-1} ~ p(x_{t-1} | x_t), mean by DDPM's equation 7 with the predicted x_0, standard
        deviation exp(log variance / 2); step 0 returns the mean.
        """

        def make() -> np.ndarray:
            return np.stack(
                [
                    self.sqrt_recip_alphas_cumprod,
                    self.sqrt_recipm1_alphas_cumprod,
                    self.posterior_mean_coef2,
                    self.posterior_mean_coef1,
                    0.5 * self._log_middle,
                    0.5 * self._log_halfwidth,
                    (np.arange(self.num_timesteps) > 0).astype(np.float64),
                ],
                axis=1,
            )

        return self._cached("ancestral", torch.device(device), make)

    def ddim_rows(self, device: torch.device | str, eta: float = 0.0) -> torch.Tensor:
        """Constants of DDIM steps for `reverse_update`, [N,K] float32; row i is step i.

        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma noise (DDIM,
        equations 12 and 16), with eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t) written out,
        so that a clipped x_0 also corrects eps. `eta` 0..1 scales sigma: 0 adds no noise, 1 is
        the ancestral posterior. ValueError outside.
        """
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta {eta}: DDIM's noise scale must lie in 0..1.")

        def make() -> np.ndarray:
            abar, prev = self.alphas_cumprod, self.alphas_cumprod_prev
            sigma = eta * np.sqrt(self.posterior_variance)
            toward_x = np.sqrt(np.maximum(1.0 - prev - sigma**2, 0.0)) / np.sqrt(1.0 - abar)
            zero = np.zeros_like(abar)
            return np.stack(
                [
                    self.sqrt_recip_alphas_cumprod,
                    self.sqrt_recipm1_alphas_cumprod,
                    toward_x,
                    np.sqrt(prev) - toward_x * np.sqrt(abar),
                    zero,
                    zero,
                    sigma,
                ],
                axis=1,
            )

        return self._cached(f"ddim {float(eta)}", torch.device(device), make)

    # ---- training ----

    def _training_rows(self, t: torch.Tensor, ndim: int) -> list[torch.Tensor]:
        def make() -> np.ndarray:
            return np.stack(
                [
                    self.sqrt_alphas_cumprod,
                    self.sqrt_one_minus_alphas_cumprod,
                    self.posterior_mean_coef1 * self.sqrt_recipm1_alphas_cumprod,
                    self._log_middle,
                    self._log_halfwidth,
                    self.posterior_log_variance_clipped,
                ],
                axis=1,
            )

        return _columns(self._cached("training", t.device, make)[t], ndim)

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t [B,C,H,W] float32 at steps t [B] for given unit normal noise (DDPM, equation 4)."""
        signal, spread, *_ = self._training_rows(t, x_start.ndim)
        return signal * x_start.float() + spread * noise.float()

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """{"loss", "mse", "vb"}, each [B] float32; one call model(x_t, timestep, **model_kwargs).

        x_start [B,C,H,W] scaled latents; t [B] int64, steps 0..num_timesteps-1 of this chain, on
        x_start's device; noise like x_start, None draws it from torch's generator.

        mse is the mean squared error of the noise. vb is the term of the variational bound at t, in
        bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p), or at t = 0 the likelihood of 256 bins.
        It teaches the variance only, its gradient does not reach the predicted noise. loss = mse +
        vb (the hybrid objective of Improved DDPM, section 3.1, with weight 1).
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x0, noise = x_start.float(), noise.float()
        signal, spread, gap_scale, log_middle, log_halfwidth, log_posterior = self._training_rows(
            t, x0.ndim
        )
        x_t = signal * x0 + spread * noise
        output = model(x_t.to(x_start.dtype), self.timesteps(t.device)[t], **(model_kwargs or {}))
        eps, v = _split(output, x0.shape[1])

        error = eps - noise
        # Both means share their x_t term, so the true one minus the predicted one is
        # coef1 * (x_0 - predicted x_0) = coef1 * sqrt(1/abar - 1) * error, free of cancellation.
        # At t = 0 coef1 is 1 and this is x_0 minus the predicted mean.
        gap = gap_scale * error.detach()
        log_variance = log_middle + log_halfwidth * v
        kl = 0.5 * (
            log_variance
            - log_posterior
            - 1.0
            + torch.exp(log_posterior - log_variance)
            + gap.square() * torch.exp(-log_variance)
        )
        last = (t == 0).reshape(-1, *[1] * (x0.ndim - 1))
        nats = torch.where(last, _decoder_nll(x0, gap, log_variance), kl)

        mse = error.square().flatten(1).mean(1)
        vb = nats.flatten(1).mean(1) / math.log(2.0)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    # ---- sampling ----

    def p_mean_variance(
        self,
        model: Model,
        x: torch.Tensor,
        t: torch.Tensor,
        model_kwargs: dict | None = None,
        clip_denoised: bool = False,
    ) -> dict[str, torch.Tensor]:
        """p(x_{t-1} | x_t): {"mean", "variance", "log_variance", "pred_xstart"}, each like x.

        x [B,C,H,W]; t [B] int64, steps of this chain; the model receives timestep_map[t].
        `clip_denoised` limits pred_xstart to -1..1 before the mean is taken. All float32.
        """
        output = model(x, self.timesteps(t.device)[t], **(model_kwargs or {}))
        eps, v = _split(output, x.shape[1])
        from_x, from_eps, keep_x, keep_x0, log_std, log_std_v, _ = _columns(
            self.ancestral_rows(t.device)[t], x.ndim
        )
        x = x.float()
        x0 = from_x * x - from_eps * eps
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        log_variance = 2.0 * (log_std + log_std_v * v)
        return {
            "mean": keep_x * x + keep_x0 * x0,
            "variance": torch.exp(log_variance),
            "log_variance": log_variance,
            "pred_xstart": x0,
        }

    def p_sample_loop(
        self,
        model: Model,
        noise: torch.Tensor,
        model_kwargs: dict | None = None,
        clip_denoised: bool = False,
        step_noise: StepNoise | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Ancestral sampling (DDPM, algorithm 2) from `noise` [B,C,H,W]; returns x_0 like it.

        step_noise(i) gives the unit normal tensor of step i and is called for i = N-1 .. 0 (that
        of step 0 is not added); None draws from torch's generator. No gradients.
        """
        rows = self.ancestral_rows(noise.device)
        draw = step_noise or (lambda index: torch.randn_like(noise))
        return self._loop(model, noise, model_kwargs, rows, clip_denoised, draw, progress)

    def ddim_sample_loop(
        self,
        model: Model,
        noise: torch.Tensor,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
        clip_denoised: bool = False,
        step_noise: StepNoise | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """DDIM sampling from `noise` [B,C,H,W]; returns x_0 like it. `eta` as in `ddim_rows`.

        step_noise as in `p_sample_loop`; with eta 0 it is not called. No gradients.
        """
        rows = self.ddim_rows(noise.device, eta)
        draw = (step_noise or (lambda index: torch.randn_like(noise))) if eta else None
        return self._loop(model, noise, model_kwargs, rows, clip_denoised, draw, progress)

    @torch.no_grad()
    def _loop(
        self,
        model: Model,
        start: torch.Tensor,
        model_kwargs: dict | None,
        rows: torch.Tensor,
        clip_denoised: bool,
        draw: StepNoise | None,
        progress: bool,
    ) -> torch.Tensor:
        timesteps = self.timesteps(start.device)
        x = start.float()
        for i in countdown(self.num_timesteps, progress):
            # A host integer takes views; a 0-d device index would be read back at every step.
            timestep, row = timesteps[i].expand(len(x)), rows[i]
            output = model(x.to(start.dtype), timestep, **(model_kwargs or {}))
            noise = draw(i) if draw is not None else None
            x = reverse_update(x, output, row, noise, clip_denoised)
        return x.to(start.dtype)


def countdown(steps: int, progress: bool) -> Iterator[int]:
    """steps-1 .. 0, with a tqdm bar if `progress`."""
    indices = range(steps - 1, -1, -1)
    if not progress:
        return iter(indices)
    from tqdm import tqdm

    return iter(tqdm(indices, desc="sampling", unit="step"))
