"""Writes what sampling leaves behind: PNGs, one .npz, a grid picture, and samples.json."""

import json
import math
import platform
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.files import write_json, write_whole

REPOSITORY = Path(__file__).resolve().parent.parent


def git_revision() -> str | None:
    """The checkout's commit, with "-dirty" when files differ from it; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    revision = git("rev-parse", "HEAD")
    return (revision + ("-dirty" if git("status", "--porcelain") else "")) or None


def environment() -> dict:
    """Versions and revision that a result was made with."""
    return {
        "git_revision": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def describe_run(folder: Path, settings: dict, complete: bool) -> None:
    """Writes `folder`/samples.json; refuses a folder whose images were made with other settings.

    Only the number of samples may differ: more images of the same run may be added.

    Raises:
        ValueError: naming the setting and both values.
    """
    path = folder / "samples.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))["settings"]
        for key, value in settings.items():
            if key != "num_samples" and old.get(key) != value:
                raise ValueError(
                    f"{path}: the images there were made with {key} = {old.get(key)!r}, this run "
                    f"has {value!r}; choose another --folder-name or --sample-dir"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files but no samples.json; choose another folder")
    write_json(path, {"complete": complete, "settings": settings, **environment()})


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [H,W,3] as PNG, whole or not at all."""
    picture = Image.fromarray(image)
    write_whole(path, lambda partial: picture.save(partial, format="PNG"), durable=False)


def save_npz(path: Path, files: list[Path]) -> None:
    """Packs PNGs of one size as `arr_0` uint8 [N,H,W,3] of an .npz, one image at a time."""
    height, width = np.asarray(Image.open(files[0])).shape[:2]
    header = {
        "descr": "|u1",
        "fortran_order": False,
        "shape": (len(files), height, width, 3),
    }

    def write(partial: Path) -> None:
        with (
            zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as entry,
        ):
            np.lib.format.write_array_header_2_0(entry, header)
            for file in files:
                with Image.open(file) as image:
                    entry.write(np.asarray(image.convert("RGB"), dtype=np.uint8).tobytes())

    write_whole(path, write)


def save_grid(path: Path, files: list[Path]) -> None:
    """A near-square picture of the images, in order, row by row."""
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("RGB"))
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    sheet.save(path)
