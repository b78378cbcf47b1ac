"""The 22 released grafts: configs/zoo.yaml, and files of exactly their names, shapes and nesting.

The files' tensors have no storage (meta), so that models of 2.7 GB take no memory; what becomes of
values is tested in test_grafting.py.
"""

import argparse
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.config_files import REPOSITORY, read_yaml
from models.grafting import build_grafted
from models.plan import load_plan
from models.weights import SLOTS

MODELS = read_yaml(REPOSITORY / "configs" / "zoo.yaml")["models"]
CASES = json.loads((Path(__file__).parent / "golden" / "state_dicts.json").read_text())["cases"]
BLOCKS = {  # % of the blocks -> which
    50: [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27],
    75: [b for b in range(28) if b % 4 != 0],
    100: list(range(28)),
}
D = 1152
PLAIN = CASES["DiT-XL/2@256"]["state_dict"]
# arXiv 2506.05340, Tables 2 and 4: IS, FID, sFID, precision, recall
PUBLISHED = """
mlp-mlp_r_4-100p  277.72 2.54 4.52 .83 .57
mlp-mlp_r_3-50p   272.14 2.53 4.51 .83 .57
mlp-mlp_r_3-75p   279.72 2.61 4.61 .83 .56
mlp-mlp_r_6-50p   278.00 2.38 4.50 .83 .58
mlp-mlp_r_6-75p   277.94 2.37 4.48 .82 .58
mlp-hyena_x-50p   265.60 2.64 4.66 .83 .56
mlp-hyena_x-75p   226.13 3.26 4.79 .81 .55
mha-mha-100p      287.81 2.49 4.71 .83 .56
mha-hyena_se-50p  274.73 2.73 5.05 .82 .56
mha-hyena_se-75p  231.15 3.62 6.04 .81 .54
mha-hyena_x-50p   273.30 2.74 5.03 .83 .56
mha-hyena_x-75p   229.11 3.69 6.10 .81 .53
mha-hyena_y-50p   273.37 2.72 5.02 .83 .55
mha-hyena_y-75p   228.99 3.66 5.95 .81 .53
mha-swa-50p       280.62 2.67 4.90 .83 .56
mha-swa-75p       249.99 3.09 5.54 .82 .55
mha-mamba_2-50p   285.08 2.65 4.84 .83 .55
mha-mamba_2-75p   257.66 3.02 5.48 .82 .53
"""
NAME = re.compile(r"dit-xl2-(mha|mlp)-(\w+)-(\d+)p-fid(\d\.\d\d)(_ablation)?")


def plan_of(model):
    plan = load_plan(REPOSITORY / model["config"])
    return replace(plan, grafted_ckpt_path=Path(model["checkpoint"]))


def operator_shapes(word):
    """Tensor names and shapes of an operator, by its word in the released model's name."""
    if word == "mha":
        return None  # the original's
    if word.startswith("mlp_r_"):
        hidden = int(word[-1]) * D
        return {"fc1.weight": [hidden, D], "fc1.bias": [hidden], "fc2.weight": [D, hidden],
                "fc2.bias": [D]}  # fmt: skip
    return CASES[f"operator:{word}"]["state_dict"]


def published_shapes(name):
    """All tensor names and shapes of a released model."""
    slot, word, share, _, _ = NAME.fullmatch(name).groups()
    word = {"mamba_2": "mamba2"}.get(
        word, "mlp_hyena_x" if (slot, word) == ("mlp", "hyena_x") else word
    )
    operator = operator_shapes(word)
    shapes = dict(PLAIN)
    for block in BLOCKS[int(share)] if operator is not None else ():
        place = f"blocks.{block}.{SLOTS[slot]}."
        shapes = {n: s for n, s in shapes.items() if not n.startswith(place)}
        shapes.update({place + n: s for n, s in operator.items()})
    return shapes


def save(path, shapes):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    torch.save({"ema": tensors, "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}, path)


def load(model):
    """Finds the file as a run does: from the working directory."""
    with torch.device("meta"):  # operators, too, without memory
        return build_grafted(plan_of(model))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m["name"])
def test_released_model_loads_to_the_last_tensor(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shapes = published_shapes(model["name"])
    save(tmp_path / model["checkpoint"], shapes)
    loaded, report = load(model)
    assert {n: list(t.shape) for n, t in loaded.state_dict().items()} == shapes
    assert report.counts() == {"checkpoint": len(shapes)}
    assert report.dropped == ()
    assert list(report.files.values()) == [model["checkpoint"]]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m["name"])
def test_entry_agrees_with_its_name_and_its_config(model):
    slot, _, share, fid, ablation = NAME.fullmatch(model["name"]).groups()
    plan = load_plan(REPOSITORY / model["config"])
    (graft,) = plan.grafts
    assert (graft.slot, graft.operator) == (slot, model["operator"])
    assert list(graft.blocks) == BLOCKS[model["ratio"]] == BLOCKS[int(share)]
    assert model["checkpoint"] == f"grafted_models/{model['name']}/model.pt"
    assert model["source"] == f"https://huggingface.co/grafting/{model['name']}"
    assert model["published"]["fid"] == float(fid)
    assert list(model["published"]) == ["is", "fid", "sfid", "precision", "recall"]
    unknown = [k for k, v in model["published"].items() if v is None]
    if ablation:
        assert unknown == ["is", "sfid", "precision", "recall"]
    else:
        assert unknown == []
        assert str(plan.grafted_ckpt_path) == model["checkpoint"]


def test_scores_are_the_published_ones():
    rows = {name: values for name, *values in map(str.split, PUBLISHED.strip().splitlines())}
    scored = [m for m in MODELS if not m["name"].endswith("_ablation")]
    found = {re.sub("dit-xl2-|-fid.*", "", m["name"]): m["published"] for m in scored}
    assert found.keys() == rows.keys()
    for name, values in rows.items():
        assert list(found[name].values()) == [float(value) for value in values], name


@pytest.mark.parametrize("operator", ["swa", "hyena_y"])
def test_learned_selection_takes_its_graft_and_the_base(operator, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = load_plan(REPOSITORY / "configs" / f"50p_graftfusion75_{operator}.yaml")
    released = published_shapes(plan.grafted_ckpt_path.parent.name)
    save(tmp_path / plan.grafted_ckpt_path, released)
    save(tmp_path / plan.base_ckpt_path, PLAIN)
    with torch.device("meta"):
        model, report = build_grafted(plan)
    grafted = [b for b in range(28) if f"blocks.{b}.attn.qkv.weight" not in model.state_dict()]
    assert grafted == list(plan.grafted_blocks()) and len(grafted) == 14
    from_base = {n for n, source in report.sources.items() if source == "base"}
    back = [b for b in BLOCKS[75] if b not in grafted]
    assert from_base == {n for n in PLAIN for b in back if n.startswith(f"blocks.{b}.attn.")}
    assert {n for n, _ in report.dropped if n not in PLAIN} == {  # those of the base are in it too
        n for n in released for b in back if n.startswith(f"blocks.{b}.attn.")
    }


def test_zoo_holds_22_models_once_and_every_config_with_weights():
    names = {m["name"] for m in MODELS}
    assert len(MODELS) == len(names) == 22
    assert [m["name"].endswith("_ablation") for m in MODELS].count(True) == 4
    plans = [load_plan(path) for path in (REPOSITORY / "configs").glob("*p_*.yaml")]
    named = {plan.grafted_ckpt_path.parent.name for plan in plans if plan.grafted_ckpt_path}
    assert named == {name for name in names if not name.endswith("_ablation")}


SWA = next(m for m in MODELS if m["name"] == "dit-xl2-mha-swa-50p-fid2.67")
QKV = "blocks.1.attn.Wqkv.weight"


def changed(**changes):
    shapes = {**published_shapes(SWA["name"]), **changes}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def exchanged(one, two):
    """The released file with the attention slots of two blocks exchanged."""
    other = {
        f"blocks.{one}.attn.": f"blocks.{two}.attn.",
        f"blocks.{two}.attn.": f"blocks.{one}.attn.",
    }

    def renamed(name):
        return re.sub(r"^blocks\.\d+\.attn\.", lambda m: other.get(m[0], m[0]), name)

    return {renamed(name): shape for name, shape in published_shapes(SWA["name"]).items()}


REFUSED = {
    "other operator": (
        published_shapes("dit-xl2-mha-hyena_y-50p-fid2.72"),
        "block 1 holds 'hyena_y' in its mha slot; .*50p_swa.yaml wants 'swa' there",
    ),
    "more blocks": (
        published_shapes("dit-xl2-mha-swa-75p-fid3.09"),
        r"DiT-XL-2-256x256.pt' was .*; block 2 needs its original mha .*holds the graft 'swa'",
    ),
    "other slot": (
        published_shapes("dit-xl2-mlp-mlp_r_3-50p-fid2.53"),
        "block 1 holds the graft 'mlp' in its mlp slot; .*50p_swa.yaml wants the original mlp",
    ),
    "exchanged blocks": (
        exchanged(1, 2),
        "block 1 holds the original mha in its mha slot; .*50p_swa.yaml wants 'swa' there",
    ),
    "missing key": (
        changed(**{QKV: None}),
        r"block 1: the mha slot holds no .*wants 'swa' there \(missing: Wqkv\.weight\)",
    ),
    "missing bias": (changed(**{QKV.replace("weight", "bias"): None}), "Wqkv.bias is missing; the"),
    "missing bias of an original": (
        changed(**{"blocks.0.attn.qkv.bias": None}),
        "tensor blocks.0.attn.qkv.bias is missing; the model of",
    ),
    "operator where the plan has none": (
        changed(
            **{
                "blocks.0.mlp.fc1.weight": [3456, 1152],
                "blocks.0.mlp.fc1.bias": [3456],
                "blocks.0.mlp.fc2.weight": [1152, 3456],
            }
        ),
        "block 0 holds 'mlp' in its mlp slot; .*wants the original mlp there, and has 'mlp' in no",
    ),
    "missing key outside": (changed(pos_embed=None), "tensor pos_embed is missing; the model of"),
    "missing block": (
        {n: s for n, s in changed().items() if not n.startswith("blocks.27.")},
        "holds 27 blocks; DiT-XL/2 of .*50p_swa.yaml has 28",
    ),
    "extra key": (
        changed(**{"blocks.1.attn.rotary": [8]}),
        r"block 1: the mha slot holds no .*wants 'swa' there \(left over: rotary\)",
    ),
    "extra key beside": (changed(**{"blocks.1.gate": [8]}), "blocks.1.gate has no place in the"),
    "extra key outside": (changed(z_embedder=[8]), "tensor z_embedder has no place in the model"),
    "other width": (
        changed(**{QKV: [3 * D, 8]}),
        rf"{QKV} has shape \[{3 * D}, 8\]; .* needs \[{3 * D}, {D}\]",
    ),
    "other model": (
        CASES["DiT-B/2@256"]["state_dict"],
        "holds 12 blocks; DiT-XL/2 of .*50p_swa.yaml has 28",
    ),
    "512 px": (changed(pos_embed=[1, 1024, D]), "pos_embed has shape .*another resolution"),
    "9 classes": (
        changed(**{"y_embedder.embedding_table.weight": [10, D]}),
        "the file has 9 classes, the plan 1000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_is_not_the_released_model_is_refused(case, monkeypatch, tmp_path):
    shapes, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    save(tmp_path / SWA["checkpoint"], shapes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(SWA)


DAMAGED = {  # what becomes of the released file's bytes
    "cut short": (lambda whole: whole[: len(whole) // 2], "model.pt cannot be read: it is torn"),
    "never begun": (lambda whole: b"", "model.pt cannot be read: it is empty"),
    "error page": (lambda whole: b"<html>404</html>", "model.pt cannot be read: it is a web page"),
    "git lfs": (lambda whole: b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    "program": (lambda whole: pickle.dumps(print), "model.pt cannot be read: it is a bare pickle"),
    "damaged list": (lambda whole: whole.replace(b"pos_embed", b"pos_embex"), "torn or damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_released_file_that_did_not_arrive_whole_is_refused(case, monkeypatch, tmp_path):
    change, message = DAMAGED[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / SWA["checkpoint"]
    save(path, published_shapes(SWA["name"]))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(SWA)
    path.rename(path.with_name("model.pt.part"))
    with pytest.raises(FileNotFoundError, match=r"model.pt.part is a download that has not ended"):
        load(SWA)


@pytest.mark.parametrize("content", [{"ema": {}}, {"ema": {}, "model": {}}, {"ema": {"step": 3}}])
def test_released_file_without_tensors_is_refused(content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / SWA["checkpoint"]
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    with pytest.raises(ValueError, match="model.pt.* no state dict|entry 'step' is of type int"):
        load(SWA)
