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
    write("finetune", measured(*both, matmul_peak=800.0))
    write("selection", measured(side("selection", 8, 100.0, "published"), side("selection", 8, 20)))
    low = side("sampling", 32, 40, "here, --fp8")
    write("sampling", measured(side("sampling", 32, 100, "published"), low))
    coding = [side(work, 64, ms, name) for work in ("encode", "decode")
              for ms, name in ((100, "published"), (10, "here"))]  # fmt: skip
    write("vae", measured(*coding))
    for exchange in ("fp32", "bf16"):
        write(f"two_{exchange}", measured(*both, processes=2))
    row = {"latency_ms": {"1": 1.0, "2": 2.0}, "plain": {"latency_ms": {"1": 1.5, "2": 2.0}}}
    write("pairs", measured(row))
    operator = {"operator": "swa", "tokens": 256, "mode": "eager"}
    write("operators", measured(
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
        "| finetuning step | 8 | 100.0 | 25.0 | 4.0 | 4 | 400 (50 %) | 10.0 | 2.5 |",
        "| guided reverse step, `--fp8` | 32 | 100.0 | 40.0 | 2.5 | 2.2 |  | 10.0 | 4.0 |",
        "| VAE decoding | 64 | 100.0 | 10.0 | 10.0 |  |  | 10.0 | 1.0 |",
        "| finetuning step, 8 | 9.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 1.5 | 0.8 |",
        "| 2 | bf16 | 8 | 100.0 | 25.0 | 4.0 |",
        "| times as fast | 1.50 | 1.00 |",
        "| swa | 256 | PyTorch | 1.50 |  |",
        "| swa | 256 | Triton | 1.00 | 3.00 |",
        "| whole step | 60.0 | 1000 |",
        "50.0 % of the teacher's rate (aim: 45 %); 8 000 images x 200 epochs in 0.44 hours",
    ):
        assert line in text
    assert "finetuning step: revision 01234567, PyTorch 2.11.0, a GPU, peak 800 TFLOP/s;" in text
    assert "VAE encoding and VAE decoding: revision 01234567" in text
    assert "old" not in text and text.endswith("end\n")


def test_what_is_missing_is_named_and_nothing_is_written(results, tmp_path):
    (results / "pairs.json").unlink()
    page = tmp_path / "page.md"
    argv = ["--results", str(results), "--page", str(page)]
    with pytest.raises(ValueError, match=r"pairs\.json: missing: measure it as"):
        performance_tables.main(performance_tables.parse_args(argv))
    assert not page.exists()
