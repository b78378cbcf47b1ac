"""The entries as a user starts them, on the miniature testbed and the CPU."""

import contextlib
import faulthandler
import importlib
import io
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training import distributed

REPOSITORY = Path(__file__).resolve().parent.parent
MINI = REPOSITORY / "assets" / "mini"


def refused_here(entry: str, *flags) -> str:
    """The error output of an entry that fails, run in this process: without the time to start."""
    module = importlib.import_module(entry.removesuffix(".py"))
    heard, argv = io.StringIO(), sys.argv
    sys.argv = [entry, *map(str, flags)]
    try:
        with (
            contextlib.chdir(REPOSITORY),
            contextlib.redirect_stderr(heard),
            pytest.raises(SystemExit) as ended,
        ):
            distributed.run(module.main, module.parse_args())
    finally:
        sys.argv = argv
    assert ended.value.code == 2
    return heard.getvalue()


class Forked:
    """An entry in `ranks` processes that are forked from this one: without the time to import.

    Attributes:
        processes: in rank order.
    """

    def __init__(
        self,
        folder: Path,
        entry: str,
        *flags,
        ranks: int = 1,
        before: Callable[[int], object] | None = None,
    ) -> None:
        """folder: takes what the processes say; before: called in each, with its rank, at first."""
        module = importlib.import_module(entry.removesuffix(".py"))
        self.entry, self.outputs = entry, [folder / f"rank{rank}.txt" for rank in range(ranks)]
        port = free_port()

        def work(rank: int) -> None:
            with open(self.outputs[rank], "wb") as heard:
                os.dup2(heard.fileno(), 1)
                os.dup2(heard.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not pytest's
            faulthandler.enable()
            os.chdir(REPOSITORY)
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            sys.argv = [entry, *map(str, flags)]
            if before is not None:
                before(rank)
            faulthandler.dump_traceback_later(60)  # where it hangs, if it does
            distributed.run(module.main, module.parse_args())

        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=work, args=(rank,)) for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """Ends all processes at once, as kill -9 does."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self) -> str:
        """What the processes wrote, rank after rank."""
        return "".join(path.read_text() for path in self.outputs)

    def join(self, code: int = 0, seconds: float = 120) -> str:
        """Waits for all to end with exit code `code`; what they wrote."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
        assert codes == [code] * len(codes), f"{self.entry} ended with {codes}: {self.said()}"
        return self.said()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(*command, processes: int = 0, fails: bool = False, here: bool = False) -> str:
    """Runs an entry from the repository root; its output, or with `fails` its error output."""
    if here:
        return refused_here(*command)
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    result = subprocess.run(
        [*launcher, *map(str, command)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if fails:
        assert result.returncode != 0, result.stdout
        return result.stderr
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def encode(work, name, processes=0):
    return run(
        "extract_features.py", "--vae", MINI / "vae", "--image-size", 64, "--num-classes", 9,
        "--no-mirror", "--num-workers", 0, "--shard-size", 16, "--data-path", work / "images",
        "--features-path", work / name, processes=processes,
    )  # fmt: skip


def select(work, name, *more, processes=0, **kw):
    return run(
        "prune_by_learning.py", "--config", "configs/mini/75p_swa.yaml",
        "--data-path", work / "latents", "--results-dir", work / "runs", "--prefix", name,
        "--delta-w", "--lora", "--global-batch-size", 4, "--log-every", 1, *more,
        processes=processes, **kw,
    )  # fmt: skip


def finetune(work, name, *more, processes=0, **kw):
    return run(
        "finetune_tinyfusion.py", "--config", work / "runs/pair-DiT-Mini-2/selected.yaml",
        "--data-path", work / "latents", "--results-dir", work / "runs", "--prefix", name,
        "--global-batch-size", 4, "--log-every", 1, *more, processes=processes, **kw,
    )  # fmt: skip


def draw_samples(work, name, *more, processes=0, **kw):
    return run(
        "sample_ddp_finetuned.py", "--sample-dir", work / "samples", "--folder-name", name,
        "--sampler", "dpm++", "--num-sampling-steps", 4, *more, processes=processes, **kw,
    )  # fmt: skip
