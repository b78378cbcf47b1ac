"""The latent store: VAE moments of an image folder in shards that describe themselves.

    <store>/manifest.json            written last; without it there is no store
    <store>/settings.json            written first: what a restarted extraction must agree with
    <store>/shards/00000.json        counts, sizes and sha256 of the shard's two arrays
    <store>/shards/00000-moments.npy float16 [n, mirrors, 2C, h, w]: mean, logvar; unscaled
    <store>/shards/00000-labels.npy  int64 [n]

With --captions, labels are places in the table of captions/ (latents/captions.py).
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
from latents.captions import FOLDER, CaptionTable, open_captions
from latents.codec import HUB_NAMES, PUBLISHED_SCALE, scale_of
from latents.shards import (
    FILE,
    SIZE,
    VERSION,
    ShardWriter,
    check_record,
    fault_of,
    file_inside,
    load_array,
    save_array,
    short,
)
from latents.text import encoder_sha256, local_text_encoder
from models.captions import Captions
from models.config_files import places
from models.files import file_sha256, read_json, write_whole
from models.graft_plan import ENCODER_KEYS, GraftPlan
from models.presets import PRESETS

FORMAT = "latent-store"
ARRAY_NAMES = {"moments": "moments", "sample": "latents"}  # kind -> what its arrays are called
OLD_SCALE = PUBLISHED_SCALE  # the old layout was only ever written with the sd-vae-ft-* VAEs
FLAGS = Path("flags")  # the path of a plan that no YAML holds
OLD_PART = 1024  # files that `verify` takes together, as it takes a shard
OLD_NAME = re.compile(r"imagenet\d+_features")
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


class StoreWriter(ShardWriter):
    """Writes the latents of a picture listing.

    settings: count (pictures listed), shard_size, kind, shape [C, h, w], dtype, mirrors, vae,
    vae_sha256, scale, image_size, crop, class_names, and whatever else the bytes depend on.
    """

    format = FORMAT

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
        name = ARRAY_NAMES[self.settings["kind"]]
        parts = {name: arrays, "labels": labels.astype(np.int64)}
        self.write_parts(shard, parts, count=len(labels), skipped=skipped)


def joined(
    arrays: list[np.ndarray], labels: list[np.ndarray], settings: dict
) -> tuple[np.ndarray, np.ndarray]:
    """A shard's batches as one array; of no rows when none of its pictures could be read."""
    if arrays:
        return np.concatenate(arrays), np.concatenate(labels)
    channels, h, w = settings["shape"]
    channels *= 2 if settings["kind"] == "moments" else 1
    empty = np.empty((0, settings["mirrors"], channels, h, w), settings["dtype"])
    return empty, np.empty(0, dtype=np.int64)


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
            fault = fault_of(folder, record, contents=False)
            if fault is not None:
                raise ValueError(f"{fault}: rerun extract_features.py to repair {folder}")
        self.labels = np.concatenate([self._shard_labels(record) for record in self._records])

    def _shard_labels(self, record: dict) -> np.ndarray:
        path = self._folder / record["labels"]["file"]
        labels = load_array(path)
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
            rows = load_array(path, mmap_mode="r")
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
            fault = fault_of(self._folder, self._records[shard], contents=True)
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
        first = load_array(features / f"{self._numbers[0]}.npy")
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
            kept = load_array(cache)
            if kept.shape == (len(head) + len(numbers),) and (kept[: len(head)] == head).all():
                return kept[len(head) :]
        chunks = np.array_split(numbers, -(-len(numbers) // 1000))
        with ThreadPoolExecutor(8) as pool:
            labels = np.concatenate(list(pool.map(self._labels_of, chunks)))
        try:
            whole = np.concatenate([head, labels])
            write_whole(cache, lambda partial: save_array(partial, whole), durable=False)
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): the labels are read file by file at every start",
                cache,
                error,
            )
        return labels

    def _labels_of(self, numbers: np.ndarray) -> np.ndarray:
        files = (self._label_folder / f"{number}.npy" for number in numbers)
        return np.array([int(load_array(file).reshape(-1)[0]) for file in files], dtype=np.int64)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.row), self.dtype)
        for i, number in enumerate(self._numbers[indices]):
            path = self._features / f"{number}.npy"
            array = load_array(path)
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
        captions: what the labels are places in, of a store made with --captions; else None.
        manifest: the manifest as read; of the old layout, what can be told of it.
        notes: what `check_plan` had to leave unchecked, for the log of the run.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict,
        rows: _Shards | _OldFiles,
        num_classes: int | None,
        captions: CaptionTable | None = None,
    ) -> None:
        self.path, self.manifest, self._rows, self.captions = path, manifest, rows, captions
        self.kind: str = manifest["kind"]
        self.shape = tuple(manifest["shape"])
        self.scale = float(manifest["scale"])
        self.num_mirrors: int = manifest["mirrors"]
        self.class_names: list[str] = manifest["class_names"]
        self.labels = rows.labels
        self.notes: list[str] = []
        low, high = int(self.labels.min()), int(self.labels.max())
        if captions is not None:
            num_classes = len(captions)
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

    @property
    def sha256(self) -> str:
        """Of what a training reads, by the manifest's records; in the old layout of the labels."""
        read = {key: self.manifest.get(key) for key in ("shards", "scale", "captions_sha256")}
        if read["shards"] is None:
            read["labels"] = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    def check_shape(self, shape: tuple[int, int, int], wanted_by: str) -> None:
        """ValueError unless the latents are (C, h, w) = `shape`; `wanted_by` names the model."""
        if tuple(shape) != self.shape:
            raise ValueError(
                f"{self.path} holds latents {list(self.shape)} (image size "
                f"{self.manifest['image_size']}, VAE {self.manifest['vae']}), {wanted_by} needs "
                f"{list(shape)}: extract again with its --image-size and --vae, or change the model"
            )

    def check_plan(self, plan: GraftPlan) -> None:
        """ValueError unless a plan's model can train on these latents: their shape, their scale,
        and the classes or captions with them.

        The scale is that of the plan's VAE. It is not compared where that VAE is a folder that is
        not here (`notes` then says so), nor for a model from scratch of which no YAML names a VAE.
        """
        self._check_condition(plan)
        side = plan.input_size
        self.check_shape((4, side, side), f"{plan.model_name} of {plan.path}")
        vae = plan.vae
        if vae not in HUB_NAMES:
            found = [place for place in places(vae, plan.path) if place.is_dir()]
            if not found:
                self._leave_unchecked("VAE", vae, plan)
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

    def _check_condition(self, plan: GraftPlan) -> None:
        """The part of `check_plan` on what the model is told."""
        model = f"{plan.model_name} of {plan.path}"
        if not plan.captioned:
            if self.captions is not None:
                raise ValueError(f"{self.path} holds captions, {model} is told classes")
            return
        if self.captions is None:
            raise ValueError(
                f"{self.path} holds no captions, {model} is told such: extract again with "
                "--captions"
            )
        held, width = self.captions.manifest, PRESETS[plan.model_name]["caption_channels"]
        name = plan.text_encoder
        if self.captions.width != width:
            raise ValueError(
                f"{self.path} holds embeddings of text encoder {held['text_encoder']}, "
                f"{self.captions.width} wide; {model} takes {width}: extract again with its "
                "--text-encoder"
            )
        found = local_text_encoder(name, plan.path)
        if found is None:
            self._leave_unchecked("text encoder", name, plan)
        elif encoder_sha256(found) != held["text_encoder_sha256"]:
            raise ValueError(
                f"{self.path} holds embeddings of text encoder {held['text_encoder']}, which is "
                f"not {name} of {plan.path} (their hashes differ): extract again with that, or "
                "name the other in the YAML's sample_config (text_encoder)"
            )

    def _leave_unchecked(self, what: str, name: str, plan: GraftPlan) -> None:
        self.notes.append(
            f"{what} {name} of {plan.path} is not here: whether {self.path} was made with it is "
            "not checked"
        )

    def with_encoder(self, plan: GraftPlan) -> GraftPlan:
        """The plan, with what embedded the captions; as it is where there are none."""
        if self.captions is None:
            return plan
        return plan.with_encoder(*(self.captions.manifest[key] for key in ENCODER_KEYS))

    def conditions(self, indices: torch.Tensor) -> torch.Tensor | Captions:
        """What a model is told of rows `indices` [B], on the CPU: classes [B], or captions."""
        labels = self.labels[np.asarray(indices, dtype=np.int64)]
        return torch.from_numpy(labels) if self.captions is None else self.captions.read(labels)

    def verify(self, first: int = 0, step: int = 1) -> None:
        """Reads every file and checks it against its sha256; ValueError names what differs.

        Of the shards only number `first` and every `step`-th from there, one process's share.
        """
        self._rows.verify(range(first, len(self._rows), step))
        if self.captions is not None:
            self.captions.verify(range(first, self.captions.num_shards, step))

    def verify_one(self, *chance: int) -> None:
        """As `verify`, one shard that follows from the numbers `chance`; one of captions too."""
        draw = np.random.default_rng(chance)
        self._rows.verify([int(draw.integers(len(self._rows)))])
        if self.captions is not None:
            self.captions.verify([int(draw.integers(self.captions.num_shards))])

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
        captions = open_captions(path / FOLDER) if "captions_sha256" in manifest else None
        if captions and file_sha256(captions.path / "manifest.json") != manifest["captions_sha256"]:
            raise ValueError(
                f"{captions.path / 'manifest.json'} differs from its sha256 in the store's "
                "manifest: rerun extract_features.py"
            )
        return LatentStore(path, manifest, _Shards(path, manifest), num_classes, captions)
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
    check_record(path, "", manifest, MANIFEST)
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
                f"{path}: {key} {short(manifest[key])} is impossible; rerun extract_features.py"
            )
    for number, record in enumerate(manifest["shards"]):
        where, arrays = f"shards[{number}]", (ARRAY_NAMES[manifest["kind"]], "labels")
        check_record(path, where, record, {"count": SIZE, **dict.fromkeys(arrays, dict)})
        if odd := record.keys() - {"count", *arrays}:
            raise ValueError(
                f"{path}: {where}: unknown key {min(odd)!r}; rerun extract_features.py"
            )
        for name in arrays:
            check_record(path, f"{where}: {name}", record[name], FILE)
            file_inside(folder, record[name]["file"], path)
    total = sum(record["count"] for record in manifest["shards"])
    if total != manifest["count"] or total == 0:
        raise ValueError(
            f"{path}: count {manifest['count']} is not the {total} images of its shards; rerun "
            "extract_features.py"
        )
    return manifest
