"""What a result was made with: the revision of this checkout and the versions it ran on."""

import platform
import subprocess
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def git_revision() -> str | None:
    """The checkout's commit, with "-dirty" when tracked files differ from it.

    None outside a checkout and where git is not installed.
    """
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return None
    return (revision + ("-dirty" if changed else "")) if revision else None


def environment() -> dict:
    """Versions and revision that a result was made with."""
    return {
        "git_revision": git_revision(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
