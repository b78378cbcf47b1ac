"""Graft YAMLs, operator YAMLs and manifests, damaged at random: one error that names the file."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from latents.store import StoreWriter, open_latents
from models import operators
from models.plan import load_plan

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["../x", "/etc/passwd", "None", "nan", "\0", "a" * 300, 10**400, -1, 0, 2**63]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
CASES = settings(
    max_examples=150,
    deadline=2000,  # milliseconds a case: a hang is an error
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def places(tree, path=()):
    """Paths to everything below the top of nested lists and mappings."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


@st.composite
def damaged(draw, content):
    """`content` with a value replaced, left out or added, and the keys that an error may name.

    Not the one that changed alone: a list of blocks that lacks one is at odds with others.
    """
    tree = copy.deepcopy(content)
    path = draw(st.sampled_from(sorted(places(tree), key=str)))
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if what == "replace":
        holder[path[-1]] = draw(VALUES)
    elif what == "remove":
        del holder[path[-1]]
    elif isinstance(holder, list):
        holder.append(draw(VALUES))
    else:
        holder[draw(st.text(min_size=1, max_size=8))] = draw(VALUES)
    return tree, keys_of(content) | keys_of(tree)


def keys_of(tree):
    """Every key of nested lists and mappings, as an error may write it."""
    keys = {key for path in places(tree) for key in path if isinstance(key, str)}
    return keys | {repr(key) for key in keys}


def one_error(call, file, keys=None):
    """Calls; what it raises, if anything, is a ValueError or FileNotFoundError of file and key."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert str(file) in text and "\n" not in text, text
        assert keys is None or any(key in text for key in keys), (keys, text)


GRAFT = {
    "operator": {"type": "mha", "name": "swa", "config_filepath": "swa.yaml"},
    "sample_config": {
        "seed": 0,
        "dit_model_name": "DiT-S/2",
        "grafted_dit_ckpt_path": None,
        "image_size": 64,
        "graft_indexes": [1, 2, 5],
        "graft_weights": {1: "w.pt"},
        "base_ckpt_path": "base.pt",
        "num_classes": 9,
        "vae": "ema",
        "graft_init": "inherit",
    },
}
HYBRID = {
    "grafts": [
        {**GRAFT["operator"], "graft_indexes": [1, 2]},
        {"type": "mlp", "name": "mlp", "config_filepath": "mlp.yaml", "graft_indexes": [2]},
    ],
    "sample_config": {
        k: v for k, v in GRAFT["sample_config"].items() if k not in ("graft_indexes",)
    },
}
OPERATORS = {
    "swa": {"window_size": [4, 4]},
    "hyena_y": {"d_model": 384, "short_filter_order": 4},
    "mamba2": {"d_state": 64, "d_conv": 4, "expand": 2, "headdim": 64},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "swa.yaml").write_text("{}")
    (folder / "mlp.yaml").write_text("expansion_ratio: 3\n")
    return folder


def test_undamaged_files_load(folder):
    for content in (GRAFT, HYBRID):
        (folder / "graft.yaml").write_text(yaml.safe_dump(content))
        assert load_plan(folder / "graft.yaml").grafts


@CASES
@given(st.one_of(damaged(GRAFT), damaged(HYBRID)))
def test_graft_yamls(folder, case):
    tree, keys = case
    path = folder / "graft.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    one_error(lambda: load_plan(path), path, keys)


@CASES
@given(st.text(max_size=60) | st.binary(max_size=60))
@example("[" * 5000)
@example("- " * 5000)
@example("a: [" * 5000)
@example(
    "a: &a [x, x]\n"
    + "".join(
        f"{c}: &{c} [*{b}, *{b}]\n"
        for b, c in zip("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyzA", strict=True)
    )
)
@example("sample_config: &a\n  vae: *a\n")
@example("a: !!python/object/apply:os.system ['true']")
def test_any_text_as_yaml(folder, text):
    path = folder / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    one_error(lambda: load_plan(path), path)


@CASES
@given(
    st.sampled_from(sorted(OPERATORS)).flatmap(
        lambda n: st.tuples(st.just(n), damaged(OPERATORS[n]))
    )
)
def test_operator_yamls(folder, case):
    name, (tree, keys) = case
    content = copy.deepcopy(GRAFT)
    content["operator"] |= {"name": name, "config_filepath": "operator.yaml"}
    (folder / "operator.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (folder / "outer.yaml").write_text(yaml.safe_dump(content))
    one_error(lambda: load_plan(folder / "outer.yaml"), folder / "operator.yaml", keys)


DECENT = {"d_model": 384, "dim": 384, "embed_dim": 384, "l_max": 16}  # as GRAFT's model has them


@pytest.mark.parametrize("number", [2**16 + 1, 10**14, 10**18, 2**63, 10**400, 1e300])
@pytest.mark.parametrize("name", sorted(operators.OPERATORS))
def test_numbers_that_no_machine_holds(folder, name, number):
    """Every key of every operator that takes numbers at all, alone with this one."""
    spec, content = operators.OPERATORS[name], copy.deepcopy(GRAFT)
    content["operator"] |= {"type": spec.slot, "name": name, "config_filepath": "operator.yaml"}
    (folder / "outer.yaml").write_text(yaml.safe_dump(content))
    path = folder / "operator.yaml"
    required = {key: DECENT.get(key, 4) for key in spec.required}
    for key, setting in spec.settings.items():
        if setting.accepts(1) or setting.accepts([1, 1]):
            for value in (number, [number, number], [0, number]):
                path.write_text(yaml.safe_dump({**required, key: value}), encoding="utf-8")
                one_error(lambda: load_plan(folder / "outer.yaml"), path, {key})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of four images in two shards, and its manifest."""
    folder = tmp_path_factory.mktemp("store")
    what = {"kind": "moments", "count": 4, "shard_size": 2, "shape": [4, 2, 2], "dtype": "float16"}
    what |= {"mirrors": 2, "vae": "ema", "vae_sha256": "0" * 64, "scale": 0.18215}
    what |= {"image_size": 16, "crop": "adm-center", "class_names": ["a", "b"]}
    writer = StoreWriter(folder, what)
    writer.begin([0, 1])
    for shard in range(2):
        writer.write_shard(shard, np.zeros((2, 2, 8, 2, 2), np.float16), np.arange(2), [])
    return folder, writer.finish()


def use(folder):
    opened = open_latents(folder)
    opened.verify()
    opened.latents(opened.read(torch.arange(len(opened))), torch.arange(len(opened)), 0, 0)


@CASES
@given(st.data())
def test_manifests(store, data):
    folder, manifest = store
    tree, keys = data.draw(damaged(manifest))
    path = folder / "manifest.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    one_error(lambda: use(folder), folder, keys)


@CASES
@given(st.text(max_size=60) | st.binary(max_size=60))
@example("[" * 100_000)
@example("1" * 5000)
def test_any_text_as_manifest(store, text):
    folder, _ = store
    path = folder / "manifest.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    one_error(lambda: use(folder), path)
