"""Graft YAMLs: what loads, and the one clear error for what does not."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from models.operators import _note_hint
from models.plan import (
    differences,
    find_file,
    flag_path,
    load_plan,
    plan_from_flags,
    read_yaml,
    with_base,
    write_plan,
)

REPOSITORY = Path(__file__).resolve().parent.parent
OPERATOR = {"type": "mha", "name": "swa", "config_filepath": "swa.yaml"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "swa.yaml").write_text("window_size: [4, 4]\n")
    (tmp_path / "mlp.yaml").write_text("expansion_ratio: 3\n")
    return tmp_path


def write(folder, operator=OPERATOR, grafts=None, **sample):
    content = {"sample_config": {"dit_model_name": "DiT-Mini/2", "image_size": 64, **sample}}
    if grafts is None:
        content["operator"] = operator
        content["sample_config"].setdefault("graft_indexes", [1, 3])
    else:
        content["grafts"] = grafts
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*p_*.yaml")))
def test_shipped_configs_load(path):
    plan = load_plan(path)
    assert plan.model_name == "DiT-XL/2" and plan.depth == 28
    share = len(plan.grafted_blocks()) / plan.depth
    assert path.name.startswith(f"{round(100 * share)}p_")


def test_learned_selections_keep_two_of_each_four():
    for name in ("swa", "hyena_y"):
        grafted = load_plan(REPOSITORY / f"configs/50p_graftfusion75_{name}.yaml").grafted_blocks()
        assert [sum(b // 4 == g for b in grafted) for g in range(7)] == [2] * 7


def test_predecessor_schema_with_paths_beside_the_file(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "sequence_mixers").mkdir()
    (folder / "configs" / "sequence_mixers" / "swa.yaml").write_text(
        "embed_dim: 1152\nnum_heads: 16\nwindow_size: [4, 4]\nfused_bias_fc: true\n"
    )
    path = folder / "configs" / "p.yaml"
    path.write_text(
        "operator:\n  type: 'mha'\n  name: \"swa\"\n"
        "  config_filepath: ../configs/sequence_mixers/swa.yaml\n\n\n"
        "sample_config:\n  seed: 0\n  dit_model_name: DiT-XL/2\n"
        "  grafted_dit_ckpt_path: None\n  samples_save_dir: results/x\n  image_size: 256\n"
        "  graft_indexes:\n    - 1\n    - 27\n  graft_weights:\n"
    )
    plan = load_plan(path)
    assert plan.grafted_blocks() == (1, 27) and plan.grafted_ckpt_path is None
    assert plan.grafts[0].config["embed_dim"] == 1152
    assert str(plan.base_ckpt_path) == "pretrained/DiT-XL-2-256x256.pt"


@pytest.mark.parametrize("start", ["configs", "./configs", "../configs"])
def test_papers_files_load_from_anywhere(folder, start, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "stage1.yaml"
    path.write_text(
        "operator:\n  type: 'mha'\n  name: \"hyena_y\"\n"
        f"  config_filepath: {start}/sequence_mixers/hyena_y.yaml\n\n\n"
        "sample_config:\n  init_type: graft\n  global_seed: 100\n  dit_model_name: DiT-XL/2\n"
        "  grafted_dit_ckpt_path: None\n  samples_save_dir: ./results/demo/\n  image_size: 256\n"
        "  graft_indexes:\n    - 6\n    - 16\n  \n  # a remark\n  graft_weights:\n"
        '    - 6: "./results/seed=6/best_train.pt"\n    - 16: "./results/seed=16/best_train.pt"\n'
    )
    for place in (folder, elsewhere, REPOSITORY, REPOSITORY / "tests"):
        monkeypatch.chdir(place)
        plan = load_plan(path)
        assert plan.grafted_blocks() == (6, 16)
        assert plan.grafted_ckpt_path is None and plan.grafts[0].config["l_max"] == 1_000_000
        assert plan.graft_weights[16, "mha"] == Path("results/seed=16/best_train.pt")
    write_plan(plan, folder / "runs" / "new.yaml", {"mha": [16]})
    new = load_plan(folder / "runs" / "new.yaml")
    assert new.graft_weights == {(16, "mha"): Path("results/seed=16/best_train.pt")}


def test_none_as_a_word_is_null_where_null_is_legal(folder):
    words = dict.fromkeys(("grafted_dit_ckpt_path", "graft_weights", "base_ckpt_path"), "None")
    plan = load_plan(write(folder, **words, graft_init="None", samples_save_dir="None"))
    assert plan.grafted_ckpt_path is plan.base_ckpt_path is plan.graft_init is None
    assert plan.graft_weights == {}
    with pytest.raises(ValueError, match="dit_model_name: 'None'; legal names"):
        load_plan(write(folder, dit_model_name="None"))


def test_papers_training_files_are_refused_by_name(folder):
    (folder / "stage2.yaml").write_text("train: {}\noperator: {}\ntrain_config: {wd: 0}\n")
    with pytest.raises(ValueError, match="stage2.yaml: train_config: flags say how to train"):
        load_plan(folder / "stage2.yaml")


BAD = {
    "unknown key": ({"grafted_indexes": [1]}, "unknown key 'grafted_indexes'"),
    "block 28": ({"graft_indexes": [1, 28]}, "graft_indexes: block 28; legal blocks are 0 to 27"),
    "negative": ({"graft_indexes": [-1]}, "graft_indexes: block -1"),
    "text block": ({"graft_indexes": ["one"]}, "graft_indexes: block 'one'"),
    "boolean block": ({"graft_indexes": [True]}, "graft_indexes: block True"),
    "duplicate": ({"graft_indexes": [3, 3]}, "graft_indexes: block 3 stands twice"),
    "no block": ({"graft_indexes": []}, "graft_indexes: names no block"),
    "model": ({"dit_model_name": "DiT-XXL/2"}, "legal names: DiT-B/2"),
    "image size": ({"image_size": 60}, "sample_config: image_size 60"),
    "type": ({"image_size": "64"}, "image_size: '64' must be of type int"),
    "init": ({"graft_init": "magic"}, "graft_init: 'magic'; legal: fresh, inherit"),
    "classes": ({"num_classes": 0}, "num_classes: 0"),
    "weights": ({"graft_weights": {2: "a.pt"}}, "graft_weights: 2: takes no graft"),
    "boolean weights": ({"graft_weights": {True: "a.pt"}}, "graft_weights: True: takes no graft"),
    "weights twice": ({"graft_weights": [{1: "a"}, {1: "b"}]}, "names a block twice"),
    "weights list": ({"graft_weights": ["a.pt"]}, "graft_weights: ['a.pt'] must be {block: file}"),
    "weights name": ({"graft_weights": {1: 5}}, "graft_weights: 1: 5 must be a file name"),
    "weights slot": ({"graft_weights": {1: {"mlp": "a"}}}, "1: 'mlp'; legal here: mha"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_value_is_named(folder, case):
    sample, message = BAD[case]
    path = write(folder, **sample)
    with pytest.raises(ValueError) as error:
        load_plan(path)
    assert message in str(error.value) and str(path) in str(error.value)


BAD_OPERATORS = {
    "slot": ({**OPERATOR, "type": "attention"}, "legal slots: mha, mlp"),
    "other slot": ({**OPERATOR, "name": "mlp"}, "'mlp' belongs in the other slot"),
    "name": ({**OPERATOR, "name": "swin"}, "legal names: hyena_se"),
    "missing": ({"type": "mha", "name": "swa"}, "key 'config_filepath' is missing"),
}


@pytest.mark.parametrize("case", BAD_OPERATORS)
def test_bad_operator_is_named(folder, case):
    operator, message = BAD_OPERATORS[case]
    with pytest.raises(ValueError, match="plan.yaml") as error:
        load_plan(write(folder, operator))
    assert message in str(error.value)


def test_width_of_another_model_is_refused(folder):
    (folder / "swa.yaml").write_text("embed_dim: 1152\nnum_heads: 16\n")
    with pytest.raises(ValueError, match="1152.*128"):
        load_plan(write(folder))


def test_missing_operator_file_lists_all_places(folder):
    operator = {**OPERATOR, "config_filepath": "nowhere.yaml"}
    with pytest.raises(FileNotFoundError) as error:
        load_plan(write(folder, operator))
    for place in (folder, Path.cwd(), REPOSITORY):
        assert str(place / "nowhere.yaml") in str(error.value)
    operator["config_filepath"] = "../nowhere.yaml"  # as if from a folder of the repository
    with pytest.raises(FileNotFoundError, match=f"{REPOSITORY}/nowhere.yaml$"):
        load_plan(write(folder, operator))


NOT_YAML = {
    "duplicate": ("seed: 1\na: {b: 1, b: 2}\n", ", line 2: not valid YAML: key 'b' stands twice"),
    "other spelling": ("w: {1: a, 0x1: b}\n", ", line 1: not valid YAML: key 1 stands twice"),
    "bracket": ("a: [1\n", ", line 2: not valid YAML: expected ',' or ']'"),
    "tab": ("a:\n\tb: 1\n", ", line 2: not valid YAML: found character .* indent with spaces"),
    "control": ("a: \x01\n", ": not valid YAML: unacceptable character"),
    "date": ("a: 2024-13-45\n", ": not valid YAML: month must be in 1..12"),
    "empty": ("# nothing\n", ": is empty"),
    "list": ("- 1\n", ": holds list, needs a mapping"),
}


@pytest.mark.parametrize("case", NOT_YAML)
def test_what_is_no_yaml_mapping_is_one_line(folder, case):
    text, message = NOT_YAML[case]
    (folder / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"^config {folder}/x.yaml{message}") as error:
        load_plan(folder / "x.yaml")
    assert "\n" not in str(error.value)


def test_folder_and_missing_file_as_config(folder):
    with pytest.raises(ValueError, match=f"config {folder}: is a folder"):
        load_plan(folder)
    with pytest.raises(FileNotFoundError, match="absent.yaml: no such file"):
        load_plan(folder / "absent.yaml")


BAD_CONFIGS = {  # slot, operator, its file -> message
    "tokens": ("mha", "hyena_se", "l_max: 63\n", "l_max 63 is less than the model's 64 tokens"),
    "tokens of x": ("mha", "hyena_x", "l_max: 63\n", "l_max 63 is less than the model's 64 tokens"),
    "tokens of y": ("mha", "hyena_y", "l_max: 63\n", "l_max 63 is less than the model's 64 tokens"),
    "other tokens": ("mlp", "mlp_hyena_x", "l_max: 65\n", "l_max 65 differs from .* 64 tokens"),
    "head size": (
        "mha", "mamba2", "headdim: 48\n",
        "headdim 48 does not divide .* = 256: choose one of 1, 2, 4, 8, 16, 32, 64, 128, 256$",
    ),
    "groups": (
        "mha", "mamba2", "ngroups: 3\n",
        "ngroups 3 does not divide the 4 heads .*: choose one of 1, 2, 4$",
    ),
    "negative window": ("mha", "swa", "window_size: [-1, 4]\n", r"window_size \[-1, 4\] .* from 0"),
    "three windows": ("mha", "swa", "window_size: [1, 2, 3]\n", "window_size .* two whole numbers"),
    "one window": ("mha", "swa", "window_size: 4\n", "window_size 4 .* two whole numbers"),
    "heads": ("mha", "swa", "num_heads: 5\n", "num_heads 5 does not divide .* hidden size 128"),
    "mha heads": ("mha", "mha", "num_heads: 3\n", "num_heads 3 does not divide .* hidden size 128"),
    "key-value heads": ("mha", "swa", "num_heads_kv: 2\n", "num_heads_kv 2 .* num_heads 4"),
    "width": ("mha", "hyena_y", "d_model: 64\n", "d_model 64 differs from .* hidden size 128"),
    "ratio": ("mlp", "mlp", "expansion_ratio: 0.33\n", "expansion_ratio 0.33 of d_model 128"),
    "file of the mlp slot": (
        "mha", "swa", "d_model: 128\nexpansion_ratio: 3\ndropout: 0.0\n",
        r"unknown key 'd_model' .*these are the keys of mlp \(mlp slot\)",
    ),
    "file of the mha slot": (
        "mlp", "mlp", "embed_dim: 128\nnum_heads: 4\n",
        r"unknown key 'embed_dim' .*these are the keys of swa \(mha slot\)",
    ),
    "mixer of the other slot": (
        "mha", "hyena_x", "d_model: 128\nl_max: 64\nexpansion_ratio: 2\n",
        r"unknown key 'expansion_ratio' .*these are the keys of mlp_hyena_x \(mlp slot\)",
    ),
    "file of another operator": (
        "mha", "hyena_y", "d_model: 128\nd_state: 64\n",
        r"unknown key 'd_state' .*these are the keys of mamba2 \(mha slot\)",
    ),
    "file of hyena_y": (
        "mha", "hyena_x", "d_model: 128\ninner_filter_len: 4\n",
        "inner_filter_len without short_filter_order is .* another Hyena .*the file of hyena_x",
    ),
    "file of hyena_x": (
        "mha", "hyena_y", "d_model: 128\nshort_filter_order: 4\n",
        "short_filter_order without inner_filter_len is .* another Hyena .*the file of hyena_y",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_operator_file_names_block_slot_file_and_both_sides(folder, case):
    slot, operator, text, message = BAD_CONFIGS[case]
    (folder / "op.yaml").write_text(text)
    entry = {"type": slot, "name": operator, "config_filepath": "op.yaml"}
    where = rf"plan.yaml: operator \({slot} slot of blocks 1, 3\): {folder}/op.yaml: {operator}: "
    with pytest.raises(ValueError, match=where + message) as error:
        load_plan(write(folder, entry))
    assert "\n" not in str(error.value)


def test_bad_operator_file_is_named_once(folder):
    for text, message in (("window: 4\n", "unknown key 'window'"), ("a: [1\n", "not valid YAML")):
        (folder / "swa.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load_plan(write(folder))
        assert str(error.value).count("swa.yaml") == 1


def test_merge_keys_work(folder):
    path = folder / "merged.yaml"
    path.write_text(
        "grafts:\n"
        "  - &swa {type: mha, name: swa, config_filepath: swa.yaml, graft_indexes: [1]}\n"
        "sample_config:\n  dit_model_name: DiT-Mini/2\n  image_size: 64\n"
    )
    text = path.read_text().replace(
        "sample_config", "  - &two {<<: *swa, graft_indexes: [2]}\n"
        "  - {<<: *two, graft_indexes: [3]}\nsample_config"
    )  # fmt: skip
    path.write_text(text)
    assert load_plan(path).grafted_blocks() == (1, 2, 3)


def test_find_file_goes_in_order_and_keeps_the_name_of_a_link(folder, tmp_path, monkeypatch):
    here, blob = tmp_path / "here", tmp_path / "blob"
    here.mkdir()
    blob.write_text("")
    monkeypatch.chdir(here)
    (here / "w.safetensors").symlink_to(blob)
    assert find_file("w.safetensors", folder / "p.yaml", "key") == here / "w.safetensors"
    (folder / "w.safetensors").write_text("")
    assert find_file("w.safetensors", folder / "p.yaml", "key") == folder / "w.safetensors"
    assert flag_path("--load-weight", "w.safetensors") == here / "w.safetensors"


def test_flags_name_files_from_the_working_directory_alone(folder, monkeypatch):
    plan = load_plan(write(folder, base_ckpt_path="base.pt"))
    (folder / "base.pt").write_text("")
    assert with_base(plan, None) is plan
    assert with_base(plan, "none").base_ckpt_path is None
    with pytest.raises(FileNotFoundError, match="^--load-weight base.pt: no such file$"):
        with_base(plan, "base.pt")  # beside the YAML, which a flag does not mean
    monkeypatch.chdir(folder)
    assert with_base(plan, "base.pt").base_ckpt_path == folder / "base.pt"


def test_hybrid_of_both_slots(folder):
    mlp = {"type": "mlp", "name": "mlp", "config_filepath": "mlp.yaml", "graft_indexes": [1, 2]}
    plan = load_plan(write(folder, grafts=[{**OPERATOR, "graft_indexes": [1]}, mlp]))
    assert plan.graft_at(1, "mha").operator == "swa" and plan.graft_at(2, "mha") is None
    assert plan.grafted_blocks("mlp") == (1, 2)
    again = {**OPERATOR, "graft_indexes": [0, 1]}
    with pytest.raises(ValueError, match="block 1 already takes 'swa' in its mha slot"):
        load_plan(write(folder, grafts=[{**OPERATOR, "graft_indexes": [1]}, again]))
    for blocks, words in (([28], "block 28"), ([2, 2], "block 2 stands twice"), ([], "no block")):
        entries = [{**OPERATOR, "graft_indexes": [1]}, {**OPERATOR, "graft_indexes": blocks}]
        with pytest.raises(ValueError, match=rf"grafts\[1\].graft_indexes: .*{words}"):
            load_plan(write(folder, grafts=entries))


def test_weights_of_both_slots_of_a_block(folder):
    mlp = {"type": "mlp", "name": "mlp", "config_filepath": "mlp.yaml", "graft_indexes": [1, 2]}
    grafts = [{**OPERATOR, "graft_indexes": [1]}, mlp]
    files = {1: {"mha": "a.pt", "mlp": "b.pt"}, 2: "c.pt"}
    plan = load_plan(write(folder, grafts=grafts, graft_weights=files))
    weights = {(1, "mha"): Path("a.pt"), (1, "mlp"): Path("b.pt"), (2, "mlp"): Path("c.pt")}
    assert plan.graft_weights == weights
    (folder / "b.pt").write_text("")
    write_plan(plan, folder / "runs" / "new.yaml", {"mlp": [1]})
    new = load_plan(folder / "runs" / "new.yaml")
    assert new.graft_weights == {(1, "mha"): Path("a.pt"), (1, "mlp"): Path("../b.pt")}
    assert new.grafted_blocks("mha") == (1,) and new.grafted_blocks("mlp") == (1,)
    with pytest.raises(ValueError, match="graft_weights: 1: takes a graft in both slots: write"):
        load_plan(write(folder, grafts=grafts, graft_weights={1: "a.pt"}))


def test_architecture_does_not_depend_on_the_wording(folder, tmp_path):
    (folder / "long.yaml").write_text(
        "embed_dim: 128\nnum_heads: 4\nnum_heads_kv: 4\nwindow_size: [4, 4]\nlayer_idx: 3\n"
        "use_flash_attn: true\ndropout: 0\ncausal: false\n"
    )
    (folder / "mamba.yaml").write_text("headdim: 16\n")
    (folder / "mamba2.yaml").write_text("headdim: 16\ndt_limit: [0, .inf]\nchunk_size: 32\n")
    mamba = {"type": "mha", "name": "mamba2", "config_filepath": "mamba.yaml"}
    grafts = [{**OPERATOR, "graft_indexes": [1, 2, 5]}, {**mamba, "graft_indexes": [3]}]
    first = load_plan(write(folder, grafts=grafts))
    grafts = [
        {**mamba, "config_filepath": "mamba2.yaml", "graft_indexes": [3]},
        {**OPERATOR, "graft_indexes": [5]},
        {**OPERATOR, "config_filepath": "long.yaml", "graft_indexes": [2, 1]},
    ]
    second = load_plan(write(folder, grafts=grafts))
    assert first.architecture() == second.architecture()
    assert [g["blocks"] for g in first.architecture()["grafts"]] == [[1, 2, 5], [3]]
    assert first.grafts[0].config == {
        "embed_dim": 128, "num_heads": 4, "window_size": [4, 4], "qkv_proj_bias": True,
        "out_proj_bias": True, "dropout": 0.0, "softmax_scale": None,
    }  # fmt: skip
    torch.save(first.architecture(), tmp_path / "a.pt")
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    assert stored == first.architecture() == yaml.safe_load(yaml.safe_dump(stored))


def test_differences_say_only_what_differs(folder):
    (folder / "wide.yaml").write_text("window_size: [8, 8]\n")
    ours = load_plan(write(folder, graft_indexes=[1, 3])).architecture()
    assert differences(ours, ours) == ""
    theirs = load_plan(write(folder, graft_indexes=[1, 2])).architecture()
    assert differences(ours, theirs) == "mha/swa blocks [1, 2] there, [1, 3] here"
    wide = load_plan(write(folder, {**OPERATOR, "config_filepath": "wide.yaml"}, num_classes=9))
    assert differences(ours, wide.architecture()) == (
        "num_classes 9 there, 1000 here; mha/swa window_size [8, 8] there, [4, 4] here in blocks "
        "[1, 3]"
    )
    plain = load_plan(write(folder, grafts=[])).architecture()
    assert differences(ours, plain) == "mha/swa blocks none there, [1, 3] here"


def test_ignored_hints_are_warned_of_once(folder, caplog):
    _note_hint.cache_clear()
    (folder / "swa.yaml").write_text("use_flash_attn: true\n")
    with caplog.at_level(logging.WARNING):
        load_plan(write(folder))
        load_plan(write(folder))
    (record,) = caplog.records
    assert "use_flash_attn" in record.getMessage() and record.levelno == logging.WARNING


def test_flags_must_agree_with_the_yaml(folder):
    path = write(folder)
    assert plan_from_flags(path, "DiT-Mini/2", 64, None).image_size == 64
    with pytest.raises(ValueError, match="--model DiT-XL/2.*says DiT-Mini/2"):
        plan_from_flags(path, "DiT-XL/2", None, None)
    with pytest.raises(ValueError, match="give --config or --model"):
        plan_from_flags(None, None, None, None)
    with pytest.raises(ValueError, match="--image-size: image_size 60"):
        plan_from_flags(None, "DiT-S/2", 60, None)
    with pytest.raises(ValueError, match="--image-size: image_size 0"):
        plan_from_flags(None, "DiT-S/2", 0, None)
    with pytest.raises(ValueError, match="--num-classes 0"):
        plan_from_flags(None, "DiT-S/2", None, 0)
    plain = plan_from_flags(None, "DiT-S/8", None, None)
    assert plain.grafts == () and plain.image_size == 256 and plain.base_ckpt_path is None


def test_written_plan_reads_back_from_another_folder(folder):
    (folder / "base.safetensors").write_bytes(b"x")
    plan = load_plan(write(folder, base_ckpt_path="base.safetensors", graft_indexes=[1, 2, 3]))
    target = folder / "runs" / "a"
    target.mkdir(parents=True)
    write_plan(plan, target / "selected.yaml", {"mha": [1, 3]}, "Learned.\nTwice.")
    new = load_plan(target / "selected.yaml")
    assert new.grafted_blocks() == (1, 3)
    assert new.grafts[0].config == plan.grafts[0].config
    base = read_yaml(target / "selected.yaml")["sample_config"]["base_ckpt_path"]
    assert (target / base).resolve() == folder / "base.safetensors"
    assert (target / "selected.yaml").read_text().startswith("# Learned.\n# Twice.\n")


def test_written_plan_keeps_what_the_flags_said_and_no_more(folder):
    sample = {"base_ckpt_path": "base.pt", "samples_save_dir": "results/x", "graft_init": "inherit"}
    plan = load_plan(write(folder, **sample, vae="vae", graft_weights={1: "a.pt", 3: "b.pt"}))
    (folder / "vae").mkdir()
    (folder / "a.pt").write_text("")
    target = folder / "runs" / "selected.yaml"
    write_plan(with_base(plan, "none"), target, {"mha": [1]})
    sample = read_yaml(target)["sample_config"]
    assert sample["base_ckpt_path"] is None and "samples_save_dir" not in sample
    assert sample["graft_weights"] == {1: "../a.pt"} and sample["vae"] == "../vae"
    assert load_plan(target).graft_init == "inherit" and load_plan(target).base_ckpt_path is None
    write_plan(replace(plan, grafted_ckpt_path=folder / "a.pt"), target, {"mha": []})
    content = read_yaml(target)
    assert content["grafts"] == [] and "operator" not in content
    assert not {"graft_indexes", "graft_weights"} & content["sample_config"].keys()
    assert content["sample_config"]["grafted_dit_ckpt_path"] == "../a.pt"
    assert load_plan(target).grafts == ()
