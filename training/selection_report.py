"""What layer selection leaves behind: the decision, its evidence, and a picture of it."""

import json
import math
from pathlib import Path

import torch

from models.plan import GraftPlan
from models.selection import LayerGates


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
    return {"kept": kept, "grafted": grafted, "groups": groups}


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
