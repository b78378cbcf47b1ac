"""What layer selection leaves behind: the decision, its evidence, and a picture of it."""

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.dit import DiT
from models.files import file_sha256, naming, write_json
from models.graft_plan import PAIR
from models.grafting import LoadReport, build_choices
from models.plan import GraftPlan, write_plan
from models.selection import LayerGates, settle
from models.weights import SLOTS
from training.checkpoint import write_tensors
from training.lora import merge_lora

TRAJECTORY = "trajectory.jsonl"
SHOWN = 8  # options of a group in trajectory.png, the likeliest at the end
INSIDE = 16  # characters of the longest name of an option, up to which a legend is inside its panel
LINE, LINES = 60, 2  # characters of a line, and lines of an option, in a legend below its panel


def decision(
    gates: LayerGates, plans: Sequence[GraftPlan], scaling: float, trajectory: Path, steps: int
) -> dict:
    """The answer of the gates as plain data; README "Layer selection" describes it.

    Args:
        gates: the averaged gates.
        plans: what they choose from; variant v of a block is that of plans[v - 1].
        scaling: factor on the logits, as at the end of training.
        trajectory: the lines of `write_trajectory_line`.
        steps: length of the training.
    """
    chosen = gates.chosen()
    blocks, kept = gates.blocks, gates.decide()
    late = [r for r in _records(trajectory) if r["step"] > 0.9 * steps]
    groups = []
    for g, probability in enumerate(gates.probabilities(scaling)):
        p = probability.double().tolist()
        first, end = gates.spans[g]
        best = _best(p)
        options = []
        for row, share in zip(gates.choices[g].tolist(), p, strict=True):
            named = list(zip(blocks[first:end], row, strict=True))
            option = {"keeps": [b for b, variant in named if variant == 0]}
            if gates.variants > 1:
                option["takes"] = {b: variant for b, variant in named if variant}
            options.append(option | {"probability": share})
        agreeing = [_best(r["probabilities"][g]) == best for r in late]
        groups.append(
            {
                "blocks": list(blocks[first:end]),
                "kept": [b for b in kept if b in blocks[first:end]],
                "confidence": p[best],
                "entropy": -sum(x * math.log(x) for x in p if x > 0),
                "agreement": sum(agreeing) / len(agreeing) if agreeing else None,
                "options": options,
            }
        )
    answer = {
        "kept": kept,
        "grafted": [b for b in blocks if b not in kept],
        "slots": [PAIR] if gates.pairs else sorted({g.slot for plan in plans for g in plan.grafts}),
        "groups": groups,
        "groups_spec": ",".join(f"{keep}:{size}" for keep, size in gates.groups),
        "pinned": list(gates.pinned),
        "agreement_lines": len(late),
    }
    if gates.variants > 1:
        answer["variants"] = {v: str(plan.path) for v, plan in enumerate(plans, start=1)}
        answer["chosen"] = {b: variant for b, variant in enumerate(chosen) if variant}
    if gates.pairs:
        answer["pairs"] = {
            word: [list(pair) for pair in gates.pairs if (pair[0] in kept) == in_sequence]
            for word, in_sequence in (("sequential", True), ("parallel", False))
        }
    return answer


def write_answer(
    folder: Path,
    answer: dict,
    gates: LayerGates,
    plans: Sequence[GraftPlan],
    reports: Sequence[LoadReport],
    provenance: dict,
) -> None:
    """Writes selected.yaml, selection.json and trajectory.png into a run folder.

    Args:
        answer: from `decision`.
        gates: the averaged gates.
        plans, reports: what the gates chose from, and where its weights came from; the files are
            hashed.
        provenance: what else the decision depends on, as plain data; its "settings" hold the
            "global_seed" of `build_choices`.
    """
    names = " and ".join(plan.path.name for plan in plans)
    header = (
        f"Learned by prune_by_learning.py from {names} in {provenance['steps']} steps;\n"
        "selection.json beside this file holds the probabilities."
    )
    beside = [(plan, gates.taking(v)) for v, plan in enumerate(plans[1:], start=2)]
    if any(blocks for _, blocks in beside):
        seed = provenance["settings"]["global_seed"]
        beside = _with_operators(folder / "operators", plans, beside, seed)
    _write_chosen(plans[0], folder / "selected.yaml", gates, header, beside)
    weights = {}
    for plan, report in zip(plans, reports, strict=True):
        weights |= {
            source if plan is plans[0] else f"{plan.path}: {source}": {
                "file": report.files[source],
                "sha256": file_sha256(path),
            }
            for source, path in report.resolved.items()
            if path.is_file()
        }
    configs = [
        {"file": str(p.path), "sha256": file_sha256(p.path), "architecture": p.architecture()}
        for p in plans
    ]
    content = {**answer, "plan": "selected.yaml", "trajectory": TRAJECTORY, "configs": configs}
    content |= {"weights": weights, **provenance}
    write_json(folder / "selection.json", content)
    if _records(folder / TRAJECTORY):
        figure = draw_trajectory(_records(folder / TRAJECTORY), gates)
        figure.savefig(folder / "trajectory.png", dpi=130)


def _with_operators(
    folder: Path,
    plans: Sequence[GraftPlan],
    beside: list[tuple[GraftPlan, list[int]]],
    seed: int,
) -> list[tuple[GraftPlan, list[int]]]:
    """Gives each chosen graft of the further plans a file of its own, as it began the selection.

    One plan names one grafted checkpoint, the first plan's; these files take the others' place.
    """
    model, _ = build_choices(plans, seed)
    written = []
    for variant, (plan, blocks) in enumerate(beside, start=2):
        files = {}
        for graft in plan.grafts:
            for block in set(graft.blocks) & set(blocks):
                operator = getattr(model.blocks[block], SLOTS[graft.slot]).operator(variant)
                path = folder / f"block{block:02d}.{graft.slot}.{graft.operator}.pt"
                state = {"model": operator.state_dict()}
                write_tensors(path, state)
                files[block, graft.slot] = path.resolve()
        written.append((replace(plan, graft_weights=files), blocks))
    return written


def save_merged(path: Path, model: DiT, gates: LayerGates, plans: Sequence[GraftPlan]) -> Path:
    """Saves the selected model with LoRA folded in, and a YAML that starts from it.

    Args:
        path: the weight file to write; the YAML is named like it.
        model: its slots are open and it may hold LoRA updates; settled and merged in place.
        gates, plans: the choice, and what it was made from.

    Returns:
        The YAML.
    """
    merge_lora(model)
    settle(model, dict(zip(gates.blocks, gates.chosen(), strict=True)))
    if gates.pairs:
        merged = plans[0].with_pairs(gates.taking(1))
    else:
        grafts = []
        for variant, plan in enumerate(plans, start=1):
            taking = set(gates.taking(variant))
            confined = [replace(g, blocks=tuple(sorted(taking & {*g.blocks}))) for g in plan.grafts]
            grafts += [g for g in confined if g.blocks]
        merged = replace(plans[0], grafts=tuple(grafts))
    write_tensors(path, {"model": model.state_dict(), "plan": merged.architecture()})
    start = replace(plans[0], grafted_ckpt_path=path.resolve(), graft_weights={})
    header = f"Starts from {path.name}, the model that selection trained."
    beside = [
        (replace(plan, graft_weights={}), gates.taking(v))
        for v, plan in enumerate(plans[1:], start=2)
    ]
    _write_chosen(start, path.with_suffix(".yaml"), gates, header, beside)
    return path.with_suffix(".yaml")


def _write_chosen(
    first: GraftPlan,
    path: Path,
    gates: LayerGates,
    header: str,
    beside: list[tuple[GraftPlan, list[int]]],
) -> None:
    if gates.pairs:
        write_plan(first.with_pairs(gates.taking(1)), path, {}, header)
        return
    blocks = dict.fromkeys(SLOTS, gates.taking(1))
    write_plan(first, path, blocks, header, [part for part in beside if part[1]])


def _records(trajectory: Path) -> list[dict]:
    """The lines so far; none where a resumed run's are in another folder."""
    if not trajectory.is_file():
        return []
    return [json.loads(line) for line in trajectory.read_text(encoding="utf-8").splitlines()]


def _best(probabilities: list[float]) -> int:
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def write_trajectory_line(path: Path, step: int, gates: LayerGates, scaling: float) -> None:
    """Appends the probability of every option, group by group, to trajectory.jsonl."""
    values = [p.double().tolist() for p in gates.probabilities(scaling)]
    with naming(path), open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": step, "probabilities": values}) + "\n")


def draw_trajectory(records: Sequence[dict], gates: LayerGates):
    """Matplotlib's figure of the lines of trajectory.jsonl: a panel a group, a curve an option, and
    the final keep mask.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r["step"] for r in records]
    number = len(gates.options)
    columns = min(4, number)
    rows = math.ceil(number / columns)
    # of blocks, or of pairs of them
    names = [f"{b}+{b + 1}" if gates.pairs else str(b) for b in gates.blocks]
    unit, kept, grafted = (
        ("pair", "in sequence", "parallel") if gates.pairs else ("block", "keep", "graft")
    )
    title = "in sequence" if gates.pairs else "keeps"
    title += " (block:variant)" * (gates.variants > 1)
    panels = []  # of each group its options' (name, curve)
    for g, (first, end) in enumerate(gates.spans):
        curves = torch.tensor([r["probabilities"][g] for r in records])  # [lines, options]
        shown = []
        for option in curves[-1].argsort(descending=True)[:SHOWN].tolist():
            named = list(zip(names[first:end], gates.choices[g][option].tolist(), strict=True))
            label = " ".join(name for name, variant in named if variant == 0)
            if gates.variants > 1:
                taken = (f"{name}:{variant}" for name, variant in named if variant)
                label += f" ({' '.join(taken)})"
            shown.append((label, curves[:, option].numpy()))
        panels.append(shown)
    inside = max(len(label) for shown in panels for label, _ in shown) <= INSIDE
    height = 2.6
    if not inside:
        panels = [[(_folded(label), curve) for label, curve in shown] for shown in panels]
        lines = max(sum(1 + label.count("\n") for label, _ in shown) for shown in panels)
        height += 0.2 + 0.12 * (1 + lines)
    highest = max(float(curve.max()) for shown in panels for _, curve in shown)
    highest = 1.0 if highest > 0.1 else highest  # of thousands of options none may be likely

    width = 3.6 * (columns if inside else max(2, columns))
    figure = Figure(figsize=(width, height * rows + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=[height * rows, 1.4])
    axes = top.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[number:]:
        axis.set_visible(False)
    for g in range(number):
        axis = axes.flat[g]
        first, end = gates.spans[g]
        for label, curve in panels[g]:
            axis.plot(steps, curve, label=label, linewidth=1.6)
        axis.set_title(f"{unit}s {names[first]} to {names[end - 1]}", fontsize=10)
        axis.set_ylim(-0.02 * highest, 1.02 * highest)
        if inside:
            axis.legend(title=title, fontsize=7, title_fontsize=7, loc="best")
        else:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
            axis.legend(title=title, fontsize=6, title_fontsize=6, **place)
            axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    if inside:
        top.supxlabel("step", fontsize=9)
        top.supylabel("probability of the option", fontsize=9)
    else:
        for axis in axes[:, 0]:
            axis.set_ylabel("probability of the option", fontsize=9)
    axis = bottom.subplots()
    chosen = gates.chosen()
    mask = torch.tensor([float(variant == 0) for variant in chosen])
    axis.imshow(mask[None].numpy(), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    for place, variant in enumerate(chosen):
        text = grafted if variant else kept
        if gates.variants > 1 and variant:
            text += f" {variant}"
        color = "black" if variant else "white"  # on light and on dark blue
        axis.text(place, 0, text, color=color, ha="center", va="center", fontsize=8, rotation=60)
    axis.set_xticks(range(len(mask)), names)
    axis.set_yticks([])
    axis.set_xlabel(unit, fontsize=9)
    axis.tick_params(labelsize=7)
    return figure


def _folded(label: str) -> str:
    """An option's name in lines of a legend below a panel; what does not fit is left out."""
    return textwrap.fill(label, LINE, max_lines=LINES, placeholder=" ...")
