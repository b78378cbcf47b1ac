"""Graft YAMLs: what loads, and the one clear error for what does not."""

from pathlib import Path

import pytest
import yaml

from models.plan import load_plan, plan_from_flags, read_yaml, write_plan

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


BAD = {
    "unknown key": ({"grafted_indexes": [1]}, "unknown key 'grafted_indexes'"),
    "block 28": ({"graft_indexes": [1, 28]}, "block 28; legal blocks are 0 to 27"),
    "negative": ({"graft_indexes": [-1]}, "block -1"),
    "text block": ({"graft_indexes": ["one"]}, "block 'one'"),
    "boolean block": ({"graft_indexes": [True]}, "block True"),
    "duplicate": ({"graft_indexes": [3, 3]}, "block 3 stands twice"),
    "no block": ({"graft_indexes": []}, "names no block"),
    "model": ({"dit_model_name": "DiT-XXL/2"}, "legal names: DiT-B/2"),
    "image size": ({"image_size": 60}, "image_size 60"),
    "type": ({"image_size": "64"}, "image_size: '64' must be of type int"),
    "init": ({"graft_init": "magic"}, "graft_init: 'magic'; legal: fresh, inherit"),
    "classes": ({"num_classes": 0}, "num_classes: 0"),
    "weights": ({"graft_weights": {2: "a.pt"}}, "block 2 holds 0 grafts"),
    "weights name": ({"graft_weights": {1: 5}}, "graft_weights: 1: 5 must be a file name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_value_is_named(folder, case):
    sample, message = BAD[case]
    path = write(folder, **sample)
    with pytest.raises(ValueError) as error:
        load_plan(path)
    assert message in str(error.value) and (str(path) in str(error.value) or case == "image size")


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


def test_duplicate_yaml_key_is_refused(folder):
    path = folder / "twice.yaml"
    path.write_text("grafts: []\ngrafts: []\nsample_config: {}\n")
    with pytest.raises(ValueError, match="'grafts' stands twice"):
        load_plan(path)


def test_not_yaml_and_missing_file(folder):
    (folder / "x.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_plan(folder / "x.yaml")
    with pytest.raises(FileNotFoundError, match="absent.yaml: no such file"):
        load_plan(folder / "absent.yaml")


def test_hybrid_of_both_slots(folder):
    mlp = {"type": "mlp", "name": "mlp", "config_filepath": "mlp.yaml", "graft_indexes": [1, 2]}
    plan = load_plan(write(folder, grafts=[{**OPERATOR, "graft_indexes": [1]}, mlp]))
    assert plan.graft_at(1, "mha").operator == "swa" and plan.graft_at(2, "mha") is None
    assert plan.grafted_blocks("mlp") == (1, 2)
    again = {**OPERATOR, "graft_indexes": [0, 1]}
    with pytest.raises(ValueError, match="block 1 already takes 'swa' in its mha slot"):
        load_plan(write(folder, grafts=[{**OPERATOR, "graft_indexes": [1]}, again]))


def test_flags_must_agree_with_the_yaml(folder):
    path = write(folder)
    assert plan_from_flags(path, "DiT-Mini/2", 64, None).image_size == 64
    with pytest.raises(ValueError, match="--model DiT-XL/2.*says DiT-Mini/2"):
        plan_from_flags(path, "DiT-XL/2", None, None)
    with pytest.raises(ValueError, match="--model None"):
        plan_from_flags(None, None, None, None)
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
