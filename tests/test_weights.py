"""Weight files: nesting, wrappers in names, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from models.weights import read_checkpoint, read_state

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_torn_and_malicious_files_are_refused(tmp_path):
    whole = saved(tmp_path, {"a": torch.zeros(1000)}).read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="torn.pt"):
        read_state(tmp_path / "torn.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "hook": pytest.Item}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is refused"):
        read_state(tmp_path / "evil.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="torn.safetensors"):
        read_state(tmp_path / "torn.safetensors")


def test_wrappers_go_as_whole_components_only(tmp_path):
    names = ["module.a.weight", "_orig_mod.module.b", "c._orig_mod.module.d", "submodule.e",
             "f.module", "g_orig_mod.h"]  # fmt: skip
    state = read_state(saved(tmp_path, {"ema": dict.fromkeys(names, ONE)}))
    assert list(state) == ["a.weight", "b", "c.d", "submodule.e", "f.module", "g_orig_mod.h"]


def test_two_names_for_one_tensor_are_refused(tmp_path):
    with pytest.raises(ValueError, match="module.a and another entry both stand for a"):
        read_state(saved(tmp_path, {"model": {"a": ONE, "module.a": TWO}}))


def test_nesting_falls_to_the_first_that_holds_something(tmp_path):
    for content, value in (
        ({"ema": {"a": ONE}, "model": {"a": TWO}}, ONE),
        ({"ema": {}, "model": {"a": TWO}}, TWO),
        ({"state_dict": {"model.a": TWO}}, TWO),
        ({"model": {"state_dict": {"a": TWO}}}, TWO),
        ({"a": ONE}, ONE),
        ({"model.a": TWO, "ema.a": ONE}, ONE),
    ):
        state = read_state(saved(tmp_path, content))
        assert state.keys() == {"a"} and torch.equal(state["a"], value), content
    for content in ({"ema": {}}, {}):
        with pytest.raises(ValueError, match="no state dict .found an empty one"):
            read_state(saved(tmp_path, content))
    with pytest.raises(ValueError, match="no state dict .found Tensor"):
        read_state(saved(tmp_path, ONE))
    with pytest.raises(ValueError, match="entry 'step' is of type int"):
        read_state(saved(tmp_path, {"ema": {"a": ONE, "step": 3}}))


def test_prefixes_of_all_names_of_a_safetensors_file_go(tmp_path):
    save_file({"model.a": TWO, "ema.a": ONE, "ema.b.c": TWO.clone()}, tmp_path / "x.safetensors")
    state = read_state(tmp_path / "x.safetensors")
    assert state.keys() == {"a", "b.c"} and torch.equal(state["a"], ONE)
    save_file({"model.a": TWO, "other": ONE}, tmp_path / "x.safetensors")
    assert read_state(tmp_path / "x.safetensors").keys() == {"model.a", "other"}


def test_only_plans_of_this_repository_come_with_the_weights(tmp_path):
    plan = {"model_name": "DiT-S/2", "image_size": 256, "num_classes": 9, "grafts": []}
    assert read_checkpoint(saved(tmp_path, {"model": {"a": ONE}, "plan": plan}))[1] == plan
    for foreign in ("a plan", {"grafts": []}, ONE):
        assert read_checkpoint(saved(tmp_path, {"model": {"a": ONE}, "plan": foreign}))[1] is None


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone.pt: no such file"):
        read_state(tmp_path / "gone.pt")
