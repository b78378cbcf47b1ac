"""Checkpoints that are whole or absent: written aside, synced, renamed; read as plain data."""

import logging
import os
import pickle
import re
import struct
import sys
import zipfile
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from latents.store import LatentStore
from models.files import naming, remove_stale, write_whole
from models.plan import GraftPlan, differences
from training import distributed
from training.distributed import Preempted, World, barrier, gather_objects
from training.preemption import StopSignals
from training.runlog import Means, RunLog

FORMAT = 1
KEYS = ("model", "opt", "train_steps", "plan", "rng", "position", "args", "entry")
# What a resumed run must have the same -> the flags that set it, where not the one of its name
FLAGS = {
    "images": ("data_path", "num_images", "num_samples"),
    "latents_sha256": ("data_path",),
    "stored": ("data_path",),
    "total_steps": ("max_steps", "epochs"),
    "teacher_sha256": ("load_weight", "config_filepath"),
    "plans": ("config_filepath", "candidates"),
}
# What zipfile raises where the bytes of an archive are not those that were written
DAMAGE = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error)
log = logging.getLogger(__name__)


def save(path: str | Path, state: dict) -> None:
    """Writes a training state; a crash leaves either the old file or the new one, never half.

    Args:
        path: `<run>/checkpoints/0040000.pt`; a text file `latest` beside it then names it.
        state: at least the entries of `KEYS`; tensors and plain Python data only.
    """
    path = Path(path)
    if not set(KEYS) <= set(state):
        raise ValueError(f"checkpoint {path}: entries {sorted(state)} lack some of {sorted(KEYS)}")
    write_tensors(path, {**state, "format": FORMAT})
    _name_latest(path)


def _name_latest(path: Path) -> None:
    write_whole(path.with_name("latest"), lambda p: p.write_text(path.name + "\n"))


def write_tensors(path: Path, state: dict) -> None:
    """`torch.save`, whole or not at all; a full disk is an OSError as with any other file."""

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # of its writer, which then misses bytes
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_whole(path, write)


def load(path: str | Path, check_sums: bool = False) -> dict:
    """Opens a training checkpoint of this repository; its tensors are mapped, not read.

    Args:
        path: of the file.
        check_sums: first read it all, against the checksums that torch.save wrote and torch.load
            does not look at: a lost block leaves a hole in a file whose ends are there.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be read, which says nothing of what it holds.
        ValueError: torn, damaged, not a checkpoint of these scripts, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint")
    if path.suffix == ".safetensors":
        raise ValueError(f"--resume {path}: weights only; start from them with --load-weight")
    with naming(path), open(path, "rb") as file:
        # The end, in which zipfile takes an error of the disk for that of the file
        file.seek(max(0, path.stat().st_size - 2**17))
        file.read()
        try:
            with zipfile.ZipFile(file) as archive:
                if check_sums:
                    _check_sums(archive, path.stat().st_size)
        except DAMAGE as error:
            raise ValueError(
                f"checkpoint {path} cannot be read: torn, damaged, or no checkpoint ({error})"
            ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {path} cannot be read (torn or foreign): {error}") from error
    if not isinstance(state, dict) or not {*KEYS, "format"} <= set(state):
        raise ValueError(
            f"checkpoint {path} lacks {sorted({*KEYS, 'format'} - set(state))}: if it holds "
            "weights only, start from them with --load-weight or in the YAML"
        )
    if state["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state['format']}; this code reads {FORMAT}"
        )
    return state


def _check_sums(archive: zipfile.ZipFile, size: int) -> None:
    for record in archive.infolist():
        if not 0 <= record.header_offset < size:
            raise zipfile.BadZipFile(f"{record.filename} lies outside")
        if record.CRC:  # else torch.save was told to write none
            with archive.open(record) as content:
                while content.read(2**20):
                    pass


@dataclass(frozen=True)
class Extent:
    """Where a training run is kept, how long it is and what it must stay like.

    Attributes:
        folder: the run folder.
        steps_per_epoch, total_steps: of the global batch.
        order: what the order of the samples, the schedules and the precision depend on, as plain
            data; a resumed run must have the same.
    """

    folder: Path
    steps_per_epoch: int
    total_steps: int
    order: dict


def extent(
    args: Namespace,
    plan: GraftPlan,
    store: LatentStore,
    dtype: torch.dtype,
    images: int,
    **more,
) -> Extent:
    """The extent that an entry's flags (`training.arguments.add_run`) mean for so many images.

    Args:
        store: where the images are from.
        dtype: what `training.precision` chose.
        more: further plain data that a resumed run must have the same.
    """
    steps_per_epoch = images // args.global_batch_size
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    order = {
        "images": images,
        "latents_sha256": store.sha256,
        "global_batch_size": args.global_batch_size,
        "global_seed": args.global_seed,
        "total_steps": total_steps,
        "precision": str(dtype).removeprefix("torch."),
        **more,
    }
    folder = Path(args.results_dir) / f"{args.prefix}-{plan.model_name.replace('/', '-')}"
    return Extent(folder, steps_per_epoch, total_steps, order)


def held_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; none where there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [folder / name for name in names if re.fullmatch(r"\d+\.pt", name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.stem)


def find(world: World, resume: str | None, folder: Path) -> dict | None:
    """The state to go on from: None for a fresh start. Every process gets the same.

    Args:
        resume: None, a file, or "auto" for the newest whole checkpoint of the run (none: fresh).
        folder: the run folder.

    Raises:
        ValueError: a fresh start into a folder that holds a run, a file that cannot be read, or
            checkpoints none of which is whole.
    """

    def choose() -> str | None:
        try:
            return _chosen(resume, folder)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(
                f"{error.filename} cannot be read ({error.strerror}), so what there is to continue "
                "is not known: make it readable, or name another checkpoint with --resume FILE"
            ) from error

    path = distributed.decide(world, choose)
    return None if path is None else load(path)


def _chosen(resume: str | None, folder: Path) -> str | None:
    """The file that `find` goes on from."""
    held = held_in(folder / "checkpoints")
    if resume is None:
        if held:
            raise ValueError(
                f"{folder} holds a run already ({held[0].name}): continue it with --resume auto, "
                "or choose another --prefix"
            )
        return None
    if resume != "auto":
        load(resume, check_sums=True)
        return resume
    for path in held:
        try:
            load(path, check_sums=True)
            return str(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    if held:
        raise ValueError(
            f"--resume auto: no checkpoint of {folder} is whole "
            f"({', '.join(path.name for path in reversed(held))}): name one that is with --resume "
            "FILE, or start anew under another --prefix"
        )
    log.warning("--resume auto: no checkpoint in %s; starting afresh", folder)
    return None


def check(
    state: dict, plan: GraftPlan, args: Namespace, order: dict, fixed: tuple[str, ...]
) -> int:
    """The step to go on from, once the checkpoint is seen to belong to this run.

    Args:
        order: see `Extent`; of it what the checkpoint, as an older one, does not have is not
            compared.
        fixed: names of flags that must be as they were.

    Raises:
        ValueError: another entry, architecture, data order or flag than the run's; going on would
            mix two runs.
    """
    if state["entry"] != entry_name():
        raise ValueError(
            f"--resume {args.resume}: the checkpoint is of {state['entry']}, not of "
            f"{entry_name()}; name one of this entry's, or another --prefix"
        )
    if different := differences(plan.architecture(), state["plan"]):
        raise ValueError(
            f"--resume {args.resume}: the checkpoint is of another model than {plan.path}: "
            f"{different}"
        )
    flags = {name: getattr(args, name) for name in fixed}
    for there, here in ((state["position"], order), (state["args"], flags)):
        for key, value in here.items():
            if key in there and there[key] != value:
                names = [name for name in FLAGS.get(key, (key,)) if hasattr(args, name)]
                by = " and ".join(f"--{name.replace('_', '-')}" for name in names)
                raise ValueError(
                    f"--resume: the checkpoint's run had {key} {there[key]}, this one has "
                    f"{value} (set by {by}); continue with the old value or start anew under "
                    "another --prefix"
                )
    return state["train_steps"]


def entry_name() -> str:
    """The script that runs, for example finetune_tinyfusion.py."""
    return Path(sys.argv[0]).name


class RunState:
    """All that a training run must keep in order to go on as if never interrupted.

    Args:
        extent: where the run is kept and how long it is.
        world: this process's place; rank 0 writes.
        plan: what the model is.
        args: the entry's flags.
        means: the sums of the log line to come; every process has its own.
        log: is told what becomes of the checkpoints.
        parts: "model", "ema", "opt", "sched" and others with state_dict and load_state_dict.
    """

    def __init__(
        self,
        extent: Extent,
        world: World,
        plan: GraftPlan,
        args: Namespace,
        means: Means,
        log: RunLog,
        **parts,
    ) -> None:
        self.folder = extent.folder / "checkpoints"
        self.extent, self.world, self.plan, self.args = extent, world, plan, args
        self.means, self.log, self.parts = means, log, parts
        self.signals = StopSignals()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Path, Future] | None = None

    def restore(self, state: dict) -> None:
        """Puts everything back to what `save` wrote.

        The random generators only on the same number of processes; training does not draw from
        them (its randomness is a function of seed, epoch and sample). Checkpoints of later steps
        are of a run that is not continued: rank 0 sets them aside, lest "auto" take them up again.
        """
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if "means" in state:  # older files have none
            self.means.load_state_dict(state["means"])
        if len(state["rng"]) == self.world.size:
            mine = state["rng"][self.world.rank]
            torch.set_rng_state(mine["cpu"])
            if self.world.device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"], self.world.device)
        if self.world.main:
            self._set_aside(state["train_steps"])

    def _set_aside(self, step: int) -> None:
        beyond = [path for path in held_in(self.folder) if _step_of(path) > step]
        if not beyond:
            return
        number = 1
        while (aside := self.folder / f"aside-{number}").exists():
            number += 1
        aside.mkdir()
        for path in beyond:
            path.rename(aside / path.name)
        latest = self.folder / "latest"
        latest.unlink(missing_ok=True)
        for newest in held_in(self.folder)[:1]:
            _name_latest(newest)
        names = ", ".join(path.name for path in reversed(beyond))
        self.log.info(f"resumed before {names}: set aside in {aside}")

    def step_done(self, step: int, logged: bool) -> None:
        """Writes a checkpoint when one is due after `step` finished steps; every process calls it.

        One is due every --ckpt-every steps, at the end, and when a scheduler asked to stop. Several
        processes agree on that where they meet anyway, which `logged` says. The log is told of a
        checkpoint once it is whole, at the next step or, of the last, before this returns.

        Raises:
            OSError: a checkpoint could not be written; on rank 0, at the step after it failed.
            Preempted: after the checkpoint of a stop is whole.
        """
        if self._writing is not None and self._writing[1].done():
            self._wait()
        last = step == self.extent.total_steps
        stop = not last and self.signals.agreed(self.world, logged)
        if last or stop or step % self.args.ckpt_every == 0:
            path = self.save(step)
        if last or stop:
            self._wait()
            barrier(self.world)
            self.signals.restore()
        if stop:
            raise Preempted(
                f"stopped by a signal after step {step}; --resume auto goes on from {path}"
            )

    def save(self, step: int) -> Path:
        """Writes checkpoints/<step>.pt beside the training; every process calls it.

        The state is copied to the host before this returns; a thread of rank 0 writes it, once the
        one before is whole.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        rng, means = zip(*gather_objects(self.world, (rng, self.means.state_dict())), strict=True)
        path = self.folder / f"{step:07d}.pt"
        self._wait()
        if self.world.main:
            position = {
                "epoch": step // self.extent.steps_per_epoch,
                "step_in_epoch": step % self.extent.steps_per_epoch,
                **self.extent.order,
            }
            state = {
                **{name: part.state_dict() for name, part in self.parts.items()},
                "entry": entry_name(),
                "train_steps": step,
                "plan": self.plan.architecture(),
                "rng": list(rng),
                "means": list(means),
                "position": position,
                "args": vars(self.args),
            }
            self._writing = path, self._writer.submit(self._write, path, _on_host(state))
        return path

    def _wait(self) -> None:
        if self._writing is not None:
            (path, writing), self._writing = self._writing, None
            writing.result()
            self.log.info(f"saved {path}")

    def _write(self, path: Path, state: dict) -> None:
        remove_stale(self.folder, "*.pt")  # a stop comes at any step
        save(path, state)
        keep = self.args.keep_last
        if keep is None:
            return
        so_far = [old for old in held_in(self.folder) if _step_of(old) <= _step_of(path)]
        for old in so_far[keep:]:
            every = self.args.keep_every
            if every is None or _step_of(old) % every:
                old.unlink()


def _on_host(value):
    """A copy of nested plain data whose tensors lie on the host and change no more."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item) for item in value)
    return value
