"""A report of scored samples and training runs, as Markdown and as one HTML file."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from evaluation.readers import open_images
from evaluation.report import LABELS, align, show
from models.files import read_json, write_whole
from models.selection import summary

GRID = 64  # images of a grid
THUMB = 128  # pixels, the largest side of a picture in a grid
PUBLISHED_N = 50_000
NUMBERS = (
    "N",
    "step",
    "loss",
    "lowest loss",
    "images/s",
    "steps left out",
)  # columns beside scores
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { text-align: left; background: var(--soft); } td.number, th.number { text-align: right; }
tr.published td { opacity: .7; font-style: italic; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: white; }
figcaption, li { font-size: .92rem; overflow-wrap: anywhere; } figcaption { opacity: .8; }
"""


@dataclass(frozen=True)
class Picture:
    """An image of the page: file name, content, what it shows."""

    name: str
    data: bytes
    caption: str


@dataclass
class Section:
    """A part of the page: a heading, sentences, a table (its head first), pictures, a list.

    published: the numbers of the table's rows that hold published scores.
    """

    title: str
    sentences: list[str] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    published: set[int] = field(default_factory=set)
    pictures: list[Picture] = field(default_factory=list)
    points: list[str] = field(default_factory=list)


# -- finding -------------------------------------------------------------------


def find_results(places: Sequence[Path]) -> tuple[dict[Path, dict], list[Path]]:
    """Scores by the file that holds them, and folders of training runs, in and below `places`.

    Raises: FileNotFoundError when a place does not exist, ValueError when it holds neither.
    """
    reports: dict[Path, dict] = {}
    runs: list[Path] = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: give metrics.json files or folders")
        files = sorted(place.rglob("*metrics.json")) if place.is_dir() else [place]
        found = {file: read_json(file, "score the samples again") for file in files}
        found = {file: report for file, report in found.items() if "metrics" in report}
        folders = sorted(p.parent for p in place.rglob("metrics.jsonl")) if place.is_dir() else []
        folders = [folder for folder in folders if curves_of(folder)]
        if not found and not folders:
            raise ValueError(f"{place} holds neither scores (metrics.json) nor training runs")
        reports |= found
        runs += [folder for folder in folders if folder not in runs]
    return reports, runs


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file; a last one may be in the making."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses of a run by name, as (step, value); non-finite values are left out."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read_lines(run / "metrics.jsonl"):
        for name, value in record.items():
            if "loss" in name and value is not None:
                curves.setdefault(name, []).append((record["step"], value))
    return curves


# -- parts ---------------------------------------------------------------------


def describe_plan(settings: dict) -> str:
    """ "DiT-Mini/2, swa in mha of 14 blocks" of the settings in samples.json; "-" without any."""
    plan = settings.get("plan")
    if plan is None:
        return "-"
    grafts = [
        f"{graft['operator']} in {graft['slot']} of {len(graft['blocks'])} blocks"
        for graft in plan["grafts"]
    ]
    return f"{plan['model_name']}, {'; '.join(grafts) or 'no grafts'}"


def settings_of(report: dict) -> dict:
    return (report.get("samples_json") or {}).get("settings", {})


def name_of(file: Path, report: dict) -> str:
    """What a result is called: the last two parts of the path of its samples."""
    return "/".join(Path(report["samples"]["path"]).parts[-2:]) or str(file)


def results_section(reports: dict[Path, dict], zoo: list[dict]) -> Section:
    """The scores; below a released model what was published of it."""
    keys = [key for key in LABELS if any(key in report["metrics"] for report in reports.values())]
    section = Section("Scores")
    section.table = [["samples", "model", "N", *(LABELS[key] for key in keys), "protocol"]]
    for file, report in reports.items():
        settings = settings_of(report)
        scores = [
            show(report, key, _digits(key)) if key in report["metrics"] else "" for key in keys
        ]
        count = _thousands(report["num_samples"])
        row = [name_of(file, report), describe_plan(settings), count, *scores, report["protocol"]]
        section.table.append(row)
        for entry in zoo:
            if entry["name"] in json.dumps(settings) and "fid" in report["metrics"]:
                section.published.add(len(section.table))
                section.table.append(_published_row(entry, keys))
    section.sentences.append(_references(reports))
    small = sorted({r["num_samples"] for r in reports.values() if r["num_samples"] < PUBLISHED_N})
    if small:
        section.sentences.append(
            f"N is the number of samples; published scores are of {_thousands(PUBLISHED_N)}. "
            "Frechet distances of fewer read higher: compare at equal N only."
        )
    if any(report.get("standard_errors") for report in reports.values()):
        section.sentences.append(
            "± is the standard error that the choice of the samples leaves, by resampling them."
        )
    if "fd_mini" in keys:
        section.sentences.append(
            "fd_mini, and precision and recall of protocol mini, are of the testbed's own feature "
            "network: they cannot be compared with published scores."
        )
    return section


def _digits(key: str) -> int:
    """Decimals of a score: the papers' two, and three of shares."""
    return 3 if key in ("precision", "recall") else 2


def _references(reports: dict[Path, dict]) -> str:
    """One sentence: what all results were compared with, or that the references differ."""
    found = list(dict.fromkeys(map(_reference_of, reports.values())))
    if len(found) == 1:
        return f"The reference is {found[0]}."
    return f"The references differ, and scores compare at an equal one only: {'; '.join(found)}."


def _reference_of(report: dict) -> str:
    known, source = report["num_reference"], report["reference"].get("made_from")
    text = report["reference"]["path"] + (f", from {source}" if source else "")
    return f"{text} ({'count not stated' if known is None else f'{_thousands(known)} images'})"


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _published_row(entry: dict, keys: Sequence[str]) -> list[str]:
    scores = [entry["published"].get(key) for key in keys]
    texts = ["-" if score is None else f"{score:.2f}" for score in scores]
    return [f"published: {entry['name']}", f"{entry['operator']}, {entry['ratio']} %",
            _thousands(PUBLISHED_N), *texts, "adm"]  # fmt: skip


def zoo_section(reports: dict[Path, dict], zoo: list[dict]) -> Section | None:
    """Published scores of the operators that the results graft; None when there are none."""
    operators = {
        graft["operator"]
        for report in reports.values()
        for graft in settings_of(report).get("plan", {}).get("grafts", [])
    }
    entries = [entry for entry in zoo if entry["operator"] in operators]
    if not entries:
        return None
    keys = ["fid", "sfid", "is", "precision", "recall"]
    head = ["released model", "graft", "N", *(LABELS[key] for key in keys), "protocol"]
    section = Section(
        "Published scores of the same operators",
        ["DiT-XL/2 at 256 px, arXiv 2506.05340; the list is configs/zoo.yaml."],
        [head],
    )
    for entry in entries:
        row = _published_row(entry, keys)
        section.table.append([entry["name"], *row[1:]])
    return section


def result_section(file: Path, report: dict, number: int) -> Section:
    """One set of samples: a grid, where it comes from, what to doubt."""
    settings = settings_of(report)
    section = Section(f"Samples {name_of(file, report)}")
    grid = grid_of(file, report)
    if grid is None:
        section.sentences.append(f"The samples are no longer at {report['samples']['path']}.")
    else:
        count = report["num_samples"]
        which = f"the first {GRID} of {_thousands(count)}" if count > GRID else f"all {count}"
        section.pictures.append(Picture(f"samples-{number}.jpg", grid, f"{which} samples"))
    points = [f"scores: {file}"]
    if settings:
        points += [
            f"model: {describe_plan(settings)}",
            f"weights: {_words(settings['checkpoint'])}",
            f"sampler: {settings['sampler']}, {settings['steps']} steps, cfg-scale "
            f"{settings['cfg_scale']}, seed {settings['seed']}, labels {settings['labels']}, VAE "
            f"{settings['vae']}, {settings['precision']}",
        ]
    net = report["feature_net"]
    points += [
        f"reference: {_reference_of(report)}",
        f"features: {net['name']}, protocol {net['protocol']}, weights {net['sha256'][:12]}",
        f"made with revision {report['git_revision'] or 'unknown'}, PyTorch {report['torch']}, "
        f"{report['time']}",
    ]  # fmt: skip
    points += [f"no {LABELS[key]}: {why}" for key, why in report.get("why_null", {}).items()]
    points += [f"note: {line}" for line in report["notes"]]
    section.points = points + [f"warning: {line}" for line in report["warnings"]]
    return section


def _words(checkpoint: str | dict) -> str:
    if isinstance(checkpoint, str):
        return checkpoint
    return ", ".join(f"{key} {value}" for key, value in checkpoint.items() if value) or "none"


def grid_of(file: Path, report: dict) -> bytes | None:
    """The first images of a result as a JPEG; None when they are no longer there.

    They are looked for where metrics.json lies, and where they were scored: in that order, as other
    images may have taken the place since.
    """
    scored = Path(report["samples"]["path"])
    if file.name == "metrics.json":
        own = [file.parent]
    else:
        name = file.name.removesuffix(".metrics.json")
        own = [file.with_name(name), file.with_name(f"{name}.npz")]
    for place in (*own, scored):
        try:
            images = open_images(place)
        except (FileNotFoundError, ValueError):
            continue
        pixels = [images.read(i)[0] for i in range(min(GRID, len(images)))]
        break
    else:
        return None
    columns = next(n for n in range(1, GRID + 1) if n * n >= len(pixels))
    scale = min(1.0, THUMB / max(images.size))
    width, height = (max(1, round(side * scale)) for side in images.size)
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, array in enumerate(pixels):
        thumb = Image.fromarray(array).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(thumb, (i % columns * width, i // columns * height))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=92, subsampling=0)
    return content.getvalue()


def runs_section(runs: list[Path]) -> Section:
    """All training runs in one table, and the losses of those of a kind in one plot."""
    section = Section("Training runs")
    section.table = [["run", "step", "loss", "lowest loss", "images/s", "steps left out"]]
    kinds: dict[tuple, dict[str, list[tuple[int, float]]]] = {}
    for run in runs:
        curves, last = curves_of(run), {}
        for record in read_lines(run / "metrics.jsonl"):
            last |= record
        losses = curves.get("loss", [])
        row = [
            _run_name(run),
            str(last["step"]),
            "-",
            "-",
            "-",
            str(last.get("skipped_steps", "-")),
        ]
        if losses:
            row[2:4] = f"{losses[-1][1]:.4f}", f"{min(value for _, value in losses):.4f}"
            kind = ((run / "trajectory.jsonl").is_file(), *sorted(curves))
            kinds.setdefault(kind, {})[_run_name(run)] = losses
        if "images_per_sec" in last:
            row[4] = f"{last['images_per_sec']:.1f}"
        section.table.append(row)
    compared = [(kind[0], curves) for kind, curves in kinds.items() if len(curves) > 1]
    for number, (selects, curves) in enumerate(compared, 1):
        caption = f"losses of the {'selections' if selects else 'runs'} over their steps"
        section.pictures.append(Picture(f"losses-{number}.svg", _plot(curves, "loss"), caption))
    return section


def _run_name(run: Path) -> str:
    return "/".join(run.parts[-2:])


def run_section(run: Path, number: int) -> Section:
    """One training run: its losses, its gates, its last figures."""
    curves = curves_of(run)
    section = Section(f"Run {_run_name(run)}")
    section.pictures.append(
        Picture(f"loss-{number}.svg", _plot(curves, "loss"), "loss over the steps of the run")
    )
    trajectory = run / "trajectory.png"
    if trajectory.is_file():
        caption = "probability of each option of the gates, and the decision"
        section.pictures.append(Picture(f"gates-{number}.png", trajectory.read_bytes(), caption))
    elif (run / "trajectory.jsonl").is_file():
        groups: dict[str, list[tuple[int, float]]] = {}
        for line in read_lines(run / "trajectory.jsonl"):
            for group, chances in enumerate(line["probabilities"], 1):
                groups.setdefault(f"group {group}", []).append((line["step"], max(chances)))
        caption = "probability of the likeliest option of each group of gates, so far"
        plot = _plot(groups, "probability")
        section.pictures.append(Picture(f"gates-{number}.svg", plot, caption))
    section.points.append(f"folder: {run}")
    for name, points in curves.items():
        best = min(value for _, value in points)
        step, last = points[-1]
        section.points.append(f"{name}: {last:.5g} at step {step}, lowest {best:.5g}")
    decision = run / "selection.json"
    if decision.is_file():
        answer = read_json(decision, "repeat the selection with --resume auto")
        section.points += summary(answer)
        lowest = min(group["confidence"] for group in answer["groups"])
        section.points.append(f"lowest confidence of a group: {lowest:.2f}")
    return section


def _plot(curves: dict[str, list[tuple[int, float]]], label: str) -> bytes:
    """Curves over steps as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=name, linewidth=1.6, marker="." if len(steps) < 30 else "")
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=1 + len(curves) // 8)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


# -- writing -------------------------------------------------------------------


def build_sections(places: Sequence[Path], zoo: list[dict]) -> list[Section]:
    """The page of everything in `places`. Raises: as `find_results`."""
    reports, runs = find_results(places)
    sections = []
    if reports:
        sections.append(results_section(reports, zoo))
        if published := zoo_section(reports, zoo):
            sections.append(published)
    sections += [result_section(file, r, i) for i, (file, r) in enumerate(reports.items(), 1)]
    if len(runs) > 1:
        sections.append(runs_section(runs))
    return sections + [run_section(run, i) for i, run in enumerate(runs, 1)]


def to_markdown(title: str, sections: list[Section], folder: str) -> str:
    """The page as Markdown, whose pictures lie in `folder`."""
    lines = [f"# {title}"]
    for section in sections:
        lines += ["", f"## {section.title}"]
        lines += [line for sentence in section.sentences for line in ("", sentence)]
        if section.table:
            safe = [[cell.replace("|", "\\|") for cell in row] for row in section.table]
            lines += ["", *align(safe)]
        for picture in section.pictures:
            lines += ["", f"![{picture.caption}]({folder}/{picture.name})"]
        if section.points:
            lines += ["", *(f"- {point}" for point in section.points)]
    return "\n".join(lines) + "\n"


def to_html(title: str, sections: list[Section]) -> str:
    """The page as one HTML file that needs no other."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(sentence)}</p>" for sentence in section.sentences]
        if section.table:
            parts.append(_html_table(section))
        for picture in section.pictures:
            kind = {"jpg": "jpeg", "png": "png", "svg": "svg+xml"}[picture.name.rpartition(".")[2]]
            data = base64.b64encode(picture.data).decode()
            caption = html.escape(picture.caption)
            parts.append(
                f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        if section.points:
            points = "".join(f"<li>{html.escape(point)}</li>" for point in section.points)
            parts.append(f"<ul>{points}</ul>")
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(section: Section) -> str:
    head, *rows = section.table
    numbers = {i for i, name in enumerate(head) if name in (*NUMBERS, *LABELS.values())}

    def line(cells: list[str], tag: str, kind: str = "") -> str:
        classes = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        inside = (
            f"<{tag}{name}>{html.escape(cell)}</{tag}>"
            for cell, name in zip(cells, classes, strict=True)
        )
        return f"<tr{kind}>{''.join(inside)}</tr>"

    body = "".join(
        line(row, "td", ' class="published"' if i in section.published else "")
        for i, row in enumerate(rows, 1)
    )
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def write_page(folder: Path, title: str, sections: list[Section]) -> tuple[Path, Path]:
    """Writes report.html, report.md and the pictures of the latter into `folder`."""
    pages = folder / "report.html", folder / "report.md"
    for section in sections:
        for picture in section.pictures:
            content = picture.data
            write_whole(
                folder / "images" / picture.name,
                lambda partial, content=content: partial.write_bytes(content),
                durable=False,
            )
    texts = to_html(title, sections), to_markdown(title, sections, "images")
    for page, text in zip(pages, texts, strict=True):
        write_whole(page, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
    return pages
