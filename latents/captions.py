"""Captions of images, and the table of their embeddings beside a latent store.

    <store>/captions/manifest.json                 as `latents.shards` writes it
    <store>/captions/shards/00000-embeddings.npy   float16 [tokens, C], caption after caption
    <store>/captions/shards/00000-lengths.npy      int64 [n], tokens of each caption
    <store>/captions/shards/00000-texts.npy        uint8, the captions as lines of JSON

Every text is in the table once, and the store's labels are places in it. Place 0 is the empty
caption.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from latents.shards import (
    FILE,
    SIZE,
    VERSION,
    ShardWriter,
    check_record,
    fault_of,
    file_inside,
    load_array,
)
from latents.text import TextEncoder, normalised
from models.captions import Captions
from models.files import read_json, read_lines

FORMAT, FOLDER = "caption-store", "captions"
SHARD_SIZE = 1024
PARTS = ("embeddings", "lengths", "texts")
MANIFEST = {
    "version": range(1, 2**31),
    "count": SIZE,
    "shard_size": range(1, 2**31),
    "width": range(1, 2**31),
    "max_tokens": range(1, 2**31),
    "text_encoder": str,
    "text_encoder_sha256": str,
    "shards": list,
}


def read_captions(path: str | Path) -> dict[str, str]:
    """Picture -> caption, of a JSONL file with rows {"file_name": ..., "caption" or "text": ...}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no such row or no UTF-8, or a picture has two.
    """
    path, found = Path(path), {}
    if not path.is_file():
        raise FileNotFoundError(f"--captions {path}: no such file")
    for number, line in enumerate(read_lines(path, "--captions"), start=1):
        if not line.strip():
            continue
        where = f"--captions {path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); one object a line") from error
        texts = [row[key] for key in ("caption", "text") if key in row] if row_like(row) else []
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError(
                f'{where}: {line[:80]!r} is no {{"file_name": ..., "caption" or "text": ...}}'
            )
        name = Path(row["file_name"]).as_posix()
        if name in found:
            raise ValueError(f"{where}: {name} has a caption already; keep one")
        found[name] = normalised(texts[0])
    return found


def row_like(row: object) -> bool:
    """Whether a line of JSON names a picture."""
    return isinstance(row, dict) and isinstance(row.get("file_name"), str)


class CaptionWriter(ShardWriter):
    """Writes the table of embeddings; `describe` gives its settings."""

    format = FORMAT

    def write_shard(self, shard: int, texts: list[str], encoder: TextEncoder) -> None:
        """Embeds and writes the captions of one shard."""
        mine = [texts[place] for place in self.rows(shard)]
        embedded = [row.numpy() for row in encoder.encode(mine)]
        parts = {
            "embeddings": np.concatenate(embedded),
            "lengths": np.array([len(row) for row in embedded], dtype=np.int64),
            "texts": np.frombuffer("\n".join(map(json.dumps, mine)).encode(), dtype=np.uint8),
        }
        cut = sum(n > encoder.max_tokens for n in encoder.tokens(mine))
        self.write_parts(shard, parts, count=len(mine), truncated=cut)


def describe(texts: list[str], encoder: TextEncoder) -> dict:
    """The settings of a `CaptionWriter`."""
    return {
        "count": len(texts),
        "shard_size": SHARD_SIZE,
        "width": encoder.width,
        "max_tokens": encoder.max_tokens,
        "text_encoder": encoder.id,
        "text_encoder_sha256": encoder.sha256,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "texts_sha256": hashlib.sha256("\n".join(map(json.dumps, texts)).encode()).hexdigest(),
    }


def padded(rows: Sequence[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [tokens, C] of B captions -> float16 [B, length, C], and bool [B, length]."""
    embeddings = np.zeros((len(rows), length, rows[0].shape[1]), np.float16)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        embeddings[i, : len(row)] = row
        mask[i, : len(row)] = True
    return torch.from_numpy(embeddings), torch.from_numpy(mask)


class CaptionTable:
    """The embedded captions of a store, through memory maps; `open_captions` makes it.

    Attributes:
        path: the folder. manifest: as read. width: C of the embeddings.
        null_embeddings, null_mask: of the empty caption, float16 [1, L, C] and bool [1, L].
    """

    def __init__(self, path: Path, manifest: dict) -> None:
        self.path, self.manifest, self.width = path, manifest, manifest["width"]
        self._records = manifest["shards"]
        for record in self._records:
            if fault := fault_of(path, record, contents=False):
                raise ValueError(f"{fault}: rerun extract_features.py to repair {path.parent}")
        self._lengths = [self._load(record, "lengths") for record in self._records]
        self._ends = [np.cumsum(lengths) for lengths in self._lengths]
        self._maps: dict[int, np.ndarray] = {}
        for record, lengths in zip(self._records, self._lengths, strict=True):
            legal = lengths.shape == (record["count"],) and lengths.dtype == np.int64
            if not legal or lengths.min() < 1 or lengths.max() > manifest["max_tokens"]:
                raise ValueError(
                    f"{path / record['lengths']['file']} does not hold the lengths of "
                    f"{record['count']} captions: rerun extract_features.py"
                )
        self.null_embeddings, self.null_mask = self._rows(np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return self.manifest["count"]

    def _load(self, record: dict, part: str, mmap_mode: str | None = None) -> np.ndarray:
        return load_array(self.path / record[part]["file"], mmap_mode)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            record = self._records[shard]
            rows, wanted = (
                self._load(record, "embeddings", "r"),
                (self._ends[shard][-1], self.width),
            )
            if rows.shape != wanted or rows.dtype != np.float16:
                raise ValueError(
                    f"{self.path / record['embeddings']['file']} holds {rows.dtype} "
                    f"{list(rows.shape)}, not float16 {list(wanted)}: rerun "
                    "extract_features.py"
                )
            self._maps[shard] = rows
        return self._maps[shard]

    def _rows(self, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for place in places:
            shard, row = divmod(int(place), self.manifest["shard_size"])
            length, end = int(self._lengths[shard][row]), int(self._ends[shard][row])
            rows.append(self._map(shard)[end - length : end])
        return padded(rows, self.manifest["max_tokens"])

    def read(self, places: np.ndarray) -> Captions:
        """The captions at int64 places [B], float16 on the CPU."""
        return Captions(*self._rows(places), self.null_embeddings, self.null_mask)

    def verify(self, shards: Iterable[int]) -> None:
        """Reads files and checks them against their sha256; ValueError names what differs."""
        for shard in shards:
            if fault := fault_of(self.path, self._records[shard], contents=True):
                raise ValueError(f"{fault}: rerun extract_features.py to repair {self.path.parent}")

    @property
    def num_shards(self) -> int:
        return len(self._records)


def open_captions(path: Path) -> CaptionTable:
    """Opens the captions of a store.

    Raises:
        ValueError: the manifest or a file is missing, damaged, or of another version.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: rerun extract_features.py with --captions")
    manifest = read_json(file, "rerun extract_features.py")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} is no manifest of captions: format must be {FORMAT!r}")
    check_record(file, "", manifest, MANIFEST)
    if manifest["version"] != VERSION:
        raise ValueError(
            f"{file}: version {manifest['version']} is not {VERSION}; extract again with this code"
        )
    counts = []
    for number, record in enumerate(manifest["shards"]):
        where = f"shards[{number}]"
        check_record(file, where, record, {"count": SIZE, **dict.fromkeys(PARTS, dict)})
        for part in PARTS:
            check_record(file, f"{where}: {part}", record[part], FILE)
            file_inside(path, record[part]["file"], file)
        counts.append(record["count"])
    full, rest = divmod(manifest["count"], manifest["shard_size"])
    if counts != [manifest["shard_size"]] * full + [rest] * (rest > 0) or not counts:
        raise ValueError(
            f"{file}: count {manifest['count']} is not the {sum(counts)} captions of its shards; "
            "rerun extract_features.py"
        )
    return CaptionTable(path, manifest)
