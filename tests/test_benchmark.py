"""scripts/benchmark.py on the CPU: every command runs, and its figures hang together."""

import json

import pytest

from scripts import benchmark


def measure(tmp_path, command):
    out = tmp_path / "rows.json"
    argv = [*command.split(), "--rounds", "1", "--device", "cpu", "--json", str(out)]
    benchmark.main(benchmark.parse_args(argv))
    return json.loads(out.read_text())


def test_benchmark_of_distillation(tmp_path, capsys):
    command = "distill --config configs/mini/75p_hyena_y.yaml --batch 1 --steps 1"
    (row,) = measure(tmp_path, command)["rows"]
    assert row["operators"] == 21 and row["share_of_teacher"] == row["teacher_ms"] / row["step_ms"]
    assert "images_per_sec" in capsys.readouterr().out


def test_benchmark_of_operators(tmp_path, capsys):
    command = "operators --hidden-size 48 --tokens 64 16 --batch-tokens 128 --modes eager"
    stored = measure(tmp_path, command)
    assert stored["hardware"].endswith("(cpu)") and stored["flags"]["hidden_size"] == 48
    rows = {(r["operator"], r["tokens"], r["batch"], r["pass"]): r for r in stored["rows"]}
    assert len(rows) == len(stored["rows"]) == len(benchmark.FILES) * 2 * 2
    assert {"swa", "mamba2", "mha", "mlp_hyena_x"} <= {r["operator"] for r in stored["rows"]}
    assert all(r["ms"] > 0 and r["path"] == "torch" for r in rows.values())
    assert ("swa", 16, 8, "training") in rows
    assert capsys.readouterr().out.count("\n") == 1 + len(rows)


@pytest.mark.parametrize(
    "command",
    [
        "finetune --config configs/mini/75p_hyena_y.yaml --batch 1 --steps 1",
        "selection --config configs/mini/75p_swa.yaml --batch 1 --steps 1",
        "sampling --config configs/mini/no_graft.yaml --batch 1 --steps 1",
        "vae --batch 2 --image-size 16",
    ],
)
def test_benchmark_beside_the_published_style(tmp_path, capsys, command):
    found = measure(tmp_path, command)
    work = {row["work"] for row in found["rows"]}
    assert work == ({"encode", "decode"} if command.startswith("vae") else {command.split()[0]})
    rows = {(row["work"], row["side"]): row for row in found["rows"]}
    for kind in work:
        public, here = rows[kind, "published"], rows[kind, "here"]
        assert here["ratio"] == public["ms"] / here["ms"] and public["ratio"] == 1
        assert here["images_per_sec"] == 1e3 * here["batch"] / here["ms"]
    assert capsys.readouterr().out.count(" images/s") == len(found["rows"])
