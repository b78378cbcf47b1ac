"""distill_operators.py and training/distillation.py: independence, resume, refusals, results."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

import distill_operators
from latents.loader import balanced_rows
from models.dit import DiT, build_dit
from models.grafting import build_grafted, load_plan
from models.operators import build_operator
from training import distributed
from training.distillation import Students, Teacher
from training.optimizer import adamw, schedule


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_latents):
    """Random latents of 4x8x8 (one file a picture) and a DiT-Mini/2 with live blocks as teacher."""
    folder = tmp_path_factory.mktemp("distill")
    write_latents(folder / "latents", 12, classes=3)
    torch.manual_seed(0)
    teacher = build_dit("DiT-Mini/2", 8, num_classes=3)
    for name, parameter in teacher.named_parameters():
        if "adaLN" in name:  # zero at the start: no block would do anything
            torch.nn.init.normal_(parameter, std=0.05)
    torch.save(teacher.state_dict(), folder / "base.pt")
    return folder


def plan_file(folder, name, grafts, **sample):
    """A YAML of [(slot, operator, blocks)] on the module's teacher."""
    (folder / "plain.yaml").write_text("{}")
    entries = [
        {"type": s, "name": o, "config_filepath": str(folder / "plain.yaml"), "graft_indexes": b}
        for s, o, b in grafts
    ]
    sample = {"base_ckpt_path": str(folder / "base.pt"), **sample}
    sample |= {"dit_model_name": "DiT-Mini/2", "image_size": 32, "num_classes": 3}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"grafts": entries, "sample_config": sample}))
    return path


def distill(monkeypatch, folder, config, name, *flags):
    """Runs the entry in this process; its run folder."""
    command = ["distill_operators.py", "--config", config, "--data-path", folder / "latents"]
    command += ["--results-dir", folder, "--prefix", name, "--num-samples", 8, "--val-samples", 4]
    command += ["--global-batch-size", 4, "--epochs", 2, "--log-every", 1, "--lr", 1e-3]
    monkeypatch.setattr(sys, "argv", [str(w) for w in [*command, "--device", "cpu", *flags]])
    try:
        distill_operators.main(distill_operators.parse_args())
    finally:
        distributed.release()
    return folder / f"{name}-DiT-Mini-2"


def weights(run):
    files = sorted((run / "operators").glob("*.pt"))
    return {f.name: torch.load(f, weights_only=True)["model"] for f in files}


def test_blocks_together_equal_blocks_apart(monkeypatch, folder):
    """Hyena in two blocks and an MLP beside one of them: as if each were alone."""
    parts = [("mha", "hyena_y", [1]), ("mha", "hyena_y", [4]), ("mlp", "mlp_hyena_x", [4])]
    apart = {}
    for i, part in enumerate(parts):
        apart |= weights(distill(monkeypatch, folder, plan_file(folder, f"p{i}", [part]), f"p{i}"))
    grafts = [("mha", "hyena_y", [1, 4]), ("mlp", "mlp_hyena_x", [4])]
    run = distill(monkeypatch, folder, plan_file(folder, "all", grafts), "all")
    together = weights(run)
    assert len(together) == 3 and together.keys() == apart.keys()
    for name, tensors in together.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, apart[name][key], rtol=1e-5, atol=1e-6)
    plan = load_plan(run / "distilled.yaml")
    model, report = build_grafted(plan)
    assert report.counts()["graft_weights"] == 6 + 6 + 6 and "fresh" not in report.counts()
    assert torch.equal(
        model.blocks[4].attn.in_proj.weight, together["block04.mha.hyena_y.pt"]["in_proj.weight"]
    )
    summary = json.loads((run / "distillation.json").read_text())["operators"]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for name, found in summary.items():
        seen = [line[f"val_loss/{name}"] for line in lines if f"val_loss/{name}" in line]
        assert found["val_loss"] == min(seen) < seen[0]


def test_interrupted_run_ends_like_an_undisturbed_one(monkeypatch, folder):
    plan = plan_file(folder, "resume", [("mha", "swa", [2, 3])])
    flags = ["--ckpt-every", 2, "--val-every", 1]
    whole = distill(monkeypatch, folder, plan, "whole", *flags)
    target = folder / "broken-DiT-Mini-2" / "checkpoints"
    target.mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "0000002.pt", target)
    broken = distill(monkeypatch, folder, plan, "broken", *flags, "--resume", "auto")
    ends = [torch.load(r / "checkpoints/0000004.pt", weights_only=True) for r in (whole, broken)]
    for key in ("model", "opt", "best"):
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=0, atol=0)
    assert ends[0]["position"] == ends[1]["position"] and len(ends[0]["position"]) == 10
    for name, tensors in weights(whole).items():
        torch.testing.assert_close(tensors, weights(broken)[name], rtol=0, atol=0)


def test_a_block_that_fails_is_named_and_leaves_the_others(monkeypatch, folder):
    build = distill_operators.build_students

    def spoilt(*args):
        teacher, students, *rest = build(*args)
        with torch.no_grad():
            students[4, "mha"].in_proj.weight[0, 0] = float("nan")
        return teacher, students, *rest

    plan = plan_file(folder, "nan", [("mha", "hyena_x", [1, 4])])
    good = weights(distill(monkeypatch, folder, plan, "good"))
    monkeypatch.setattr(distill_operators, "build_students", spoilt)
    with pytest.raises(ValueError, match=r"^block04.mha: never finite .* without a distilled.yaml"):
        distill(monkeypatch, folder, plan, "nan")
    run = folder / "nan-DiT-Mini-2"
    log = (run / "log.txt").read_text()
    assert "mean loss of 1/2 0." in log and "relative error at most nan%, block04.mha" in log
    kept = weights(run)
    assert list(kept) == ["block01.mha.hyena_x.pt"] and not (run / "distilled.yaml").exists()
    torch.testing.assert_close(kept, {n: good[n] for n in kept}, rtol=0, atol=0)


def test_operators_that_never_get_better_are_named(monkeypatch, folder):
    plan = plan_file(folder, "wild", [("mha", "hyena_x", [1, 4])])
    message = r"^block01.mha, block04.mha: never better in validation than it began.* Lower --lr"
    with pytest.raises(ValueError, match=message):
        distill(monkeypatch, folder, plan, "wild", "--lr", 1e3)
    run = folder / "wild-DiT-Mini-2"
    found = json.loads((run / "distillation.json").read_text())["operators"]
    assert {operator["step"] for operator in found.values()} == {0}


@pytest.mark.parametrize(
    ("grafts", "sample", "flags", "message"),
    [
        ([("mha", "swa", [1])], {}, ["--num-samples", 9], "holds 12 images, fewer than --num-samp"),
        ([("mlp", "mlp", [1])], {"graft_init": "inherit"}, [], "block 1: mlp .* nothing to learn"),
        ([], {}, [], "no grafts and no parallel pairs; there is nothing to distill"),
        ([("mha", "swa", [1])], {"base_ckpt_path": None}, [], "has no base_ckpt_path"),
        ([("mha", "swa", [1])], {"base_ckpt_path": "THIN"}, [], r"thin.pt: .* has shape"),
    ],
)
def test_bad_input(monkeypatch, folder, grafts, sample, flags, message):
    if sample.get("base_ckpt_path") == "THIN":
        thin = DiT(input_size=8, hidden_size=64, depth=28, num_heads=4, num_classes=3)
        torch.save(thin.state_dict(), folder / "thin.pt")
        sample = {"base_ckpt_path": str(folder / "thin.pt")}
    plan = plan_file(folder, "bad", grafts, **sample)
    with pytest.raises(ValueError, match=message):
        distill(monkeypatch, folder, plan, "bad", *flags)
    assert not (folder / "bad-DiT-Mini-2").exists()


def test_teacher_hands_over_what_the_blocks_see():
    """Against hooks on an untouched copy, in both slots; blocks after the last one do not run."""
    torch.manual_seed(0)
    dit = DiT(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=5)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 4])
    drop = torch.tensor([False, True])
    seen = {}
    dit.eval()
    slots = [(1, "mlp"), (0, "mha")]
    for block, slot, name in ((1, "mlp", "mlp"), (0, "mha", "attn")):
        getattr(dit.blocks[block], name).register_forward_hook(
            lambda _, h, f, key=(block, slot): seen.update({key: (h[0], f)})
        )
    dit(*batch, drop=drop)
    c = dit.t_embedder(batch[1]) + dit.y_embedder(batch[2], drop)
    expected = [
        dit.blocks[1].adaLN_modulation(c)[:, 160:],
        dit.blocks[0].adaLN_modulation(c)[:, 64:96],
    ]
    inputs, outputs, gates = Teacher(dit, slots)(*batch, drop)
    assert len(dit.blocks) == 2
    for i, slot in enumerate(slots):
        torch.testing.assert_close((inputs[i], outputs[i]), seen[slot])
        torch.testing.assert_close(gates[i], expected[i])


def test_losses_are_those_of_the_paper():
    h, f, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4) * 2, torch.randn(2, 4)
    error = h - f
    huber = torch.where(error.abs() < 0.5, error**2 / 2, 0.5 * (error.abs() - 0.25))
    for kind, expected in (("l1", error.abs()), ("l2", error**2), ("huber", huber)):
        students = Students({(0, "mha"): torch.nn.Identity()}, {"mha": kind}, 0.5, False)
        losses, squares = students([h], [f], [gate])
        torch.testing.assert_close(losses[0], expected.mean())
        torch.testing.assert_close(squares[:, 0].sqrt(), torch.stack([error.norm(), f.norm()]))
    weighed = Students({(0, "mha"): torch.nn.Identity()}, {"mha": "l1"}, 0.5, True)
    torch.testing.assert_close(
        weighed([h], [f], [gate])[0][0], (error * gate[:, None]).abs().mean()
    )


@pytest.mark.parametrize(
    ("slot", "kind", "steps", "lr"), [("mha", "l1", 1000, 1e-2), ("mlp", "l2", 2500, 3e-2)]
)
def test_self_graft_of_one_block_is_learned(slot, kind, steps, lr):
    torch.manual_seed(0)
    dit = DiT(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    for name, parameter in dit.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    config = {"dim": 16, "num_heads": 2} if slot == "mha" else {"d_model": 16}
    teacher = Teacher(dit, [(1, slot)])
    students = Students({(1, slot): build_operator(slot, **config)}, {slot: kind}, 1.0, False)
    optimizer = adamw([{"params": [*students.parameters()], "lr": lr}], 0.0)
    rate = schedule(optimizer, "cosine", total_steps=steps, end_factor=0.01)
    for _ in range(steps):
        batch = torch.randn(16, 4, 8, 8), torch.randint(1000, (16,)), torch.randint(5, (16,))
        losses, (wrong, whole) = students(*teacher(*batch, torch.zeros(16, dtype=torch.bool)))
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        rate.step()
    assert (wrong / whole).sqrt() < 0.05


def test_rows_are_balanced_and_nested():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 7)
    rows = balanced_rows(labels, 12, seed=3)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 4]
    assert torch.equal(balanced_rows(labels, 7, seed=3), rows[:7])
    assert len(set(balanced_rows(labels, 20, seed=3).tolist())) == 20
    assert not torch.equal(balanced_rows(labels, 12, seed=4), rows)
    with pytest.raises(ValueError, match="21 images are asked for and the latents hold 20"):
        balanced_rows(labels, 21, seed=3)
