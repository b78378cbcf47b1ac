"""Checkpoints that are whole or absent: written aside, synced, renamed; read as plain data."""

import logging
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import torch

from models.files import write_whole
from models.plan import GraftPlan
from training.distributed import World, barrier, gather_objects

FORMAT = 1
KEYS = ("model", "ema", "opt", "sched", "train_steps", "plan", "rng", "position", "args", "format")
log = logging.getLogger(__name__)


def save(path: str | Path, state: dict) -> None:
    """Writes a training state; a crash leaves either the old file or the new one, never half.

    Args:
        path: `<run>/checkpoints/0040000.pt`; a text file `latest` beside it then names it.
        state: the entries of `KEYS` except `format`; tensors and plain Python data only.
    """
    path = Path(path)
    if set(state) != set(KEYS) - {"format"}:
        raise ValueError(f"checkpoint {path}: entries {sorted(state)} are not {sorted(KEYS)}")
    write_whole(path, lambda partial: torch.save({**state, "format": FORMAT}, partial))
    write_whole(path.with_name("latest"), lambda p: p.write_text(path.name + "\n"))


def load(path: str | Path) -> dict:
    """Opens a training checkpoint of this repository on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: torn, not a checkpoint of these scripts, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {path} cannot be read: torn, or no checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
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


def check(state: dict, plan: GraftPlan, images: int, args: Namespace) -> int:
    """The step to go on from, once the checkpoint is seen to belong to this run.

    Raises:
        ValueError: another architecture, batch size, seed or data set than the run's; going on
            would repeat or skip samples.
    """
    ours, theirs = plan.architecture(), state["plan"]
    if theirs != ours:
        keys = [k for k in ours if ours[k] != theirs.get(k)]
        raise ValueError(
            f"--resume: the checkpoint is of another model than {plan.path}: "
            + "; ".join(f"{k} {theirs.get(k)!r} there, {ours[k]!r} here" for k in keys)
        )
    for key, value in _order(images, args).items():
        if state["position"][key] != value:
            raise ValueError(
                f"--resume: the checkpoint was made with {key} {state['position'][key]}, this run "
                f"has {value}; the data order would not continue"
            )
    return state["train_steps"]


def _order(images: int, args: Namespace) -> dict:
    """What the order of the samples depends on."""
    return {
        "images": images,
        "global_batch_size": args.global_batch_size,
        "global_seed": args.global_seed,
    }


class RunState:
    """All that a training run must keep in order to go on as if never interrupted.

    Args:
        folder: the run folder.
        world: this process's place; rank 0 writes.
        plan: what the model is.
        args: the entry's flags.
        steps_per_epoch: of the loader, and `images` the number of samples it goes through.
        parts: "model", "ema", "opt" and "sched", each with state_dict and load_state_dict.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        plan: GraftPlan,
        args: Namespace,
        *,
        steps_per_epoch: int,
        images: int,
        **parts,
    ) -> None:
        self.folder = folder / "checkpoints"
        self.world, self.plan, self.args = world, plan, args
        self.steps_per_epoch, self.images = steps_per_epoch, images
        self.parts = parts

    def restore(self, state: dict) -> None:
        """Puts everything back to what `save` wrote."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if len(state["rng"]) == self.world.size:
            mine = state["rng"][self.world.rank]
            torch.set_rng_state(mine["cpu"])
            if self.world.device.type == "cuda" and "cuda" in mine:
                torch.cuda.set_rng_state(mine["cuda"], self.world.device)

    def save(self, step: int) -> Path:
        """Writes checkpoints/<step>.pt, after `step` finished steps; every process calls it."""
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        rng = gather_objects(self.world, rng)
        path = self.folder / f"{step:07d}.pt"
        if self.world.main:
            position = {
                "epoch": step // self.steps_per_epoch,
                "step_in_epoch": step % self.steps_per_epoch,
                **_order(self.images, self.args),
            }
            state = {
                **{name: part.state_dict() for name, part in self.parts.items()},
                "train_steps": step,
                "plan": self.plan.architecture(),
                "rng": rng,
                "position": position,
                "args": vars(self.args),
            }
            save(path, state)
        barrier(self.world)
        return path
