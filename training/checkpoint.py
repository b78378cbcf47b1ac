"""Checkpoints that are whole or absent: written aside, synced, renamed; read as plain data."""

import logging
import os
import pickle
import zipfile
from pathlib import Path

import torch

from training.distributed import World, gather_objects

FORMAT = 1
KEYS = ("model", "ema", "opt", "sched", "train_steps", "plan", "rng", "position", "args", "format")
log = logging.getLogger(__name__)


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary path)`, syncs that file and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with open(aside, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: str | Path, state: dict) -> None:
    """Writes a training state; a crash leaves either the old file or the new one, never half.

    Args:
        path: `<run>/checkpoints/0040000.pt`; a text file `latest` beside it then names it.
        state: the entries of `KEYS` except `format`; tensors and plain Python data only.
    """
    path = Path(path)
    if set(state) != set(KEYS) - {"format"}:
        raise ValueError(f"checkpoint {path}: entries {sorted(state)} are not {sorted(KEYS)}")
    write_atomically(path, lambda aside: torch.save({**state, "format": FORMAT}, aside))
    write_atomically(path.with_name("latest"), lambda aside: aside.write_text(path.name + "\n"))


def load(path: str | Path) -> dict:
    """Opens a training checkpoint of this repository on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: torn, not a checkpoint of these scripts, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read (torn or foreign): {error}") from error
    if not isinstance(state, dict) or not set(KEYS) <= set(state):
        raise ValueError(
            f"checkpoint {path} lacks {sorted(set(KEYS) - set(state))}: it holds weights only; "
            "start from it with --load-weight or in the YAML instead of --resume"
        )
    if state["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state['format']}; this code reads {FORMAT}"
        )
    return state


def find(resume: str | None, folder: str | Path) -> dict | None:
    """The state to go on from: None for a fresh start.

    Args:
        resume: None, a file, or "auto" for the newest whole checkpoint of `folder` (none: fresh).
        folder: the run's `checkpoints` folder.
    """
    if resume is None:
        return None
    if resume != "auto":
        return load(resume)
    for path in sorted(Path(folder).glob("[0-9]*.pt"), reverse=True):
        try:
            return load(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    return None


def rng_states(world: World) -> list[dict]:
    """The random generators' states of every process, in rank order."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return gather_objects(world, state)


def restore_rng(world: World, states: list[dict]) -> None:
    """Puts this process's generators back; a run on another number of processes keeps its own."""
    if len(states) != world.size:
        return
    torch.set_rng_state(states[world.rank]["cpu"])
    if world.device.type == "cuda" and "cuda" in states[world.rank]:
        torch.cuda.set_rng_state(states[world.rank]["cuda"], world.device)


def position(step: int, loader, args) -> dict:
    """Where a run stands in its data, and what that place depends on."""
    return {
        "epoch": step // loader.steps_per_epoch,
        "step_in_epoch": step % loader.steps_per_epoch,
        "global_batch_size": args.global_batch_size,
        "global_seed": args.global_seed,
        "images": len(loader.store),
    }


def check(state: dict, plan, store, args) -> int:
    """The step to go on from, once the checkpoint is seen to belong to this run.

    Raises:
        ValueError: another architecture, batch size, seed or data set than the run's; going on
            would repeat or skip samples.
    """
    if state["plan"] != plan.architecture():
        ours, theirs = plan.architecture(), state["plan"]
        keys = [k for k in ours if ours[k] != theirs.get(k)]
        raise ValueError(
            f"--resume: the checkpoint is of another model than {plan.path}: "
            + "; ".join(f"{k} {theirs.get(k)!r} there, {ours[k]!r} here" for k in keys)
        )
    here = {
        "global_batch_size": args.global_batch_size,
        "global_seed": args.global_seed,
        "images": len(store),
    }
    for key, value in here.items():
        if state["position"][key] != value:
            raise ValueError(
                f"--resume: the checkpoint was made with {key} {state['position'][key]}, this run "
                f"has {value}; the data order would not continue"
            )
    return state["train_steps"]
