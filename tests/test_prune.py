"""prune_by_learning.py in this process: models, slots, groups, competing grafts, its answer."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml

import prune_by_learning
from models.dit import build_dit, preset
from models.grafting import build_choices, build_grafted, load_plan, with_base
from models.selection import LayerGates
from scripts import testbed
from training.distributed import World
from training.selection_report import decision, draw_trajectory, write_trajectory_line

CPU = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_latents):
    """Random latents of 4x8x8 in the layout of one file a picture."""
    folder = tmp_path_factory.mktemp("prune")
    write_latents(folder / "latents", 8, classes=5)
    return folder


def plan_file(folder, name, grafts, model="DiT-S/2", **sample):
    """A YAML with fresh grafts, [(slot, operator, blocks)], on a fresh model of 4x8x8 latents."""
    entries = []
    for number, (slot, operator, blocks, config) in enumerate(grafts):
        file = folder / f"{name}-{number}.yaml"
        file.write_text(yaml.safe_dump(config) or "{}")
        entries.append(
            {"type": slot, "name": operator, "config_filepath": str(file), "graft_indexes": blocks}
        )
    size = 32 if model == "DiT-Mini/2" else 64
    sample = {"dit_model_name": model, "image_size": size, "num_classes": 5, **sample}
    content = {"grafts": entries, "sample_config": {**sample, "base_ckpt_path": None}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def select(monkeypatch, folder, config, name, *flags, device="cpu"):
    """Runs the entry for two steps; its run folder and its answer."""
    command = ["prune_by_learning.py", "--config", config, "--data-path", folder / "latents"]
    command += ["--results-dir", folder, "--prefix", name, "--max-steps", 2, "--log-every", 1]
    command += ["--global-batch-size", 4, "--gate-lr", 0.01, "--device", device, *flags]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    prune_by_learning.main(prune_by_learning.parse_args())
    run = next(folder.glob(f"{name}-DiT*"))
    return run, json.loads((run / "selection.json").read_text())


SWA = ("mha", "swa", {})
THIN = ("mlp", "mlp", {"expansion_ratio": 3})


# by depth: what --groups takes, and how many blocks then keep their original
FORMS = {
    12: {"2:4": 6, "1:2": 6, "3:4": 9, "3:6": 6, "2:12": 2, "2:4,1:4,3:4": 6},
    28: {"2:4": 14, "1:2": 14, "3:4": 21, "7:14": 14, "2:4,1:4,3:4,2:4,1:4,3:4,2:4": 14},
}


def forms(*models):
    return [(model, groups) for model in models for groups in FORMS[preset(model)["depth"]]]


def select_form(monkeypatch, folder, model, slot, groups, device):
    """A selection over every block in one slot, in one form of groups."""
    slot, operator, config = SWA if slot == "mha" else THIN
    depth = preset(model)["depth"]
    name = f"{model}-{slot}-{groups}".translate(str.maketrans("/:,", "---"))[:40]
    plan = plan_file(folder, name, [(slot, operator, list(range(depth)), config)], model)
    flags = ["--groups", groups, "--delta-w", "--lora", "--no-compile"]
    run, answer = select(monkeypatch, folder, plan, name, *flags, device=device)
    assert len(answer["kept"]) == FORMS[depth][groups] and answer["slots"] == [slot]
    assert load_plan(run / "selected.yaml").grafted_blocks(slot) == tuple(answer["grafted"])
    shutil.rmtree(run / "checkpoints")  # of the largest model: gigabytes


@pytest.mark.parametrize("slot", ["mha", "mlp"])
@pytest.mark.parametrize(("model", "groups"), forms("DiT-Mini/2", "DiT-S/2"))
def test_every_form_of_groups(monkeypatch, folder, model, slot, groups):
    select_form(monkeypatch, folder, model, slot, groups, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "groups"), [("mha", "2:4"), ("mlp", "7:14")])
def test_group_forms_of_the_largest_model(monkeypatch, folder, slot, groups):
    select_form(monkeypatch, folder, "DiT-XL/2", slot, groups, "cpu")


def test_both_slots_follow_one_decision(monkeypatch, folder):
    grafts = [
        (slot, operator, blocks, config)
        for (slot, operator, config), blocks in ((SWA, [1, 2, 3, 5]), (THIN, [2, 3, 6, 7]))
    ]
    plan = plan_file(folder, "both", grafts, model="DiT-Mini/2")
    flags = ["--groups", "2:4,2:4," + ",".join(["4:4"] * 5), "--pin", 5, "--delta-w", "--lora"]
    merged = folder / "both.pt"
    run, answer = select(monkeypatch, folder, plan, "both", *flags, "--save-model", merged)
    assert answer["slots"] == ["mha", "mlp"] and set(answer["pinned"]) >= {0, 4, 5, 8, 27}
    chosen = load_plan(run / "selected.yaml")
    grafted = set(answer["grafted"])
    assert chosen.grafted_blocks("mha") == tuple(sorted({1, 2, 3, 5} & grafted))
    assert chosen.grafted_blocks("mlp") == tuple(sorted({2, 3, 6, 7} & grafted))
    started = load_plan(merged.with_suffix(".yaml"))
    assert {k: started.architecture()[k] for k in ("grafts",)} == {
        "grafts": chosen.architecture()["grafts"]
    }
    _, report = build_grafted(started)
    assert set(report.counts()) == {"checkpoint"}


def test_several_grafts_compete_for_a_block(monkeypatch, folder):
    torch.manual_seed(0)
    torch.save(build_dit("DiT-S/2", 8, num_classes=5).state_dict(), folder / "s.pt")

    class Tilted(LayerGates):
        """Gates whose last option, the one of the last plans, leads in every other group."""

        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            with torch.no_grad():
                for gate in list(self.gumbel_gates)[::2]:
                    gate[0, -1] += 1

    monkeypatch.setattr(prune_by_learning, "LayerGates", Tilted)
    blocks = [b for b in range(12) if b % 4]
    plans = {
        "swa": plan_file(folder, "one", [("mha", "swa", blocks, {})]),
        "hyena_y": plan_file(folder, "two", [("mha", "hyena_y", blocks, {})]),
        "mlp": plan_file(folder, "three", [("mlp", "mlp", [1, 2], {"expansion_ratio": 3})]),
    }
    flags = ["--candidates", plans["hyena_y"], plans["mlp"], "--delta-w"]
    with pytest.raises(ValueError, match="names neither base_ckpt_path nor grafted_dit"):
        select(monkeypatch, folder, plans["swa"], "compete", *flags)
    flags += ["--load-weight", folder / "s.pt"]
    run, answer = select(monkeypatch, folder, plans["swa"], "compete", *flags)
    assert answer["variants"] == {str(v): str(p) for v, p in enumerate(plans.values(), start=1)}
    assert {1, 2} <= set(answer["chosen"].values())
    assert len(answer["kept"]) == 6 and len(answer["chosen"]) == 6
    first = answer["groups"][0]["options"]
    # one of 1, 2, 3 is kept beside 0; each other takes one of its variants
    assert len(first) == 3 * 3 + 2 * 3 * 2 == 21
    takes = [o["takes"] for o in first if o["keeps"] == [0, 3]]
    assert {tuple(t.values()) for t in takes} == {(a, b) for a in (1, 2, 3) for b in (1, 2, 3)}
    chosen = load_plan(run / "selected.yaml")
    expected = {int(b): list(plans)[v - 1] for b, v in answer["chosen"].items()}
    found = {b: g.operator for g in chosen.grafts for b in g.blocks}
    assert found == expected
    model, report = build_grafted(chosen)
    base = str(folder / "s.pt")
    begun, _ = build_choices([with_base(load_plan(p), base) for p in plans.values()], seed=0)
    for block, operator in expected.items():
        attribute = "mlp" if operator == "mlp" else "attn"
        key = {"swa": "Wqkv.weight", "hyena_y": "in_proj.weight", "mlp": "fc1.weight"}[operator]
        source = report.sources[f"blocks.{block}.{attribute}.{key}"]
        assert source == ("fresh" if operator == "swa" else "graft_weights")
        if operator != "swa":  # as it began the selection
            choice = getattr(begun.blocks[block], attribute)
            expected_tensor = choice.operator(list(plans).index(operator) + 1).get_parameter(key)
            assert torch.equal(
                getattr(model.blocks[block], attribute).get_parameter(key), expected_tensor
            )


def test_candidates_must_be_of_the_same_model(monkeypatch, folder):
    small = plan_file(folder, "small", [("mha", "swa", [1], {})])
    mini = plan_file(folder, "mini", [("mha", "swa", [1], {})], model="DiT-Mini/2")
    torch.save(build_dit("DiT-S/2", 8, num_classes=5).state_dict(), folder / "s.pt")
    flags = ["--candidates", mini, "--load-weight", folder / "s.pt"]
    with pytest.raises(ValueError, match=r"mini.yaml: model_name DiT-Mini/2 differs from DiT-S/2"):
        select(monkeypatch, folder, small, "mixed", *flags)
    with pytest.raises(ValueError, match="--save-model x.yaml: name a file that ends in .pt"):
        select(monkeypatch, folder, small, "mixed", "--save-model", "x.yaml")


@pytest.mark.parametrize("trained", [[], ["--delta-w"]])
@pytest.mark.parametrize(
    ("groups", "pins"), [("4:4", []), ("0:1", []), ("2:4", [0, 1, 6, 7, 8, 11])]
)
def test_without_a_choice_nothing_is_trained(monkeypatch, folder, groups, pins, trained):
    plan = plan_file(folder, "settled", [("mha", "swa", list(range(12)), {})])
    flags = ["--groups", groups, "--pin", *pins, *trained]
    with pytest.raises(ValueError, match="leave nothing to choose: ") as caught:
        select(monkeypatch, folder, plan, "settled", *flags)
    assert f"--groups {groups} and --pin {' '.join(map(str, pins)) or 'none'} leave" in str(
        caught.value
    )
    assert not list(folder.glob("settled-DiT*"))


def test_one_group_with_a_choice_is_enough(monkeypatch, folder):
    plan = plan_file(folder, "enough", [("mha", "swa", list(range(12)), {})])
    run, answer = select(monkeypatch, folder, plan, "enough", "--groups", "4:4,1:4,0:4")
    assert [len(group["options"]) for group in answer["groups"]] == [1, 4, 1]
    found = testbed.learned_with(answer)
    assert found["groups"] == "4:4,1:4,0:4" and found["precision"] == "float32"
    read = {"gate_lr": 0.01, "tau_range": [4.0, 0.1], "lora_rank": 8, "max_steps": 2}
    assert read.items() <= found["settings"].items()
    assert "pinned [], 1 kind of graft\n" in (run / "log.txt").read_text()


def trajectory(likely, *about, **keywords):
    """The figure of 20 lines in which the first option of each group becomes `likely`."""
    gates = LayerGates(*about, **keywords)
    records = []
    for step in range(1, 21):
        lines = [torch.full((len(o),), (1 - likely * step / 20) / len(o)) for o in gates.options]
        for line in lines:
            line[0] += likely * step / 20
        records.append({"step": step, "probabilities": [line.tolist() for line in lines]})
    figure = draw_trajectory(records, gates)
    figure.canvas.draw()
    return figure, [axis for axis in figure.axes if axis.get_legend()]


@pytest.mark.parametrize(
    ("groups", "more"),
    [
        ("7:14", {}),
        ("7:14", {"variants": [(1, 2)] * 28, "pinned": [0, 3, 5, 16, 22, 24]}),
        ("27:28", {}),
    ],
)
def test_legends_of_many_blocks_lie_below_their_panels(groups, more):
    figure, axes = trajectory(0.004, 28, groups, **more)
    for axis in axes:
        legend, panel = axis.get_legend().get_window_extent(), axis.get_window_extent()
        assert legend.y1 < panel.y0 and panel.height > 0.25 * figure.bbox.height / len(axes)
        assert all(figure.bbox.x0 <= x <= figure.bbox.x1 for x in (legend.x0, legend.x1))
        others = [other.get_window_extent() for other in figure.axes if other is not axis]
        assert not any(legend.overlaps(other) for other in others)
        for text in axis.get_legend().get_texts():
            assert len(text.get_text().splitlines()) <= 2


@pytest.mark.parametrize("likely", [0.002, 0.5])
def test_small_probabilities_fill_their_panels(likely):
    _, axes = trajectory(likely, 28, "7:14")
    ends = [axis.get_ylim()[1] for axis in axes]
    assert (
        ends == [pytest.approx(1.02 * (1 if likely == 0.5 else likely + (1 - likely) / 3432))] * 2
    )


def test_legends_of_small_groups_stay_in_their_panels():
    _, axes = trajectory(0.8, 28, "2:4")
    assert len(axes) == 7
    for axis in axes:
        assert axis.get_window_extent().contains(*axis.get_legend().get_window_extent().min)
        assert axis.get_ylim() == (-0.02, 1.02)


def test_agreement_counts_the_last_tenth_of_the_steps(tmp_path, folder):
    plan = load_plan(plan_file(folder, "few", [("mha", "swa", list(range(12)), {})]))
    gates = LayerGates(12, "1:2")
    for step in range(10, 201, 10):  # the first group changes its mind after step 190
        with torch.no_grad():
            gates.gumbel_gates[0].copy_(torch.tensor([[1.0, 0.0] if step > 190 else [0.0, 1.0]]))
            gates.gumbel_gates[1].copy_(torch.tensor([[1.0, 0.0] if step > 100 else [0.0, 1.0]]))
        write_trajectory_line(tmp_path / "lines", step, gates, 1.0)
    answer = decision(gates, [plan], 1.0, tmp_path / "lines", 200)
    assert answer["agreement_lines"] == 2
    assert [g["agreement"] for g in answer["groups"]] == [0.5, 1, 1, 1, 1, 1]
    p = torch.tensor([1.0, 0.0]).softmax(0).tolist()
    assert answer["groups"][0]["confidence"] == pytest.approx(p[0])
    assert answer["groups"][0]["entropy"] == pytest.approx(-sum(x * np.log(x) for x in p))
