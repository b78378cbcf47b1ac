"""Batches of a latent store: order = f(seed, epoch), whatever the world size or the first step."""

import secrets
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.noise import philox
from latents.store import LatentStore
from models.captions import Captions

if TYPE_CHECKING:
    from training.distributed import World

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | Captions]  # index, moments, labels
ORDER = 0  # Philox key word of the data order; the streams of diffusion.noise start at 1


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of 0..n-1, int64 [n], that depends on n, seed and epoch (0..2**32-1) alone.

    Each place draws a 62-bit number from Philox; sorting them gives the order. So it does not
    hang on any library's random generator or its version.
    """
    place = torch.arange(n)
    zero = torch.zeros_like(place)
    high, low, _, _ = philox((zero, place, zero, zero + epoch), (seed, ORDER))
    return torch.argsort(((high >> 1) << 31) | (low >> 1), stable=True)


def balanced_rows(labels: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """Places of `count` images, the same number of every class as far as they last; int64 [count].

    Every class is put into the order of `epoch_order(..., seed, 0)`; first come the first images
    of all classes, then the second ones, and so on, so that a longer list begins with a shorter
    one. ValueError for more images than there are.
    """
    if count > len(labels):
        raise ValueError(
            f"{count} images are asked for and the latents hold {len(labels)}: lower --num-images, "
            "or extract more"
        )
    place = epoch_order(len(labels), seed, 0)
    kind = torch.from_numpy(labels)[place]
    grouped = torch.argsort(kind, stable=True)
    starts = torch.searchsorted(kind[grouped], kind[grouped])
    rank = torch.empty_like(place)
    rank[grouped] = torch.arange(len(place)) - starts  # within the class
    return place[torch.argsort(rank * (int(kind.max()) + 1) + kind)][:count]


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch, b = global batch / world size.

    Attributes:
        step: global step, counted from the run's beginning. epoch: passes over the data before it.
        index: places in the store, int64 [b].
        moments: as LatentStore.read gives them, [b, mirrors, ...].
        labels: what the model is told of them: classes int64 [b], or captions.
    """

    step: int
    epoch: int
    index: torch.Tensor
    moments: torch.Tensor
    labels: torch.Tensor | Captions


class LatentLoader:
    """Iterates endlessly from `start_step` over a store; every pass drops the last short batch.

    Global batch k of an epoch is `epoch_order(...)[k * G : (k + 1) * G]`; rank r takes its r-th
    contiguous slice. Batches are read ahead in threads and handed over on `world.device`. At the
    start one shard, another for every rank and first step, is checked against its sha256.

    Args:
        rows: int64, the places of the images to read; None: all.
        grad_accum: parts into which the training cuts its part of a batch; must divide it.

    Attributes:
        store: the LatentStore. steps_per_epoch: images // global_batch.

    Raises:
        ValueError: global_batch is not divisible by world size x grad_accum, or exceeds the images;
            or the shard is damaged.
    """

    def __init__(
        self,
        store: LatentStore,
        global_batch: int,
        world: "World",
        seed: int,
        start_step: int = 0,
        num_workers: int = 2,
        rows: torch.Tensor | None = None,
        grad_accum: int = 1,
    ) -> None:
        shares = world.size * grad_accum
        if global_batch < 1 or global_batch % shares:
            accumulated = f" x --grad-accum {grad_accum}" if grad_accum > 1 else ""
            raise ValueError(
                f"--global-batch-size {global_batch} is not divisible by the {world.size} "
                f"processes{accumulated}; use a multiple of {shares}"
            )
        self.rows = torch.arange(len(store)) if rows is None else rows
        if len(self.rows) < global_batch:
            held = "holds" if rows is None else "gives"
            raise ValueError(
                f"{store.path} {held} {len(self.rows)} images, fewer than --global-batch-size "
                f"{global_batch}; lower it"
            )
        self.store, self.world = store, world
        self.global_batch, self.seed, self.start_step = global_batch, seed, start_step
        self.num_workers = num_workers
        self.steps_per_epoch = len(self.rows) // global_batch
        store.verify_one(secrets.randbits(64))
        self._orders: dict[int, torch.Tensor] = {}
        self._lock = Lock()

    @classmethod
    def from_flags(
        cls,
        args: Namespace,
        store: LatentStore,
        world: "World",
        start_step: int,
        rows: torch.Tensor | None = None,
    ) -> "LatentLoader":
        """The loader that a training entry's flags mean."""
        return cls(
            store,
            args.global_batch_size,
            world,
            args.global_seed,
            start_step,
            args.num_workers,
            rows,
            args.grad_accum,
        )

    def _order(self, epoch: int) -> torch.Tensor:
        with self._lock:
            if epoch not in self._orders:
                # What is dropped here and asked for again is made again, the same.
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                order = epoch_order(len(self.rows), self.seed, epoch)
                self._orders[epoch] = self.rows[order]
            return self._orders[epoch]

    def indices(self, step: int) -> torch.Tensor:
        """Places in the store of this process's part of global step `step`, int64 [b]."""
        epoch, k = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.world.size
        first = k * self.global_batch + self.world.rank * share
        return self._order(epoch)[first : first + share]

    def _read(self, step: int) -> Parts:
        index = self.indices(step)
        parts = index, self.store.read(index), self.store.conditions(index)
        if self.world.device.type == "cuda":
            parts = tuple(part.pin_memory() for part in parts)
        return parts

    def _batch(self, step: int, parts: Parts) -> Batch:
        index, moments, labels = (p.to(self.world.device, non_blocking=True) for p in parts)
        return Batch(step, step // self.steps_per_epoch, index, moments, labels)

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers < 1:
            for step in count(self.start_step):
                yield self._batch(step, self._read(step))
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="latents")
        pending: deque[tuple[int, Future]] = deque()
        try:
            for step in count(self.start_step):
                pending.append((step, pool.submit(self._read, step)))
                if len(pending) > 2 * self.num_workers:
                    first, future = pending.popleft()
                    yield self._batch(first, future.result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
