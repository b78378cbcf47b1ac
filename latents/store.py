"""The latent store: VAE moments of an image folder in shards that describe themselves.

    <store>/manifest.json            written last; without it there is no store
    <store>/settings.json            written first: what a restarted extraction must agree with
    <store>/shards/00000.json        counts, sizes and sha256 of the shard's two arrays
    <store>/shards/00000-moments.npy float16 [n, mirrors, 2C, h, w]: mean, logvar; unscaled
    <store>/shards/00000-labels.npy  int64 [n]

A store of kind "sample" holds <number>-latents.npy [n, mirrors, C, h, w] instead: latents already
drawn and scaled. So does the old layout of one file an image, imagenet<size>_features/<i>.npy
[mirrors, C, h, w] with imagenet<size>_labels/<i>.npy, which opens through the same class. Its
labels are read once and kept in imagenet<size>_labels.cache.npy, which may be deleted.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from diffusion import noise
from latents.codec import HUB_NAMES, PUBLISHED_SCALE, scale_of
from models.config_files import places
from models.files import file_sha256, read_json, write_json, write_whole
from models.graft_plan import GraftPlan

FORMAT, VERSION = "latent-store", 1
ARRAY_NAMES = {"moments": "moments", "sample": "latents"}  # kind -> what its arrays are called
OLD_SCALE = PUBLISHED_SCALE  # the old layout was only ever written with the sd-vae-ft-* VAEs
FLAGS = Path("flags")  # the path of a plan that no YAML holds
PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]{0,99}/){0,9}[\w-][\w.-]{0,99}", re.ASCII)
OLD_PART = 1024  # files that `verify` takes together, as it takes a shard
OLD_NAME = re.compile(r"imagenet\d+_features")
SIZE = range(2**48)
FILE = {"file": str, "bytes": SIZE, "sha256": str}  # of a shard
# What a manifest must hold beside its format: one of some values, a whole number, or a type
MANIFEST = {
    "version": range(1, 2**31),
    "kind": tuple(ARRAY_NAMES),
    "count": SIZE,
    "shape": list,
    "dtype": ("float16", "float32"),
    "mirrors": range(1, 3),
    "scale": (int, float),
    "vae": str,
    "vae_sha256": str,
    "image_size": range(1, 2**31),
    "crop": str,
    "class_names": list,
    "skipped": list,
    "shards": list,
}


log = logging.getLogger(__name__)


def _save_array(path: Path, array: np.ndarray) -> None:
    """As numpy.save, but for the error of a full disk, which keeps its reason."""
    with open(path, "wb") as file:
        array = np.ascontiguousarray(array)
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.reshape(-1).view(np.uint8).data)


class StoreWriter:
    """Writes a store shard by shard, in any order, from any number of processes.

    Shard k holds the pictures `shard_size * k` and on of the listing, so its bytes depend neither
    on who writes it nor on when. A restarted extraction asks `missing` what is left to do.

    Args:
        folder: the store; made when missing.
        settings: plain data that goes into the manifest: kind, count (pictures listed), shard_size,
            shape [C, h, w], dtype, mirrors, vae, vae_sha256, scale, image_size, crop, class_names,
            and whatever else the bytes depend on.

    Raises:
        ValueError: the folder holds shards that other settings made.
    """

    def __init__(self, folder: str | Path, settings: dict) -> None:
        self.folder, self.settings = Path(folder), settings
        self.shards = self.folder / "shards"
        self.num_shards = -(-settings["count"] // settings["shard_size"])
        # The VAE's name may change (another mount); its hash may not.
        same = {key: value for key, value in settings.items() if key != "vae"}
        self._fingerprint = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        self._check_settings(same)

    def _check_settings(self, same: dict) -> None:
        path = self.folder / "settings.json"
        if not path.is_file():
            return
        before = read_json(path, "delete it; shards that fit the new settings are kept")
        for key, value in same.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{path}: {key} was {_short(before.get(key))} and is now {_short(value)}; "
                    "choose another --features-path or delete this folder"
                )

    def begin(self, missing: list[int]) -> None:
        """Makes the folder ready; one process, before any shard is written.

        A manifest that vouches for the `missing` shards is taken back.
        """
        self.shards.mkdir(parents=True, exist_ok=True)
        if missing:
            (self.folder / "manifest.json").unlink(missing_ok=True)
        write_json(self.folder / "settings.json", self.settings)

    def rows(self, shard: int) -> range:
        """The places in the picture listing that a shard holds."""
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.settings["count"]))

    def missing(self, shards: Iterable[int]) -> list[int]:
        """Those of `shards` that are not there, or not as their record says (size and sha256)."""
        return [shard for shard in shards if not self._is_whole(shard)]

    def _record_path(self, shard: int) -> Path:
        return self.shards / f"{shard:05d}.json"

    def _is_whole(self, shard: int) -> bool:
        path = self._record_path(shard)
        if not path.is_file():
            return False
        try:
            record = read_json(path, "its shard is encoded again")
        except ValueError:
            return False
        if record.pop("settings_sha256", None) != self._fingerprint:
            return False
        return _fault(self.folder, record, contents=True) is None

    def write_shard(
        self, shard: int, arrays: np.ndarray, labels: np.ndarray, skipped: list[str]
    ) -> None:
        """Writes one shard; its record comes last.

        arrays [n, mirrors, 2C, h, w] (kind "sample": C) in the store's dtype, labels int64 [n];
        skipped: a sentence on each picture that could not be read. Raises ValueError for other
        shapes, or values that the dtype cannot hold.
        """
        channels, h, w = self.settings["shape"]
        channels *= 2 if self.settings["kind"] == "moments" else 1
        expected = (len(labels), self.settings["mirrors"], channels, h, w)
        if arrays.shape != expected or arrays.dtype != self.settings["dtype"]:
            raise ValueError(
                f"shard {shard}: array {arrays.dtype} {list(arrays.shape)} is not "
                f"{self.settings['dtype']} {list(expected)}"
            )
        if not np.isfinite(arrays).all():
            raise ValueError(
                f"shard {shard}: the VAE's output does not fit {arrays.dtype} (infinite or NaN); "
                "rerun with --precision fp32"
            )
        self._record_path(shard).unlink(missing_ok=True)
        record: dict = {"count": len(labels), "skipped": skipped}
        for name, array in (
            (ARRAY_NAMES[self.settings["kind"]], arrays),
            ("labels", labels.astype(np.int64)),
        ):
            path = self.shards / f"{shard:05d}-{name}.npy"
            write_whole(path, lambda partial, array=array: _save_array(partial, array))
            record[name] = {
                "file": path.relative_to(self.folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        record["settings_sha256"] = self._fingerprint
        write_json(self._record_path(shard), record)

    def finish(self) -> dict:
        """Writes and returns the manifest; one process, once every shard is there.

        Raises ValueError when a shard is not, or when not one picture could be read.
        """
        records, skipped = [], []
        for shard in range(self.num_shards):
            path = self._record_path(shard)
            if not path.is_file():
                raise ValueError(f"{path} is missing: unfinished extraction, rerun it")
            record = read_json(path, "rerun extract_features.py")
            record.pop("settings_sha256")
            skipped += record.pop("skipped")
            records.append(record)
        count = sum(record["count"] for record in records)
        if count == 0:
            raise ValueError(f"{self.folder}: none of the {len(skipped)} pictures could be read")
        manifest = {"format": FORMAT, "version": VERSION, **self.settings, "count": count}
        manifest |= {"skipped": skipped, "shards": records}
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _inside(folder: Path, name: str, source: Path) -> Path:
    """A file that a manifest names; ValueError when it lies outside the store."""
    path = folder / name
    plain = PLAIN_NAME.fullmatch(name)
    if not plain or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{source}: file {_short(name)} lies outside the store or has an odd name; paths must "
            "stay inside and be of letters, digits and . _ -"
        )
    return path


def _fault(folder: Path, record: dict, contents: bool) -> str | None:
    """What is wrong with a shard's files, or None; `contents` also checks their sha256."""
    for part in record.values():
        if not isinstance(part, dict):
            continue
        path = _inside(folder, part["file"], folder)
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != part["bytes"]:
            return f"{path} has {size} bytes, its record says {part['bytes']}"
        if contents and file_sha256(path) != part["sha256"]:
            return f"{path} differs from its sha256 {part['sha256'][:12]}"
    return None


def _load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a .npy array ({error}): extract the features again"
        ) from error


class _Shards:
    """Rows of a sharded store, through memory maps that are opened at first use."""

    def __init__(self, folder: Path, manifest: dict) -> None:
        self._name = ARRAY_NAMES[manifest["kind"]]
        self._folder, self._records = folder, manifest["shards"]
        C, h, w = manifest["shape"]
        channels = 2 * C if manifest["kind"] == "moments" else C
        self._row = (manifest["mirrors"], channels, h, w)
        self._dtype = np.dtype(manifest["dtype"])
        self._maps: dict[int, np.ndarray] = {}
        counts = [record["count"] for record in self._records]
        self._ends = np.cumsum(counts)
        for record in self._records:
            fault = _fault(folder, record, contents=False)
            if fault is not None:
                raise ValueError(f"{fault}: rerun extract_features.py to repair {folder}")
        self.labels = np.concatenate([self._shard_labels(record) for record in self._records])

    def _shard_labels(self, record: dict) -> np.ndarray:
        path = self._folder / record["labels"]["file"]
        labels = _load_array(path)
        if labels.shape != (record["count"],) or labels.dtype != np.int64:
            raise ValueError(
                f"{path} holds {labels.dtype} {list(labels.shape)}, not int64 [{record['count']}]: "
                "rerun extract_features.py"
            )
        return labels

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            record = self._records[shard]
            path = self._folder / record[self._name]["file"]
            rows = _load_array(path, mmap_mode="r")
            if rows.shape != (record["count"], *self._row) or rows.dtype != self._dtype:
                raise ValueError(
                    f"{path} holds {rows.dtype} {list(rows.shape)}, not {self._dtype} "
                    f"{[record['count'], *self._row]}: rerun extract_features.py"
                )
            self._maps[shard] = rows
        return self._maps[shard]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._ends, indices, side="right")
        maps = {shard: self._map(int(shard)) for shard in np.unique(shards)}
        out = np.empty((len(indices), *self._row), self._dtype)
        for shard, rows in maps.items():
            (places,) = np.nonzero(shards == shard)
            local = indices[places] - (self._ends[shard] - len(rows))
            out[places] = rows[local]
        return out

    def __len__(self) -> int:
        return len(self._records)

    def verify(self, shards: Iterable[int]) -> None:
        for shard in shards:
            fault = _fault(self._folder, self._records[shard], contents=True)
            if fault is not None:
                raise ValueError(f"{fault}: rerun extract_features.py to repair {self._folder}")


class _OldFiles:
    """The old layout: one .npy an image, numbered, and one for its label."""

    def __init__(self, features: Path, labels: Path) -> None:
        self._features, self._label_folder = features, labels
        if not labels.is_dir():
            raise FileNotFoundError(f"{labels} is missing: {features} needs its labels beside it")
        stems = [e.name[:-4] for e in os.scandir(features) if e.name.endswith(".npy")]
        if not stems:
            raise FileNotFoundError(f"{features} is empty: extract the features again")
        odd = next((stem for stem in stems if not stem.isdigit()), None)
        if odd is not None:
            raise ValueError(f"{features / odd}.npy: the old layout's files are named 0.npy, 1.npy")
        self._numbers = np.sort(np.array(stems, dtype=np.int64))
        first = _load_array(features / f"{self._numbers[0]}.npy")
        if first.ndim != 4 or first.shape[0] not in (1, 2):
            raise ValueError(
                f"{features}/{self._numbers[0]}.npy is {list(first.shape)}, not "
                "[mirrors 1 or 2, C, h, w]"
            )
        self.row, self.dtype = first.shape, first.dtype
        self.labels = self._read_labels()

    def _read_labels(self) -> np.ndarray:
        """int64 [N] from the cache file where that is of today's files, else from every file."""
        folder, numbers = self._label_folder, self._numbers
        cache = folder.with_name(f"{folder.name}.cache.npy")
        # What it holds: the label files' count and newest change, the features' numbers, the labels
        changes = [entry.stat().st_mtime_ns for entry in os.scandir(folder)]
        head = np.array([len(changes), max(changes, default=0), *numbers], dtype=np.int64)
        with contextlib.suppress(ValueError):  # no cache, or a damaged one: it is made (again)
            kept = _load_array(cache)
            if kept.shape == (len(head) + len(numbers),) and (kept[: len(head)] == head).all():
                return kept[len(head) :]
        chunks = np.array_split(numbers, -(-len(numbers) // 1000))
        with ThreadPoolExecutor(8) as pool:
            labels = np.concatenate(list(pool.map(self._labels_of, chunks)))
        try:
            whole = np.concatenate([head, labels])
            write_whole(cache, lambda partial: _save_array(partial, whole), durable=False)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): the labels are read file by file at every start",
                cache,
                error,
            )
        return labels

    def _labels_of(self, numbers: np.ndarray) -> np.ndarray:
        files = (self._label_folder / f"{number}.npy" for number in numbers)
        return np.array([int(_load_array(file).reshape(-1)[0]) for file in files], dtype=np.int64)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.row), self.dtype)
        for i, number in enumerate(self._numbers[indices]):
            path = self._features / f"{number}.npy"
            array = _load_array(path)
            if array.shape != self.row:
                raise ValueError(
                    f"{path} is {list(array.shape)}, the first file {list(self.row)}: extract the "
                    "features again"
                )
            out[i] = array
        return out

    def __len__(self) -> int:
        return -(-len(self._numbers) // OLD_PART)

    def verify(self, parts: Iterable[int]) -> None:
        for part in parts:
            rows = np.arange(part * OLD_PART, min((part + 1) * OLD_PART, len(self._numbers)))
            self.gather(rows)


class LatentStore:
    """An opened store; `open_latents` makes it.

    Attributes:
        path: the folder. kind: "moments" or "sample".
        shape: (C, h, w) of one image's latents. scale: what makes unscaled latents unit-sized.
        num_mirrors: 1, or 2 when the mirror image is stored too.
        labels: int64 [N]. num_classes: every label is below it. class_names: [] in the old layout.
        manifest: the manifest as read; of the old layout, what can be told of it.
    """

    def __init__(
        self, path: Path, manifest: dict, rows: _Shards | _OldFiles, num_classes: int | None
    ) -> None:
        self.path, self.manifest, self._rows = path, manifest, rows
        self.kind: str = manifest["kind"]
        self.shape = tuple(manifest["shape"])
        self.scale = float(manifest["scale"])
        self.num_mirrors: int = manifest["mirrors"]
        self.class_names: list[str] = manifest["class_names"]
        self.labels = rows.labels
        low, high = int(self.labels.min()), int(self.labels.max())
        if num_classes is None:
            num_classes = max(len(self.class_names), high + 1)
        self.num_classes = num_classes
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{path}: label {high if high >= num_classes else low} is outside the "
                f"{num_classes} classes of the model; set num_classes to at least {high + 1} in "
                "the YAML (or --num-classes when there is none)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def check_shape(self, shape: tuple[int, int, int], wanted_by: str) -> None:
        """ValueError unless the latents are (C, h, w) = `shape`; `wanted_by` names the model."""
        if tuple(shape) != self.shape:
            raise ValueError(
                f"{self.path} holds latents {list(self.shape)} (image size "
                f"{self.manifest['image_size']}, VAE {self.manifest['vae']}), {wanted_by} needs "
                f"{list(shape)}: extract again with its --image-size and --vae, or change the model"
            )

    def check_plan(self, plan: GraftPlan) -> None:
        """ValueError unless a plan's model can train on these latents: their shape and their scale.

        The scale is that of the plan's VAE. It is not compared where that VAE is a folder that is
        not here, nor for a model from scratch of which no YAML names a VAE.
        """
        side = plan.input_size
        self.check_shape((4, side, side), f"{plan.model_name} of {plan.path}")
        vae = plan.vae
        if vae not in HUB_NAMES:
            found = [place for place in places(vae, plan.path) if place.is_dir()]
            if not found:
                log.warning(
                    "VAE %s of %s is not here: whether %s was made with it is not checked",
                    vae,
                    plan.path,
                    self.path,
                )
                return
            vae = found[0]
        elif plan.path == FLAGS and plan.base_ckpt_path is None:
            return
        scale = scale_of(vae)
        if not math.isclose(self.scale, scale, rel_tol=1e-4):
            raise ValueError(
                f"{self.path} holds latents of VAE {self.manifest['vae']}, scaled by {self.scale}; "
                f"VAE {plan.vae} of {plan.path} scales by {scale}: extract again with that VAE, or "
                "name the other in the YAML's sample_config (vae)"
            )

    def verify(self, first: int = 0, step: int = 1) -> None:
        """Reads every file and checks it against its sha256; ValueError names what differs.

        Of the shards only number `first` and every `step`-th from there, one process's share.
        """
        self._rows.verify(range(first, len(self._rows), step))

    def verify_one(self, *chance: int) -> None:
        """As `verify`, one shard that follows from the numbers `chance`."""
        self._rows.verify([int(np.random.default_rng(chance).integers(len(self._rows)))])

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the store as they are stored, on the CPU.

        indices int64 [B], 0..N-1. Returns float16 (old layout: as stored) moments
        [B, mirrors, 2C, h, w], or latents [B, mirrors, C, h, w] of kind "sample".
        """
        places = np.asarray(indices, dtype=np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < len(self)):
            raise ValueError(
                f"index {places.min()}..{places.max()} is outside the {len(self)} images of "
                f"{self.path}"
            )
        return torch.from_numpy(self._rows.gather(places))

    def latents(
        self, moments: torch.Tensor, index: torch.Tensor, seed: int, epoch: int
    ) -> torch.Tensor:
        """Training latents x0 of rows that `read` gave, on their device.

        Image i of an epoch takes one of its mirrors and a fresh draw from the posterior; both are
        functions of (seed, i, epoch). moments [B, mirrors, ...], index int64 [B] the rows' places.
        Returns float32 [B, C, h, w], scaled.
        """
        index = index.to(moments.device)
        if self.num_mirrors > 1:
            mirror = noise.integers(seed, noise.FLIP, index, self.num_mirrors, step=epoch)
            picked = moments[torch.arange(len(moments), device=moments.device), mirror]
        else:
            picked = moments[:, 0]
        if self.kind == "sample":
            return picked.float()
        mean, logvar = picked.float().chunk(2, dim=1)  # [B, C, h, w] each
        draw = noise.normal(seed, noise.POSTERIOR, index, self.shape, step=epoch)
        return (mean + torch.exp(0.5 * logvar) * draw) * self.scale


def open_latents(path: str | Path, *, num_classes: int | None = None) -> LatentStore:
    """Opens what extract_features.py wrote, or the old layout of one file an image.

    Args:
        path: the store; of the old layout, the folder that holds imagenet<size>_features, or that
            folder itself.
        num_classes: classes of the model that will train on it; None takes the store's own.

    Raises:
        FileNotFoundError: no such folder, an unfinished extraction, or neither layout.
        ValueError: a file is damaged or the manifest is, or a label is no class of the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"latent store {path} does not exist: make it with python extract_features.py "
            f"--data-path <image folder> --features-path {path}"
        )
    if (path / "manifest.json").is_file():
        manifest = _read_manifest(path)
        return LatentStore(path, manifest, _Shards(path, manifest), num_classes)
    if (path / "settings.json").is_file() or (path / "shards").is_dir():
        raise FileNotFoundError(
            f"{path / 'manifest.json'} is missing: unfinished extraction, rerun "
            f"extract_features.py with --features-path {path}"
        )
    features = [f for f in (path, *sorted(path.iterdir())) if OLD_NAME.fullmatch(f.name)]
    if len(features) != 1:
        found = "is empty" if not any(path.iterdir()) else f"has {len(features)} old-style folders"
        raise FileNotFoundError(
            f"{path} is no latent store: no manifest.json, and it {found} where one "
            "imagenet<size>_features is needed; make a store with extract_features.py"
        )
    folder = features[0]
    rows = _OldFiles(folder, folder.with_name(folder.name.removesuffix("_features") + "_labels"))
    mirrors, *shape = rows.row
    described = {
        "kind": "sample",
        "count": len(rows.labels),
        "shape": shape,
        "dtype": str(rows.dtype),
        "mirrors": mirrors,
        "scale": OLD_SCALE,
        "vae": "unknown",
        "image_size": "unknown",
        "class_names": [],
    }
    return LatentStore(path, described, rows, num_classes)


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    manifest = read_json(path, "unfinished extraction, rerun extract_features.py")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a latent store: format must be {FORMAT!r}")
    _check(path, "", manifest, MANIFEST)
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{path}: version {manifest['version']} is not {VERSION}; extract again with this code"
        )
    for key, fits in (
        ("scale", 0 < manifest["scale"] < math.inf),
        ("shape", [type(n) for n in manifest["shape"]] == [int] * 3 and min(manifest["shape"]) > 0),
        ("class_names", all(isinstance(name, str) for name in manifest["class_names"])),
    ):
        if not fits:
            raise ValueError(
                f"{path}: {key} {_short(manifest[key])} is impossible; rerun extract_features.py"
            )
    for number, record in enumerate(manifest["shards"]):
        where, arrays = f"shards[{number}]", (ARRAY_NAMES[manifest["kind"]], "labels")
        _check(path, where, record, {"count": SIZE, **dict.fromkeys(arrays, dict)})
        if odd := record.keys() - {"count", *arrays}:
            raise ValueError(
                f"{path}: {where}: unknown key {min(odd)!r}; rerun extract_features.py"
            )
        for name in arrays:
            _check(path, f"{where}: {name}", record[name], FILE)
            _inside(folder, record[name]["file"], path)
    total = sum(record["count"] for record in manifest["shards"])
    if total != manifest["count"] or total == 0:
        raise ValueError(
            f"{path}: count {manifest['count']} is not the {total} images of its shards; rerun "
            "extract_features.py"
        )
    return manifest


def _check(path: Path, where: str, found: object, legal: dict) -> None:
    """ValueError unless `found` is a mapping that holds the keys of `legal`, each as it says."""
    place = f"{path}: {where}: " if where else f"{path}: "
    if not isinstance(found, dict):
        raise ValueError(f"{place}{_short(found)} must be a mapping; rerun extract_features.py")
    missing = [key for key in legal if key not in found]
    if missing:
        raise ValueError(f"{place}lacks {', '.join(missing)}: rerun extract_features.py")
    for key, rule in legal.items():
        value = found[key]
        if isinstance(rule, tuple) and isinstance(rule[0], str):
            fits, words = value in rule, f"none of {', '.join(map(str, rule))}"
        elif isinstance(rule, range):
            fits = type(value) is int and value in rule
            words = f"no whole number from {rule.start} to {rule.stop - 1}"
        else:
            fits = isinstance(value, rule) and not isinstance(value, bool)
            words = f"no {getattr(rule, '__name__', 'number')}"
        if not fits:
            raise ValueError(f"{place}{key} {_short(value)} is {words}; rerun extract_features.py")
