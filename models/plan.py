"""A graft YAML becomes, once and at the start, a frozen GraftPlan.

The YAML names the pretrained DiT, which of its blocks take another operator in which slot, and
where the weights lie. The schema is the predecessor's and the grafting paper's
(arXiv 2506.05340), whose files load unchanged; README "Graft YAML" describes the keys.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import yaml

from models.dit import PRESETS, latent_size
from models.operators import OPERATORS, complete_config

REPOSITORY = Path(__file__).resolve().parent.parent
ORIGINAL = {"mha": "mha", "mlp": "mlp"}  # what a slot holds in the pretrained DiT
INITS = ("fresh", "inherit")

# Every key a graft YAML may hold, with the types it may have. The first group is the predecessor's
# and the paper's schema; "base_ckpt_path" and below are this repository's.
OPERATOR_KEYS = {"type": str, "name": str, "config_filepath": str}
SAMPLE_KEYS = {
    "seed": int,
    "global_seed": int,  # the paper's files call the seed this
    "init_type": str,  # the paper's files; only "graft"
    "dit_model_name": str,
    "grafted_dit_ckpt_path": (str, type(None)),
    "samples_save_dir": (str, type(None)),
    "image_size": int,
    "graft_indexes": (list, type(None)),
    "graft_weights": (dict, type(None)),
    "base_ckpt_path": (str, type(None)),
    "num_classes": int,
    "vae": str,
    "graft_init": str,
}
TOP_KEYS = {"operator": dict, "grafts": list, "sample_config": dict}


@dataclass(frozen=True)
class Graft:
    """One operator and the blocks that take it.

    Attributes:
        slot: "mha" or "mlp".
        operator: name in `models.operators.OPERATORS`.
        config: complete constructor arguments.
        blocks: ascending block indices.
    """

    slot: str
    operator: str
    config: Mapping
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class GraftPlan:
    """What is grafted where, and from which files; see the module's head.

    Attributes:
        path: the YAML file.
        model_name: preset of the pretrained DiT, for example "DiT-XL/2".
        image_size: pixels.
        num_classes: without the null class.
        grafts: operators and their blocks; empty for a plain DiT.
        base_ckpt_path: the pretrained DiT; None to train one from scratch.
        grafted_ckpt_path: a grafted model that this plan starts from, or None.
        graft_weights: block -> file of a distilled operator.
        graft_init: "fresh" or "inherit", for grafts that no file provides.
        vae: "ema", "mse" or a folder, for sampling.
    """

    path: Path
    model_name: str
    image_size: int
    num_classes: int = 1000
    seed: int = 0
    grafts: tuple[Graft, ...] = ()
    base_ckpt_path: Path | None = None
    grafted_ckpt_path: Path | None = None
    graft_weights: Mapping[int, Path] = field(default_factory=dict)
    graft_init: str = "fresh"
    vae: str = "ema"
    samples_save_dir: str | None = None

    @property
    def depth(self) -> int:
        return PRESETS[self.model_name]["depth"]

    @property
    def input_size(self) -> int:
        """Latent height and width."""
        return latent_size(self.model_name, self.image_size)

    def grafted_blocks(self, slot: str | None = None) -> tuple[int, ...]:
        """Blocks that take another operator, in `slot` or in either."""
        blocks = {b for g in self.grafts if slot in (None, g.slot) for b in g.blocks}
        return tuple(sorted(blocks))

    def graft_at(self, block: int, slot: str) -> Graft | None:
        """The graft of one slot of one block, or None where the original operator stays."""
        for graft in self.grafts:
            if graft.slot == slot and block in graft.blocks:
                return graft
        return None

    def architecture(self) -> dict:
        """What the tensors' names and shapes depend on, as plain data; stored in checkpoints."""
        return {
            "model_name": self.model_name,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "grafts": [
                {**asdict(g), "config": dict(g.config), "blocks": list(g.blocks)}
                for g in self.grafts
            ],
        }

    def describe(self) -> str:
        """One line for logs."""
        parts = [f"{g.operator} in {g.slot} of {len(g.blocks)} blocks" for g in self.grafts]
        return f"{self.model_name} at {self.image_size} px, " + ("; ".join(parts) or "no grafts")


# -- reading YAML --------------------------------------------------------------


def find_file(name: str, yaml_path: Path, key: str) -> Path:
    """Where a path in a YAML leads: beside that file, the working directory, or the repository.

    Raises:
        FileNotFoundError: in none of the three; the message lists them.
    """
    places = _places(name, yaml_path)
    for place in places:
        if place.exists():
            return place.resolve()
    tried = ", ".join(str(p) for p in dict.fromkeys(places))
    raise FileNotFoundError(f"{yaml_path}: {key}: {name!r} was found at none of {tried}")


def _places(name: str, yaml_path: Path) -> list[Path]:
    return [base / name for base in (yaml_path.parent, Path.cwd(), REPOSITORY)]


def read_yaml(path: Path) -> dict:
    """A YAML file's mapping, with duplicate keys refused."""
    if not path.is_file():
        raise FileNotFoundError(f"config {path}: no such file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path}: holds {type(content).__name__}, needs a mapping of keys")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets the last of two equal keys win without a word; a graft plan must not."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _check_keys(path: Path, where: str, found: dict, legal: dict, required: tuple = ()) -> None:
    for key, value in found.items():
        if key not in legal:
            raise ValueError(
                f"{path}: {where}: unknown key {key!r}; legal keys: {', '.join(sorted(legal))}"
            )
        types = legal[key] if isinstance(legal[key], tuple) else (legal[key],)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{path}: {where}: {key}: {value!r} must be of type {names}")
    for key in required:
        if key not in found:
            raise ValueError(f"{path}: {where}: key {key!r} is missing")


def _blocks(path: Path, key: str, value: list | None, depth: int) -> tuple[int, ...]:
    blocks = list(value or [])
    for block in blocks:
        if not isinstance(block, int) or isinstance(block, bool) or not 0 <= block < depth:
            raise ValueError(f"{path}: {key}: block {block!r}; legal blocks are 0 to {depth - 1}")
        if blocks.count(block) > 1:
            raise ValueError(f"{path}: {key}: block {block} stands twice; name each block once")
    return tuple(sorted(blocks))


def _graft(path: Path, where: str, entry: dict, indexes: list | None, sizes: dict) -> Graft:
    slot, operator = entry["type"], entry["name"]
    if slot not in ORIGINAL:
        raise ValueError(f"{path}: {where}: type: {slot!r}; legal slots: {', '.join(ORIGINAL)}")
    legal = sorted(n for n, s in OPERATORS.items() if s.slot == slot)
    if operator not in legal:
        other = f" ({operator!r} belongs in the other slot)" if operator in OPERATORS else ""
        raise ValueError(
            f"{path}: {where}: name: {operator!r} is no operator of the {slot} slot{other}; "
            f"legal names: {', '.join(legal)}"
        )
    config_path = find_file(entry["config_filepath"], path, f"{where}: config_filepath")
    try:
        config = complete_config(operator, read_yaml(config_path), **sizes["operator"])
    except ValueError as error:
        raise ValueError(f"{path}: {where}: {config_path}: {error}") from error
    return Graft(slot, operator, config, _blocks(path, where, indexes, sizes["depth"]))


def load_plan(path: str | Path) -> GraftPlan:
    """Reads a graft YAML.

    Operator files must exist; weight files are looked for when the model is built.

    Raises:
        FileNotFoundError: the YAML or an operator file is missing.
        ValueError: naming file, key, value and the legal values.
    """
    path = Path(path)
    content = read_yaml(path)
    _check_keys(path, "top level", content, TOP_KEYS, required=("sample_config",))
    sample = content["sample_config"]
    _check_keys(path, "sample_config", sample, SAMPLE_KEYS, ("dit_model_name", "image_size"))
    name = sample["dit_model_name"]
    if name not in PRESETS:
        raise ValueError(
            f"{path}: dit_model_name: {name!r}; legal names: {', '.join(sorted(PRESETS))}"
        )
    if sample.get("init_type", "graft") != "graft":
        raise ValueError(f"{path}: init_type: {sample['init_type']!r}; the only legal value: graft")
    if sample.get("graft_init", "fresh") not in INITS:
        raise ValueError(f"{path}: graft_init: {sample['graft_init']!r}; legal: {', '.join(INITS)}")
    if sample.get("num_classes", 1) < 1:
        raise ValueError(f"{path}: num_classes: {sample['num_classes']}; must be at least 1")
    preset = PRESETS[name]
    size = latent_size(name, sample["image_size"])
    sizes = {
        "depth": preset["depth"],
        "operator": {
            "hidden_size": preset["hidden_size"],
            "num_heads": preset["num_heads"],
            "num_tokens": (size // preset["patch_size"]) ** 2,
        },
    }
    grafts = _read_grafts(path, content, sample, sizes)
    weights = _read_graft_weights(path, sample, grafts)
    return GraftPlan(
        path=path,
        model_name=name,
        image_size=sample["image_size"],
        num_classes=sample.get("num_classes", 1000),
        seed=sample.get("seed", sample.get("global_seed", 0)),
        grafts=grafts,
        base_ckpt_path=_base_path(path, sample, name),
        grafted_ckpt_path=_optional_path(sample.get("grafted_dit_ckpt_path")),
        graft_weights=weights,
        graft_init=sample.get("graft_init", "fresh"),
        vae=sample.get("vae", "ema"),
        samples_save_dir=sample.get("samples_save_dir"),
    )


def _read_grafts(path: Path, content: dict, sample: dict, sizes: dict) -> tuple[Graft, ...]:
    """Grafts of the one-operator form (`operator` + `graft_indexes`) or of the `grafts` list."""
    if ("operator" in content) == ("grafts" in content):
        raise ValueError(
            f"{path}: needs either 'operator' (with sample_config.graft_indexes) or 'grafts' "
            "(a list; [] for a plain DiT)"
        )
    if "operator" in content:
        entry = content["operator"]
        _check_keys(path, "operator", entry, OPERATOR_KEYS, tuple(OPERATOR_KEYS))
        if not sample.get("graft_indexes"):
            raise ValueError(
                f"{path}: graft_indexes: names no block; list the blocks that take "
                f"{entry['name']!r}, or write 'grafts: []' for a plain DiT"
            )
        graft = _graft(path, "operator", entry, sample["graft_indexes"], sizes)
        return (graft,)
    if sample.get("graft_indexes"):
        raise ValueError(f"{path}: graft_indexes: with 'grafts', each entry lists its own blocks")
    grafts, taken = [], {}
    for number, entry in enumerate(content["grafts"]):
        where = f"grafts[{number}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {where}: {entry!r} must be a mapping")
        keys = {**OPERATOR_KEYS, "graft_indexes": list}
        _check_keys(path, where, entry, keys, tuple(keys))
        graft = _graft(path, where, entry, entry["graft_indexes"], sizes)
        for block in graft.blocks:
            if (graft.slot, block) in taken:
                raise ValueError(
                    f"{path}: {where}: block {block} already takes {taken[graft.slot, block]!r} "
                    f"in its {graft.slot} slot"
                )
            taken[graft.slot, block] = graft.operator
        grafts.append(graft)
    return tuple(grafts)


def _read_graft_weights(path: Path, sample: dict, grafts: tuple[Graft, ...]) -> dict[int, Path]:
    """Block -> file; a block must hold exactly one graft to be filled this way."""
    weights = {}
    for block, name in (sample.get("graft_weights") or {}).items():
        holders = [g for g in grafts if block in g.blocks]
        if len(holders) != 1:
            raise ValueError(
                f"{path}: graft_weights: block {block!r} holds {len(holders)} grafts in this plan; "
                "files can be named only for blocks with exactly one"
            )
        if not isinstance(name, str):
            raise ValueError(f"{path}: graft_weights: {block}: {name!r} must be a file name")
        weights[block] = Path(name)
    return weights


def _optional_path(value: str | None) -> Path | None:
    return None if value in (None, "", "None", "none") else Path(value)


def _base_path(path: Path, sample: dict, name: str) -> Path | None:
    """The plan's base checkpoint; DiT-XL/2 has a published one, other presets none."""
    if "base_ckpt_path" in sample:
        return _optional_path(sample["base_ckpt_path"])
    if name == "DiT-XL/2" and sample["image_size"] in (256, 512):
        size = sample["image_size"]
        return Path(f"pretrained/DiT-XL-2-{size}x{size}.pt")
    return None


def with_base(plan: GraftPlan, base: str | None) -> GraftPlan:
    """The plan with another base checkpoint (the entries' --load-weight); None changes nothing."""
    return plan if base is None else replace(plan, base_ckpt_path=_optional_path(base))


def plan_from_flags(
    config: str | None, model: str | None, image_size: int | None, num_classes: int | None
) -> GraftPlan:
    """The plan of `--config`, or of a plain DiT named by `--model`, for entries that take both.

    Raises:
        ValueError: a flag contradicts the YAML, or neither names a model.
    """
    if config is None:
        if model not in PRESETS:
            raise ValueError(f"--model {model}: legal names: {', '.join(sorted(PRESETS))}")
        sample = {"dit_model_name": model, "image_size": 256 if image_size is None else image_size}
        return GraftPlan(
            path=Path("flags"),
            model_name=model,
            image_size=sample["image_size"],
            num_classes=1000 if num_classes is None else num_classes,
            base_ckpt_path=_base_path(Path("flags"), sample, model),
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


def write_plan(plan: GraftPlan, path: Path, blocks: dict[str, list[int]], header: str = "") -> None:
    """Writes a YAML like the plan's own, with other blocks grafted in each slot.

    Args:
        plan: where operators, files and sizes come from.
        path: the new YAML; file names in it lead from its folder or, as before, from the
            repository and the working directory.
        blocks: slot -> blocks that take the plan's operator of that slot.
        header: comment lines for the top.
    """
    source, folder = read_yaml(plan.path), path.parent.resolve()
    sample = dict(source["sample_config"])
    entries = [source["operator"]] if "operator" in source else source["grafts"]
    grafts = []
    for entry, graft in zip(entries, plan.grafts, strict=True):
        file = find_file(entry["config_filepath"], plan.path, "config_filepath")
        chosen = [b for b in graft.blocks if b in blocks[graft.slot]]
        grafts.append(
            {
                **entry,
                "config_filepath": os.path.relpath(file, folder),
                "graft_indexes": chosen,
            }
        )
    if plan.base_ckpt_path is not None:
        sample["base_ckpt_path"] = str(plan.base_ckpt_path)
    for key in ("grafted_dit_ckpt_path", "base_ckpt_path", "vae"):
        if sample.get(key) and any(p.exists() for p in _places(sample[key], plan.path)):
            sample[key] = os.path.relpath(find_file(sample[key], plan.path, key), folder)
    if sample.get("graft_weights"):
        kept = {b for g in grafts for b in g["graft_indexes"]}
        sample["graft_weights"] = {
            b: os.path.relpath(find_file(f, plan.path, "graft_weights"), folder)
            for b, f in sample["graft_weights"].items()
            if b in kept
        }
    if "operator" in source:
        sample["graft_indexes"] = grafts[0].pop("graft_indexes")
        content = {"operator": grafts[0], "sample_config": sample}
    else:
        content = {"grafts": [g for g in grafts if g["graft_indexes"]], "sample_config": sample}
    text = "".join(f"# {line}\n" for line in header.splitlines())
    path.write_text(text + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
