"""What layer selection leaves behind: the decision, its evidence, and a picture of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from models.dit import DiT
from models.files import file_sha256, write_json, write_whole
from models.grafting import LoadReport
from models.plan import GraftPlan, write_plan
from models.provenance import environment
from models.selection import LayerGates, settle
from training.lora import merge_lora

TRAJECTORY = "trajectory.jsonl"


def decision(gates: LayerGates, plan: GraftPlan, scaling: float) -> dict:
    """The answer of the gates as plain data; see `selection.json` in the README.

    Args:
        gates: the averaged gates.
        scaling: factor on the logits, as at the end of training.
    """
    kept = gates.decide()
    groups = []
    for g, probability in enumerate(gates.probabilities(scaling)):
        p = probability.double().tolist()
        first, end = gates.spans[g]
        best = max(range(len(p)), key=p.__getitem__)
        groups.append(
            {
                "blocks": list(range(first, end)),
                "kept": [b for b in kept if first <= b < end],
                "confidence": p[best],
                "entropy": -sum(x * math.log(x) for x in p if x > 0),
                "options": [
                    {
                        "keeps": [first + i for i, k in enumerate(row) if k],
                        "probability": x,
                    }
                    for row, x in zip(gates.options[g].int().tolist(), p, strict=True)
                ],
            }
        )
    grafted = [b for b in range(plan.depth) if b not in kept]
    spec = ",".join(f"{keep}:{size}" for keep, size in gates.groups)
    return {
        "kept": kept,
        "grafted": grafted,
        "slot": plan.grafts[0].slot,
        "groups": groups,
        "groups_spec": spec,
        "pinned": list(gates.pinned),
    }


def write_answer(
    folder: Path,
    answer: dict,
    gates: LayerGates,
    plan: GraftPlan,
    report: LoadReport,
    provenance: dict,
) -> None:
    """Writes selected.yaml, selection.json and trajectory.png into a run folder.

    Args:
        answer: from `decision`.
        gates: the averaged gates.
        report: where the model's weights came from; their files are hashed.
        provenance: what else the decision depends on, as plain data.
    """
    header = (
        f"Learned by prune_by_learning.py from {plan.path.name} in {provenance['steps']} steps;\n"
        "selection.json beside this file holds the probabilities."
    )
    write_plan(plan, folder / "selected.yaml", {answer["slot"]: answer["grafted"]}, header)
    weights = {
        source: {"file": report.files[source], "sha256": file_sha256(path)}
        for source, path in report.resolved.items()
        if path.is_file()
    }
    config = {"file": str(plan.path), "sha256": file_sha256(plan.path)}
    content = {**answer, "plan": "selected.yaml", "trajectory": TRAJECTORY, "config": config}
    content |= {"weights": weights, **provenance, **environment()}
    write_json(folder / "selection.json", content)
    plot_trajectory(folder / TRAJECTORY, gates, folder / "trajectory.png")


def save_merged(path: Path, model: DiT, plan: GraftPlan, answer: dict) -> Path:
    """Saves the selected model with LoRA folded in, and a YAML that starts from it.

    Args:
        path: the weight file to write; the YAML is named like it.
        model: holds graft pairs and LoRA updates; settled and merged in place.

    Returns:
        The YAML.
    """
    merge_lora(model)
    settle(model, answer["kept"])
    graft = replace(plan.grafts[0], blocks=tuple(answer["grafted"]))
    merged = {
        "model": model.state_dict(),
        "plan": replace(plan, grafts=(graft,)).architecture(),
    }
    write_whole(path, lambda partial: torch.save(merged, partial))
    start = replace(plan, grafted_ckpt_path=path.resolve(), graft_weights={})
    header = f"Starts from {path.name}, the model that selection trained."
    write_plan(start, path.with_suffix(".yaml"), {answer["slot"]: answer["grafted"]}, header)
    return path.with_suffix(".yaml")


def write_trajectory_line(path: Path, step: int, gates: LayerGates, scaling: float) -> None:
    """Appends the probability of every option, group by group, to trajectory.jsonl."""
    values = [p.double().tolist() for p in gates.probabilities(scaling)]
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": step, "probabilities": values}) + "\n")


def plot_trajectory(lines: Path, gates: LayerGates, picture: Path) -> None:
    """Draws trajectory.jsonl: a panel a group, a curve an option, and the final keep mask."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    steps = [r["step"] for r in records]
    number = len(gates.options)
    columns = min(4, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.6 * rows, 1.4])
    axes = top.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    for g in range(number):
        axis = axes.flat[g]
        first, end = gates.spans[g]
        curves = torch.tensor([r["probabilities"][g] for r in records])  # [lines, options]
        shown = curves[-1].argsort(descending=True)[:8].tolist()
        for option in shown:
            row = gates.options[g][option].int().tolist()
            label = " ".join(str(first + i) for i, k in enumerate(row) if k)
            axis.plot(steps, curves[:, option], label=label, linewidth=1.6)
        axis.set_title(f"blocks {first} to {end - 1}", fontsize=10)
        axis.set_ylim(-0.02, 1.02)
        axis.legend(title="keeps", fontsize=7, title_fontsize=7, loc="best")
        axis.grid(alpha=0.3)
    top.supxlabel("step", fontsize=9)
    top.supylabel("probability of the option", fontsize=9)
    axis = bottom.subplots()
    mask = gates.keep_mask().detach().cpu()
    axis.imshow(mask[None], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for block, kept in enumerate(mask.tolist()):
        text = "keep" if kept else "graft"
        axis.text(block, 0, text, ha="center", va="center", fontsize=6.5, rotation=60)
    axis.set_xticks(range(len(mask)))
    axis.set_yticks([])
    axis.set_xlabel("block", fontsize=9)
    axis.tick_params(labelsize=7)
    figure.savefig(picture, dpi=130)
