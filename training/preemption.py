"""Ends a training in good order when a scheduler takes the node away."""

import signal

import torch

from training.distributed import World, sum_across

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send ahead of a preemption


class StopSignals:
    """Notes a signal to stop, and lets the training go on to where it can."""

    def __init__(self) -> None:
        self.noted = False
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: object) -> None:
        self.noted = True

    def restore(self) -> None:
        """Gives the signals back their handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, world: World, meeting: bool) -> bool:
        """Whether to stop now, the same on every process.

        Alone a process stops at once. Several ask each other at a `meeting` only, a step after
        which they wait for each other anyway, so that no step pays for it.
        """
        if world.size == 1:
            return self.noted
        if not meeting:
            return False
        noted = torch.tensor(float(self.noted), device=world.device)
        return sum_across(world, noted).item() > 0
