"""Small models of parallel pairs, and plans of pairs on a small base, for the tests."""

import sys

import torch
import yaml

from models.dit import DiT, build_dit
from models.operators import build_operator
from models.restructure import parallelize

WIDTH, TOKENS = 32, 16


def tiny(depth=5, seed=0, pairs=((0, 1), (3, 4)), operators=()):
    """A DiT in float64 whose every tensor counts; operators: (block, attribute, name, config)."""
    torch.manual_seed(seed)
    model = DiT(input_size=8, hidden_size=WIDTH, depth=depth, num_heads=4, num_classes=5)
    for block, slot, name, config in operators:
        setattr(model.blocks[block], slot, build_operator(name, **config))
    parallelize(model, pairs)
    return scramble(model.double().eval())


def scramble(model):
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch=3):
    torch.manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, dtype=torch.float64)
    return x, torch.tensor([1, 500, 900])[:batch], torch.tensor([0, 2, 5])[:batch]


def fill(folder, write_latents):
    """Puts latents of 4x8x8, a live DiT-Mini/2 as base, and an operator file into a folder."""
    write_latents(folder / "latents", 12, classes=3)
    torch.manual_seed(0)
    base = build_dit("DiT-Mini/2", 8, num_classes=3)
    for name, parameter in base.named_parameters():
        if "adaLN" in name or "final" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.save(base.state_dict(), folder / "base.pt")
    (folder / "plain.yaml").write_text("{}")
    return folder


def plan_file(folder, name, restructured, grafts=(), **sample):
    """A YAML of pairs and of [(slot, operator, blocks)] over the module's base."""
    entries = [
        {"type": s, "name": o, "config_filepath": str(folder / "plain.yaml"), "graft_indexes": b}
        for s, o, b in grafts
    ]
    sample = {"base_ckpt_path": str(folder / "base.pt"), **sample}
    sample |= {"dit_model_name": "DiT-Mini/2", "image_size": 32, "num_classes": 3}
    content = {"grafts": entries, "sample_config": sample}
    if restructured is not None:
        content["restructure"] = restructured
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def some(*firsts):
    return {"parallel_pairs": [[a, a + 1] for a in firsts]}


def enter(monkeypatch, entry, *flags):
    words = [f"{entry.__name__}.py", *flags, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    entry.main(entry.parse_args())
