"""training/knowledge.py: the losses against their definition, and the entry with --distill."""

import json
import sys

import pytest
import torch
import yaml

import finetune_tinyfusion
from diffusion import create_diffusion
from models.dit import DiT, build_dit
from models.grafting import build_grafted, load_plan
from training.knowledge import WithHidden, distilled_losses, masked_difference


def tiny(seed):
    torch.manual_seed(seed)
    model = DiT(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=5)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_losses_are_their_definition():
    student, teacher, diffusion = tiny(0), tiny(1), create_diffusion("")
    x, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    t, drop = torch.tensor([0, 10, 500, 999]), torch.tensor([False, True, False, True])
    labels = {"y": torch.tensor([0, 1, 2, 3]), "drop": drop}
    terms = distilled_losses(
        diffusion, WithHidden(student), WithHidden(teacher), x, t, noise, labels, 0.8, 0.05
    )
    plain = diffusion.training_losses(student, x, t, labels, noise=noise)
    torch.testing.assert_close(terms["mse"], plain["mse"])
    torch.testing.assert_close(terms["vb"], plain["vb"])
    x_t = diffusion.q_sample(x, t, noise)
    s, f = (model(x_t, t, labels["y"], drop=drop) for model in (student, teacher))
    kd = (s - f)[:, :4].square().mean((1, 2, 3)) + (s - f)[:, 4:].square().mean((1, 2, 3))
    torch.testing.assert_close(terms["kd"], kd)
    hidden = [WithHidden(m)(x_t, t, labels["y"], drop)[1] for m in (student, teacher)]
    assert len(hidden[0]) == 3 and not torch.equal(hidden[0][0], hidden[0][2])
    features = sum(masked_difference(a, b) for a, b in zip(*hidden, strict=True)) / 3
    torch.testing.assert_close(terms["features"], features)
    expected = 0.8 * kd + 0.2 * plain["loss"] + 0.05 * features
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].sum().backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_outliers_of_either_side_are_left_out():
    torch.manual_seed(0)
    student, teacher = torch.rand(2, 5, 40), torch.rand(2, 5, 40)
    expected = (student - teacher).square()
    keep = torch.ones_like(expected, dtype=torch.bool)
    student[0, 1, 2], teacher[0, 3, 4] = 50.0, -60.0
    keep[0, 1, 2] = keep[0, 3, 4] = False
    for x in (student, teacher):
        for sample in range(2):
            mean, std = x[sample].mean(), x[sample].std()
            keep[sample] &= (x[sample] - mean).abs() < 2 * std
    assert keep[0].sum() == 198  # beside the two, all lie within
    found = masked_difference(student, teacher)
    for sample in range(2):
        assert found[sample].item() == pytest.approx(expected[sample][keep[sample]].mean().item())


def test_finetuning_with_a_teacher(monkeypatch, tmp_path, write_latents):
    write_latents(tmp_path / "latents", 8, classes=3)
    torch.manual_seed(0)
    base = build_dit("DiT-Mini/2", 8, num_classes=3)
    for parameter in base.final_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(base.state_dict(), tmp_path / "base.pt")
    (tmp_path / "swa.yaml").write_text("{}")
    sample = {"dit_model_name": "DiT-Mini/2", "image_size": 32, "num_classes": 3}
    sample |= {"base_ckpt_path": str(tmp_path / "base.pt"), "graft_indexes": [1]}
    operator = {"type": "mha", "name": "swa", "config_filepath": str(tmp_path / "swa.yaml")}
    config = tmp_path / "plan.yaml"
    config.write_text(yaml.safe_dump({"operator": operator, "sample_config": sample}))

    def finetune(name, *flags):
        command = ["finetune_tinyfusion.py", "--config", config, "--data-path"]
        command += [tmp_path / "latents", "--results-dir", tmp_path, "--prefix", name, "--device"]
        command += ["cpu", "--global-batch-size", 4, "--log-every", 1, "--max-steps", 2, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        finetune_tinyfusion.main(finetune_tinyfusion.parse_args())
        return tmp_path / f"{name}-DiT-Mini-2"

    run = finetune("kd", "--distill", "--num-images", 6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line, beta in zip(lines, (1e-2, 5e-3), strict=True):
        own = 0.9 * line["kd"] + 0.1 * (line["mse"] + line["vb"]) + beta * line["features"]
        assert line["loss"] == pytest.approx(own, rel=1e-5)
    held = torch.load(run / "checkpoints" / "0000002.pt", weights_only=True)
    assert "blocks.1.attn.Wqkv.weight" in held["model"]  # the model's own names, without a teacher
    finished, report = build_grafted(load_plan(run / "finetuned.yaml"))
    assert set(report.counts()) == {"checkpoint"}
    for name, tensor in finished.state_dict().items():
        assert torch.equal(tensor, held["ema"][name]), name
    with pytest.raises(ValueError, match="had distill True, this one has False"):
        finetune("kd", "--num-images", 6, "--resume", "auto")
    with pytest.raises(ValueError, match="9 images are asked for and the latents hold 8"):
        finetune("many", "--num-images", 9)
    sample["base_ckpt_path"] = None
    config.write_text(yaml.safe_dump({"operator": operator, "sample_config": sample}))
    with pytest.raises(ValueError, match="--distill needs .* it has no base_ckpt_path"):
        finetune("baseless", "--distill")
