"""Gaussian diffusion: schedule and respacing, losses, reverse steps, samplers, per-sample noise.

from diffusion import create_diffusion
d = create_diffusion("")                                  # all 1000 steps, for training
loss = d.training_losses(model, x0, t, dict(y=y))["loss"].mean()
x0 = create_diffusion("250").p_sample_loop(model, start, dict(y=y))
"""

from diffusion.gaussian import Diffusion
from diffusion.schedule import respaced_timesteps

__all__ = ["Diffusion", "create_diffusion"]


def create_diffusion(timestep_respacing: str = "") -> Diffusion:
    """The diffusion process of DiT, on all or some of its 1000 steps.

    Linear betas 1e-4..0.02, noise prediction, learned variance range. `timestep_respacing`:
    "" all steps; "250" that many, evenly spread, both ends included; "10,15,20" the steps of
    each of three equal parts, the least noisy first; "ddim25" every 40th step from 0 on.
    Raises ValueError, naming these forms, for anything else.
    """
    return Diffusion(respaced_timesteps(timestep_respacing))
