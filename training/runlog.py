"""The record of a run: log.txt for people, metrics.jsonl for machines, TensorBoard for curves.

Where --wandb asks for it, Weights & Biases gets what TensorBoard gets.
"""

import errno
import fcntl
import io
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from models.files import naming, remove_stale, write_whole
from models.provenance import environment
from training.distributed import World, at_end, decide, sum_across

LOCK = "run.lock"  # beside log.txt
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none
log = logging.getLogger(__name__)


def watched(world: World) -> bool:
    """Whether this process should draw progress bars: rank 0 with a terminal on stderr."""
    return world.main and sys.stderr.isatty()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"the folder {folder} cannot be made, a file is in its way: name another with "
            "--results-dir, or for extraction with --features-path"
        ) from error


def claim(world: World, folder: Path) -> None:
    """Makes the run folder, for this run alone until it or its process ends, in whatever way.

    To be called before anything of the folder is read. The lock is one of the file system, held by
    rank 0: no other process inherits it, and other machines see it too. A run that is refused
    before it has written anything leaves no folder.

    Raises:
        ValueError: another run holds the folder, or it cannot be made.
    """
    decide(world, lambda: _lock(folder))


def _lock(folder: Path) -> None:
    new, path = not folder.exists(), folder / LOCK
    _make(folder)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, open while the run lasts
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError as error:
        alone = False
        if error.errno in NO_LOCKS:
            log.warning("%s: %s; see to it that no other run has this folder", path, error)
        else:
            file.seek(0)
            with file:
                holder = file.read().strip()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"{folder} is in use by a run that has not ended, {holder}: end that one, or "
                "choose another --prefix"
            ) from error
    if not os.fstat(file.fileno()).st_nlink:  # just deleted by the run that had made it
        file.close()
        return _lock(folder)

    def give_back() -> None:
        with file, suppress(OSError):  # of a folder that was moved or deleted
            if new and os.listdir(folder) == [LOCK]:
                path.unlink()
                folder.rmdir()

    at_end(give_back)
    if alone:
        for place in (folder, folder / "checkpoints"):
            remove_stale(place, seconds=-math.inf)  # what nobody else writes here now
    with naming(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def cut_records(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl file that lie beyond `step`, and a last one that was torn.

    All at step 0, from which a run writes also what it finds before its first step. Another line
    that cannot be read, as a power failure leaves it, is dropped with a warning.
    """
    if not path.is_file():
        return
    kept = []
    lines = io.BytesIO(path.read_bytes()) if step > 0 else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: line %d is no record (%r) and is left out", path, number, error)
    write_whole(path, lambda partial: partial.write_bytes(b"".join(kept)))


class Means:
    """Means of the loss terms over all processes and the steps since the last log line.

    A value that is not finite does not count. Nothing waits for the device before `take`.

    Args:
        world: this process's place.
        names: of the terms.

    Attributes:
        last: [K], the terms of this process's last step.
    """

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self.world, self.names = world, tuple(names)
        self.last = torch.zeros(len(self.names), device=world.device)
        self._sums = torch.zeros(2, len(self.names), device=world.device)  # and how many

    def add(self, terms: torch.Tensor) -> None:
        """The terms [K] of a step, means over its samples."""
        self.last.copy_(terms)
        finite = terms.isfinite()
        self._sums += torch.stack([torch.where(finite, terms, 0), finite.float()])

    def take(self) -> dict[str, float]:
        """The means, which begin anew; NaN for a term that was never finite."""
        total, number = sum_across(self.world, self._sums.clone())
        self._sums.zero_()
        return dict(zip(self.names, (total / number).tolist(), strict=True))

    def state_dict(self) -> list[list[float]]:
        """This process's sums, for a checkpoint."""
        return self._sums.tolist()

    def load_state_dict(self, states: list[list[list[float]]]) -> None:
        """Takes all processes' sums back.

        Where their number has changed, rank 0 takes the whole, with the weight that the steps to
        come will have.
        """
        held = torch.tensor(states)
        if len(states) == self.world.size:
            self._sums.copy_(held[self.world.rank])
        elif self.world.main:
            self._sums.copy_(held.mean(0) * self.world.size)


class _LogFile(logging.FileHandler):
    """log.txt; what cannot be written is an error of the run, as with its other files."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the library's name
        with naming(self.baseFilename):
            raise  # what `emit` caught


def _hush(before: Callable, failure: threading.ExceptHookArgs) -> None:
    """Leaves an OSError of TensorBoard's thread to `RunLog`, in which its next call raises it."""
    if not (
        isinstance(failure.exc_value, OSError)
        and type(failure.thread).__module__.startswith("tensorboard.")
    ):
        before(failure)


def _begin_wandb(folder: Path, settings: dict):
    """A run of Weights & Biases, continued where the one of this folder was cut off.

    Its steps only rise: what is trained again after a resume is not drawn again.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "--wandb: the package wandb is not installed: pip install wandb, or leave the flag out"
        ) from error
    return wandb.init(name=folder.name, dir=str(folder), config=settings, resume="auto")


class RunLog:
    """Writes a run's record on rank 0; silent on the others.

    Args:
        folder: the run folder; made when missing. A resumed run appends to what is there.
        world: this process's place.
        settings: flags and derived values of the run, stored at the head of log.txt; with "wandb"
            true, Weights & Biases is told as well.
        tensorboard: also write event files (needs the `tensorboard` package).
        start_step: finished steps of a resumed run; later lines of its records are cut off.

    Raises:
        ValueError: the folder cannot be made, or wandb is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        world: World,
        settings: dict,
        tensorboard: bool = True,
        start_step: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.active = world.main
        self._board = self._wandb = None
        self._logger = logging.getLogger(f"run.{self.folder}")
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)
        if not self.active:
            self._logger.addHandler(logging.NullHandler())
            return
        _make(self.folder)
        if settings.get("wandb"):
            self._wandb = _begin_wandb(self.folder, settings)
        form = logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        for handler in (
            logging.StreamHandler(sys.stdout),
            _LogFile(self.folder / "log.txt", encoding="utf-8"),
        ):
            handler.setFormatter(form)
            self._logger.addHandler(handler)
        cut_records(self.folder / "metrics.jsonl", start_step)
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            before = threading.excepthook
            threading.excepthook = partial(_hush, before)
            at_end(lambda: setattr(threading, "excepthook", before))
            with naming(self.folder / "tensorboard"):
                self._board = SummaryWriter(
                    str(self.folder / "tensorboard"), purge_step=start_step + 1
                )
        self.info(f"{Path(sys.argv[0]).name} {json.dumps(environment(world.device))}")
        self.info("settings " + json.dumps(settings, sort_keys=True, default=str))

    def info(self, message: str) -> None:
        """One line for people."""
        self._logger.info(message)

    def metrics(self, step: int, **values: float) -> None:
        """One line for machines: the values at `step`, also as scalars of TensorBoard."""
        if not self.active:
            return
        # JSON has no NaN or infinity
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with naming(self._metrics.name):
            self._metrics.write(json.dumps({"step": step, "time": time.time(), **plain}) + "\n")
            self._metrics.flush()
        if self._board is not None:
            with naming(self.folder / "tensorboard"):
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes the files."""
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)
        if self.active:
            self._metrics.close()
            if self._board is not None:
                with naming(self.folder / "tensorboard"):
                    self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
