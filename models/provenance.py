"""What a result was made with: the revision of this checkout, the versions and where it ran."""

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def git_revision() -> str | None:
    """The checkout's commit, with "-dirty" when tracked files differ from it.

    Those in docs/ may differ: they hold pages and results, from which nothing is computed, and a
    study that writes its results there is not to make itself dirty. None outside a checkout and
    where git is not installed.
    """
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs")
    except OSError:
        return None
    return (revision + ("-dirty" if changed else "")) if revision else None


def usable_cpus() -> int:
    """Cores that this process may use; where the system does not say, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware(device: torch.device) -> str:
    """A device in words, "NVIDIA H200 (cuda)" or "16 processors (cpu)"; initialises CUDA's."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    return f"{usable_cpus()} processors ({device.type})"


def environment(device: torch.device | None = None) -> dict:
    """Versions and revision that a result was made with, and on what, where it is one device's."""
    return {
        "git_revision": git_revision(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        **({} if device is None else {"hardware": hardware(device)}),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
