"""Writes what sampling leaves behind: PNGs, one .npz, a grid picture, and samples.json."""

import contextlib
import json
import math
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.readers import ImageFiles, batches
from models.files import read_json, remove_stale, write_json, write_whole
from models.provenance import environment

# Settings that are paths -> the setting that tells what lies there. A file may move.
IDENTIFIED_BY = {
    "config": "plan",
    "checkpoint": "checkpoint_sha256",
    "vae": "vae_sha256",
    "labels": "labels_sha256",
    "text_encoder": "text_encoder_sha256",
}
PACKED = 64  # images that go into an .npz at once
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


def default_name(args: Namespace, model_name: str, checkpoint: str | None) -> str:
    """A folder name that tells runs apart: model, run and step, sampler, guidance, seed."""
    source = Path(args.config_filepath or "plain").stem
    if checkpoint is not None:
        path = Path(checkpoint).resolve()
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        source = f"{run.name}_{path.stem}"
    if args.prompts is not None:
        source = f"{source}-{Path(args.prompts).stem}"
    name = (
        f"{model_name}-{source}-{args.sampler}{args.num_sampling_steps}"
        f"-cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )
    return re.sub(r"[^A-Za-z0-9._+-]", "-", name)


def describe_run(
    folder: Path, settings: dict, complete: bool, device: torch.device | None = None
) -> None:
    """Writes `folder`/samples.json; refuses a folder whose images were made with other settings.

    More images of the same run may be added, and files may have moved where their hash is the
    same. A folder that was complete and lacks none of these samples stays as it is.

    Args:
        settings: all that the images depend on; `num_samples`: images 000000.png and on.
        complete: False before the first image is drawn, True when all are there.
        device: what they are drawn on.

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
        there = [int(file.stem) for file in folder.rglob("*.png") if file.stem.isdecimal()]
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
    write_json(path, {"complete": complete, "settings": settings, **environment(device)})


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes uint8 [H,W,3] as PNG, whole or not at all."""
    picture = Image.fromarray(image)
    write_whole(path, lambda partial: picture.save(partial, format="PNG"), durable=False)


@contextlib.contextmanager
def _saying_what_to_do() -> Iterator[None]:
    """Within it, an image that cannot be read is a ValueError that says how to go on."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; delete that file and repeat the command") from error


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there to its last bytes, which a crash of the machine may have lost."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - len(PNG_END)))
            return file.read() == PNG_END
    except FileNotFoundError:
        return False


def save_npz(path: Path, files: Sequence[Path], num_workers: int = 4) -> None:
    """Packs PNGs of one size as `arr_0` uint8 [N,H,W,3] of an .npz, a few at a time in memory.

    Raises: ValueError naming a file that cannot be read or has another size than the first.
    """
    with _saying_what_to_do():
        images = ImageFiles(files[0].parent, files)
        width, height = images.size
        shape = (len(files), height, width, 3)

        def write(partial: Path) -> None:
            with (
                zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as entry,
            ):
                np.lib.format.write_array_header_2_0(
                    entry, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
                for batch in batches(images, PACKED, num_workers=num_workers):
                    entry.write(batch.permute(0, 2, 3, 1).numpy().data)  # [B,H,W,3]

        write_whole(path, write)


def save_grid(path: Path, files: Sequence[Path]) -> None:
    """A near-square picture of the images, in order, row by row. Raises: as save_npz."""
    columns = math.ceil(math.sqrt(len(files)))
    rows = math.ceil(len(files) / columns)
    with _saying_what_to_do():
        images = ImageFiles(files[0].parent, files)
        width, height = images.size
        sheet = Image.new("RGB", (columns * width, rows * height), "white")
        for i in range(len(files)):
            place = (i % columns * width, i // columns * height)
            sheet.paste(Image.fromarray(images.read(i)[0]), place)
    write_whole(path, lambda partial: sheet.save(partial, format="PNG"), durable=False)
