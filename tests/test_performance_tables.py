"""scripts/performance_tables.py: measured files to the tables of a page."""

import json

import pytest

from scripts import performance_tables

MADE = {"git_revision": "0123456789", "torch": "2.11.0", "hardware": "a GPU"}


def side(work, batch, ms, name="here", **more):
    row = {"work": work, "batch": batch, "side": name, "ms": ms, "peak_memory_gib": ms / 10}
    return row | {"ratio": 100 / ms} | more


@pytest.fixture
def results(tmp_path):
    def write(name, content):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def measured(*rows, **more):
        return MADE | {"processes": 1, "rows": list(rows)} | more

    kinds = {"products": 9.0, "no kernel": 1.5, "copies": 0.5, "convolutions": 0.25}
    fast = {"tflops": 400.0, "share_of_peak": 0.5, "kinds": kinds}
    both = [side("finetune", 8, 100.0, "published"), side("finetune", 8, 25.0, **fast)]
    large = (
        side("finetune", 128, 90.0, "published"),
        side("finetune", 128, 100.0, tflops=400.0, share_of_peak=0.45),
    )
    write("finetune", measured(*both, *large, matmul_peak=800.0))
    write("selection", measured(side("selection", 8, 100.0, "published"), side("selection", 8, 20)))
    low = side("sampling", 32, 40, "here, --fp8")
    write("sampling", measured(side("sampling", 32, 100, "published"), low))
    coding = [side(work, 64, ms, name) for work in ("encode", "decode")
              for ms, name in ((100, "published"), (10, "here"))]  # fmt: skip
    write("vae", measured(*coding))
    for exchange in ("fp32", "bf16"):
        write(f"two_{exchange}", measured(*both, processes=2))
    row = {
        "model": "DiT-XL/2 at 256 px, 14 parallel pairs",
        "latency_ms": {"1": 1.0, "2": 2.0},
        "plain": {"latency_ms": {"1": 1.5, "2": 2.0}},
    }
    write("pairs", measured(row))
    write("pixart", measured(row | {"model": "PixArt at 512 px"}))
    operator = {"operator": "swa", "tokens": 256, "mode": "eager"}
    for kind in ("hyena", "mamba2"):
        path = {"hyena": "causal-conv1d", "mamba2": "causal-conv1d + mamba-ssm"}[kind]
        row = {"operator": kind, "tokens": 64, "mode": "eager", "pass": "forward", "ms": 2.0}
        write(f"operators_{kind}", measured(row | {"path": path}))
    write("operators_swa", measured(
        operator | {"path": "torch", "pass": "forward", "ms": 1.5},
        operator | {"path": "triton", "pass": "forward", "ms": 1.0},
        operator | {"path": "triton", "pass": "training", "ms": 3.0},
    ))  # fmt: skip
    distill = {"teacher_ms": 30.0, "teacher_images_per_sec": 2000.4, "step_ms": 60.0}
    distill |= {"images_per_sec": 1000.2, "share_of_teacher": 0.5, "peak_memory_gib": 12.54}
    write("distill", measured(distill | {"hours_for_8000_x_200": 0.444}))
    return tmp_path


def test_tables_say_what_was_measured(results, tmp_path):
    page = tmp_path / "page.md"
    begin = "<!-- results: written by scripts/performance_tables.py {} -->"
    marks = begin + "\nold\n<!-- end of results -->\n"
    page.write_text("# Page\n" + "".join(map(marks.format, performance_tables.SECTIONS)) + "end\n")
    argv = ["--results", str(results), "--page", str(page)]
    performance_tables.main(performance_tables.parse_args(argv))
    text = page.read_text()
    for line in (
        "| finetuning step | 8 | 100.0 | 25.0 | 4.0 | 4 | 29.5 | 400 (50.0 %) | 12.5 | 10.0 |",
        "| 128 | 90.0 | 100.0 | 1.0 | 60 % | 75.0 | 400 (45.0 %) | 45.0 | 9.0 | 10.0 |",
        "| guided reverse step, `--fp8` | 32 | 100.0 | 40.0 | 2.5 | 2.2 | 27.6 |  |  | 10.0 |",
        "| VAE encoding | 64 | 100.0 | 10.0 | 10.0 | 20 | 5.0 |  |  | 10.0 | 1.0 |",
        "| VAE decoding | 64 | 100.0 | 10.0 | 10.0 |  |  |  |  | 10.0 | 1.0 |",
        "| finetuning step, 8 | 9.0 |  |  |  |  |  |  | 1.5 | 0.8 |",
        "| finetuning step, 8, 2 GPUs, bf16 | 9.0 |  |  |  |  |  |  | 1.5 | 0.8 |",
        "| 2 | bf16 | 8 | 100.0 | 25.0 | 4.0 |",
        "| times as fast | 1.50 | 1.00 |",
        "| PixArt at 512 px | 1 | 1.50 | 1.00 | 1.50 |",
        "| swa | 256 | PyTorch | 1.50 |  |",
        "| mamba2 | 64 | causal-conv1d + mamba-ssm | 2.00 |",
        "| swa | 256 | Triton | 1.00 | 3.00 |",
        "| whole step | 60.0 | 1000 |",
        "50.0 % of the teacher's rate (aim: 45 %); 8 000 images x 200 epochs in 0.44 hours",
    ):
        assert line in text
    assert (
        "\n- finetuning step: revision 01234567, PyTorch 2.11.0, a GPU; peak 800 TFLOP/s\n" in text
    )
    assert "\n- VAE encoding and VAE decoding: revision 01234567" in text
    assert "old" not in text and text.endswith("end\n")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pairs", None, "missing: measure it again, docs/performance.md has the command"),
        ("vae", "{", "is not whole JSON"),
        ("finetune", "operators_swa", "holds no rows of finetune: measure it again"),
        ("selection", "finetune", "holds no rows of selection"),
        ("distill", "vae", "holds no rows of distill"),
        ("pairs", {"rows": [{"model": "a", "latency_ms": None}]}, "holds no rows of pairs"),
        ("pairs", {"rows": [{"model": "a", "latency_ms": {}}]}, "is of a, not of parallel pairs"),
        ("two_bf16", "finetune", "is of processes 1, --exchange None"),
        ("two_fp32", {"flags": {"exchange": "bf16"}}, "is of processes 2, --exchange bf16"),
    ],
)
def test_what_cannot_be_is_named_and_nothing_is_written(results, tmp_path, name, content, said):
    path = results / f"{name}.json"
    if content is None:
        path.unlink()
    elif content == "{":
        path.write_text(content)
    elif isinstance(content, str):
        path.write_text((results / f"{content}.json").read_text())
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    page = tmp_path / "page.md"
    argv = ["--results", str(results), "--page", str(page)]
    with pytest.raises(ValueError, match=rf"{name}\.json.*{said}"):
        performance_tables.main(performance_tables.parse_args(argv))
    assert not page.exists()


def test_a_page_needs_a_place_for_every_table(results, tmp_path):
    page = tmp_path / "page.md"
    before = "<!-- results: written by scripts/performance_tables.py steps -->\n"
    page.write_text(before)
    argv = ["--results", str(results), "--page", str(page)]
    with pytest.raises(ValueError, match=r"page\.md: has no place for the table 'kernels'"):
        performance_tables.main(performance_tables.parse_args(argv))
    assert page.read_text() == before
