"""Tables and plots of docs/selection.md, from the results of scripts/selection_study.py.

Not a command: the study's `report` calls it. `groups` are the results by (operator, pattern), those
of the model without a graft under UNGRAFTED.
"""

import statistics
from collections.abc import Mapping, Sequence
from math import comb, sqrt
from pathlib import Path

from scripts import testbed
from scripts.testbed import DIGITS, METRICS

DEPTH = 28
UNGRAFTED = ("none", "base")  # operator and pattern of the cases without a graft
CHOSEN, GUESSED = "tab:orange", "tab:blue"

Groups = Mapping[tuple[str, str], list[dict]]


def ranked(operator: str, groups: Groups) -> list[tuple[str, list[dict]]]:
    """(pattern, results) of an operator, by the mean training MSE, the smallest first."""
    found = [(pattern, records) for (of, pattern), records in groups.items() if of == operator]
    return sorted(found, key=lambda item: mean(item[1], "train_mse"))


def mean(records: list[dict], metric: str) -> float:
    return statistics.mean(record[metric] for record in records)


def is_learned(records: list[dict]) -> bool:
    return records[0]["selection"] is not None


def operator_table(operator: str, groups: Groups) -> str:
    """Mean and standard deviation over the cases of every pattern, and of no graft at all."""
    rows = [["no graft", groups[UNGRAFTED]]]
    for pattern, records in ranked(operator, groups):
        rows.append([f"**{pattern}**" if is_learned(records) else pattern, records])
    lines = [
        [name, str(len(records)), *(testbed.cell(records, metric) for metric in METRICS)]
        for name, records in rows
    ]
    grafted = len(ranked(operator, groups)[0][1][0]["grafted"])
    title = f"**{operator}** in {grafted} of {DEPTH} blocks (bold: learned):"
    return f"{title}\n\n{testbed.table(['selection', 'cases', *METRICS.values()], lines)}"


def memory(groups: Groups) -> str:
    """A sentence on how much better the model without a graft knows what it was trained on."""
    base = groups[UNGRAFTED]
    train, heldout = (mean(base, metric) for metric in ("train_mse", "heldout_mse"))
    return (
        f"Without a graft the same finetuning ends at a training MSE of {train:.3f} and a held-out "
        f"MSE of {heldout:.3f}, {heldout / train:.1f} times as much."
    )


def spread_table(operators: Sequence[str], groups: Groups) -> str:
    """How far apart seeds are, and whether the three metrics order the selections alike."""
    rows = []
    for operator in operators:
        found = ranked(operator, groups)
        cells = []
        for metric in METRICS:
            deviation = pooled_deviation([records for _, records in found], metric)
            cells.append("-" if deviation is None else f"{deviation:.{DIGITS[metric]}f}")
        better = [mean(records, "fd_mini") for _, records in found[: len(found) // 2]]
        cells.append(f"{min(better):.3f} to {max(better):.3f}" if better else "-")
        means = {metric: [mean(records, metric) for _, records in found] for metric in METRICS}
        for metric in list(METRICS)[1:]:
            value = rank_correlation(means["train_mse"], means[metric])
            cells.append("-" if value is None else f"{value:+.2f}")
        rows.append([operator, *cells])
    columns = ["operator", *(f"deviation, {title}" for title in METRICS.values())]
    columns.append("fd_mini, better half")
    columns += [f"correlation, {title}" for title in list(METRICS.values())[1:]]
    title = "**How far the numbers carry**, over the selections above:"
    return f"{title}\n\n{testbed.table(columns, rows)}"


def pooled_deviation(groups: list[list[dict]], metric: str) -> float | None:
    """Standard deviation over seeds, pooled over the plans that several seeds share."""
    variances = [
        statistics.variance(record[metric] for record in records)
        for records in groups
        if len(records) > 1 and len({tuple(record["grafted"]) for record in records}) == 1
    ]
    return sqrt(statistics.mean(variances)) if variances else None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, for values without ties; None of fewer than two."""
    if len(one) < 2:
        return None
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    return statistics.correlation(*ranks)


def duels_table(operators: Sequence[str], groups: Groups) -> str:
    """Of the seeds that both have, in how many a learned selection is below each guess."""
    guesses = dict.fromkeys(
        pattern
        for operator in operators
        for pattern, records in ranked(operator, groups)
        if not is_learned(records)
    )
    rows = []
    for operator in operators:
        for pattern, records in ranked(operator, groups):
            if not is_learned(records):
                continue
            for metric, title in METRICS.items():
                duels = [wins(records, groups.get((operator, g), []), metric) for g in guesses]
                rows.append([operator, pattern, title, *duels])
    title = "**Seed by seed**, how often the learned selection has the smaller value:"
    return f"{title}\n\n{testbed.table(['operator', 'selection', 'metric', *guesses], rows)}"


def wins(records: list[dict], others: list[dict], metric: str) -> str:
    values = {record["seed"]: record[metric] for record in others}
    below = [r[metric] < values[r["seed"]] for r in records if r["seed"] in values]
    return f"{sum(below)} of {len(below)}" if below else "-"


def learned_table(operators: Sequence[str], groups: Groups, pinned: Mapping) -> str:
    """How sure the gates are, and how far their answers agree between seeds.

    Args:
        pinned: the blocks without a choice, by (operator, pattern); none where it has no entry.
    """
    rows = []
    for operator in operators:
        for pattern, records in ranked(operator, groups):
            if not is_learned(records):
                continue
            spans = choices(records[0], pinned.get((operator, pattern), ()))
            row = [operator, pattern, str(len(records)), words(comb(n, k) for _, n, k in spans)]
            row += [gates_mean(records, key) for key in ("confidence", "agreement")]
            rows.append(row + (agreement(records, spans) if len(records) > 1 else ["-", "-"]))
    columns = ["operator", "selection", "cases", "options a group", "confidence", "steady"]
    columns += ["same in all seeds", "by chance"]
    return f"**How sure the gates are** (means over groups):\n\n{testbed.table(columns, rows)}"


def variations_table(
    operators: Sequence[str],
    groups: Groups,
    varied: Groups,
    base: str,
    told: Mapping[str, Sequence],
) -> str:
    """What becomes of the selection `base` when its gates learn otherwise.

    A row of `base` itself, and one a variation: how far it is from `base` of the same seeds. Cases
    without that are left out.

    Args:
        varied: results by (operator, variation).
        told: the flags of `base`, and those that each variation has in their place.
    """
    rows = []
    for operator in operators:
        found = groups.get((operator, base), [])
        same_seed = {record["seed"]: record for record in found}
        for name, flags in told.items():
            records = found if name == base else varied.get((operator, name), [])
            records = [record for record in records if record["seed"] in same_seed]
            if not records:
                continue
            bases = [same_seed[record["seed"]] for record in records]
            if name == base:
                cells = [f"{mean(records, metric):.{DIGITS[metric]}f}" for metric in METRICS]
                cells.append("-")
            else:
                cells = [
                    f"{mean(records, metric) - mean(bases, metric):+.{DIGITS[metric]}f}"
                    for metric in METRICS
                ]
                moved = map(blocks_moved, records, bases)
                kept = DEPTH - len(records[0]["grafted"])
                cells.append(f"{statistics.mean(moved):.1f} of {kept}")
            cells += [gates_mean(records, key) for key in ("confidence", "agreement")]
            shown = f"`{' '.join(map(str, flags))}`"
            rows.append([operator, name, shown, str(len(records)), *cells])
    columns = ["operator", "selection", "flags", "cases", *METRICS.values()]
    table = testbed.table([*columns, "other blocks kept", "confidence", "steady"], rows)
    return f"**{base}, learned otherwise**, against {base} of the same seeds:\n\n{table}"


def blocks_moved(record: dict, other: dict) -> int:
    """Of the blocks that keep attention in one result, how many do not in another."""
    return len(set(other["grafted"]) - set(record["grafted"]))


def gates_mean(records: list[dict], key: str) -> str:
    """Mean over results and their groups of what gates say at their end."""
    return f"{statistics.mean(v for record in records for v in record['selection'][key]):.2f}"


def choices(record: dict, pinned: Sequence[int]) -> list[tuple[list[int], int, int]]:
    """(blocks in question, their number, how many of them keep attention) of each group."""
    size = DEPTH // len(record["selection"]["confidence"])
    spans = []
    for first in range(0, DEPTH, size):
        blocks = [block for block in range(first, first + size) if block not in pinned]
        kept = sum(block not in record["grafted"] for block in blocks)
        spans.append((blocks, len(blocks), kept))
    return spans


def agreement(records: list[dict], spans: list[tuple[list[int], int, int]]) -> list[str]:
    """Share of the blocks in question that all seeds treat alike, and that of uniform choices."""
    blocks = [block for of_group, _, _ in spans for block in of_group]
    alike = sum(len({block in record["grafted"] for record in records}) == 1 for block in blocks)
    runs = len(records)
    expected = sum(n * ((k / n) ** runs + (1 - k / n) ** runs) for _, n, k in spans if n)
    return [f"{share / len(blocks):.0%}" for share in (alike, expected)]


def words(numbers) -> str:
    """Different numbers, each once."""
    return " and ".join(f"{number:,}".replace(",", " ") for number in dict.fromkeys(numbers))


# -- plots ---------------------------------------------------------------------


def figure_of(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def color_of(records: list[dict]) -> str:
    return CHOSEN if is_learned(records) else GUESSED


def plot_metrics(operators: Sequence[str], groups: Groups, path: Path) -> None:
    """A panel an operator and metric, a row a pattern, a dot a case; dashed without a graft."""
    figure = figure_of(4.6 * len(METRICS), 0.5 + 3.2 * len(operators))
    axes = figure.subplots(len(operators), len(METRICS), squeeze=False, sharey="row")
    for row, operator in zip(axes, operators, strict=True):
        shown = ranked(operator, groups)
        for axis, (metric, title) in zip(row, METRICS.items(), strict=True):
            for place, (_, records) in enumerate(shown):
                values, color = [record[metric] for record in records], color_of(records)
                axis.plot(values, [place] * len(values), "o", color=color, alpha=0.55)
                axis.plot(mean(records, metric), place, "|", color=color, markersize=18)
            base = mean(groups[UNGRAFTED], metric)
            axis.axvline(base, color="black", linestyle="--", linewidth=1)
            axis.set_title(f"{operator}: {title}", fontsize=11)
            axis.grid(alpha=0.3)
        row[0].set_yticks(range(len(shown)), [pattern for pattern, _ in shown])
        row[0].invert_yaxis()
    figure.supxlabel(
        "dot: a seed; bar: their mean; orange: learned, blue: guessed; dashed: no graft, the same "
        "finetuning; best training MSE on top",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def plot_blocks(operators: Sequence[str], groups: Groups, path: Path) -> None:
    """A panel an operator, a row a plan, a column a block: filled where it keeps attention."""
    from matplotlib.colors import ListedColormap

    panels = [strips(operator, groups) for operator in operators]
    figure = figure_of(7.4 * len(panels), 1.2 + 0.26 * max(len(rows) for rows in panels))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, operator, rows in zip(axes, operators, panels, strict=True):
        cells = [
            [0 if block in grafted else 1 + chosen for block in range(DEPTH)]
            for _, grafted, chosen, _ in rows
        ]
        colors = ListedColormap(["#e8e8e8", GUESSED, CHOSEN])
        axis.pcolormesh(cells, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=1.5)
        for group in range(4, DEPTH, 4):
            axis.axvline(group, color="black", linewidth=0.6, alpha=0.5)
        middles = [place + 0.5 for place in range(len(rows))]
        axis.set_yticks(middles, [name for name, *_ in rows])
        axis.set_xticks([block + 0.5 for block in range(DEPTH)], range(DEPTH), fontsize=7)
        axis.invert_yaxis()
        right = axis.secondary_yaxis("right")
        right.set_yticks(middles, [f"{value:.4f}" for *_, value in rows], fontsize=8)
        right.set_ylabel("training MSE", fontsize=9)
        for ticked in (axis, right):
            ticked.tick_params(length=0)
        axis.set_title(f"{operator}: filled blocks keep attention", fontsize=11)
        axis.set_xlabel("block", fontsize=9)
    figure.savefig(path, dpi=110)


def strips(operator: str, groups: Groups) -> list[tuple[str, list[int], bool, float]]:
    """(name, grafted blocks, whether learned, training MSE) of each plan, as `ranked` has them.

    A plan that all seeds share has one row, with the mean over the seeds.
    """
    rows = []
    for pattern, records in ranked(operator, groups):
        chosen = is_learned(records)
        if not chosen and len({tuple(record["grafted"]) for record in records}) == 1:
            rows.append((pattern, records[0]["grafted"], chosen, mean(records, "train_mse")))
            continue
        for record in records:
            name = f"{pattern}, seed {record['seed']}"
            rows.append((name, record["grafted"], chosen, record["train_mse"]))
    return rows
