"""The text encoder (T5) between captions and what a text-to-image model reads of them."""

import fnmatch
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from latents.codec import published_folder
from models.config_files import places
from models.graft_plan import GraftPlan
from models.presets import PRESETS

HUB_NAMES = {"t5": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"}
PARTS = ("text_encoder", "tokenizer")  # subfolders, as of a diffusers pipeline
# Files that make an encoder and its tokenizer what they are; others may lie beside them
DEFINING = ("config.json", "*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")
DEFINING += ("tokenizer*.json", "*.model", "special_tokens_map.json", "added_tokens.json")
DEFINING += ("vocab.*", "merges.txt")
PIECE, STRIDE = 2**20, 2**26  # bytes read of a weight file for its hash, and from one to the next
BATCH = 16  # captions at a time, whoever asks: another size may round differently


@dataclass(frozen=True)
class TextEncoder:
    """A frozen T5 encoder (arXiv 1910.10683) and its tokenizer.

    Attributes:
        width: C of the embeddings. max_tokens: L, where captions are cut.
        id: as it was asked for: "t5" or a folder. sha256: see `encoder_sha256`.
    """

    model: torch.nn.Module
    tokenizer: object
    width: int
    max_tokens: int
    id: str
    sha256: str
    device: torch.device
    dtype: torch.dtype

    def check_plan(self, plan: GraftPlan) -> None:
        """ValueError when a plan's model does not read what this encoder gives."""
        width = PRESETS[plan.model_name]["caption_channels"]
        if self.width != width:
            raise ValueError(
                f"text encoder {self.id}: its embeddings are {self.width} wide; {plan.model_name} "
                f"of {plan.path} takes {width}: name its own in text_encoder, or --text-encoder"
            )

    def tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, its end mark among them, before any is cut."""
        found = self.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return [len(ids) for ids in found]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[torch.Tensor]:
        """Of each text float16 [tokens, C] on the CPU, tokens at most `max_tokens`.

        Raises:
            ValueError: an embedding does not fit float16.
        """
        embedded = []
        for first in range(0, len(texts), BATCH):
            batch = texts[first : first + BATCH]
            tokens = self.tokenizer(
                batch + [""] * (BATCH - len(batch)),
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            with torch.autocast(
                self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32
            ):
                out = self.model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).last_hidden_state  # BATCH L C
            out = out.to("cpu", torch.float16)
            if not out[: len(batch)].isfinite().all():
                raise ValueError(
                    f"text encoder {self.id}: embeddings do not fit float16 (infinite or NaN); "
                    "rerun with --precision fp32"
                )
            lengths = tokens["attention_mask"].sum(1).tolist()
            embedded += [row[:n].clone() for row, n in zip(out, lengths, strict=True)][: len(batch)]
        return embedded


def normalised(text: str) -> str:
    """A caption as diffusers' pipeline hands it to T5 without `clean_caption`."""
    return text.lower().strip()


def load_text_encoder(
    name: str | Path,
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    recorded: str | None = None,
) -> TextEncoder:
    """Opens a text encoder for inference.

    Args:
        name: "t5" (`HUB_NAMES`: its folder in pretrained/ where that exists, else the hub), or a
            folder that holds text_encoder/ and tokenizer/ as a diffusers pipeline does, or both
            models' files together.
        dtype: what it computes in; bfloat16 weights are kept in that.
        recorded: `TextEncoder.id` where `name` is a path that was resolved; None records `name`.

    Raises:
        FileNotFoundError: no such folder or files, or the hub cannot be reached.
        ValueError: a file is torn, or of another kind of model.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    # the tokenizer's threads would not outlive the fork of an image loader's workers, and complain
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = find_text_encoder(str(name))
    weights, tokens = _parts(folder)
    if not (weights / "config.json").is_file():
        raise FileNotFoundError(
            f"text encoder {name}: {weights / 'config.json'} is missing; name a folder that holds "
            "text_encoder/ and tokenizer/"
        )
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokens, local_files_only=True)
        model = T5EncoderModel.from_pretrained(weights, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"text encoder {name}: {folder} cannot be read as a T5 encoder with its tokenizer "
            f"({reason}); fetch it again, or name another"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return TextEncoder(
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        width=model.config.d_model,
        max_tokens=max_tokens,
        id=recorded or str(name),
        sha256=encoder_sha256(folder),
        device=device,
        dtype=dtype,
    )


def find_text_encoder(name: str) -> Path:
    """The folder of a text encoder; FileNotFoundError says what belongs where."""
    if name in HUB_NAMES:
        patterns = [f"{part}/*" for part in PARTS]
        return published_folder(f"text encoder {name}", HUB_NAMES[name], patterns)
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"text encoder {name}: no such folder; use {', '.join(HUB_NAMES)} or a folder that "
            "holds text_encoder/ and tokenizer/"
        )
    return Path(name)


def local_text_encoder(name: str, yaml_path: Path) -> Path | None:
    """The folder of a plan's text encoder where it is on this machine, outside the hub's cache."""
    local = f"pretrained/{HUB_NAMES[name].rpartition('/')[2]}" if name in HUB_NAMES else name
    return next((place for place in places(local, yaml_path) if place.is_dir()), None)


def encoder_sha256(folder: Path) -> str:
    """Tells text encoders apart without reading all of them (19 GB for T5-XXL).

    The sha256 over names and sizes, in names' order, of both models' files, and over one MiB in
    every 64 of each; so small files are read whole. Others than `DEFINING`, such as a README, do
    not count.
    """
    digest = hashlib.sha256()
    for part in dict.fromkeys(_parts(folder)):
        for path in sorted(p for p in part.iterdir() if p.is_file() and _defines(p.name)):
            size = path.stat().st_size
            digest.update(json.dumps([path.name, size]).encode())
            with open(path, "rb") as file:
                for place in range(0, size, STRIDE):
                    file.seek(place)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()


def _defines(name: str) -> bool:
    """Whether a file of this name counts in `encoder_sha256`."""
    known = any(fnmatch.fnmatchcase(name, pattern) for pattern in DEFINING)
    return known and not name.startswith(".")


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where the encoder and where the tokenizer lie in a folder."""
    inner = tuple(folder / part for part in PARTS)
    return inner if all(part.is_dir() for part in inner) else (folder, folder)
