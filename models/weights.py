"""Reads state dicts of published and own checkpoints safely, and tells what they hold."""

import argparse
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from models.operators import OPERATORS

SLOTS = {"mha": "attn", "mlp": "mlp"}  # the operator table's slot -> the block's attribute
NESTINGS = ("ema", "model", "state_dict")  # in this order, so that averages win over raw weights
# what DDP and torch.compile put into names, as whole components
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")
PLAN_KEYS = {"model_name", "image_size", "num_classes", "grafts"}  # of GraftPlan.architecture()
BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF"  # how torch.save began before PyTorch 1.6

# How the names of PixArt's tensors go on after transformer_blocks.<i>. in diffusers' files, and
# here after blocks.<i>., where a block has slots
DIFFUSERS_PARTS = {
    "attn1.": "attn.",
    "ff.": "mlp.",
    "scale_shift_table": "adaLN_modulation.scale_shift_table",
}
# The tensors of a slot's original in DiT -> those that hold the same in PixArt, in their order
PIXART_PARTS = {
    "mha": {
        "qkv.weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
        "qkv.bias": ("to_q.bias", "to_k.bias", "to_v.bias"),
        "proj.weight": ("to_out.0.weight",),
        "proj.bias": ("to_out.0.bias",),
    },
    "mlp": {
        "fc1.weight": ("net.0.proj.weight",),
        "fc1.bias": ("net.0.proj.bias",),
        "fc2.weight": ("net.2.weight",),
        "fc2.bias": ("net.2.bias",),
    },
}

State = Mapping[str, torch.Tensor]


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """The flat state dict of a weight file; see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The flat state dict of a `.pt`, `.pth` or `.safetensors` file, on the CPU, and its plan.

    Nesting under `ema`, `model` or `state_dict` (the first that is not empty; in flat files a
    prefix of all names) and wrappers of DDP and torch.compile are taken off. PixArt's tensors get
    the names that they have here; low-rank updates are added to what they update. Pickles open with
    `weights_only=True`; of other classes only `argparse.Namespace`, which DiT's and the released
    grafts' files carry, is let in. The plan is what this repository's checkpoints say of the
    model's architecture (`GraftPlan.architecture`); other files have None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, torn, no weight file, holding other Python objects, or no tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"weights {path}: is a folder; name the weight file in it")
    if not path.is_file():
        raise FileNotFoundError(f"weights {path}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    plan = content.get("plan") if isinstance(content, dict) else None
    settings = content.get("args") if isinstance(content, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    content = _innermost(content)
    if not isinstance(content, dict) or not content:
        kind = "an empty one" if content == {} else type(content).__name__
        raise ValueError(f"weights {path} hold no state dict (found {kind})")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in content.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise ValueError(f"weights {path}: entry {name!r} has a name of type {kind}, not text")
        if not torch.is_tensor(tensor):
            kind = type(tensor).__name__
            raise ValueError(f"weights {path}: entry {name!r} is of type {kind}, not a tensor")
        bare = WRAPPERS.sub(r"\1", name)
        if bare in state:
            raise ValueError(f"weights {path}: {name} and another entry both stand for {bare}")
        state[bare] = tensor
    if path.suffix != ".safetensors":
        _check_sums(path, state)
    state = _with_updates(path, {our_name(n): t for n, t in state.items()}, settings)
    return state, plan if isinstance(plan, dict) and plan.keys() >= PLAN_KEYS else None


def our_name(name: str) -> str:
    """The name here of a tensor of diffusers' PixArtTransformer2DModel; others stay."""
    return _renamed(name, "transformer_blocks.", "blocks.", DIFFUSERS_PARTS)


def diffusers_name(name: str) -> str:
    """The reverse of `our_name`."""
    parts = {ours: theirs for theirs, ours in DIFFUSERS_PARTS.items()}
    return _renamed(name, "blocks.", "transformer_blocks.", parts)


def _renamed(name: str, before: str, after: str, parts: Mapping[str, str]) -> str:
    found = re.match(rf"{re.escape(before)}(\d+)\.(.*)", name)
    if found is None:
        return name
    block, rest = found.groups()
    for start, other in parts.items():
        if rest.startswith(start):
            rest = other + rest.removeprefix(start)
            break
    return f"{after}{block}.{rest}"


def _with_updates(
    path: Path, state: dict[str, torch.Tensor], settings: Mapping
) -> dict[str, torch.Tensor]:
    """The state of a model trained with LoRA, its updates added to the weights that they update.

    settings: the flags of the training, which say how the updates are scaled.
    """
    down, up = ".lora_A.default.weight", ".lora_B.default.weight"
    updated = [name.removesuffix(down) for name in state if name.endswith(down)]
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha")
    if not updated or rank is None or alpha is None:
        return state
    merged = {n.replace(".base_layer.", "."): t for n, t in state.items() if ".lora_" not in n}
    for name in updated:
        if f"{name}{up}" not in state or f"{name}.weight" not in merged:
            raise ValueError(f"weights {path}: the low-rank update of {name} is not whole")
        update = state[name + up].float() @ state[name + down].float()
        merged[f"{name}.weight"] = merged[f"{name}.weight"].float() + alpha / rank * update
    return merged


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
        looks = _looks_like(path) or f"it is torn or damaged ({error}): fetch or save it again"
        raise ValueError(f"weights {path} cannot be read: {looks}") from error


def _read_pickle(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith("/data.pkl") and record.CRC:
                    archive.read(record)  # raises where it is damaged
            program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        looks = _looks_like(path) or f"it is torn or damaged ({error}): fetch or save it again"
        raise ValueError(f"weights {path} cannot be read: {looks}") from error
    if program:
        raise ValueError(f"weights {path}: is a TorchScript program: save its state_dict instead")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped: of a training checkpoint only the weights are read, not the optimiser's state
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything
        foreign = _foreign(path) if isinstance(error, pickle.UnpicklingError) else ""
        if foreign:
            raise ValueError(f"weights {path} is refused: {foreign}") from error
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"weights {path} cannot be read: it is damaged, or no weight file "
            f"({type(error).__name__}: {reason})"
        ) from error


def _foreign(path: Path) -> str:
    """What makes a pickle more than plain tensors; "" where it is damaged."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # as above
            return ""
    named = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return found and (
        f"it holds Python objects ({named}) beside tensors, and loading such can run any program: "
        "a file of the state_dict alone will do"
    )


def _looks_like(path: Path) -> str:
    """What a file that does not open seems to be, and the way out; "" where nothing tells."""
    with open(path, "rb") as file:
        head = file.read(1000)
    if not head.strip(b"\0"):
        return "it is empty, as a download that never began leaves it: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer to the file: run git lfs pull, or fetch it again"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, such as an error or a login: fetch it again"
    if head.startswith(BEFORE_ZIP):
        return (
            "it has the format of PyTorch before 1.6: "
            "torch.save(torch.load(path, weights_only=True), path) makes it new"
        )
    if head.startswith(b"\x80"):
        return "it is a bare pickle, which torch.save did not write"
    if head.startswith(b"PK") and path.suffix == ".safetensors":
        return "it has PyTorch's format: give it the suffix .pt"
    if head[8:9] == b"{" and path.suffix != ".safetensors":
        return "it has the safetensors format: give it the suffix .safetensors"
    if head.isascii() and head.split()[0].decode().isprintable():
        return f"it is text, not weights ({head[:40].decode()!r})"
    return ""


def _check_sums(path: Path, state: State) -> None:
    """Raises ValueError for a tensor whose bytes are not those that were saved.

    torch.load does not look at the checksums that torch.save writes, and a download may have holes
    though its end is there.
    """
    sums: dict[int, set[int]] = {}  # size of a record -> checksums
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            sums.setdefault(record.file_size, set()).add(record.CRC)
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            continue
        storage = tensor.untyped_storage()
        # 0: torch.save was told to write no checksums
        if storage.data_ptr() in seen or 0 in sums.get(storage.nbytes(), {0}):
            continue
        seen.add(storage.data_ptr())
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        if zlib.crc32(content) not in sums[storage.nbytes()]:
            raise ValueError(
                f"weights {path}: tensor {name} is damaged (its checksum is wrong): fetch or save "
                "the file again"
            )


def depth_of(state: State) -> int:
    """Number of blocks in a state dict."""
    blocks = {int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", n) for n in state) if m}
    return max(blocks) + 1 if blocks else 0


def tensors_at(state: State, block: int, slot: str) -> dict[str, torch.Tensor]:
    """The tensors of one slot of one block, by their names inside the operator."""
    prefix = f"blocks.{block}.{SLOTS[slot]}."
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def operator_of(tensors: State, slot: str) -> str | None:
    """The operator whose names these tensors bear, or None when no operator of the slot does.

    The original operators of PixArt are called as those of DiT, which they are in other parts.
    """
    names = set(tensors)
    if is_of_pixart(tensors, slot):
        return slot
    for operator, spec in OPERATORS.items():
        if spec.slot == slot and spec.tensors <= names <= spec.tensors | spec.optional_tensors:
            return operator
    return None


def is_of_pixart(tensors: State, slot: str) -> bool:
    """Whether these are the tensors of the slot's original operator in PixArt."""
    return set(tensors) == {name for parts in PIXART_PARTS[slot].values() for name in parts}
