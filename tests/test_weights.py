"""Weight files: nesting, wrappers in names, and what is refused."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from models.weights import read_checkpoint, read_state

ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


class Malicious:
    """Makes the folder `ran` when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def pickled(tmp_path):
    return saved(tmp_path, {"ema": {"a": torch.arange(1000.0), "b": TWO}}).read_bytes()


def tensors(tmp_path):
    save_file({"a": torch.arange(1000.0)}, tmp_path / "y.safetensors")
    return (tmp_path / "y.safetensors").read_bytes()


def script(tmp_path):
    pickled(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.writestr("x/constants.pkl", b"")  # what tells such a file
    return (tmp_path / "x.pt").read_bytes()


def old_format(tmp_path):
    torch.save({"a": ONE}, tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    return (tmp_path / "y.pt").read_bytes()


UNREADABLE = {
    "nothing": ("x.pt", lambda _: b"", "it is empty"),
    "zeros": ("x.pt", lambda _: bytes(5000), "it is empty"),
    "half": ("x.pt", lambda p: pickled(p)[:2000], "it is torn or damaged"),
    "end cut off": ("x.pt", lambda p: pickled(p)[:-1], "it is torn or damaged"),
    "half safetensors": ("x.safetensors", lambda p: tensors(p)[:2000], "it is torn or damaged"),
    "long safetensors": ("x.safetensors", lambda p: tensors(p) + b"x", "it is torn or damaged"),
    "web page": ("x.pt", lambda _: b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
    "other web page": ("x.safetensors", lambda _: b"<html>Log in</html>", "it is a web page"),
    "git lfs": (
        "x.pt",
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "it is a Git LFS pointer",
    ),
    "message": ("x.pt", lambda _: b'{"error": "denied"}', "it is text, not weights .'{.error"),
    "pickle": ("x.pt", lambda p: pickle.dumps({"a": Malicious(p)}), "it is a bare pickle"),
    "old format": ("x.pt", old_format, "it has the format of PyTorch before 1.6"),
    "script": ("x.pt", script, "is a TorchScript program: save its state_dict"),
    "safetensors as pt": ("x.pt", tensors, "the safetensors format: give it the suffix .safet"),
    "pt as safetensors": ("x.safetensors", pickled, "PyTorch's format: give it the suffix .pt"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_whole_weight_file_is_one_line_that_says_what_it_is(tmp_path, case):
    name, content, message = UNREADABLE[case]
    content = content(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"weights {tmp_path}/{name}.*{message}") as error:
        read_state(tmp_path / name)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_pickles_of_more_than_tensors_are_refused_by_what_they_hold(tmp_path):
    path = saved(tmp_path, {"ema": {"a": ONE}, "hook": Malicious(tmp_path)})
    message = r"x.pt is refused: it holds Python objects \(posix.mkdir\) beside tensors"
    with pytest.raises(ValueError, match=message) as error:
        read_state(path)
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(error.value)
    saved(tmp_path, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU(), torch.nn.Tanh()))
    with pytest.raises(ValueError, match=r"refused: .*torch.nn.modules.\w+.GELU, .* and 1 more"):
        read_state(path)


def test_damage_that_leaves_the_ends_whole_is_found(tmp_path):
    whole = pickled(tmp_path)
    path = tmp_path / "x.pt"
    hole = whole.index(torch.arange(500.0, 504.0).numpy().tobytes())
    path.write_bytes(whole[:hole] + bytes(16) + whole[hole + 16 :])
    with pytest.raises(ValueError, match="x.pt: tensor a is damaged .its checksum is wrong"):
        read_state(path)
    path.write_bytes(whole.replace(b"ema", b"emb", 1))
    with pytest.raises(ValueError, match="x.pt cannot be read: it is torn or damaged .*CRC"):
        read_state(path)
    path.write_bytes(whole)
    assert torch.equal(read_state(path)["a"], torch.arange(1000.0))


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        whole = pickled(tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_state(tmp_path / "x.pt")["a"], torch.arange(1000.0))
    (tmp_path / "x.pt").write_bytes(
        whole.replace(b"\x80\x02}q", b"\x80\x02]q")
    )  # a list, not a dict
    with pytest.raises(ValueError, match="x.pt cannot be read: it is damaged, or no weight file"):
        read_state(tmp_path / "x.pt")


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
    for content in ({5: ONE}, {"ema": {5: ONE}}):
        with pytest.raises(ValueError, match="x.pt: entry 5 has a name of type int, not text"):
            read_state(saved(tmp_path, content))
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
