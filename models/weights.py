"""Reads state dicts of published and own checkpoints safely, and tells what they hold."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from models.operators import OPERATORS

SLOTS = {"mha": "attn", "mlp": "mlp"}  # the operator table's slot -> the block's attribute
NESTINGS = ("ema", "model", "state_dict")  # in this order, so that averages win over raw weights
# what DDP and torch.compile put into names, as whole components
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
PLAN_KEYS = {"model_name", "image_size", "num_classes", "grafts"}  # of GraftPlan.architecture()

State = Mapping[str, torch.Tensor]


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The flat state dict of a weight file; see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The flat state dict of a `.pt`, `.pth` or `.safetensors` file, on the CPU, and its plan.

    Nesting under `ema`, `model` or `state_dict` (the first that is not empty; in flat files a
    prefix of all names) and wrappers of DDP and torch.compile are taken off. Pickles open with
    `weights_only=True`; of other classes only `argparse.Namespace`, which DiT's and the released
    grafts' files carry, is let in. The plan is what this repository's checkpoints say of the
    model's architecture (`GraftPlan.architecture`); other files have None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, torn, holding other Python objects, or holding no tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"weights {path}: is a folder; name the weight file in it")
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    plan = content.get("plan") if isinstance(content, dict) else None
    content = _innermost(content)
    if not isinstance(content, dict) or not content:
        kind = "an empty one" if content == {} else type(content).__name__
        raise ValueError(f"weights {path} hold no state dict (found {kind})")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        if not torch.is_tensor(tensor):
            kind = type(tensor).__name__
            raise ValueError(f"weights {path}: entry {name!r} is of type {kind}, not a tensor")
        bare = WRAPPERS.sub(r"\1", name)
        if bare in state:
            raise ValueError(f"weights {path}: {name} and another entry both stand for {bare}")
        state[bare] = tensor
    return state, plan if isinstance(plan, dict) and plan.keys() >= PLAN_KEYS else None


def _innermost(content: object) -> object:
    """The state dict inside a checkpoint's content, with nesting in dicts or in names taken off."""
    if not isinstance(content, dict):
        return content
    nested = [content[key] for key in NESTINGS if isinstance(content.get(key), dict)]
    if nested:
        return _innermost(next(filter(None, nested), {}))
    found = {str(name).partition(".")[0] for name in content}
    if found and found <= set(NESTINGS) and all("." in str(name) for name in content):
        key = next(key for key in NESTINGS if key in found)
        start = f"{key}."
        return {n.removeprefix(start): t for n, t in content.items() if n.startswith(start)}
    return content


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights {path} cannot be read (torn?): {error}") from error


def _read_pickle(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"weights {path} cannot be read: torn, or in the format of PyTorch before 1.6"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped: of a training checkpoint only the weights are read, not the optimiser's state
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"weights {path} is refused: torn, or holding more than plain tensors ({first})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"weights {path} cannot be read (torn?): {error}") from error


def depth_of(state: State) -> int:
    """Number of blocks in a state dict."""
    blocks = {int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", n) for n in state) if m}
    return max(blocks) + 1 if blocks else 0


def tensors_at(state: State, block: int, slot: str) -> dict[str, torch.Tensor]:
    """The tensors of one slot of one block, by their names inside the operator."""
    prefix = f"blocks.{block}.{SLOTS[slot]}."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def operator_of(tensors: State, slot: str) -> str | None:
    """The operator whose names these tensors bear, or None when no operator of the slot does."""
    names = set(tensors)
    for operator, spec in OPERATORS.items():
        if spec.slot == slot and spec.tensors <= names <= spec.tensors | spec.optional_tensors:
            return operator
    return None
