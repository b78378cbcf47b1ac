"""The diffusion loss on held-out latents: the same images, timesteps and noise at every call."""

import torch

from diffusion.gaussian import Diffusion
from latents.store import LatentStore
from models.captions import Captions
from training import distributed, precision
from training.distributed import World
from training.draws import HELD_OUT_EPOCH, draw

SEED = 0
DRAWS = 4  # timesteps an image


def read_rows(
    store: LatentStore, index: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | Captions]:
    """Moments, places and labels of the rows `index` [B] of a store, on the device."""
    parts = store.read(index), index, store.conditions(index)
    return tuple(part.to(world.device) for part in parts)


@torch.no_grad()
def validation_loss(
    model: torch.nn.Module,
    store: LatentStore,
    diffusion: Diffusion,
    world: World,
    dtype: torch.dtype,
    batch_size: int = 64,
) -> dict[str, float]:
    """Means of "loss", "mse" and "vb" over all images of a store, each at `DRAWS` timesteps.

    The draws depend on an image's place in the store alone, so that models, steps and world sizes
    compare. No label is dropped. The model runs in eval mode and is left as it was.

    Args:
        dtype: of the autocast, as in training.
        batch_size: images at a time on each process.
    """
    was_training = model.training
    model.eval()
    names = ("loss", "mse", "vb")
    sums = torch.zeros(4, device=world.device, dtype=torch.float64)
    mine = torch.arange(world.rank, len(store), world.size)
    for index in mine.split(batch_size) if len(mine) else ():
        moments, index, labels = read_rows(store, index, world)
        for epoch in range(HELD_OUT_EPOCH, HELD_OUT_EPOCH - DRAWS, -1):
            x = store.latents(moments, index, SEED, epoch)  # [B,C,H,W]
            draws = draw(SEED, epoch, index, x.shape[1:], diffusion.num_timesteps, 0.0)
            with precision.autocast(world.device, dtype):
                terms = diffusion.training_losses(
                    model, x, draws.t, {"y": labels}, noise=draws.noise
                )
            sums += torch.stack(
                [*(terms[n].double().sum() for n in names), sums.new_tensor(len(x))]
            )
    model.train(was_training)
    *totals, number = distributed.sum_across(world, sums).tolist()
    return {name: total / number for name, total in zip(names, totals, strict=True)}
