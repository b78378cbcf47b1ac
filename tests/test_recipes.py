"""The entries' defaults are those of the published recipes; README's commands say the rest."""

import argparse
import re
import shlex
import sys

import pytest
import torch
from entries import REPOSITORY

import distill_operators
import evaluate_fid
import finetune_tinyfusion
import prune_by_learning
import sample_ddp_finetuned
from models.selection import LayerGates
from scripts import attention_locality
from training import arguments

# As DiT itself was trained; what --help says beside them sends to the recipes.
EXTENT = {"epochs": 1400, "global_batch_size": 256, "wandb": False, "compile": True}
SELECTION = {
    **EXTENT, "tau_range": [4.0, 0.1], "scaling_range": [100.0, 100.0], "lora_rank": 8,
    "lora_alpha": None, "lr": 1e-4, "gate_lr": 1e-3, "clip_grad": 1.0, "ema_decay": 0.999,
    "class_dropout": 0.1, "groups": None,
}  # fmt: skip
FINAL = {
    **EXTENT, "lr": 1e-4, "lr_schedule": "cosine", "lr_end_factor": 0.5, "clip_grad": 1.0,
    "ema_decay": 0.9999, "weight_decay": 0.0, "warmup_steps": 0, "class_dropout": 0.1,
    "kd_weight": 0.9, "feature_weight": 1e-2, "lora_rank": 64, "distill": False,
}  # fmt: skip
STAGE_1 = {
    "num_samples": 8000, "epochs": 200, "global_batch_size": 64, "lr": 1e-4, "clip_grad": 10.0,
    "loss_mha": "l1", "loss_mlp": "l2", "loss_pair": "l1", "huber_delta": 1.0,
    "lr_schedule": "milestones", "lr_gamma": 0.5, "gate_weighting": False,
}  # fmt: skip
STAGE_2 = {
    "num_images": 128_000, "max_steps": 50_000, "global_batch_size": 256, "lr": 1e-4,
    "lr_schedule": "constant", "warmup_steps": 1000, "clip_grad": 10.0, "ema_decay": 0.9999,
    "weight_decay": 0.0, "class_dropout": 0.1,
}  # fmt: skip


def settings(module, monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    return vars(module.parse_args())


@pytest.mark.parametrize(
    ("module", "recipe"),
    [(prune_by_learning, SELECTION), (finetune_tinyfusion, FINAL), (distill_operators, STAGE_1)],
)
def test_defaults_are_the_recipes(module, recipe, monkeypatch):
    found = settings(module, monkeypatch, ["--data-path", "d", "--config", "c.yaml"])
    assert {name: found[name] for name in recipe} == recipe


def test_what_stands_elsewhere_than_in_the_flags():
    """Groups, the start of the gates, epochs of milestones, the paper's sampling."""
    assert arguments.GROUPS["grafts"] == "2:4"
    gates = LayerGates(28, arguments.GROUPS["grafts"])
    assert len(gates.gumbel_gates) == 7
    assert all((gate == torch.tensor(0.02)).all() for gate in gates.gumbel_gates)
    unset = argparse.Namespace(lr_schedule="milestones", milestones=None)
    assert arguments.milestones(unset, default=(50, 100, 150)) == [50, 100, 150]
    assert sample_ddp_finetuned.DEFAULTS_DIT == {
        "sampler": "ddpm", "num_sampling_steps": 250, "cfg_scale": 1.5, "cfg_channels": 3
    }  # fmt: skip
    measured = attention_locality.parse_args([])
    assert (measured.num_samples, measured.num_sampling_steps, measured.cfg_scale) == (250, 50, 1.5)
    assert evaluate_fid.parse_args(["r", "s"]).manifold_images == 10_000


@pytest.mark.parametrize("module", [prune_by_learning, finetune_tinyfusion])
def test_help_says_that_epochs_and_batch_are_not_the_recipes(module, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        settings(module, monkeypatch, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for flag, default in (("EPOCHS passes over the data", 1400), ("images a step, in all", 256)):
        assert re.search(rf"{flag}; DiT's own, for \w+ see above \(default: {default}\)", said)
    assert f"{module.__name__}.py --epochs " in said and "--global-batch-size 64" in said


def commands(entry):
    """README's commands of an entry, as lists of its flags."""
    text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(rf"^torchrun .*?{entry}\.py (.*)$", text, re.MULTILINE)
    return [shlex.split(flags) for flags in found]


def test_readme_has_the_recipes(monkeypatch):
    """Selection, final finetuning, Stage 2, parallel pairs; the steps are those of the papers."""
    (select, *_) = (
        settings(prune_by_learning, monkeypatch, c) for c in commands("prune_by_learning")
    )
    assert (select["epochs"], select["global_batch_size"]) == (6, 64)
    assert select["delta_w"] and select["lora"]
    final, stage_2, pairs, text = (
        settings(finetune_tinyfusion, monkeypatch, c) for c in commands("finetune_tinyfusion")
    )
    assert (final["epochs"], final["global_batch_size"]) == (20, 64)
    assert {**final, "epochs": 1400, "global_batch_size": 256}.items() >= FINAL.items()
    assert stage_2.items() >= STAGE_2.items()
    assert stage_2["epochs"] * (128_000 // 256) >= 50_000
    steps = pairs["num_images"] // pairs["global_batch_size"]
    assert [epoch * steps for epoch in pairs["milestones"]] == [75_000, 150_000]
    assert (pairs["lr_gamma"], pairs["lr"], pairs["warmup_steps"]) == (0.5, 1e-4, 1000)
    assert text["lora"] and text["lora_rank"] == 64
