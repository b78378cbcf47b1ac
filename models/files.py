"""Files that are there in full or not at all, and their hashes."""

import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STALE_SECONDS = 3600.0  # nothing is written for so long without a change to its partial file


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within it an OSError that names no file, as of a full disk, gets the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: str | Path, write: Callable[[Path], object], durable: bool = True) -> None:
    """Calls `write(temporary path)` beside `path`, syncs what it wrote and renames it to `path`.

    A crash or an error leaves what was there before. Without `durable` nothing is synced or tidied:
    for many small files that can be made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if durable:
        remove_stale(path.parent, glob.escape(path.name))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            write(partial)
            if durable:
                with open(partial, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def check_writable(path: str | Path) -> None:
    """Fails now, as writing the file `path` would after hours of work."""
    trial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.trial")
    write_whole(trial, Path.touch, durable=False)
    trial.unlink()


def remove_stale(folder: Path, pattern: str = "*", seconds: float = STALE_SECONDS) -> None:
    """Deletes the partial files that killed processes left of files named like `pattern`.

    Only such as have not changed for so long: a younger one may be in the making, on another
    machine too, unless something else says that nobody writes there.
    """
    for partial in folder.glob(f".{pattern}.*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - partial.stat().st_mtime > seconds:
                partial.unlink()


def read_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a text that a user made, without their ends; `flag` is what named the file.

    Lines end in \\n or \\r\\n alone: str.splitlines would also part them at such marks within text
    as U+0085 and U+2028. A byte order mark is left out. ValueError: the file is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{flag} {path}, line {number}: is not UTF-8 (byte {error.object[error.start]:#04x}); "
            "save the file in that encoding"
        ) from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_json(path: str | Path, fix: str) -> dict:
    """The object that a JSON file holds. ValueError, which ends in `fix`, when it is torn."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: {fix}")
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Writes readable JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
