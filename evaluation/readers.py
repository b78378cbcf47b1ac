"""Images to be scored: a folder of pictures or the array `arr_0` of an .npz, as uint8 batches."""

import contextlib
import io
import os
import struct
import zipfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from latents.images import READ_ERRORS, SUFFIXES

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANGED = ("L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "1", "CMYK", "YCbCr")


def _pictures(folder: Path) -> Iterator[Path]:
    """The picture files of a folder and of those within and linked in it, none that is hidden."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(place, name)


class ImageFiles:
    """The pictures in a folder and below it, sorted by path; hidden files are left out.

    path, kind   where they are; "folder"
    size         (width, height) of the first picture, which all others must have

    Args:
        files: these in this order, in place of all.

    Raises: FileNotFoundError when there is none, ValueError when the first cannot be read.
    """

    kind = "folder"

    def __init__(self, path: Path, files: Sequence[Path] | None = None):
        self.path = path
        self.files = files or sorted(_pictures(path))
        if not self.files:
            raise FileNotFoundError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        height, width = _decode(self.files[0])[0].shape[:2]
        self.size = (width, height)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """Picture `index` as uint8 [H, W, 3], and the colour mode it is stored in."""
        pixels, mode = _decode(self.files[index])
        height, width = pixels.shape[:2]
        if (width, height) != self.size:
            raise ValueError(
                f"{self.files[index]} is {width}x{height} but {self.files[0]} is "
                f"{self.size[0]}x{self.size[1]}: all images must have one size"
            )
        return pixels, mode


class ImageArray:
    """The images `arr_0` [N, H, W, 3] of an .npz, mapped from the disk when not compressed.

    path, kind, size as in ImageFiles; kind is "npz".
    """

    kind = "npz"

    def __init__(self, path: Path):
        self.path = path
        self.array = _open_array(path, "arr_0")
        shape, dtype = self.array.shape, self.array.dtype
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or not len(self.array):
            raise ValueError(
                f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3] with N > 0"
            )
        self.size = (shape[2], shape[1])

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: int) -> tuple[np.ndarray, str]:
        """Picture `index` as uint8 [H, W, 3], and its colour mode, always "RGB"."""
        return np.array(self.array[index]), "RGB"


def open_images(path: str | Path) -> ImageFiles | ImageArray:
    """A folder or an .npz with arr_0; see the two classes.

    Raises: FileNotFoundError when `path` does not exist or is an empty folder, ValueError when it
    is another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFiles(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give an image folder or an .npz")
    return ImageArray(path)


def npz_keys(path: str | Path) -> set[str]:
    """Names of the arrays of an .npz. ValueError when the file is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is neither an image folder nor a readable .npz") from error


@contextlib.contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """Within it, what reading the .npz `path` raises is a ValueError that names it."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(
            f"{path} is damaged or no .npz of plain arrays ({error}): make or fetch it again"
        ) from error


def batches(
    images: ImageFiles | ImageArray,
    batch_size: int,
    *,
    share: tuple[int, int] = (0, 1),
    num_workers: int = 4,
    modes: Counter | None = None,
) -> Iterator[torch.Tensor]:
    """uint8 tensors [B, 3, H, W] in file order, read ahead by `num_workers` threads.

    share: (r, n) gives every n-th picture from the r-th on. modes: counts the colour modes.
    Raises: ValueError naming the file that cannot be read or has another size.
    """
    indices = range(share[0], len(images), share[1])
    if modes is None:
        modes = Counter()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        waiting = deque()
        position = 0
        for start in range(0, len(indices), batch_size):
            ahead = min(start + 3 * batch_size, len(indices))
            while position < ahead:
                waiting.append(pool.submit(images.read, indices[position]))
                position += 1
            count = min(batch_size, len(indices) - start)
            try:
                pictures = [waiting.popleft().result() for _ in range(count)]
            except ValueError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            modes.update(mode for _, mode in pictures)
            stacked = np.stack([pixels for pixels, _ in pictures])  # [B, H, W, 3]
            yield torch.from_numpy(stacked).permute(0, 3, 1, 2)


def conversion_note(modes: Counter) -> str | None:
    """One sentence about images that were not stored as RGB, or None."""
    changed = {mode: count for mode, count in sorted(modes.items()) if mode != "RGB"}
    if not changed:
        return None
    counts = ", ".join(f"{count} of mode {mode}" for mode, count in changed.items())
    return f"converted to RGB: {counts} (grey is repeated, alpha is dropped)"


def _decode(file: Path) -> tuple[np.ndarray, str]:
    data = file.read_bytes()
    if data.startswith(PNG_SIGNATURE) and data[24:25] == b"\x10":  # IHDR: bit depth 16
        raise ValueError(f"{file} has 16 bits a channel; scores are defined on 8-bit images")
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, pixels = image.mode, None
            if mode == "RGB" or mode in CHANGED:
                pixels = np.asarray(image.convert("RGB"))
    except READ_ERRORS as error:
        why = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{file} cannot be read as an image: {why}") from error
    if pixels is None:
        raise ValueError(f"{file} has the colour mode {mode}; save it as 8-bit RGB")
    return pixels, mode


def _open_array(path: Path, key: str) -> np.ndarray:
    """An array of an .npz; memory-mapped when stored plain, so that processes share its pages."""
    if key not in npz_keys(path):
        raise ValueError(f"{path} holds no images: it has no array named {key}")
    with naming_damage(path):
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(key + ".npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version == (1, 0):
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                else:
                    shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
                header = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
            with np.load(path) as archive:
                return archive[key]
        with open(path, "rb") as file:
            # lengths of name and extra field, in the local header
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + 30 + name + extra + header
        return np.memmap(path, dtype, "r", offset, shape)
