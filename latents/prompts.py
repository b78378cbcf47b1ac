"""Prompts to sample images of, and GenEval's layout of what comes out.

    <folder>/00000/metadata.jsonl     the prompt's row, as its file has it
    <folder>/00000/samples/0000.png   the images of the prompt

GenEval (arXiv 2310.11513) scores such a folder; its prompts are the rows of its
evaluation_metadata.jsonl.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from latents.captions import padded
from latents.text import TextEncoder, normalised
from models.captions import Captions
from models.files import read_lines, write_whole


@dataclass
class Prompts:
    """The rows of a prompts file; image i is number i % per_prompt of row i // per_prompt.

    Attributes:
        rows: each with a "prompt". per_prompt: images of each.
        embedded: text -> float16 [tokens, C], once `embed` was called. max_tokens: L.
    """

    rows: list[dict]
    per_prompt: int
    embedded: dict[str, np.ndarray] = field(default_factory=dict)
    max_tokens: int = 0

    def __len__(self) -> int:
        return len(self.rows) * self.per_prompt

    def file_of(self, folder: Path, image: int) -> Path:
        row, number = divmod(image, self.per_prompt)
        return folder / f"{row:05d}" / "samples" / f"{number:04d}.png"

    def text_of(self, image: int) -> str:
        return normalised(self.rows[image // self.per_prompt]["prompt"])

    def settings(self, encoder: TextEncoder) -> dict:
        """What the images depend on, for samples.json."""
        rows = json.dumps(self.rows, ensure_ascii=False)
        return {
            "prompts_sha256": hashlib.sha256(rows.encode()).hexdigest(),
            "images_per_prompt": self.per_prompt,
            "text_encoder": encoder.id,
            "text_encoder_sha256": encoder.sha256,
            "max_tokens": encoder.max_tokens,
        }

    def too_long(self, encoder: TextEncoder) -> int:
        """How many prompts the encoder cuts."""
        counts = encoder.tokens([normalised(row["prompt"]) for row in self.rows])
        return sum(n > encoder.max_tokens for n in counts)

    def embed(self, encoder: TextEncoder, images: list[int]) -> None:
        """Embeds the prompts of these images, each text once, and the empty one."""
        texts = list(dict.fromkeys(["", *(self.text_of(image) for image in images)]))
        rows = (row.numpy() for row in encoder.encode(texts))
        self.embedded = dict(zip(texts, rows, strict=True))
        self.max_tokens = encoder.max_tokens

    def conditions(self, images: torch.Tensor) -> Captions:
        """What the model is told of images int64 [B], on the device of `images`."""
        rows = [self.embedded[self.text_of(image)] for image in images.tolist()]
        told = Captions(
            *padded(rows, self.max_tokens), *padded([self.embedded[""]], self.max_tokens)
        )
        return told.to(images.device)

    def write_metadata(self, folder: Path) -> None:
        """Writes the metadata.jsonl of every prompt."""
        for number, row in enumerate(self.rows):
            text = json.dumps(row, ensure_ascii=False) + "\n"
            path = folder / f"{number:05d}" / "metadata.jsonl"
            write_whole(
                path,
                lambda partial, text=text: partial.write_text(text, encoding="utf-8"),
                durable=False,
            )


def read_prompts(path: str | Path, per_prompt: int) -> Prompts:
    """Prompts of a .txt file, one a line, or of a .jsonl file of objects with a "prompt".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, no prompts, or a line that is no such object or no UTF-8.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"--prompts {path}: name a .txt file of one prompt a line, or a .jsonl file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    rows = []
    for number, line in enumerate(read_lines(path, "--prompts"), start=1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"--prompts {path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(
                f'--prompts {path}, line {number}: {line[:80]!r} is no object with a "prompt"'
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"--prompts {path}: holds no prompt")
    return Prompts(rows, per_prompt)
