"""The tables of docs/performance.md, from what benchmark.py and profile_grafts.py have measured.

python scripts/benchmark.py finetune --batch 8 32 128 --profile --json RESULTS/finetune.json
python scripts/performance_tables.py

RESULTS is docs/results/performance. It holds what benchmark.py's commands give: finetune.json,
selection.json, sampling.json, vae.json, operators.json and distill.json; of finetuning with
torchrun, two_fp32.json and two_bf16.json; and pairs.json, what `profile_grafts.py
configs/parallel_pairs.yaml --latency --json` prints. docs/performance.md has the commands.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.files import read_json
from scripts import testbed
from training import arguments, distributed

REPOSITORY = Path(__file__).resolve().parent.parent
FIX = "measure it as scripts/performance_tables.py says"
WORKS = {
    "finetune": "finetuning step",
    "selection": "selection step, 75 % SWA, LoRA",
    "sampling": "guided reverse step",
    "encode": "VAE encoding",
    "decode": "VAE decoding",
}
AIMS = {  # times as fast as the published style
    ("finetune", 8, "here"): "4",
    ("finetune", 32, "here"): "2.5",
    ("finetune", 128, "here"): "60 % of the peak",
    ("selection", 8, "here"): "5",
    ("selection", 32, "here"): "2.7",
    ("sampling", 32, "here"): "2.2",
    ("sampling", 32, "here, --fp8"): "2.2",
    ("encode", 64, "here"): "20",
}
KINDS = {  # of kernel_times.py; what is in none of these is "other"
    "products": "products",
    "attention": "attention",
    "modulation": "modulation",
    "GELU": "GELU",
    "Inductor's": "Inductor's own",
    "optimiser, averages, norms": "optimiser, averages, norms",
    "no kernel": "no kernel",
}


def read(results: Path, *names: str) -> list[dict]:
    """What was measured, by file; ValueError for one that is missing or not whole."""
    paths = [results / f"{name}.json" for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: missing: {FIX}")
    return [read_json(path, FIX) for path in paths]


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
    columns = ["work", "images", "published ms", "here ms", "ratio", "aim", "TFLOP/s (of the peak)"]
    columns += ["GiB published", "GiB here"]
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
                    AIMS.get((work, batch, side), ""),
                    f"{here['tflops']:.0f} ({100 * rate:.0f} %)" if rate else "",
                    *(f"{row['peak_memory_gib']:.1f}" for row in (public, here)),
                ]
            )
        works = " and ".join(dict.fromkeys(WORKS[row["work"]] for row in found["rows"]))
        peak = found.get("matmul_peak")
        made.append(f"{works}: {origin(found)}" + (f", peak {peak:.0f} TFLOP/s" if peak else ""))
    return testbed.table(columns, lines) + "\n\n" + "; ".join(made) + "."


def origin(found: dict) -> str:
    """What made a file."""
    revision = str(found["git_revision"])[:8]
    return f"revision {revision}, PyTorch {found['torch']}, {found['hardware']}"


def kernels(results: Path) -> str:
    """Where the time goes, of what was measured with --profile."""
    lines = []
    for found in read(results, "finetune", "selection", "sampling"):
        for _, row in sides(found):
            if kinds := row.get("kinds"):
                named = [kinds.get(kind, 0.0) for kind in KINDS.values()]
                numbers = [*named, sum(kinds.values()) - sum(named)]
                title = f"{WORKS[row['work']]}, {row['batch']}"
                lines.append([title, *(f"{ms:.1f}" for ms in numbers)])
    return testbed.table(["", *KINDS, "other"], lines)


def processes(results: Path) -> str:
    """Finetuning on several GPUs, by how they exchange gradients."""
    lines = []
    for exchange in ("fp32", "bf16"):
        (found,) = read(results, f"two_{exchange}")
        for public, here in sides(found):
            numbers = (public["ms"], here["ms"], here["ratio"])
            where = [f"{found['processes']}", exchange, str(here["batch"])]
            lines.append([*where, *(f"{n:.1f}" for n in numbers)])
    columns = ["GPUs", "exchange", "images a GPU", "published ms", "here ms", "ratio"]
    return testbed.table(columns, lines) + f"\n\n{origin(found)}."


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


def operators(results: Path) -> str:
    """Milliseconds of operators, a line for each path."""
    (found,) = read(results, "operators")
    times: dict[tuple, dict] = {}
    for row in found["rows"]:
        line = times.setdefault((row["operator"], row["tokens"], row["path"]), {})
        line[f"{row['mode']} {row['pass']}"] = f"{row['ms']:.2f}"
    columns = list(dict.fromkeys(column for line in times.values() for column in line))
    lines = [
        [name, str(tokens), {"torch": "PyTorch", "triton": "Triton", "flex": "FlexAttention"}[path]]
        + [line.get(column, "") for column in columns]
        for (name, tokens, path), line in times.items()
    ]
    return testbed.table(["operator", "tokens", "path", *columns], lines) + f"\n\n{origin(found)}."


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
}


def main(args: argparse.Namespace) -> None:
    made = {name: section(args.results) for name, section in SECTIONS.items()}
    for name, text in made.items():
        testbed.write_tables(args.page, f"{Path(__file__).name} {name}", text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument
    add("--results", type=Path, default=REPOSITORY / "docs" / "results" / "performance")
    add(
        "--page",
        type=Path,
        default=REPOSITORY / "docs" / "performance.md",
        help="where the tables go, each between two markers of its own",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    distributed.run(main, parse_args())
