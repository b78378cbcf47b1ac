"""A graft YAML becomes, once and at the start, a frozen GraftPlan.

The YAML names the pretrained DiT, which of its blocks take another operator in which slot, and
where the weights lie. The schema is the predecessor's and the grafting paper's
(arXiv 2506.05340), whose files load unchanged; README "Graft YAML" describes the keys.
`graft_weights` maps a block to the file of its distilled operator, or to {mha: file, mlp: file}
where both slots of the block are grafted; the first block of a parallel pair to {pair: file}.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from models.config_files import check_keys, find_file, flag_path, places, read_yaml
from models.files import write_whole
from models.graft_plan import PAIR, Graft, GraftPlan, differences
from models.operators import OPERATORS, complete_config
from models.presets import PRESETS, is_captioned, latent_size
from models.restructure import all_pairs, check_pairs

__all__ = [
    "Graft",
    "GraftPlan",
    "differences",
    "find_file",
    "flag_path",
    "load_plan",
    "network_of",
    "plan_from_flags",
    "read_yaml",
    "with_base",
    "write_plan",
]

SLOT_NAMES = ("mha", "mlp")
INITS = ("fresh", "inherit")
RESTRUCTURES = ("parallel_pairs",)
VAE_NAMES = ("ema", "mse", "sdxl")  # any other `vae` is a path
ENCODER_NAMES = ("t5",)  # any other `text_encoder` is a path
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"  # in a folder of diffusers' format

# Every key a graft YAML may hold, with the types it may have. The first group is the predecessor's
# and the paper's schema; "base_ckpt_path" and below are this repository's.
OPERATOR_KEYS = {"type": str, "name": str, "config_filepath": str}
SAMPLE_KEYS = {
    "seed": int,  # read by nothing: --global-seed decides
    "global_seed": int,  # the same, in the paper's files
    "init_type": str,  # the paper's files; only "graft"
    "dit_model_name": str,
    "grafted_dit_ckpt_path": (str, type(None)),
    "samples_save_dir": (str, type(None)),  # read by nothing: --sample-dir decides
    "image_size": int,
    "graft_indexes": (list, type(None)),
    "graft_weights": (dict, list, type(None)),  # a list of {block: file} in one of the paper's
    "base_ckpt_path": (str, type(None)),
    "num_classes": int,
    "vae": str,
    "text_encoder": str,
    "graft_init": (str, type(None)),
}
TOP_KEYS = {
    "operator": dict,
    "grafts": list,
    "sample_config": dict,
    "restructure": (str, dict, type(None)),
}


# -- reading -------------------------------------------------------------------


def load_plan(path: str | Path) -> GraftPlan:
    """Reads a graft YAML.

    Operator files must exist; weight files are looked for when the model is built.

    Raises:
        FileNotFoundError: the YAML or an operator file is missing.
        ValueError: naming file, key, value and the legal values.
    """
    path = Path(path)
    content = read_yaml(path)
    if "train_config" in content:
        raise ValueError(
            f"{path}: train_config: flags say how to train; what is grafted stands in sample_config"
        )
    check_keys(path, "top level", content, TOP_KEYS, required=("sample_config",))
    sample = _without_none_words(content["sample_config"])
    check_keys(path, "sample_config", sample, SAMPLE_KEYS, ("dit_model_name", "image_size"))
    name = sample["dit_model_name"]
    if name not in PRESETS:
        raise ValueError(
            f"{path}: dit_model_name: {name!r}; legal names: {', '.join(sorted(PRESETS))}"
        )
    if sample.get("init_type", "graft") != "graft":
        raise ValueError(f"{path}: init_type: {sample['init_type']!r}; the only legal value: graft")
    if sample.get("graft_init") not in (None, *INITS):
        raise ValueError(f"{path}: graft_init: {sample['graft_init']!r}; legal: {', '.join(INITS)}")
    _check_condition(path, content, sample)
    if sample.get("num_classes", 1) < 1:
        raise ValueError(f"{path}: num_classes: {sample['num_classes']}; must be at least 1")
    try:
        size = latent_size(name, sample["image_size"])
    except ValueError as error:
        raise ValueError(f"{path}: sample_config: {error}") from error
    preset = PRESETS[name]
    sizes = {
        "hidden_size": preset["hidden_size"],
        "num_heads": preset["num_heads"],
        "num_tokens": (size // preset["patch_size"]) ** 2,
    }
    grafts = _read_grafts(path, content, sample, sizes, preset["depth"])
    pairs = _read_pairs(path, content.get("restructure"), preset["depth"])
    return GraftPlan(
        path=path,
        model_name=name,
        image_size=sample["image_size"],
        num_classes=sample.get("num_classes", _classes(name)),
        grafts=grafts,
        base_ckpt_path=_base_path(sample),
        grafted_ckpt_path=_optional_path(sample.get("grafted_dit_ckpt_path")),
        graft_weights=_read_graft_weights(path, sample, grafts, pairs),
        graft_init=sample.get("graft_init"),
        vae=sample.get("vae", _vae(name)),
        text_encoder=sample.get("text_encoder", _text_encoder(name)),
        parallel_pairs=pairs,
    )


def _check_condition(path: Path, content: dict, sample: dict) -> None:
    """ValueError for keys of class-conditional models in the plan of a captioned one, or back."""
    name = sample["dit_model_name"]
    if not is_captioned(name) and "text_encoder" in sample:
        raise ValueError(
            f"{path}: text_encoder: {name} is told classes, not captions; drop the key"
        )
    if is_captioned(name) and "num_classes" in sample:
        raise ValueError(f"{path}: num_classes: {name} is told captions, not classes; drop it")
    if is_captioned(name) and content.get("restructure") is not None:
        raise ValueError(f"{path}: restructure: only DiT has parallel pairs, not {name}")


def _classes(name: str) -> int | None:
    return None if is_captioned(name) else 1000


def _vae(name: str) -> str:
    return "sdxl" if is_captioned(name) else "ema"


def _text_encoder(name: str) -> str | None:
    return "t5" if is_captioned(name) else None


def _without_none_words(sample: dict) -> dict:
    """`sample` with null for "None", which the predecessor's files write for it."""

    def nullable(key: object) -> bool:
        types = SAMPLE_KEYS.get(key)
        return isinstance(types, tuple) and type(None) in types

    return {k: None if v in ("None", "none") and nullable(k) else v for k, v in sample.items()}


def _read_grafts(
    path: Path, content: dict, sample: dict, sizes: dict, depth: int
) -> tuple[Graft, ...]:
    """Grafts of the one-operator form (`operator` + `graft_indexes`) or of the `grafts` list."""
    if ("operator" in content) == ("grafts" in content):
        raise ValueError(
            f"{path}: needs either 'operator' (with sample_config.graft_indexes) or 'grafts' "
            "(a list; [] for a plain DiT)"
        )
    if "operator" in content:
        entry = content["operator"]
        check_keys(path, "operator", entry, OPERATOR_KEYS, tuple(OPERATOR_KEYS))
        blocks = _blocks(path, "graft_indexes", sample.get("graft_indexes"), depth)
        return (_graft(path, "operator", entry, blocks, sizes),)
    if sample.get("graft_indexes"):
        raise ValueError(f"{path}: graft_indexes: with 'grafts', each entry lists its own blocks")
    grafts, taken = [], {}
    for number, entry in enumerate(content["grafts"]):
        where = f"grafts[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {where}: {entry!r} must be a mapping")
        keys = {**OPERATOR_KEYS, "graft_indexes": list}
        check_keys(path, where, entry, keys, tuple(keys))
        blocks = _blocks(path, f"{where}.graft_indexes", entry["graft_indexes"], depth)
        graft = _graft(path, where, entry, blocks, sizes)
        for block in graft.blocks:
            if (graft.slot, block) in taken:
                raise ValueError(
                    f"{path}: {where}: block {block} already takes {taken[graft.slot, block]!r} "
                    f"in its {graft.slot} slot"
                )
            taken[graft.slot, block] = graft.operator
        grafts.append(graft)
    return tuple(grafts)


def _blocks(path: Path, key: str, value: list | None, depth: int) -> tuple[int, ...]:
    if not value:
        raise ValueError(
            f"{path}: {key}: names no block; list the blocks that take the operator, or write "
            "'grafts: []' instead of it for a plain DiT"
        )
    for block in value:
        if type(block) is not int or not 0 <= block < depth:
            raise ValueError(f"{path}: {key}: block {block!r}; legal blocks are 0 to {depth - 1}")
        if value.count(block) > 1:
            raise ValueError(f"{path}: {key}: block {block} stands twice; name each block once")
    return tuple(sorted(value))


def _graft(path: Path, where: str, entry: dict, blocks: tuple[int, ...], sizes: dict) -> Graft:
    slot, operator = entry["type"], entry["name"]
    if slot not in SLOT_NAMES:
        raise ValueError(f"{path}: {where}: type: {slot!r}; legal slots: {', '.join(SLOT_NAMES)}")
    legal = sorted(n for n, s in OPERATORS.items() if s.slot == slot)
    if operator not in legal:
        other = f" ({operator!r} belongs in the other slot)" if operator in OPERATORS else ""
        raise ValueError(
            f"{path}: {where}: name: {operator!r} is no operator of the {slot} slot{other}; "
            f"legal names: {', '.join(legal)}"
        )
    config_path = find_file(entry["config_filepath"], path, f"{where}: config_filepath")
    config = read_yaml(config_path)
    try:
        config = complete_config(operator, config, **sizes)
    except ValueError as error:
        place = f"{where} ({slot} slot of blocks {', '.join(map(str, blocks))})"
        raise ValueError(f"{path}: {place}: {config_path}: {error}") from error
    return Graft(slot, operator, config, blocks)


def _read_pairs(path: Path, given: str | dict | None, depth: int) -> tuple[tuple[int, int], ...]:
    """`parallel_pairs` for all pairs of blocks, {parallel_pairs: [[4, 5], ...]} for some."""
    if given is None:
        return ()
    names = [given] if isinstance(given, str) else list(given)
    if names != list(RESTRUCTURES):
        raise ValueError(
            f"{path}: restructure: {given!r}; legal is parallel_pairs, or {{parallel_pairs: list}} "
            "with a list of pairs of neighbouring blocks"
        )
    try:
        if isinstance(given, str):
            return all_pairs(depth)
        pairs = given["parallel_pairs"]
        if not isinstance(pairs, list) or not pairs:
            raise ValueError(f"{pairs!r} must be a list of pairs, such as [[4, 5], [6, 7]]")
        return check_pairs(pairs, depth)
    except ValueError as error:
        raise ValueError(f"{path}: restructure: parallel_pairs: {error}") from error


def _read_graft_weights(
    path: Path, sample: dict, grafts: tuple[Graft, ...], pairs: tuple[tuple[int, int], ...]
) -> dict[tuple[int, str], Path]:
    given = sample.get("graft_weights") or {}
    if isinstance(given, list):
        if not all(isinstance(entry, dict) for entry in given):
            raise ValueError(f"{path}: graft_weights: {given!r} must be {{block: file}}")
        entries = [pair for entry in given for pair in entry.items()]
        given = dict(entries)
        if len(given) < len(entries):
            raise ValueError(f"{path}: graft_weights: names a block twice")
    weights = {}
    for block, files in given.items():
        where = f"{path}: graft_weights: {block!r}"
        slots = [g.slot for g in grafts if type(block) is int and block in g.blocks]
        slots += [PAIR for pair in pairs if type(block) is int and block == pair[0]]
        if not slots:
            raise ValueError(f"{where}: takes no graft in this plan, and begins no parallel pair")
        if not isinstance(files, dict):
            if len(slots) > 1 or slots == [PAIR]:
                pair = PAIR in slots
                reason = "begins a parallel pair" if pair else "takes a graft in both slots"
                form = ", ".join(f"{slot}: file" for slot in slots)
                raise ValueError(f"{where}: {reason}: write {{{form}}}")
            files = {slots[0]: files}
        for slot, name in files.items():
            if slot not in slots:
                raise ValueError(f"{where}: {slot!r}; legal here: {', '.join(slots)}")
            if not isinstance(name, str):
                raise ValueError(f"{where}: {name!r} must be a file name")
            weights[block, slot] = Path(name)
    for block, slot in weights:
        pair = next((p for p in pairs if block in p), None)
        if slot != PAIR and pair is not None and (pair[0], PAIR) in weights:
            raise ValueError(
                f"{path}: graft_weights: {block}: {slot}: the file of the pair {list(pair)} holds "
                "this operator too; drop one of the two"
            )
    return weights


def _optional_path(value: str | None) -> Path | None:
    return None if value in (None, "", "None", "none") else Path(value)


def _base_path(sample: dict) -> Path | None:
    """The base checkpoint; DiT-XL/2 and PixArt-Sigma have published ones, other presets none."""
    name, size = sample["dit_model_name"], sample["image_size"]
    if "base_ckpt_path" in sample:
        return _weight_file(name, _optional_path(sample["base_ckpt_path"]))
    if name == "DiT-XL/2" and size in (256, 512):
        return Path(f"pretrained/DiT-XL-2-{size}x{size}.pt")
    if name.startswith("PixArt-Sigma-XL-2-"):
        published = name.replace("2048", "2K") + "-MS"
        return Path("pretrained") / published / "transformer" / DIFFUSERS_WEIGHTS
    return None


def _weight_file(name: str, path: Path | None) -> Path | None:
    """The weights in a folder of diffusers' format, which has no suffix; a file as it is."""
    if path is None or not is_captioned(name) or path.suffix in (".safetensors", ".pt", ".pth"):
        return path
    return path / DIFFUSERS_WEIGHTS


def network_of(plan: GraftPlan, key: str, given: str | None) -> tuple[str, str | Path]:
    """The "vae" or "text_encoder" of a plan, or of the flag of that name where it is given.

    Returns:
        The name as it stands there, and the folder, or again the name of a published network.

    Raises:
        FileNotFoundError: no such folder.
    """
    name = given or getattr(plan, key)
    if name in {"vae": VAE_NAMES, "text_encoder": ENCODER_NAMES}[key]:
        return name, name
    if given:
        return name, flag_path(f"--{key.replace('_', '-')}", name)
    return name, find_file(name, plan.path, key, folder=True)


# -- from flags ----------------------------------------------------------------


def with_base(plan: GraftPlan, base: str | None) -> GraftPlan:
    """The plan with the base checkpoint of --load-weight; "none": no base, None: as it was.

    Raises:
        FileNotFoundError: no such file, from the working directory.
    """
    if base is None:
        return plan
    path = None if _optional_path(base) is None else flag_path("--load-weight", base)
    return replace(plan, base_ckpt_path=_weight_file(plan.model_name, path))


def plan_from_flags(
    config: str | None, model: str | None, image_size: int | None, num_classes: int | None
) -> GraftPlan:
    """The plan of `--config`, or of a plain DiT named by `--model`, for entries that take both.

    Raises:
        ValueError: a flag contradicts the YAML, or neither names a model.
    """
    if config is None:
        return _plain_plan(
            model,
            image_size,
            num_classes,
        )
    plan = load_plan(config)
    for flag, given, planned in (
        ("--model", model, plan.model_name),
        ("--image-size", image_size, plan.image_size),
        ("--num-classes", num_classes, plan.num_classes),
    ):
        if given is not None and given != planned:
            raise ValueError(
                f"{flag} {given}: {config} says {planned}; drop the flag or mend the file"
            )
    return plan


def _plain_plan(model: str | None, image_size: int | None, num_classes: int | None) -> GraftPlan:
    if model is None:
        raise ValueError("nothing says which model: give --config or --model")
    if model not in PRESETS:
        raise ValueError(f"--model {model}: legal names: {', '.join(sorted(PRESETS))}")
    if num_classes is not None and is_captioned(model):
        raise ValueError(f"--num-classes {num_classes}: {model} is told captions, not classes")
    image_size = PRESETS[model].get("image_size", 256) if image_size is None else image_size
    num_classes = _classes(model) if num_classes is None else num_classes
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"--num-classes {num_classes}: must be at least 1")
    try:
        latent_size(model, image_size)
    except ValueError as error:
        raise ValueError(f"--image-size: {error}") from error
    base = _base_path({"dit_model_name": model, "image_size": image_size})
    return GraftPlan(
        Path("flags"),
        model,
        image_size,
        num_classes,
        base_ckpt_path=base,
        vae=_vae(model),
        text_encoder=_text_encoder(model),
    )


# -- writing -------------------------------------------------------------------


def write_plan(
    plan: GraftPlan,
    path: Path,
    blocks: dict[str, list[int]],
    header: str = "",
    beside: Sequence[tuple[GraftPlan, list[int]]] = (),
) -> None:
    """Writes a YAML like the plan's own, with other blocks grafted.

    Args:
        plan: where operators, files and sizes come from.
        path: the new YAML; names of files that exist now lead from its folder.
        blocks: slot -> blocks that take the plan's operator of that slot; a slot that is left out
            keeps its blocks.
        header: comment lines for the top.
        beside: further plans whose grafts stand in the same model, and the blocks that take them;
            of these plans only operators and `graft_weights` are read.
    """
    source, folder = read_yaml(plan.path), path.parent.resolve()

    def lead(name: str | Path, key: str) -> str:
        return _lead(plan, folder, name, key)

    parts = [(plan, _entries(plan, folder, blocks))]
    for other, chosen in beside:
        parts.append((other, _entries(other, folder, dict.fromkeys(SLOT_NAMES, chosen))))
    grafts = [entry for _, entries in parts for entry in entries]

    sample = dict(source["sample_config"])
    for key in ("samples_save_dir", "graft_indexes", "graft_weights"):
        sample.pop(key, None)
    base = plan.base_ckpt_path
    sample["base_ckpt_path"] = None if base is None else lead(base, "base_ckpt_path")
    start = plan.grafted_ckpt_path
    sample["grafted_dit_ckpt_path"] = (
        None if start is None else lead(start, "grafted_dit_ckpt_path")
    )
    sample.pop("graft_init", None)
    if plan.graft_init is not None:
        sample["graft_init"] = plan.graft_init
    for key, names in (("vae", VAE_NAMES), ("text_encoder", ENCODER_NAMES)):
        if key in sample and sample[key] not in names:
            sample[key] = lead(sample[key], key)
    weights: dict[int, dict[str, str]] = {}
    for owner, entries in parts:
        for (block, slot), file in owner.graft_weights.items():
            grafted = any(g["type"] == slot and block in g["graft_indexes"] for g in entries)
            if grafted or (slot == PAIR and owner is plan):
                weights.setdefault(block, {})[slot] = _lead(owner, folder, file, "graft_weights")
    if "operator" in source and grafts and not beside:
        sample["graft_indexes"] = grafts[0].pop("graft_indexes")
        content = {"operator": grafts[0], "sample_config": sample}
    else:
        content = {"grafts": grafts, "sample_config": sample}
    if plan.parallel_pairs:
        content["restructure"] = _restructure_of(plan)
    if weights:
        # a file alone will do where the block takes one graft, as in the predecessor's schema
        sample["graft_weights"] = {
            block: files if "grafts" in content or PAIR in files else next(iter(files.values()))
            for block, files in weights.items()
        }
    text = "".join(f"# {line}\n" for line in header.splitlines())
    text += yaml.safe_dump(content, sort_keys=False)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _restructure_of(plan: GraftPlan) -> str | dict:
    """The value of `restructure` for a plan's pairs."""
    if 2 * len(plan.parallel_pairs) == plan.depth:
        return "parallel_pairs"
    return {"parallel_pairs": [list(pair) for pair in plan.parallel_pairs]}


def _lead(plan: GraftPlan, folder: Path, name: str | Path, key: str) -> str:
    """The name of a plan's file from `folder`; as it stands when there is no such file yet."""
    if not any(place.exists() for place in places(name, plan.path)):
        return str(name)
    return os.path.relpath(find_file(name, plan.path, key, folder=True), folder)


def _entries(plan: GraftPlan, folder: Path, blocks: dict[str, list[int]]) -> list[dict]:
    """The plan's entries of a `grafts` list, for a file in `folder`, confined to `blocks`."""
    source = read_yaml(plan.path)
    entries = [source["operator"]] if "operator" in source else source["grafts"]
    grafts = []
    for entry, graft in zip(entries, plan.grafts, strict=True):
        chosen = [b for b in graft.blocks if b in blocks.get(graft.slot, graft.blocks)]
        file = _lead(plan, folder, entry["config_filepath"], "config_filepath")
        if chosen:
            grafts.append({**entry, "config_filepath": file, "graft_indexes": chosen})
    return grafts
