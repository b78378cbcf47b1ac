"""Ends a run in good order when a scheduler takes the node away."""

import os
import signal
import threading
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:  # it imports this module
    from training.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send ahead of a preemption
PREEMPTED = 75  # exit code EX_TEMPFAIL, on which a scheduler can be told to requeue
GRACE_SECONDS = 10.0  # in which a process that ends at once must have ended
PARENT_SECONDS = 1.0  # between two looks at who this process's parent is


class Preempted(BaseException):
    """A signal ended the run: a training's after a whole checkpoint. No error to recover from."""


class StopSignals:
    """Notes a signal to stop, and lets the training go on to where it can.

    Used in the main thread, the only one to which Python brings signals; elsewhere it hears none.

    Args:
        at_once: raise Preempted where the process is instead, once; what hangs after that is ended.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.noted, self.at_once = False, at_once
        self._process = os.getpid()
        self._clock = threading.Timer(GRACE_SECONDS, os._exit, [PREEMPTED])
        self._clock.daemon = True
        heard = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper, which has nothing to bring to an end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        first, self.noted = not self.noted, True
        if first and self.at_once:
            self._clock.start()
            raise Preempted(
                "stopped by a signal; the same command (training: with --resume auto) goes on"
            )

    def restore(self) -> None:
        """Gives the signals back their handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._clock.cancel()

    def agreed(self, world: "World", meeting: bool) -> bool:
        """Whether to stop now, the same on every process.

        Alone a process stops at once. Several ask each other at a `meeting` only, a step after
        which they wait for each other anyway, so that no step pays for it.
        """
        if world.size == 1:
            return self.noted
        if not meeting:
            return False
        noted = torch.tensor(float(self.noted), device=world.device)
        dist.all_reduce(noted)
        return noted.item() > 0


class ParentWatch:
    """Sends this process SIGTERM once the one that started it, torchrun's agent, has died."""

    def __init__(self) -> None:
        self._over, self._parent = threading.Event(), os.getppid()
        threading.Thread(target=self._watch, name="parent", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(PARENT_SECONDS):
            if os.getppid() != self._parent:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()
