"""Where every tensor of a grafted model comes from, and what is refused."""

import argparse
import copy

import pytest
import torch
import yaml
from safetensors.torch import save_file

from diffusion import create_diffusion
from models.grafting import build_grafted, graft, load_plan, load_trained
from models.selection import GraftPair
from models.weights import operator_of, tensors_at


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base DiT, a 75 % SWA checkpoint of other values, and their YAML's folder."""
    folder = tmp_path_factory.mktemp("grafts")
    (folder / "swa.yaml").write_text("window_size: [4, 4]\n")
    (folder / "hyena.yaml").write_text("inner_filter_len: 4\n")
    (folder / "mamba.yaml").write_text("d_state: 16\nheaddim: 16\n")
    (folder / "wide.yaml").write_text("window_size: [8, 8]\n")
    (folder / "empty.yaml").write_text("{}\n")
    (folder / "r3.yaml").write_text("expansion_ratio: 3\n")
    (folder / "x.yaml").write_text("short_filter_order: 4\n")
    torch.manual_seed(0)
    base, _ = build_grafted(load_plan(plan(folder, "base.yaml", grafts=[])))
    scramble(base)
    save_file(base.state_dict(), folder / "base.safetensors")
    blocks75 = [b for b in range(28) if b % 4]
    model, _ = build_grafted(load_plan(plan(folder, "75.yaml", blocks75)))
    scramble(model)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4)}, folder / "75.pt")
    return folder, base.state_dict(), model.state_dict(), blocks75


def plan(folder, name, blocks=(), operator="swa", config="swa.yaml", grafts=None, **sample):
    content = {"sample_config": {"dit_model_name": "DiT-Mini/2", "image_size": 64, **sample}}
    content["sample_config"].setdefault("num_classes", 9)
    if grafts is None:
        content["operator"] = {"type": "mha", "name": operator, "config_filepath": config}
        content["sample_config"]["graft_indexes"] = list(blocks)
    else:
        content["grafts"] = grafts
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name


def scramble(model):
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.05


def test_inherited_window_attention_equals_attention_inside_the_window(files):
    folder, base, _, _ = files
    path = plan(
        folder, "i.yaml", [1], base_ckpt_path="base.safetensors", graft_init="inherit",
    )  # fmt: skip
    model, report = build_grafted(load_plan(path))
    assert report.counts() == {"base": len(base) - 4, "inherited": 4}
    x = torch.randn(2, 5, 128)  # 5 tokens: the window holds them all
    original, _ = build_grafted(load_plan(plan(folder, "b.yaml", grafts=[],
                                               base_ckpt_path="base.safetensors")))  # fmt: skip
    torch.testing.assert_close(model.blocks[1].attn(x), original.blocks[1].attn(x))


def test_75_to_50_takes_attention_of_ungrafted_blocks_from_the_base(files):
    folder, base, ckpt, _ = files
    path = plan(folder, "50.yaml", [1, 2], base_ckpt_path="base.safetensors",
                grafted_dit_ckpt_path="75.pt")  # fmt: skip
    model, report = build_grafted(load_plan(path))
    state = model.state_dict()
    assert torch.equal(state["blocks.3.attn.qkv.weight"], base["blocks.3.attn.qkv.weight"])
    assert torch.equal(state["blocks.1.attn.Wqkv.weight"], ckpt["blocks.1.attn.Wqkv.weight"])
    assert torch.equal(state["blocks.0.attn.qkv.weight"], ckpt["blocks.0.attn.qkv.weight"])
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], ckpt["blocks.3.mlp.fc1.weight"])
    assert report.counts() == {"base": 4 * 19, "checkpoint": len(base) - 4 * 19}
    dropped = dict(report.dropped)
    assert dropped["blocks.3.attn.Wqkv.weight"] == (
        "the plan keeps the original where the checkpoint has swa"
    )
    assert dropped["blocks.1.attn.qkv.weight"] == "replaced by swa"
    assert dropped["pos_embed"] == dropped["blocks.3.mlp.fc1.bias"] == "the checkpoint holds it"
    assert len(report.dropped) == 4 * 19 + len(base) - 4 * 19
    assert report.notes == ()


def test_report_names_the_files_as_found(files, monkeypatch):
    folder = files[0]
    path = plan(folder, "50.yaml", [1, 2], base_ckpt_path="base.safetensors",
                grafted_dit_ckpt_path="75.pt")  # fmt: skip
    _, report = build_grafted(load_plan(path))
    whole = {"base": folder / "base.safetensors", "checkpoint": folder / "75.pt"}
    assert report.resolved == whole
    assert report.files == {source: str(file) for source, file in whole.items()}
    monkeypatch.chdir(folder.parent)
    assert report.files["checkpoint"] == f"{folder.name}/75.pt"
    assert f"76 tensors base ({folder.name}/base.safetensors)" in report.lines()


def test_pairs_hold_both_operators(files):
    folder, base, ckpt, blocks = files
    path = plan(folder, "p.yaml", blocks, base_ckpt_path="base.safetensors",
                grafted_dit_ckpt_path="75.pt")  # fmt: skip
    model, _ = build_grafted(load_plan(path), pairs=True)
    assert [isinstance(b.attn, GraftPair) for b in model.blocks] == [i % 4 != 0 for i in range(28)]
    state = model.state_dict()
    qkv = state["blocks.5.attn.original.qkv.weight"]
    assert torch.equal(qkv, base["blocks.5.attn.qkv.weight"])
    new = state["blocks.5.attn.graft.Wqkv.weight"]
    assert torch.equal(new, ckpt["blocks.5.attn.Wqkv.weight"])


def test_checkpoint_alone_is_enough_for_its_own_plan(files):
    folder, _, ckpt, blocks = files
    path = plan(folder, "own.yaml", blocks, grafted_dit_ckpt_path="75.pt")
    model, report = build_grafted(load_plan(path))
    assert report.counts() == {"checkpoint": len(ckpt)}
    torch.testing.assert_close(model.state_dict(), ckpt)


def test_distilled_file_wins_over_the_checkpoint(files):
    folder, _, ckpt, blocks = files
    new = {k: v + 1 for k, v in tensors_at(ckpt, 5, "mha").items()}
    torch.save({"model": new}, folder / "block5.pt")
    path = plan(folder, "d.yaml", blocks, grafted_dit_ckpt_path="75.pt",
                graft_weights={5: "block5.pt"})  # fmt: skip
    model, report = build_grafted(load_plan(path))
    assert torch.equal(model.state_dict()["blocks.5.attn.Wqkv.bias"], new["Wqkv.bias"])
    assert report.counts()["graft_weights"] == 4
    assert report.resolved["graft_weights[5].mha"] == folder / "block5.pt"
    assert any(line.startswith("4 tensors graft_weights (") for line in report.lines())


REFUSED = {
    "other operator": (
        {"operator": "hyena_y", "config": "hyena.yaml", "grafted_dit_ckpt_path": "75.pt"},
        "block 1 holds 'swa' in its mha slot; .* wants 'hyena_y'",
    ),
    "other blocks": (
        {"blocks": [0, 1], "grafted_dit_ckpt_path": "75.pt", "base_ckpt_path": "base.safetensors"},
        "block 0 holds the original mha in its mha slot; .* wants 'swa' there .*graft_init: fresh",
    ),
    "other operator, fresh": (
        {"operator": "hyena_y", "config": "hyena.yaml", "grafted_dit_ckpt_path": "75.pt",
         "graft_init": "fresh"},
        "block 1 holds 'swa' in its mha slot; .* wants 'hyena_y' there$",
    ),
    "none of its grafts": (
        {"grafts": [], "grafted_dit_ckpt_path": "75.pt", "base_ckpt_path": "base.safetensors"},
        "block 1 holds the graft 'swa' in its mha slot; .*bad.yaml wants the original mha there",
    ),
    "none of its grafts but a self-graft": (
        {"grafts": [{"type": "mlp", "name": "mlp", "config_filepath": "empty.yaml",
                     "graft_indexes": [1, 2]}],
         "grafted_dit_ckpt_path": "75.pt", "base_ckpt_path": "base.safetensors"},
        "block 1 holds the graft 'swa' in its mha slot; .*bad.yaml wants the original mha there",
    ),
    "no base": (
        {"grafted_dit_ckpt_path": "75.pt"},
        "needs its original mha.*holds the graft 'swa'.*base",
    ),
    "classes": (
        {"base_ckpt_path": "base.safetensors", "num_classes": 5},
        r"embedding_table.weight has shape \[10, 128\].* has 9 classes, the plan 5",
    ),
    "resolution": (
        {"base_ckpt_path": "base.safetensors", "image_size": 32},
        r"pos_embed has shape \[1, 64, 128\].*another resolution",
    ),
    "depth": (
        {"base_ckpt_path": "base.safetensors", "dit_model_name": "DiT-S/2", "image_size": 128},
        "holds 28 blocks; DiT-S/2 .* has 12",
    ),
    "width": (
        {"base_ckpt_path": "base.safetensors", "dit_model_name": "DiT-XL/2", "image_size": 256},
        r"pos_embed has shape \[1, 64, 128\].*another hidden size",
    ),
    "grafted base": (
        {"base_ckpt_path": "75.pt"},
        r"75.pt: is a grafted model \(block 1 holds 'swa'\): put it in grafted_dit_ckpt_path",
    ),
    "distilled alone": ({"graft_weights": {1: "x.pt"}}, "graft_weights: .* name it in base_ckpt"),
    "inherit without base": ({"graft_init": "inherit"}, "needs base_ckpt_path"),
    "cannot inherit": (
        {"operator": "mamba2", "config": "mamba.yaml", "graft_init": "inherit",
         "base_ckpt_path": "base.safetensors"},
        "'mamba2' shares no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_mis_wired_plan_is_refused(files, case):
    settings, message = REFUSED[case]
    settings = {"blocks": [1, 2], **settings}
    path = plan(files[0], "bad.yaml", **settings)
    with pytest.raises(ValueError, match=message):
        build_grafted(load_plan(path))


def test_missing_base_says_which_block_needs_it(files):
    path = plan(files[0], "less.yaml", [1], base_ckpt_path="gone.pt", grafted_dit_ckpt_path="75.pt")
    message = (
        r"'gone.pt' was found at none .*; block 2 needs its original mha .*75.pt holds .*'swa'"
    )
    with pytest.raises(FileNotFoundError, match=message):
        build_grafted(load_plan(path))


def test_unfinished_download_is_named(files):
    folder = files[0]
    (folder / "late.pt.part").write_bytes(b"begun")
    path = plan(folder, "late.yaml", [1], base_ckpt_path="late.pt")
    message = f"{folder}/late.pt.part is a download that has not ended; scripts/download.py"
    with pytest.raises(FileNotFoundError, match=message):
        build_grafted(load_plan(path))


def test_missing_file_says_where_it_was_looked_for(files):
    path = plan(files[0], "gone.yaml", [1], base_ckpt_path="gone.pt")
    with pytest.raises(FileNotFoundError, match="base_ckpt_path: 'gone.pt' was found at none of"):
        build_grafted(load_plan(path))


@pytest.mark.parametrize("change", ["extra", "missing", "shape", "extra in the replaced slot"])
def test_damaged_base_is_refused(files, change):
    folder, base, _, _ = files
    state = {k: v.clone() for k, v in base.items()}
    if change == "extra":
        state["blocks.3.attn.q_norm.weight"] = torch.ones(3)
    elif change == "missing":
        del state["blocks.3.mlp.fc1.bias"]
    elif change == "shape":
        state["blocks.3.mlp.fc1.bias"] = torch.zeros(7)
    else:
        state["blocks.1.attn.q_norm.weight"] = torch.ones(3)
    save_file(state, folder / "damaged.safetensors")
    path = plan(folder, "dam.yaml", [1], base_ckpt_path="damaged.safetensors")
    with pytest.raises(ValueError, match="damaged.safetensors.*blocks.[13]"):
        build_grafted(load_plan(path))


WQKV = "blocks.1.attn.Wqkv.weight"
DAMAGED = {  # what the tensor becomes -> message
    "gone": (lambda t: None, "1: the mha slot holds no .*wants 'swa' there .missing: Wqkv.weight"),
    "whole numbers": (lambda t: t.long(), f"{WQKV} is int64; weights are float16 or bfloat16 or"),
    "complex": (lambda t: t.to(torch.complex64), f"{WQKV} is complex64"),
    "quantised": (lambda t: t.to(torch.float8_e4m3fn), f"{WQKV} is float8_e4m3fn"),
    "flat": (lambda t: t.flatten(), rf"{WQKV} has shape \[49152\].* needs \[384, 128\]"),
    "diverged": (lambda t: t.index_fill(0, torch.tensor([3]), float("nan")),
                 f"{WQKV}: 128 of 49152 values are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED)
def test_damaged_tensor_is_refused_wherever_it_comes_from(files, change):
    folder, _, ckpt, blocks = files
    make, message = DAMAGED[change]
    state = {n: t if n != WQKV else make(t) for n, t in ckpt.items()}
    state = {n: t for n, t in state.items() if t is not None}
    torch.save({"ema": state}, folder / "damaged.pt")
    torch.save({"model": tensors_at(state, 1, "mha")}, folder / "damaged_graft.pt")
    whole = load_plan(plan(folder, "dam.yaml", blocks, grafted_dit_ckpt_path="damaged.pt"))
    with pytest.raises(ValueError, match=f"damaged.pt: .*{message}"):
        build_grafted(whole)
    with pytest.raises(ValueError, match=f"damaged.pt: .*{message}"):
        load_trained(build_grafted(whole, weights=False)[0], whole, folder / "damaged.pt")
    path = plan(folder, "dam.yaml", [1], base_ckpt_path="base.safetensors",
                graft_weights={1: "damaged_graft.pt"})  # fmt: skip
    message = message.replace("blocks.1.attn.", "")
    with pytest.raises(ValueError, match=f"damaged_graft.pt.* block.*{message}"):
        build_grafted(load_plan(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("file", ["same.pt", "same.safetensors"])
def test_other_precisions_and_wrapped_names_load(files, file, dtype):
    folder, _, ckpt, blocks = files
    state = {f"_orig_mod.module.{n}": t.to(dtype) for n, t in ckpt.items()}
    if file.endswith("t"):
        torch.save({"state_dict": {"model": state}, "args": argparse.Namespace()}, folder / file)
    else:
        save_file(state, folder / file)
    path = plan(folder, "same.yaml", blocks, grafted_dit_ckpt_path=file)
    model, report = build_grafted(load_plan(path))
    assert report.counts() == {"checkpoint": len(ckpt)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ckpt[name].to(dtype).float()), name


EVERY = [
    ("mha", "swa", "swa.yaml", [1, 2]),
    ("mha", "hyena_y", "hyena.yaml", [3]),
    ("mha", "hyena_se", "x.yaml", [5]),
    ("mha", "hyena_x", "x.yaml", [6]),
    ("mha", "mamba2", "mamba.yaml", [7]),
    ("mha", "mha", "empty.yaml", [9]),
    ("mlp", "mlp", "r3.yaml", [1, 4]),
    ("mlp", "mlp_hyena_x", "empty.yaml", [2, 8]),
]


def hybrid(folder, name, every=EVERY, **sample):
    keys = ("type", "name", "config_filepath", "graft_indexes")
    grafts = [dict(zip(keys, entry, strict=True)) for entry in every]
    return load_plan(plan(folder, name, grafts=grafts, **sample))


def test_hybrid_of_every_operator_in_both_slots_trains_and_loads(files):
    folder, base = files[:2]
    made = hybrid(folder, "all.yaml", base_ckpt_path="base.safetensors")
    model, report = build_grafted(made)
    assert [type(model.blocks[2].attn).__name__, type(model.blocks[2].mlp).__name__] == [
        "SlidingWindowAttention", "MlpHyenaX"
    ]  # fmt: skip
    assert report.counts()["base"] == len(base) - 4 * sum(len(e[-1]) for e in EVERY)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    labels = {"y": torch.tensor([0, 8])}
    create_diffusion("").training_losses(model, x, t, labels)["loss"].mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = model.state_dict()
    for slot, operator, _, blocks in EVERY:
        places = [f"blocks.{b}.{'attn' if slot == 'mha' else 'mlp'}." for b in blocks]
        names = [n for n in after if n.startswith(tuple(places))]
        assert all(not torch.equal(before[n], after[n]) for n in names), operator
    torch.save({"ema": after, "plan": made.architecture()}, folder / "all.pt")
    torch.save({"ema": after}, folder / "all_bare.pt")
    for file in ("all.pt", "all_bare.pt"):
        again, report = build_grafted(hybrid(folder, "own.yaml", grafted_dit_ckpt_path=file))
        assert report.counts() == {"checkpoint": len(after)}
        torch.testing.assert_close(again.state_dict(), after, rtol=0, atol=0)
        fresh = build_grafted(made, weights=False)[0]
        load_trained(fresh, made, folder / file)
        torch.testing.assert_close(fresh.state_dict(), after, rtol=0, atol=0)


MIXED_UP = {  # entry of EVERY -> what it becomes; message with the file that does not tell
    "operators exchanged": (3, ("mha", "hyena_y", "hyena.yaml", [6]),
                            "block 6 holds 'hyena_x' in its mha slot; .*wants 'hyena_y' there"),
    "one block on": (4, ("mha", "mamba2", "mamba.yaml", [8]),
                     "block 8 holds the original mha in its mha slot; .*wants 'mamba2' there"),
    "other slot's block": (7, ("mlp", "mlp_hyena_x", "empty.yaml", [2, 3]),
                           "block 3 holds the original mlp .*wants 'mlp_hyena_x' of expansion_r"),
    "one block more": (6, ("mlp", "mlp", "r3.yaml", [1, 4, 5]),
                       "block 5 holds the original mlp .*wants 'mlp' of expansion_ratio 3 there"),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED_UP)
def test_mixed_up_hybrid_is_refused(files, case):
    folder = files[0]
    if not (folder / "mixed.pt").exists():
        model, _ = build_grafted(hybrid(folder, "made.yaml"), weights=False)
        torch.save(model.state_dict(), folder / "mixed.pt")
    number, entry, message = MIXED_UP[case]
    other = [*EVERY[:number], entry, *EVERY[number + 1 :]]
    sample = {"grafted_dit_ckpt_path": "mixed.pt", "base_ckpt_path": "base.safetensors"}
    with pytest.raises(ValueError, match=f"mixed.pt: {message}"):
        build_grafted(hybrid(folder, "mixed.yaml", other, **sample))


@pytest.mark.parametrize("change", ["extra.weight", "blocks.3.gate.weight", "-pos_embed"])
def test_damaged_checkpoint_is_refused(files, change):
    folder, _, ckpt, blocks = files
    state = dict(ckpt)
    if change.startswith("-"):
        del state[change[1:]]
    else:
        state[change] = torch.ones(3)
    torch.save({"ema": state}, folder / "damaged.pt")
    path = plan(folder, "dam.yaml", blocks, grafted_dit_ckpt_path="damaged.pt")
    words = "is missing" if change.startswith("-") else "has no place"
    with pytest.raises(ValueError, match=f"damaged.pt: tensor {change.strip('-')} {words}"):
        build_grafted(load_plan(path))


def test_original_of_the_checkpoint_is_grafted_when_the_plan_says_how_to_start(files):
    folder, _, ckpt, blocks = files
    common = {"grafted_dit_ckpt_path": "75.pt"}
    path = plan(folder, "i.yaml", [0, *blocks], graft_init="inherit", **common)
    model, report = build_grafted(load_plan(path))
    new = model.state_dict()["blocks.0.attn.Wqkv.weight"]
    assert torch.equal(new, ckpt["blocks.0.attn.qkv.weight"])
    assert report.counts() == {"checkpoint": len(ckpt) - 4, "inherited": 4}
    path = plan(folder, "f.yaml", [0, *blocks], graft_init="fresh", **common)
    _, report = build_grafted(load_plan(path))
    assert report.counts() == {"checkpoint": len(ckpt) - 4, "fresh": 4}
    assert dict(report.dropped)["blocks.0.attn.qkv.weight"] == "replaced by swa"
    swa = {"type": "mha", "name": "swa", "config_filepath": "swa.yaml", "graft_indexes": blocks}
    mlp = {"type": "mlp", "name": "mlp", "config_filepath": "r3.yaml", "graft_indexes": [1, 4]}
    path = plan(folder, "hybrid.yaml", grafts=[swa, mlp], graft_init="fresh", **common)
    model, report = build_grafted(load_plan(path))
    assert report.counts() == {"checkpoint": len(ckpt) - 8, "fresh": 8}
    assert model.blocks[4].mlp.fc1.out_features == 384
    path = plan(folder, "pair.yaml", [0, *blocks], base_ckpt_path="base.safetensors",
                graft_init="inherit", **common)  # fmt: skip
    state = build_grafted(load_plan(path), pairs=True)[0].state_dict()
    for name in ("original.qkv.weight", "graft.Wqkv.weight"):
        assert torch.equal(state[f"blocks.0.attn.{name}"], ckpt["blocks.0.attn.qkv.weight"])


@pytest.fixture(scope="module", params=[("mha", "mha"), ("mlp", "mlp")], ids=["mha", "mlp"])
def self_grafts(request, files):
    """Self-grafts in blocks 1 and 2: file without a plan, file with it, settings of the plan."""
    folder, (slot, operator) = files[0], request.param
    entry = {"type": slot, "name": operator, "config_filepath": "empty.yaml"}
    grafts = [{**entry, "graft_indexes": [1, 2]}]
    made = load_plan(plan(folder, "self.yaml", grafts=grafts))
    model, _ = build_grafted(made, weights=False)
    scramble(model)
    torch.save({"ema": model.state_dict()}, folder / "self.pt")
    told = {"ema": model.state_dict(), "plan": made.architecture()}
    torch.save(told, folder / "self_told.pt")
    tensor = {"mha": "attn.{}qkv.weight", "mlp": "mlp.{}fc1.weight"}[slot]
    return folder, entry, model.state_dict(), f"blocks.{{}}.{tensor}"


@pytest.mark.parametrize("file", ["self.pt", "self_told.pt"])
def test_pair_of_a_self_graft_has_its_original_from_the_base(files, self_grafts, file):
    base = files[1]
    folder, entry, ckpt, name = self_grafts
    settings = {"grafts": [{**entry, "graft_indexes": [1, 2]}], "grafted_dit_ckpt_path": file}
    path = plan(folder, "sp.yaml", base_ckpt_path="base.safetensors", **settings)
    model, _ = build_grafted(load_plan(path), pairs=True)
    state = model.state_dict()
    assert torch.equal(state[name.format(1, "original.")], base[name.format(1, "")])
    assert torch.equal(state[name.format(1, "graft.")], ckpt[name.format(1, "")])
    path = plan(folder, "sp.yaml", **settings)
    with pytest.raises(ValueError, match="block 1 needs its original .*base_ckpt_path"):
        build_grafted(load_plan(path), pairs=True)


def test_kept_block_of_a_self_graft_checkpoint(files, self_grafts):
    base = files[1]
    folder, entry, ckpt, name = self_grafts
    grafts = [{**entry, "graft_indexes": [1]}]
    settings = {"grafts": grafts, "base_ckpt_path": "base.safetensors"}
    path = plan(folder, "k.yaml", grafted_dit_ckpt_path="self_told.pt", **settings)
    model, report = build_grafted(load_plan(path))
    state = model.state_dict()
    assert torch.equal(state[name.format(2, "")], base[name.format(2, "")])
    assert torch.equal(state[name.format(3, "")], ckpt[name.format(3, "")])
    assert report.notes == ()
    path = plan(folder, "k.yaml", grafted_dit_ckpt_path="self.pt", **settings)
    model, report = build_grafted(load_plan(path))
    assert torch.equal(model.state_dict()[name.format(2, "")], ckpt[name.format(2, "")])
    (note,) = report.notes
    assert "self.pt does not say" in note and "[0, 2, 3," in note
    assert f"note: {note}" in report.lines()


def test_told_self_graft_is_no_base_and_no_graft_where_it_is_the_original(self_grafts):
    folder, entry, _, _ = self_grafts
    path = plan(folder, "b.yaml", grafts=[], base_ckpt_path="self_told.pt")
    with pytest.raises(ValueError, match=f"is a grafted model .block 1 holds '{entry['name']}'"):
        build_grafted(load_plan(path))
    grafts = [{**entry, "graft_indexes": [1, 2, 3]}]
    settings = {"grafts": grafts, "grafted_dit_ckpt_path": "self_told.pt"}
    with pytest.raises(ValueError, match="block 3 holds the original"):
        build_grafted(load_plan(plan(folder, "g.yaml", **settings)))
    path = plan(folder, "g.yaml", **settings, graft_init="fresh")
    assert build_grafted(load_plan(path))[1].counts()["fresh"] == 4


def test_checkpoint_with_another_configuration_is_refused(files):
    folder, _, ckpt, blocks = files
    stored = load_plan(plan(folder, "stored.yaml", blocks)).architecture()
    torch.save({"ema": ckpt, "plan": stored}, folder / "told.pt")
    path = plan(folder, "same.yaml", [1], base_ckpt_path="base.safetensors",
                grafted_dit_ckpt_path="told.pt")  # fmt: skip
    build_grafted(load_plan(path))
    path = plan(folder, "wide_plan.yaml", blocks, config="wide.yaml",
                grafted_dit_ckpt_path="told.pt")  # fmt: skip
    message = r"block 1: swa is not that of .*window_size \[4, 4\] there, \[8, 8\] here"
    with pytest.raises(ValueError, match=message):
        build_grafted(load_plan(path))


def test_inheriting_skips_a_bias_that_the_graft_does_not_have(files):
    folder, base, _, _ = files
    (folder / "nobias.yaml").write_text("qkv_proj_bias: false\n")
    path = plan(folder, "nb.yaml", [1], config="nobias.yaml", graft_init="inherit",
                base_ckpt_path="base.safetensors")  # fmt: skip
    _, report = build_grafted(load_plan(path))
    assert report.counts() == {"base": len(base) - 4, "inherited": 3}


def test_trained_checkpoint_must_be_of_the_plan(files, tmp_path):
    folder, _, ckpt, blocks = files
    mine = load_plan(plan(folder, "mine.yaml", blocks))
    other = load_plan(plan(folder, "other.yaml", blocks[:-1]))
    torch.save({"ema": ckpt, "plan": mine.architecture()}, tmp_path / "c.pt")
    model, _ = build_grafted(mine, weights=False)
    load_trained(model, mine, tmp_path / "c.pt")
    torch.testing.assert_close(model.state_dict(), ckpt)
    message = r"another plan than .*: mha/swa blocks \[1, .* 26, 27\] there, \[1, .* 26\] here$"
    with pytest.raises(ValueError, match=message):
        load_trained(build_grafted(other, weights=False)[0], other, tmp_path / "c.pt")
    torch.save({"ema": ckpt}, tmp_path / "bare.pt")
    message = "bare.pt: block 27 holds 'swa' in its mha slot; .*other.yaml wants the original mha"
    with pytest.raises(ValueError, match=message):
        load_trained(build_grafted(other, weights=False)[0], other, tmp_path / "bare.pt")


def test_checkpoint_of_layer_selection_is_refused_by_name(files):
    folder, _, ckpt, blocks = files
    mine = load_plan(plan(folder, "mine.yaml", blocks, grafted_dit_ckpt_path="selection.pt"))
    state = {f"dit.{n}": t for n, t in ckpt.items()} | {"gates.gumbel_gates.0": torch.zeros(1, 6)}
    torch.save({"ema": state, "plan": mine.architecture()}, folder / "selection.pt")
    message = "selection.pt: is a checkpoint of prune_by_learning.py: finetune its selected.yaml"
    with pytest.raises(ValueError, match=message):
        load_trained(build_grafted(mine, weights=False)[0], mine, folder / "selection.pt")
    with pytest.raises(ValueError, match=message):
        build_grafted(mine)


def test_operators_are_recognised_by_their_tensors(files):
    plan_ = load_plan(plan(files[0], "r.yaml", [1]))
    model, _ = build_grafted(plan_, weights=False)
    state = model.state_dict()
    assert operator_of(tensors_at(state, 1, "mha"), "mha") == "swa"
    assert operator_of(tensors_at(state, 0, "mha"), "mha") == "mha"
    assert operator_of(tensors_at(state, 0, "mlp"), "mlp") == "mlp"
    assert operator_of({"what": torch.zeros(1)}, "mha") is None


def test_grafting_leaves_other_blocks_untouched(files):
    plan_ = load_plan(plan(files[0], "u.yaml", [1]))
    model, _ = build_grafted(load_plan(plan(files[0], "u0.yaml", grafts=[])))
    before = copy.deepcopy(model.blocks[2].state_dict())
    graft(model, plan_)
    torch.testing.assert_close(model.blocks[2].state_dict(), before)
