"""All five entries on the miniature testbed: alone and as two processes, resumed, and misused."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from entries import MINI, REPOSITORY, draw_samples, encode, finetune, run, select

from diffusion import noise
from latents.labels import read_labels
from models.files import file_sha256
from models.plan import load_plan


@pytest.fixture(scope="module")
def pair(work):
    """Selection, finetuning and sampling, each as two processes; later tests read the outputs."""
    encode(work, "latents1")
    select(work, "pair", "--max-steps", 2, processes=2)
    held_out = ["--val-data-path", work / "latents1"]
    finetune(work, "tuned", "--max-steps", 2, *held_out, processes=2)
    checkpoint = work / "runs/tuned-DiT-Mini-2/checkpoints/0000002.pt"
    common = ["--config", work / "runs/pair-DiT-Mini-2/selected.yaml"]
    common += ["--graft-fusion-ckpt-path", checkpoint, "--num-fid-samples", 5]
    draw_samples(work, "two", *common, "--per-proc-batch-size", 2, processes=2)
    return common


def test_extraction_is_the_same_from_one_and_two_processes(work, pair):
    one, two = (
        {
            path.relative_to(work / name): path.read_bytes()
            for path in (work / name).rglob("*")
            if path.is_file() and path.name not in ("log.txt", "metrics.jsonl")
        }
        for name in ("latents1", "latents")
    )
    assert len([name for name in one if name.suffix == ".npy"]) == 6  # 3 shards, moments and labels
    assert one == two


def test_selection_writes_its_whole_answer(work, pair):
    folder = work / "runs" / "pair-DiT-Mini-2"
    answer = json.loads((folder / "selection.json").read_text())
    assert len(answer["kept"]) == len(answer["grafted"]) == 14
    assert sorted(answer["kept"] + answer["grafted"]) == list(range(28))
    assert answer["device"] == "cpu" and answer["hardware"].endswith(" processors (cpu)")
    for g, group in enumerate(answer["groups"]):
        assert group["blocks"] == list(range(4 * g, 4 * g + 4)) and len(group["kept"]) == 2
        assert 4 * g in group["kept"], "the block without a graft is pinned"
        assert sum(o["probability"] for o in group["options"]) == pytest.approx(1)
    plan = yaml.safe_load((folder / "selected.yaml").read_text())
    assert plan["sample_config"]["graft_indexes"] == answer["grafted"]
    assert (folder / "trajectory.png").stat().st_size > 10_000
    assert len((folder / "trajectory.jsonl").read_text().splitlines()) == 2
    assert (folder / "log.txt").is_file() and list((folder / "tensorboard").iterdir())


def test_samples_are_described_packed_and_scored(work, pair):
    folder = work / "samples" / "two"
    assert len(list(folder.glob("*.png"))) == 5
    packed = np.load(work / "samples" / "two.npz")["arr_0"]
    assert packed.shape == (5, 64, 64, 3) and packed.dtype == np.uint8
    record = json.loads((folder / "samples.json").read_text())
    assert record["complete"] and record["settings"]["num_samples"] == 5
    plan = load_plan(work / "runs/pair-DiT-Mini-2/selected.yaml")
    checkpoint = work / "runs/tuned-DiT-Mini-2/checkpoints/0000002.pt"
    vae = MINI / "vae" / "diffusion_pytorch_model.safetensors"
    origin = {
        "plan": plan.architecture(), "checkpoint_sha256": {"trained": file_sha256(checkpoint)},
        "sampler": "dpm++", "steps": 4, "cfg_scale": 1.5, "cfg_channels": 3, "labels": "random",
        "seed": 0, "vae_sha256": file_sha256(vae), "num_samples": 5,
    }  # fmt: skip
    assert {key: record["settings"][key] for key in origin} == origin
    assert {"git_revision", "torch", "time"} <= record.keys()
    assert record["hardware"].endswith(" processors (cpu)")
    assert (work / "samples" / "two-grid.png").is_file()
    score = ["evaluate_fid.py", work / "images", folder, "--feature-net", "mini"]
    run(*score, processes=2)
    again = json.loads((folder / "metrics.json").read_text())["metrics"]
    run(*score)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["metrics"]) == ["fd_mini", "precision", "recall"]
    assert metrics["metrics"]["fd_mini"] > 0
    assert metrics["metrics"] == pytest.approx(again, rel=1e-6)
    assert metrics["samples_json"] == record
    assert (metrics["protocol"], metrics["num_samples"]) == ("mini", 5)
    assert metrics["num_reference"] == 36 and metrics["git_revision"] == record["git_revision"]
    assert metrics["hardware"] == record["hardware"]
    assert metrics["reference"]["path"] == str(work / "images")
    assert metrics["samples"]["path"] == str(folder)


def test_one_process_draws_the_images_of_two_and_four(work, pair):
    draw_samples(work, "one", *pair, "--per-proc-batch-size", 5)
    draw_samples(work, "four", *pair, processes=4)
    packed = [np.load(work / "samples" / f"{n}.npz")["arr_0"] for n in ("one", "two", "four")]
    one, two, four = (array.astype(int) for array in packed)
    assert np.abs(one - two).max() <= 1 and np.abs(one - four).max() <= 1


def test_stopped_sampling_goes_on_and_refuses_to_mix(work, pair):
    folder = work / "samples" / "two"
    before = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    (folder / "000003.png").unlink()
    draw_samples(work, "two", *pair)
    after = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    assert sorted(after) == sorted(before)
    assert all(after[n] == before[n] for n in before if n != "000003.png")
    whole = before["000004.png"]
    for torn in (whole[:200], b""):
        (folder / "000004.png").write_bytes(torn)
        draw_samples(work, "two", *pair)
        assert (folder / "000004.png").read_bytes() == whole
    (folder / "000004.png").write_bytes(whole[:200] + whole[-12:])
    error = draw_samples(work, "two", *pair, fails=True)
    assert "000004.png cannot be read as an image" in error and "delete that file" in error
    assert "Traceback" not in error
    (folder / "000004.png").write_bytes(whole)
    error = draw_samples(work, "two", *pair, "--cfg-scale", 3.0, fails=True)
    assert "cfg_scale = 1.5, this run has 3.0" in error and "Traceback" not in error


def test_labels_of_a_file_are_the_classes_drawn(work, pair):
    """Those of --labels random, but for the images 1 and 3: these alone become others."""
    labels = noise.integers(0, noise.LABEL, torch.arange(7), 9).numpy()
    labels[[1, 3]] = (labels[[1, 3]] + 4) % 9
    (work / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    np.save(work / "labels.npy", labels)
    for kind in ("txt", "npy"):
        draw_samples(work, kind, *pair, "--labels", work / f"labels.{kind}")
    packed = [np.load(work / "samples" / f"{n}.npz")["arr_0"] for n in ("two", "txt", "npy")]
    two, text, numbers = packed
    assert np.array_equal(text, numbers)
    changed = np.abs(text.astype(int) - two).max(axis=(1, 2, 3))
    assert (changed[[0, 2, 4]] <= 1).all() and (changed[[1, 3]] > 10).all()
    record = json.loads((work / "samples" / "npy" / "samples.json").read_text())["settings"]
    assert record["labels_sha256"] == file_sha256(work / "labels.npy")
    shutil.copy(work / "labels.npy", work / "moved.npy")  # the hash proves that it is the same
    (work / "samples" / "npy.npz").unlink()
    draw_samples(work, "npy", *pair, "--labels", work / "moved.npy", "--no-npz")
    assert not (work / "samples" / "npy.npz").exists()
    np.save(work / "labels.npy", (labels + 1) % 9)
    error = draw_samples(work, "npy", *pair, "--labels", work / "labels.npy", fails=True, here=True)
    assert "the images there were made with labels_sha256 = " in error


def test_files_without_fitting_labels_are_refused(tmp_path):
    def refused(name, content, match):
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content, encoding="latin-1")
        else:
            np.save(path, content)
        with pytest.raises(ValueError, match=match) as error:
            read_labels(str(path), 3, 9)
        assert str(error.value).startswith((f"--labels {path}: ", f"--labels {path}, line 2: "))

    (tmp_path / "good.txt").write_text("0\n8\n 2\n1")
    assert read_labels(str(tmp_path / "good.txt"), 3, 9).tolist() == [0, 8, 2, 1]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf0\r\n8\r\n2")
    assert read_labels(str(tmp_path / "marked.txt"), 3, 9).tolist() == [0, 8, 2]
    refused("short.txt", "1\n2\n", "2 labels for 3 images")
    refused("none.txt", "", "0 labels for 3 images")
    refused("words.txt", "1\ncat\n2\n", "one whole number a line.*'cat'")
    refused("blank.txt", "1\n\n2\n", "one whole number a line")
    refused("latin.txt", "1\n\xe9\n2\n", "latin.txt, line 2: is not UTF-8")
    refused("range.txt", "0\n9\n1\n", "label 9 of image 1 is outside the 9 classes, 0 to 8")
    refused("below.npy", np.array([0, 1, -1]), "label -1 of image 2")
    refused("floats.npy", np.zeros(3), r"holds float64 \[3\]")
    refused("table.npy", np.zeros((3, 1), dtype=int), r"holds int64 \[3, 1\]")
    refused("torn.npy", "no array", "a .npy of whole numbers")
    with pytest.raises(FileNotFoundError, match="use random, balanced or a file"):
        read_labels("randm", 3, 9)


def states(work, name, step):
    path = work / "runs" / f"{name}-DiT-Mini-2" / "checkpoints" / f"{step:07d}.pt"
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("stage", [select, finetune])
def test_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(work, pair, stage):
    name = stage.__name__
    stage(work, f"whole-{name}", "--max-steps", 3, "--ckpt-every", 2)
    source = work / "runs" / f"whole-{name}-DiT-Mini-2" / "checkpoints"
    target = work / "runs" / f"broken-{name}-DiT-Mini-2" / "checkpoints"
    target.mkdir(parents=True)
    shutil.copy(source / "0000002.pt", target)
    (target / "0000003.pt").write_bytes(b"torn")  # what a crash leaves is passed over
    stage(work, f"broken-{name}", "--max-steps", 3, "--resume", "auto")
    whole, broken = states(work, f"whole-{name}", 3), states(work, f"broken-{name}", 3)
    for key in ("model", "ema", "opt", "sched"):
        torch.testing.assert_close(whole[key], broken[key], rtol=0, atol=0)
    assert whole["train_steps"] == 3 and whole["position"] == broken["position"]


def test_repeated_and_small_sampling_runs_have_nothing_to_fail_on(work, pair):
    record = work / "samples" / "two" / "samples.json"
    draw_samples(work, "two", *pair, processes=2)
    assert json.loads(record.read_text())["complete"]
    draw_samples(work, "single", *pair, "--num-fid-samples", 1, processes=2)
    assert len(list((work / "samples" / "single").glob("*.png"))) == 1


def test_run_folders_are_not_mixed(work, pair):
    error = finetune(work, "tuned", "--max-steps", 3, fails=True)
    assert "holds a run already (0000002.pt)" in error and "--resume auto" in error
    error = finetune(work, "tuned", "--max-steps", 2, "--resume", "auto", "--lr", 1, fails=True)
    assert "had lr 0.0001, this one has 1.0" in error


def test_merged_selection_is_a_start_for_finetuning(work, pair):
    merged = work / "merged" / "model.pt"
    select(work, "merged", "--max-steps", 1, "--save-model", merged)
    finetune(work, "from-merged", "--config", merged.with_suffix(".yaml"), "--max-steps", 1)
    log = (work / "runs/from-merged-DiT-Mini-2/log.txt").read_text()
    assert "292 tensors checkpoint" in log and "tensors base" not in log


def test_gates_alone_and_full_updates_train(work, pair):
    """Without --lora all weights move, without --delta-w none does."""
    common = ["prune_by_learning.py", "--config", "configs/mini/75p_swa.yaml", "--max-steps", 1]
    common += ["--data-path", work / "latents", "--results-dir", work / "runs"]
    common += ["--global-batch-size", 4, "--log-every", 1]
    run(*common, "--prefix", "gates")
    run(*common, "--prefix", "full", "--delta-w")
    gates, full = states(work, "gates", 1)["model"], states(work, "full", 1)["model"]
    moved = [n for n in gates if not torch.equal(gates[n], full[n])]
    assert any("graft" in n for n in moved) and any("mlp.fc1" in n for n in moved)
    assert "dit.pos_embed" not in moved


def test_two_processes_train_like_one(work, pair):
    finetune(work, "alone", "--max-steps", 2, "--val-data-path", work / "latents1")
    lines = [
        [
            json.loads(line)
            for line in (work / "runs" / f"{n}-DiT-Mini-2/metrics.jsonl").read_text().splitlines()
        ]
        for n in ("alone", "tuned")
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 2]
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        for key in {"loss", "grad_norm", "val_loss/latents1"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-4 if key == "grad_norm" else 1e-5)


BAD = {
    "no data": (finetune, ["--data-path", "nowhere"], "nowhere"),
    "batch": (finetune, ["--global-batch-size", 3], "--global-batch-size 3 is not divisible"),
    "huge batch": (finetune, ["--global-batch-size", 64], "holds 36 images, fewer than"),
    "classes": (finetune, ["--config", "SMALL"], "label 8 is outside the 5 classes"),
    "config": (select, ["--config", "absent.yaml"], "absent.yaml: no such file"),
    "groups": (select, ["--groups", "2:5"], "groups '2:5': 5 does not divide the depth 28"),
    "pins": (select, ["--pin", 1, 2], "keeps 2 of 4 blocks but 3 of them are pinned"),
    "lora": (select, ["--resume", "gone.pt"], "--resume gone.pt: no such checkpoint"),
    "base": (select, ["--load-weight", "gone.pt"], "gone.pt"),
    "precision": (select, ["--precision", "fp16"], "argument --precision: invalid choice"),
    "steps": (finetune, ["--max-steps", 0], "--max-steps: '0' is not a whole number of at least 1"),
    "device": (finetune, ["--device", "cuda:x"], "--device cuda:x: use cpu, cuda"),
    "slots": (select, ["--config", "configs/mini/no_graft.yaml"], "has no grafts"),
    "other run": (finetune, ["--resume", "SELECTION"], "is of prune_by_learning.py, not of"),
    "folder": (finetune, ["--results-dir", "README.md"], "README.md/bad-folder-DiT-Mini-2 cannot"),
    "untrained": (draw_samples, ["--config", "configs/mini/no_graft.yaml"], "have no weights"),
    "many steps": (draw_samples, ["--num-sampling-steps", 2000], "--num-sampling-steps 2000"),
    "vae": (draw_samples, ["--vae", "ema"], "sd-vae-ft-ema"),
    "guidance": (draw_samples, ["--cfg-scale", 0.5], "--cfg-scale: '0.5' is not a number of at"),
    "checkpoint": (draw_samples, ["--graft-fusion-ckpt-path", "VAE"], "holds no blocks; DiT-Mini"),
}


@pytest.fixture(scope="module")
def refusals(work, pair):
    """The error output of every bad command; of a few, as processes of their own."""
    small = work / "small.yaml"
    text = (REPOSITORY / "configs/mini/75p_swa.yaml").read_text()
    small.write_text(
        text.replace("num_classes: 9", "num_classes: 5").replace(
            "config_filepath: swa.yaml", f"config_filepath: {REPOSITORY}/configs/mini/swa.yaml"
        )
    )
    names = {
        "SMALL": small,
        "VAE": MINI / "vae" / "diffusion_pytorch_model.safetensors",
        "SELECTION": work / "runs/pair-DiT-Mini-2/checkpoints/0000002.pt",
    }

    def refused(case: str) -> str:
        stage, flags, _ = BAD[case]
        more = ["--config", "configs/mini/75p_swa.yaml"] if stage is draw_samples else []
        flags = [names.get(flag, flag) for flag in flags]
        processes = 2 if case == "batch" else 0
        here = case not in ("batch", "no data", "config", "untrained")
        return stage(work, f"bad-{case}", *more, *flags, fails=True, processes=processes, here=here)

    return {case: refused(case) for case in BAD}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_any_work(work, refusals, case):
    message, error = BAD[case][2], refusals[case]
    assert message in error and "error: " in error
    if case != "batch":  # torchrun adds a report of its own
        assert len(error.strip().splitlines()) == 1, error
    assert not (work / "runs" / f"bad-{case}-DiT-Mini-2").exists()
    assert not (work / "samples" / f"bad-{case}").exists()
