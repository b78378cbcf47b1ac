"""Where every tensor of a grafted model comes from, and what is refused."""

import argparse
import copy

import pytest
import torch
import yaml
from safetensors.torch import save_file

from models.grafting import build_grafted, graft, load_plan, load_trained
from models.selection import GraftPair
from models.weights import operator_of, read_state, tensors_at

TOP = {"mha": {"type": "mha", "name": "swa", "config_filepath": "swa.yaml"}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base DiT, a 75 % SWA checkpoint of other values, and their YAML's folder."""
    folder = tmp_path_factory.mktemp("grafts")
    (folder / "swa.yaml").write_text("window_size: [4, 4]\n")
    (folder / "hyena.yaml").write_text("inner_filter_len: 4\n")
    (folder / "mamba.yaml").write_text("d_state: 16\nheaddim: 16\n")
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
    assert ("blocks.3.attn.Wqkv.weight") in dict(report.dropped)
    assert any("75.pt" in line for line in report.lines())


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


REFUSED = {
    "other operator": (
        {"operator": "hyena_y", "config": "hyena.yaml", "grafted_dit_ckpt_path": "75.pt"},
        "block 1 holds 'swa' in its mha slot; .* wants 'hyena_y'",
    ),
    "other blocks": (
        {"blocks": [0, 1], "grafted_dit_ckpt_path": "75.pt", "base_ckpt_path": "base.safetensors"},
        "block 0 holds the original mha in its mha slot; .* wants 'swa'",
    ),
    "no base": ({"grafted_dit_ckpt_path": "75.pt"}, "needs its original mha.*holds 'swa'.*base"),
    "classes": (
        {"base_ckpt_path": "base.safetensors", "num_classes": 5},
        r"embedding_table.weight has shape \[10, 128\]",
    ),
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


def test_missing_file_says_where_it_was_looked_for(files):
    path = plan(files[0], "gone.yaml", [1], base_ckpt_path="gone.pt")
    with pytest.raises(FileNotFoundError, match="base_ckpt_path: 'gone.pt' was found at none of"):
        build_grafted(load_plan(path))


@pytest.mark.parametrize("change", ["extra", "missing", "shape"])
def test_damaged_base_is_refused(files, change):
    folder, base, _, _ = files
    state = {k: v.clone() for k, v in base.items()}
    if change == "extra":
        state["blocks.3.attn.q_norm.weight"] = torch.ones(3)
    elif change == "missing":
        del state["blocks.3.mlp.fc1.bias"]
    else:
        state["blocks.3.mlp.fc1.bias"] = torch.zeros(7)
    save_file(state, folder / "damaged.safetensors")
    path = plan(folder, "dam.yaml", [1], base_ckpt_path="damaged.safetensors")
    with pytest.raises(ValueError, match="damaged.safetensors.*blocks.3"):
        build_grafted(load_plan(path))


def test_torn_and_malicious_files_are_refused(files, tmp_path):
    whole = (files[0] / "75.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="torn.pt"):
        read_state(tmp_path / "torn.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "hook": pytest.Item}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is refused"):
        read_state(tmp_path / "evil.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="torn.safetensors"):
        read_state(tmp_path / "torn.safetensors")


def test_trained_checkpoint_must_be_of_the_plan(files, tmp_path):
    folder, _, ckpt, blocks = files
    mine = load_plan(plan(folder, "mine.yaml", blocks))
    other = load_plan(plan(folder, "other.yaml", blocks[:-1]))
    torch.save({"ema": ckpt, "plan": mine.architecture()}, tmp_path / "c.pt")
    model, _ = build_grafted(mine, weights=False)
    load_trained(model, mine, tmp_path / "c.pt")
    torch.testing.assert_close(model.state_dict(), ckpt)
    with pytest.raises(ValueError, match="trained with another plan.*grafts"):
        load_trained(build_grafted(other, weights=False)[0], other, tmp_path / "c.pt")
    torch.save({"ema": ckpt}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="blocks.27.attn"):
        load_trained(build_grafted(other, weights=False)[0], other, tmp_path / "bare.pt")


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
