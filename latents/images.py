"""Image folders: one folder a class, ADM's centre crop, and pictures that cannot be read."""

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What Pillow raises for files that are cut short, garbled, or no images at all.
READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centred square of a picture as ADM prepares it (arXiv 2105.05233), size x size pixels.

    Halved with a box filter while the short side is at least twice `size`, then resized so that it
    equals `size` (bicubic), then cropped in the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize(
        (round(image.width * ratio), round(image.height * ratio)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


Item = tuple[torch.Tensor | None, int, int, str | None]


class LabelledImages(torch.utils.data.Dataset):
    """Pictures of <root>/<class>/**; class ids are the places of the sorted folder names.

    Ids and order equal torchvision's ImageFolder. Item i is `(image, label, i, error)`: a uint8
    tensor [3, size, size] and None, or None and one sentence that names the unreadable file.

    Attributes:
        class_names: folder names, sorted.
        paths: relative to root, "/" between parts. labels: int64 [N].

    Raises:
        FileNotFoundError: root is missing, has no class folders, or one without a picture.
    """

    def __init__(self, root: str | Path, size: int) -> None:
        self.root, self.size = Path(root), size
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder {root} does not exist; check --data-path")
        with os.scandir(self.root) as entries:
            self.class_names = sorted(entry.name for entry in entries if entry.is_dir())
        if not self.class_names:
            raise FileNotFoundError(
                f"image folder {root} holds no class folders; --data-path needs "
                "<class>/<picture> below it, or --captions for pictures without classes"
            )
        self.paths: list[str] = []
        labels: list[int] = []
        for class_id, name in enumerate(self.class_names):
            found = len(self.paths)
            for folder, _, files in sorted(os.walk(self.root / name, followlinks=True)):
                inner = Path(folder).relative_to(self.root).as_posix()
                pictures = sorted(f for f in files if f.lower().endswith(SUFFIXES))
                self.paths.extend(f"{inner}/{f}" for f in pictures)
            labels.extend([class_id] * (len(self.paths) - found))
        there = set(labels)
        empty = [name for i, name in enumerate(self.class_names) if i not in there]
        if self.paths and empty:
            raise FileNotFoundError(
                f"image folder {root}: no picture in {', '.join(empty[:4])}"
                f"{f' and {len(empty) - 4} more' if len(empty) > 4 else ''}: finish the copy, or "
                "remove the folders (the classes after them are counted anew then)"
            )
        if not self.paths:
            raise FileNotFoundError(
                f"image folder {root} has class folders but no picture in them; it needs files "
                f"that end in {', '.join(SUFFIXES)}"
            )
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path, label = self.root / self.paths[index], int(self.labels[index])
        try:
            with Image.open(path) as file:
                image = center_crop(file.convert("RGB"), self.size)
        except READ_ERRORS as error:
            # Workers hand the failure over as data: the caller decides whether it ends the run.
            return None, label, index, f"{path} cannot be read as an image ({error})"
        pixels = torch.from_numpy(np.array(image))  # [size, size, 3]
        return pixels.permute(2, 0, 1).contiguous(), label, index, None

    def listing_sha256(self) -> str:
        """Identifies which files stand at which place with which label."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(f"{label}\t{path}\n".encode())
        return digest.hexdigest()


class CaptionedImages(LabelledImages):
    """Pictures anywhere below root, each with a caption; a label is a place among the texts.

    Attributes:
        texts: every caption once, in the order of the pictures; the first is the empty one.
        unused: captions of pictures that are not there. class_names: none.

    Args:
        captions: picture, by its path below root, -> caption.
        source: names the captions, for messages.

    Raises:
        FileNotFoundError: root is missing or has no picture.
        ValueError: pictures without a caption.
    """

    def __init__(self, root: str | Path, size: int, captions: Mapping[str, str], source: str):
        self.root, self.size, self.class_names = Path(root), size, []
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder {root} does not exist; check --data-path")
        self.paths = sorted(
            Path(folder, file).relative_to(self.root).as_posix()
            for folder, _, files in os.walk(self.root, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        if not self.paths:
            raise FileNotFoundError(
                f"image folder {root} has no picture; it needs files that end in "
                f"{', '.join(SUFFIXES)}"
            )
        missing = [path for path in self.paths if path not in captions]
        if missing:
            named = ", ".join(missing[:4])
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(
                f"{source}: {len(missing)} of the {len(self.paths)} pictures of {root} have no "
                f"caption: {named}{more}; add rows with their file_name, or move them away"
            )
        self.unused = len(captions) - len(self.paths)
        places = {text: i for i, text in enumerate(dict.fromkeys(["", *self._captions(captions)]))}
        self.texts = list(places)
        self.labels = np.array([places[text] for text in self._captions(captions)], dtype=np.int64)

    def _captions(self, captions: Mapping[str, str]) -> list[str]:
        return [captions[path] for path in self.paths]

    def listing_sha256(self) -> str:
        """As of labelled images, with the texts."""
        digest = hashlib.sha256(super().listing_sha256().encode())
        digest.update("\n".join(self.texts).encode())
        return digest.hexdigest()


def collate(items: list[Item]) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, list[str]]:
    """Items to images uint8 [b, 3, S, S], labels [b], places in the listing [b], and the errors.

    b counts the readable pictures of the batch; it may be 0.
    """
    whole = [item[:3] for item in items if item[0] is not None]
    errors = [error for *_, error in items if error is not None]
    images = torch.stack([image for image, _, _ in whole]) if whole else torch.empty(0)
    labels = np.array([label for _, label, _ in whole], dtype=np.int64)
    places = torch.tensor([place for _, _, place in whole], dtype=torch.int64)
    return images, labels, places, errors
