"""The random numbers of a training step, each a function of (seed, epoch, sample index) alone."""

from typing import NamedTuple

import torch

from diffusion import noise

HELD_OUT_EPOCH = 2**32 - 1  # counted down from here, its draws are those of no training epoch


class Draws(NamedTuple):
    """What the diffusion loss of a batch needs beside the latents.

    Attributes:
        t: [B] int64 timesteps, uniform in 0..999.
        noise: [B, C, H, W] standard normal.
        drop: [B] bool, labels that become the null class.
    """

    t: torch.Tensor
    noise: torch.Tensor
    drop: torch.Tensor


def draw(
    seed: int,
    epoch: int,
    index: torch.Tensor,
    shape: tuple[int, ...],
    num_timesteps: int,
    class_dropout: float,
) -> Draws:
    """Draws for samples `index` [B] of an epoch; the same for any batch or world size.

    Args:
        shape: (C, H, W) of one sample's latents.
        class_dropout: probability of the null class, 0..1.
    """
    return Draws(
        t=noise.integers(seed, noise.TIMESTEP, index, num_timesteps, step=epoch),
        noise=noise.normal(seed, noise.NOISE, index, shape, step=epoch),
        drop=noise.uniform(seed, noise.DROP, index, (), step=epoch) < class_dropout,
    )
