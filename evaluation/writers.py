"""Writes what sampling leaves behind: PNGs, one .npz, a grid picture, and samples.json."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from models.files import read_json, remove_stale, write_json, write_whole
from models.provenance import environment

# Settings that are paths -> the setting that tells what lies there. A file may move.
IDENTIFIED_BY = {"config": "plan", "checkpoint": "checkpoint_sha256", "vae": "vae_sha256"}
IDENTIFIED_BY["text_encoder"] = "text_encoder_sha256"


def describe_run(folder: Path, settings: dict, complete: bool) -> None:
    """Writes `folder`/samples.json; refuses a folder whose images were made with other settings.

    More images of the same run may be added, and files may have moved where their hash is the
    same. A folder that was complete and lacks none of these samples stays as it is.

    Args:
        settings: all that the images depend on; `num_samples`: images 000000.png and on.
        complete: False before the first image is drawn, True when all are there.

    Raises:
        ValueError: naming the setting and both values; or samples.json is torn, or the folder
            holds images beyond `num_samples`.
    """
    path = folder / "samples.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = read_json(path, "choose another --folder-name, or delete the folder")
        old = before.get("settings", {})
        for key, value in settings.items():
            proof = IDENTIFIED_BY.get(key)
            moved = bool(proof and settings.get(proof)) and old.get(proof) == settings[proof]
            if key != "num_samples" and old.get(key) != value and not moved:
                raise ValueError(
                    f"{path}: the images there were made with {key} = {old.get(key)!r}, this run "
                    f"has {value!r}; choose another --folder-name or --sample-dir"
                )
        count = settings["num_samples"]
        there = {int(file.stem) for file in folder.glob("*.png") if file.stem.isdecimal()}
        if there and max(there) >= count:
            raise ValueError(
                f"{folder} holds images up to {max(there):06d}.png, this run makes {count}: ask "
                f"for at least {max(there) + 1} or choose another --folder-name or --sample-dir"
            )
        if before.get("complete") and old.get("num_samples") == count == len(there):
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds files but no samples.json; choose another folder")
    remove_stale(folder)
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
