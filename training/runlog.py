"""The record of a run: log.txt for people, metrics.jsonl for machines, TensorBoard for curves."""

import json
import logging
import math
import sys
import time
from pathlib import Path

from models.files import write_whole
from models.provenance import environment
from training.distributed import World


def watched(world: World) -> bool:
    """Whether this process should draw progress bars: rank 0 with a terminal on stderr."""
    return world.main and sys.stderr.isatty()


def cut_records(path: Path, step: int) -> None:
    """Drops the lines of a .jsonl file that lie beyond `step`, and a last one that was torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        whole = line.endswith("}\n")
        if whole and json.loads(line)["step"] <= step:
            kept.append(line)
    write_whole(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))


class RunLog:
    """Writes a run's record on rank 0; silent on the others.

    Args:
        folder: the run folder; made when missing. A resumed run appends to what is there.
        world: this process's place.
        settings: flags and derived values of the run, stored at the head of log.txt.
        tensorboard: also write event files (needs the `tensorboard` package).
        start_step: finished steps of a resumed run; later lines of its records are cut off.
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
        self._board = None
        self._logger = logging.getLogger(f"run.{self.folder}")
        self._logger.propagate = False
        self._logger.setLevel(logging.INFO)
        if not self.active:
            self._logger.addHandler(logging.NullHandler())
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        form = logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")
        for handler in (
            logging.StreamHandler(sys.stdout),
            logging.FileHandler(self.folder / "log.txt", encoding="utf-8"),
        ):
            handler.setFormatter(form)
            self._logger.addHandler(handler)
        cut_records(self.folder / "metrics.jsonl", start_step)
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1)
        self.info(f"{Path(sys.argv[0]).name} {json.dumps(environment())}")
        self.info("settings " + json.dumps(settings, sort_keys=True, default=str))

    def info(self, message: str) -> None:
        """One line for people."""
        self._logger.info(message)

    def metrics(self, step: int, **values: float) -> None:
        """One line for machines: the values at `step`, also as TensorBoard scalars."""
        if not self.active:
            return
        # JSON has no NaN or infinity
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._metrics.write(json.dumps({"step": step, "time": time.time(), **plain}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        for handler in list(self._logger.handlers):
            handler.close()
            self._logger.removeHandler(handler)
        if self.active:
            self._metrics.close()
            if self._board is not None:
                self._board.close()
