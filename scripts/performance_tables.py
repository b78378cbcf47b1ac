"""The tables of docs/performance.md, from what benchmark.py and profile_grafts.py have measured.

    python scripts/performance_tables.py

The page has the commands that measure, each with the file in docs/results/performance that its
--json goes to: finetune, selection, sampling, vae, distill, pairs, pixart; operators_swa,
operators_hyena and operators_mamba2; two_fp32 and two_bf16 of finetuning with torchrun.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json
from models.operators.accelerators import KERNELS as PATHS
from scripts import testbed
from training import arguments, distributed

REPOSITORY = Path(__file__).resolve().parent.parent
FIX = "measure it again, docs/performance.md has the command"
WORKS = {
    "finetune": "finetuning step",
    "selection": "selection step, 75 % SWA, LoRA",
    "sampling": "guided reverse step",
    "encode": "VAE encoding",
    "decode": "VAE decoding",
}
OPERATORS = ("swa", "hyena", "mamba2")  # in one run each, beside full attention
WANTED = {  # of each file, a key of its rows, and which values that may have
    "finetune": ("work", ["finetune"]),
    "selection": ("work", ["selection"]),
    "sampling": ("work", ["sampling"]),
    "vae": ("work", ["encode", "decode"]),
    "two_fp32": ("work", ["finetune"]),
    "two_bf16": ("work", ["finetune"]),
    **{f"operators_{kind}": ("operator", None) for kind in OPERATORS},
    "distill": ("share_of_teacher", None),
    "pairs": ("latency_ms", None),
    "pixart": ("latency_ms", None),
}
# Times as fast as the published style, and the ms of that beside which the aim was set; None: in
# the same run. An aim below 1 is a share of the peak.
AIMS = {
    ("finetune", 8): (4, 118),
    ("finetune", 32): (2.5, 138),
    ("finetune", 128): (0.6, None),
    ("selection", 8): (5, 245),
    ("selection", 32): (2.7, 205),
    ("sampling", 32): (2.2, 60.8),
    ("encode", 64): (20, None),
}
# Of kernel_times.py; what is in none of these is "other"
KINDS = ("products", "attention", "modulation", "GELU", "Inductor's own")
KINDS += ("optimiser, averages, norms", "between processes", "no kernel")


def read(results: Path, *names: str) -> list[dict]:
    """What was measured, by file; ValueError for one that is missing, torn or of something else."""
    return [_read(results / f"{name}.json", name) for name in names]


def _read(path: Path, name: str) -> dict:
    if not path.is_file():
        raise ValueError(f"{path}: missing: {FIX}")
    found, (key, values) = read_json(path, FIX), WANTED[name]
    rows = found.get("rows") or [{}]
    if any(row.get(key) is None or (values and row[key] not in values) for row in rows):
        raise ValueError(f"{path}: holds no rows of {name}: {FIX}")
    if name == "pairs" and "parallel pairs" not in rows[0].get("model", ""):
        raise ValueError(f"{path}: is of {rows[0].get('model')}, not of parallel pairs: {FIX}")
    if name.startswith("two_"):
        exchange = found.get("flags", {}).get("exchange")
        if found["processes"] < 2 or exchange not in (None, name.removeprefix("two_")):
            raise ValueError(
                f"{path}: is of processes {found['processes']}, --exchange {exchange}: {FIX}"
            )
    return found


def sides(found: dict) -> list[tuple[dict, dict]]:
    """Each row of this repository, after that of the published style beside it."""
    publics = {
        (row["work"], row["batch"]): row for row in found["rows"] if row["side"] == "published"
    }
    return [
        (publics[row["work"], row["batch"]], row)
        for row in found["rows"]
        if row["side"] != "published"
    ]


def steps(results: Path) -> str:
    """Work beside the published style, and what each file was measured with."""
    columns = ["work", "images", "published ms", "here ms", "ratio", "aim: ratio", "aim: ms"]
    columns += ["TFLOP/s (of the peak)", "ms at the peak", "GiB published", "GiB here"]
    lines, made = [], []
    for found in read(results, "finetune", "selection", "sampling", "vae"):
        for public, here in sides(found):
            work, batch, side = here["work"], here["batch"], here["side"]
            rate = here.get("share_of_peak")
            lines.append(
                [
                    WORKS[work] + side.removeprefix("here").replace(", --fp8", ", `--fp8`"),
                    str(batch),
                    f"{public['ms']:.1f}",
                    f"{here['ms']:.1f}",
                    f"{here['ratio']:.1f}",
                    *aim(public, here),
                    f"{here['tflops']:.0f} ({100 * rate:.1f} %)" if rate else "",
                    f"{here['ms'] * rate:.1f}" if rate else "",
                    *(memory(row) for row in (public, here)),
                ]
            )
        works = " and ".join(dict.fromkeys(WORKS[row["work"]] for row in found["rows"]))
        peak = found.get("matmul_peak")
        made.append(f"- {works}: {origin(found)}" + (f"; peak {peak:.0f} TFLOP/s" if peak else ""))
    return "\n".join([testbed.table(columns, lines), "", *made])


def aim(public: dict, here: dict) -> list[str]:
    """What a row was to come to, as a ratio and in ms."""
    if (here["work"], here["batch"]) not in AIMS:
        return ["", ""]
    ratio, beside = AIMS[here["work"], here["batch"]]
    if ratio < 1:
        share = here.get("share_of_peak")
        return [f"{100 * ratio:.0f} %", f"{here['ms'] * share / ratio:.1f}" if share else ""]
    return [f"{ratio}", f"{(beside or public['ms']) / ratio:.1f}"]


def memory(row: dict) -> str:
    return f"{row['peak_memory_gib']:.1f}" if "peak_memory_gib" in row else ""


def origin(found: dict) -> str:
    """What made a file."""
    revision = str(found["git_revision"])[:8]
    return f"revision {revision}, PyTorch {found['torch']}, {found['hardware']}"


def kernels(results: Path) -> str:
    """Where the time goes, of what was measured with --profile."""
    lines = []
    for name in ("finetune", "two_fp32", "two_bf16", "selection", "sampling", "vae"):
        (found,) = read(results, name)
        exchange = name.removeprefix("two_") if name.startswith("two_") else ""
        for _, row in sides(found):
            if kinds := row.get("kinds"):
                other = sum(ms for kind, ms in kinds.items() if kind not in KINDS)
                numbers = [*(kinds.get(kind) for kind in KINDS), other]
                title = f"{WORKS[row['work']]}, {row['batch']}"
                title += f", {found['processes']} GPUs, {exchange}" if exchange else ""
                lines.append([title, *("" if ms is None else f"{ms:.1f}" for ms in numbers)])
    return testbed.table(["", *KINDS, "other"], lines)


def processes(results: Path) -> str:
    """Finetuning on several GPUs, by how they exchange gradients."""
    lines, made = [], []
    for exchange in ("fp32", "bf16"):
        (found,) = read(results, f"two_{exchange}")
        for public, here in sides(found):
            numbers = (public["ms"], here["ms"], here["ratio"])
            where = [f"{found['processes']}", exchange, str(here["batch"])]
            lines.append([*where, *(f"{n:.1f}" for n in numbers)])
        made.append(f"- {exchange}: {origin(found)}")
    columns = ["GPUs", "exchange", "images a GPU", "published ms", "here ms", "ratio"]
    return "\n".join([testbed.table(columns, lines), "", *made])


def pairs(results: Path) -> str:
    """Milliseconds of a forward of the depth and of the width."""
    (found,) = read(results, "pairs")
    (row,) = found["rows"]
    batches = list(row["latency_ms"])
    lines = [
        [name, *(f"{of['latency_ms'][n]:.2f}" for n in batches)]
        for name, of in (("sequential", row["plain"]), ("parallel pairs", row))
    ]
    ratios = (row["plain"]["latency_ms"][n] / row["latency_ms"][n] for n in batches)
    lines.append(["times as fast", *(f"{ratio:.2f}" for ratio in ratios)])
    return testbed.table(["", *(f"batch {n}" for n in batches)], lines) + f"\n\n{origin(found)}."


def pixart(results: Path) -> str:
    """Milliseconds of a forward of PixArt-Sigma, plain and grafted, at several sizes."""
    (found,) = read(results, "pixart")
    lines = []
    for row in found["rows"]:
        for n, ms in row["latency_ms"].items():
            plain = row["plain"]["latency_ms"][n]
            lines.append([row["model"], n, f"{plain:.2f}", f"{ms:.2f}", f"{plain / ms:.2f}"])
    columns = ["model", "batch", "original ms", "grafted ms", "times as fast"]
    return testbed.table(columns, lines) + f"\n\n{origin(found)}."


def operators(results: Path) -> str:
    """Milliseconds of operators, a line for each path, a table for each run."""
    tables = []
    for kind in OPERATORS:
        (found,) = read(results, f"operators_{kind}")
        times: dict[tuple, dict] = {}
        for row in found["rows"]:
            line = times.setdefault((row["operator"], row["tokens"], row["path"]), {})
            line[f"{row['mode']} {row['pass']}"] = f"{row['ms']:.2f}"
        columns = list(dict.fromkeys(column for line in times.values() for column in line))
        lines = [
            [name, str(tokens), " + ".join(_name_of(part) for part in path.split(" + "))]
            + [line.get(column, "") for column in columns]
            for (name, tokens, path), line in sorted(times.items(), key=lambda item: item[0][:2])
        ]
        table = testbed.table(["operator", "tokens", "path", *columns], lines)
        tables.append(f"{table}\n\n{origin(found)}.")
    return "\n\n".join(tables)


def _name_of(path: str) -> str:
    return "PyTorch" if path == "torch" else PATHS[path].name


def distillation(results: Path) -> str:
    """A step of Stage 1 beside its teacher's forward alone."""
    (found,) = read(results, "distill")
    (row,) = found["rows"]
    lines = [
        [what, f"{row[f'{side}_ms']:.1f}", f"{row[rate]:.0f}"]
        for what, side, rate in (
            ("teacher's forward alone", "teacher", "teacher_images_per_sec"),
            ("whole step", "step", "images_per_sec"),
        )
    ]
    said = (
        f"{100 * row['share_of_teacher']:.1f} % of the teacher's rate (aim: 45 %); 8 000 images x "
        f"200 epochs in {row['hours_for_8000_x_200']:.2f} hours (aim: 1); peak memory "
        f"{row['peak_memory_gib']:.1f} GiB (aim: 60); {origin(found)}."
    )
    return testbed.table(["", "ms", "images/s"], lines) + "\n\n" + said


SECTIONS = {
    "steps": steps,
    "kernels": kernels,
    "processes": processes,
    "operators": operators,
    "distillation": distillation,
    "pairs": pairs,
    "pixart": pixart,
}


def main(args: argparse.Namespace) -> None:
    made = {name: section(args.results) for name, section in SECTIONS.items()}
    page = args.page.read_text(encoding="utf-8") if args.page.is_file() else ""
    for name in made:
        if f"{Path(__file__).name} {name} -->" not in page:
            raise ValueError(f"{args.page}: has no place for the table {name!r}; see --page")
    for name, text in made.items():
        testbed.write_tables(args.page, f"{Path(__file__).name} {name}", text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add(
        "--results",
        type=Path,
        default=REPOSITORY / "docs" / "results" / "performance",
        help="folder of what was measured (default: docs/results/performance)",
    )
    add(
        "--page",
        type=Path,
        default=REPOSITORY / "docs" / "performance.md",
        help="where the tables go, each between the two lines that name it (default: "
        "docs/performance.md)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
