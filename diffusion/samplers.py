"""One entry to the samplers: DDPM, DDIM and DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095)."""

from collections.abc import Callable

import torch

from diffusion import create_diffusion
from diffusion.gaussian import StepNoise
from diffusion.schedule import BETA_END, BETA_START, TRAIN_STEPS

SAMPLERS = ("ddpm", "ddim", "dpm++")


def sample(
    model_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    *,
    sampler: str = "ddpm",
    steps: int,
    start: torch.Tensor,
    step_noise: StepNoise | None = None,
    eta: float = 0.0,
    progress: bool = False,
) -> torch.Tensor:
    """Draws scaled latents x_0 [B,C,h,w], like `start`. No gradients.

    model_fn(x [B,C,h,w], t [B] int64 on the original 0..999 scale) -> [B,2C,h,w]; labels and
    guidance are bound into it. `shape` = (B,C,h,w) must be that of `start`, the unit normal
    starting point. "ddpm" takes `steps` (2..1000) evenly spread steps and step_noise(i), i =
    steps-1..0; "ddim" the same steps, with noise only if `eta` (0..1) is not 0; "dpm++" is the
    second-order multistep solver of diffusers (1..1000 steps), which adds no noise and leaves the
    predicted variance aside. step_noise None draws from torch's generator; see `diffusion.noise`
    for noise that depends on the sample alone. `progress` shows a tqdm bar.

    Raises ValueError for an unknown sampler, a shape that is not start's, steps or eta out of
    range, or eta with a sampler that has none.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is unknown; use one of {', '.join(SAMPLERS)}.")
    if tuple(shape) != tuple(start.shape):
        raise ValueError(f"shape {tuple(shape)} is not that of start, {tuple(start.shape)}.")
    if eta and sampler != "ddim":
        raise ValueError(f"eta {eta}: sampler {sampler!r} has no eta; leave it 0 or use 'ddim'.")
    if sampler == "dpm++":
        return _dpm_solver(model_fn, steps, start, progress)
    diffusion = create_diffusion(str(steps))
    if sampler == "ddpm":
        return diffusion.p_sample_loop(model_fn, start, step_noise=step_noise, progress=progress)
    return diffusion.ddim_sample_loop(
        model_fn, start, eta=eta, step_noise=step_noise, progress=progress
    )


@torch.no_grad()
def _dpm_solver(
    model_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    steps: int,
    start: torch.Tensor,
    progress: bool,
) -> torch.Tensor:
    if not 1 <= steps <= TRAIN_STEPS:
        raise ValueError(f"steps {steps}: sampler 'dpm++' takes 1..{TRAIN_STEPS} steps.")
    from diffusers import DPMSolverMultistepScheduler
    from tqdm import tqdm

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )
    scheduler.set_timesteps(steps, device=start.device)
    channels = start.shape[1]
    x = start.float()
    for t in tqdm(scheduler.timesteps, desc="sampling", unit="step", disable=not progress):
        output = model_fn(x.to(start.dtype), t.expand(len(x)))
        x = scheduler.step(output[:, :channels].float(), t, x).prev_sample
    return x.to(start.dtype)
