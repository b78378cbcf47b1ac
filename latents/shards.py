"""Files of a store in shards: each written whole, recorded with its size and sha256, and checked.

<folder>/manifest.json             written last; without it there is no store
<folder>/settings.json             written first: what a restarted extraction must agree with
<folder>/shards/00000.json         counts, sizes and sha256 of the shard's arrays
<folder>/shards/00000-<name>.npy   the arrays
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from models.files import file_sha256, read_json, write_json, write_whole

VERSION = 1
NETWORKS = ("vae", "text_encoder")  # settings that name a network, beside that of its hash
PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]{0,99}/){0,9}[\w-][\w.-]{0,99}", re.ASCII)
SIZE = range(2**48)
FILE = {"file": str, "bytes": SIZE, "sha256": str}  # of a shard


def save_array(path: Path, array: np.ndarray) -> None:
    """As numpy.save, but for the error of a full disk, which keeps its reason."""
    with open(path, "wb") as file:
        array = np.ascontiguousarray(array)
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.reshape(-1).view(np.uint8).data)


class ShardWriter:
    """Writes a store shard by shard, in any order, from any number of processes.

    Shard k holds the rows `shard_size * k` and on of a listing, so its bytes depend neither on who
    writes it nor on when. A restarted extraction asks `missing` what is left to do.

    Args:
        folder: the store; made when missing.
        settings: plain data that goes into the manifest: count (rows of the listing), shard_size,
            and whatever else the bytes depend on.

    Raises:
        ValueError: the folder holds shards that other settings made.
    """

    format = ""  # how the manifest calls the store

    def __init__(self, folder: str | Path, settings: dict) -> None:
        self.folder, self.settings = Path(folder), settings
        self.shards = self.folder / "shards"
        self.num_shards = -(-settings["count"] // settings["shard_size"])
        # The network's name may change (another mount); its hash may not.
        same = {key: value for key, value in settings.items() if key not in NETWORKS}
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
                    f"{path}: {key} was {short(before.get(key))} and is now {short(value)}; "
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
        return fault_of(self.folder, record, contents=True) is None

    def write_parts(self, shard: int, parts: dict[str, np.ndarray], **record) -> None:
        """Writes the arrays of a shard, by their names, and last its record, with these entries."""
        self._record_path(shard).unlink(missing_ok=True)
        for name, array in parts.items():
            path = self.shards / f"{shard:05d}-{name}.npy"
            write_whole(path, lambda partial, array=array: save_array(partial, array))
            record[name] = {
                "file": path.relative_to(self.folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
        record["settings_sha256"] = self._fingerprint
        write_json(self._record_path(shard), record)

    def finish(self, **more) -> dict:
        """Writes and returns the manifest; one process, once every shard is there.

        more: further entries of the manifest. Raises ValueError when a shard is not, or when not
        one picture could be read.
        """
        records, skipped = [], []
        for shard in range(self.num_shards):
            path = self._record_path(shard)
            if not path.is_file():
                raise ValueError(f"{path} is missing: unfinished extraction, rerun it")
            record = read_json(path, "rerun extract_features.py")
            record.pop("settings_sha256")
            skipped += record.pop("skipped", [])
            records.append(record)
        count = sum(record["count"] for record in records)
        if count == 0:
            raise ValueError(f"{self.folder}: none of the {len(skipped)} pictures could be read")
        manifest = {"format": self.format, "version": VERSION, **self.settings, "count": count}
        manifest |= {"skipped": skipped, **more, "shards": records}
        write_json(self.folder / "manifest.json", manifest)
        return manifest


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def file_inside(folder: Path, name: str, source: Path) -> Path:
    """A file that a manifest names; ValueError when it lies outside the store."""
    path = folder / name
    plain = PLAIN_NAME.fullmatch(name)
    if not plain or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{source}: file {short(name)} lies outside the store or has an odd name; paths must "
            "stay inside and be of letters, digits and . _ -"
        )
    return path


def fault_of(folder: Path, record: dict, contents: bool) -> str | None:
    """What is wrong with a shard's files, or None; `contents` also checks their sha256."""
    for part in record.values():
        if not isinstance(part, dict):
            continue
        path = file_inside(folder, part["file"], folder)
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != part["bytes"]:
            return f"{path} has {size} bytes, its record says {part['bytes']}"
        if contents and file_sha256(path) != part["sha256"]:
            return f"{path} differs from its sha256 {part['sha256'][:12]}"
    return None


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a .npy array ({error}): extract the features again"
        ) from error


def check_record(path: Path, where: str, found: object, legal: dict) -> None:
    """ValueError unless `found` is a mapping that holds the keys of `legal`, each as it says."""
    place = f"{path}: {where}: " if where else f"{path}: "
    if not isinstance(found, dict):
        raise ValueError(f"{place}{short(found)} must be a mapping; rerun extract_features.py")
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
            raise ValueError(f"{place}{key} {short(value)} is {words}; rerun extract_features.py")
