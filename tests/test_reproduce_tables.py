"""The table of a zoo: the testbed's own grafts sampled and scored, stopped half-way, gone on."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from entries import MINI, REPOSITORY
from PIL import Image

from models.grafting import build_grafted
from models.plan import load_plan
from scripts import reproduce_tables
from scripts.reproduce_tables import Failed, choose_models, parse_args

FLAGS = ["--feature-net", "mini", "--device", "cpu", "--sampler", "ddim"]
FLAGS += ["--num-sampling-steps", "2"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 pictures."""
    (tmp_path / "reference").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "reference" / f"{i}.png")
    return tmp_path / "reference"


@pytest.fixture
def started(monkeypatch):
    """Runs what the script launches in this process; lists it."""
    calls = []

    def launch(script, *flags, processes=1):
        calls.append((script, str(flags[0])))
        entry = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            entry.main(entry.parse_args())
        except (ValueError, FileNotFoundError) as error:
            raise Failed(str(error)) from error

    monkeypatch.setattr(reproduce_tables, "launch", launch)
    return calls


def reproduce(*flags):
    reproduce_tables.main(parse_args([*map(str, flags)]))


def cells(table, name):
    """The row of a model as {column: text}."""
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return next(dict(zip(head, row, strict=True)) for row in rows if row[0] == name)


def test_the_testbeds_table_is_made_stopped_and_gone_on_with(
    tmp_path, pictures, started, monkeypatch
):
    out = tmp_path / "tables"
    zoo = yaml.safe_load((REPOSITORY / "configs/mini/zoo.yaml").read_text())
    zoo["models"] = zoo["models"][:2]
    for entry in zoo["models"]:
        entry["config"] = str(REPOSITORY / "configs/mini" / entry["config"])
    zoo["models"][1]["published"] = {"fd_mini": 12.5, "precision": 0.5, "recall": None}
    path = tmp_path / "zoo.yaml"
    path.write_text(yaml.safe_dump(zoo))
    names = [entry["name"] for entry in zoo["models"]]
    flags = [*FLAGS, "--zoo", path, "--reference", pictures, "--num-fid-samples", 6, "--out", out]

    # The second model is stopped after four of its images
    saved = []

    def save_png(file, image):
        from evaluation.writers import save_png

        if names[1] in str(file):
            if len(saved) == 4:
                raise KeyboardInterrupt
            saved.append(file)
        save_png(file, image)

    with monkeypatch.context() as patch:
        patch.setattr("sample_ddp_finetuned.save_png", save_png)
        with pytest.raises(KeyboardInterrupt):
            reproduce(*flags, "--per-proc-batch-size", 2)
    table = (out / "table.md").read_text()
    assert float(cells(table, names[0])["fd_mini"]) > 0
    assert cells(table, names[1])["fd_mini"] == "-"
    assert f"- {names[1]}: still to be measured" in table
    assert len(list((out / "samples" / names[1]).glob("[0-9]*.png"))) == 4
    first = (out / "samples" / names[0] / "metrics.json").read_bytes()
    stopped = {file: file.stat().st_mtime_ns for file in saved}

    # The same command goes on: the reference and the first model are not touched again
    started.clear()
    reproduce(*flags, "--per-proc-batch-size", 2)
    assert [script for script, _ in started] == ["sample_ddp_finetuned.py", "evaluate_fid.py"]
    assert {file: file.stat().st_mtime_ns for file in saved} == stopped
    assert (out / "samples" / names[0] / "metrics.json").read_bytes() == first
    table, record = (out / "table.md").read_text(), json.loads((out / "table.json").read_text())
    row = cells(table, names[1])
    report = json.loads((out / "samples" / names[1] / "metrics.json").read_text())
    assert row["fd_mini"] == f"{report['metrics']['fd_mini']:.4f}"
    assert row["fd_mini published"] == "12.5" and row["precision published"] == "0.5"
    assert "recall published" not in row and row["N"] == "6" and row["protocol"] == "mini"
    assert cells(table, names[0])["fd_mini published"] == "-"
    assert "6 samples for 64 features" in table and "Published scores are of 50000" in table
    assert record["models"][1]["measured"]["metrics"] == report["metrics"]
    assert report["reference"]["made_from"] == str(pictures)

    # Nothing is left to do; other settings are
    started.clear()
    reproduce(*flags)
    assert not started
    reproduce(*flags, "--models", names[0], "--bootstrap", 3)
    assert [script for script, _ in started] == ["sample_ddp_finetuned.py", "evaluate_fid.py"]
    assert "±" in (out / "table.md").read_text()
    with pytest.raises(ValueError, match=r"reference.npz was made from .*choose another --out"):
        reproduce(*flags, "--reference", out / "samples" / names[0])


def test_a_model_that_fails_does_not_hold_up_the_others(tmp_path, pictures, started):
    zoo = {"models": [
        {"name": "gone", "config": str(REPOSITORY / "configs/mini/75p_swa.yaml"),
         "checkpoint": "gone.pt"},
        {"name": "there", "config": str(REPOSITORY / "configs/mini/base.yaml")},
    ]}  # fmt: skip
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(zoo))
    flags = [*FLAGS, "--zoo", tmp_path / "zoo.yaml", "--reference", pictures]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="1 of 2 models were not measured .gone."):
        reproduce(*flags, "--num-fid-samples", 4, "--out", out)
    table = (out / "table.md").read_text()
    assert "checkpoint: 'gone.pt' was found at none of" in table
    assert cells(table, "gone")["fd_mini"] == "-" and float(cells(table, "there")["fd_mini"]) > 0


def test_zoo_plans_and_names_are_checked(tmp_path):
    models = choose_models(parse_args([]))
    assert len(models) == 22 and all(m.released and m.published["fid"] for m in models)
    (tmp_path / "mine.yaml").write_text((REPOSITORY / "configs/50p_swa.yaml").read_text())
    (mine,) = choose_models(parse_args(["--plans", str(tmp_path / "mine.yaml")]))
    assert mine.name == "mine" and not mine.published and not mine.released
    name = models[3].name
    both = parse_args(["--models", name, "--plans", str(tmp_path / "mine.yaml")])
    assert [m.name for m in choose_models(both)] == [name, "mine"]
    with pytest.raises(ValueError, match="--models swa: .*zoo.yaml has dit-xl2"):
        choose_models(parse_args(["--models", "swa"]))
    with pytest.raises(ValueError, match=f"{name}: two models"):
        choose_models(parse_args(["--models", name, name]))
    (tmp_path / "zoo.yaml").write_text("models:\n  - {name: a, configuration: b}\n")
    with pytest.raises(ValueError, match=r"models\[0\]: unknown key 'configuration'"):
        choose_models(parse_args(["--zoo", str(tmp_path / "zoo.yaml")]))


def test_released_models_are_fetched_where_they_are_missing(tmp_path, monkeypatch):
    models = choose_models(parse_args([]))
    asked = []
    monkeypatch.setattr(reproduce_tables, "launch", lambda *words, **_: asked.append(words))
    monkeypatch.setattr(reproduce_tables, "REPOSITORY", tmp_path)
    reproduce_tables.fetch_weights(models[0])
    names = ("dit-xl2-256", "vae-ema", f"zoo:{models[0].name}")
    assert asked == [("scripts/download.py", *names)]
    for path in (*reproduce_tables.RELEASED, models[0].checkpoint):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    asked.clear()
    reproduce_tables.fetch_weights(models[0])
    assert not asked


def test_the_testbeds_zoo_is_of_the_testbed():
    zoo = REPOSITORY / "configs/mini/zoo.yaml"
    plans = [load_plan(model.config) for model in reproduce_tables.read_zoo(zoo)]
    assert [plan.model_name for plan in plans] == ["DiT-Mini/2"] * 3
    assert [len(plan.grafted_blocks()) for plan in plans] == [0, 14, 21]
    assert all((REPOSITORY / plan.base_ckpt_path).parent == MINI for plan in plans)
    for plan in plans:  # sampling refuses models with untrained weights
        assert "fresh" not in build_grafted(plan)[1].counts()


@pytest.mark.slow
def test_a_killed_table_goes_on(tmp_path, pictures):
    out = tmp_path / "out"
    command = [sys.executable, "scripts/reproduce_tables.py", "--zoo", "configs/mini/zoo.yaml"]
    command += [*FLAGS, "--reference", pictures, "--num-fid-samples", 12, "--out", out]
    command = [str(word) for word in [*command, "--per-proc-batch-size", 1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    second = out / "samples" / "dit-mini-mha-swa-50p"
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 300
        while len(list(second.glob("[0-9]*.png"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    before = {f: f.stat().st_mtime_ns for f in (out / "samples").glob("*/[0-9]*.png")}
    assert 15 <= len(before) < 24
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    table = (out / "table.md").read_text()
    for name in ("dit-mini", "dit-mini-mha-swa-50p", "dit-mini-mha-swa-75p"):
        assert float(cells(table, name)["fd_mini"]) > 0 and cells(table, name)["N"] == "12"
