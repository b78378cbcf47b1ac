"""Averages, checkpoints, schedules, the guarded step, LoRA and logs."""

import argparse
import errno
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusion import create_diffusion, noise
from latents.loader import LatentLoader
from latents.store import open_latents
from models.dit import DiT
from models.plan import GraftPlan
from training import arguments, checkpoint, distributed, nonfinite, precision
from training.averaging import Averaged
from training.draws import draw
from training.ema import Ema
from training.lora import add_lora, merge_lora
from training.optimizer import StepGuard, adamw, schedule
from training.preemption import SIGNALS
from training.runlog import Means, RunLog, claim, cut_records
from training.validation import validation_loss

CPU = distributed.World(0, 0, 1, torch.device("cpu"))


def test_ema_is_the_written_recurrence_and_skips_frozen_tensors():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, 0.9)
    expected = model.weight.detach().double().clone()
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    assert ema.names == ["weight"]
    torch.testing.assert_close(ema.state_dict()["weight"].double(), expected, atol=1e-6, rtol=0)
    assert ema.state_dict()["bias"].data_ptr() == model.bias.data_ptr()
    with pytest.raises(ValueError, match="--ema-decay 1.0"):
        Ema(model, 1.0)


def state(value: float) -> dict:
    entries = dict.fromkeys(checkpoint.KEYS, {})
    return {**entries, "model": {"w": torch.full((2,), value)}, "train_steps": int(value)}


def test_checkpoints_are_whole_or_passed_over(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        checkpoint.save(folder / f"000000{step}.pt", state(step))
    assert (folder / "latest").read_text() == "0000002.pt\n"
    assert sorted(p.name for p in folder.iterdir()) == ["0000001.pt", "0000002.pt", "latest"]
    assert checkpoint.find(CPU, "auto", tmp_path)["train_steps"] == 2
    whole = (folder / "0000002.pt").read_bytes()
    (folder / "0000002.pt").write_bytes(whole[: len(whole) // 2])
    assert checkpoint.find(CPU, "auto", tmp_path)["train_steps"] == 1
    assert "0000002.pt cannot be read" in caplog.text
    assert checkpoint.find(CPU, "auto", tmp_path / "empty") is None
    assert "starting afresh" in caplog.text
    (folder / "0000001.pt").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="no checkpoint of .* is whole .0000001.pt, 0000002.pt.:"):
        checkpoint.find(CPU, "auto", tmp_path)


def test_a_checkpoint_with_a_hole_is_passed_over(tmp_path, caplog):
    """Its ends are there: only the checksums tell, and a damaged directory of them is no crash."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        weights = {"w": torch.full((9000,), float(step))}
        checkpoint.save(folder / f"000000{step}.pt", {**state(step), "model": weights})
    whole = (folder / "0000002.pt").read_bytes()
    hole = slice(16_000, 20_000)
    (folder / "0000002.pt").write_bytes(whole[: hole.start] + bytes(4000) + whole[hole.stop :])
    assert checkpoint.load(folder / "0000002.pt")["model"]["w"].min() == 0
    assert checkpoint.find(CPU, "auto", tmp_path)["train_steps"] == 1
    assert "0000002.pt cannot be read: torn, damaged, or no checkpoint (Bad CRC-32" in caplog.text
    with pytest.raises(ValueError, match="0000002.pt cannot be read: torn, damaged"):
        checkpoint.find(CPU, str(folder / "0000002.pt"), tmp_path)
    for at in range(len(whole) - 400, len(whole)):  # the directory, then where it lies
        (folder / "0000002.pt").write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            loaded = checkpoint.load(folder / "0000002.pt", check_sums=True)
        except ValueError:
            continue
        assert loaded["model"]["w"].eq(2).all()


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "0000001.pt", state(1))
    (folder / "0000002.pt").symlink_to("/proc/self/mem")  # opens, and gives an error of the disk
    for resume in ("auto", str(folder / "0000002.pt")):
        with pytest.raises(ValueError, match="0000002.pt cannot be read .*: make it readable"):
            checkpoint.find(CPU, resume, tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for resume in ("auto", None):
        with pytest.raises(ValueError, match=r"checkpoints cannot be read \(Permission denied\)"):
            checkpoint.find(CPU, resume, tmp_path)


def test_fresh_start_into_a_used_folder_is_refused(tmp_path):
    assert checkpoint.find(CPU, None, tmp_path) is None
    checkpoint.save(tmp_path / "checkpoints" / "0000001.pt", state(1))
    with pytest.raises(ValueError, match="holds a run already .0000001.pt.*--resume auto"):
        checkpoint.find(CPU, None, tmp_path)


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--resume .*gone.pt"):
        checkpoint.load(tmp_path / "gone.pt")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt lacks .*--load-weight"):
        checkpoint.load(tmp_path / "weights.pt")
    torch.save({**state(1), "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="newer.pt has format 99"):
        checkpoint.load(tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="--load-weight"):
        (tmp_path / "x.safetensors").write_bytes(b"")
        checkpoint.load(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="entries"):
        checkpoint.save(tmp_path / "x.pt", {"model": {}})


def test_checkpoint_of_another_run_is_refused():
    plan = GraftPlan(Path("p.yaml"), "DiT-Mini/2", 64, 9)
    args = Namespace(lr=1e-4, resume="auto", data_path="d", epochs=1, max_steps=9)
    held = {
        "entry": checkpoint.entry_name(),
        "plan": plan.architecture(),
        "position": {"images": 9, "total_steps": 9},
        "args": {"lr": 1e-4},
        "train_steps": 7,
    }
    order = {"images": 9, "total_steps": 9}
    assert checkpoint.check(held, plan, args, order, ("lr",)) == 7
    for change, message in (
        ({"entry": "other.py"}, "is of other.py, not of"),
        ({"plan": GraftPlan(Path("p"), "DiT-Mini/2", 64, 5).architecture()}, "num_classes"),
        ({"position": {"images": 8}}, r"images 8, this one has 9 \(set by --data-path\)"),
        ({"position": {"total_steps": 3}}, r"this one has 9 \(set by --max-steps and --epochs\)"),
        ({"args": {"lr": 1.0}}, "lr 1.0, this one has 0.0001"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.check({**held, **change}, plan, args, order, ("lr",))
    older = {**held, "position": {}, "args": {}}  # says nothing of what came later
    assert checkpoint.check(older, plan, args, order, ("lr",)) == 7


def test_records_are_cut_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4')
    cut_records(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.write_text('{"step": 0}\n{"step": 1}\n')
    cut_records(path, 0)
    assert path.read_text() == ""


def test_records_that_a_power_failure_spoilt_are_left_out_by_name(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}\n',
        bytes(9) + b'"loss": 2.0}\n',
        b"\xff\r\n",
        b"[3]\n",
        b'{"step": 4}\n',
    ]
    path.write_bytes(b"".join(lines) + b'{"st')
    cut_records(path, 4)
    assert path.read_bytes() == lines[0] + lines[4]
    said = [record.getMessage() for record in caplog.records]
    assert [re.match(rf"{path}: line (\d) is no record", text)[1] for text in said] == list("234")


def test_command_line_values():
    for kind, good, bad in (
        (arguments.positive, "3", ("0", "-1", "1.5", "x")),
        (arguments.seed, "0", ("-1", str(2**32))),
        (arguments.rate, "1e-4", ("0", "nan", "inf", "-1")),
        (arguments.share, "0.1", ("1.1", "-0.1", "nan")),
        (arguments.decay, "0.9", ("1", "-1")),
    ):
        assert kind(good) == pytest.approx(float(good))
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
                kind(text)


@pytest.mark.parametrize("lines", [3, 100_000], ids=["at the end", "at once"])
def test_output_whose_reader_has_left_ends_in_silence(lines):
    program = "import sys; from training import distributed; sys.stdin.read(); "
    program += f"distributed.run(lambda args: print('line\\n' * {lines}), None)"
    channels = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, **channels) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


THREADS = """
from pathlib import Path
from training import distributed


def threads():
    return [p for p in Path("/proc/self/task").glob("*/comm") if "gloo" in p.read_text()]


def main(args):
    distributed.start("cpu")
    assert threads()
    distributed.stop()


distributed.run(main, None)
assert not threads()
"""


def test_threads_of_gloo_end_before_python_does():
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "alone"}
    place |= {"RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-c", THREADS]
    subprocess.run(command, check=True, env=os.environ | place, cwd=Path(__file__).parent.parent)


def test_bad_input_is_told_from_bugs(capsys):
    def bad(args):
        raise ValueError("--flag 3: use 4")

    with pytest.raises(SystemExit) as end:
        distributed.run(bad, None)
    assert end.value.code == 2 and capsys.readouterr().err == "error: --flag 3: use 4\n"
    with pytest.raises(ValueError):  # raised by a library: a bug of ours, whose trace is wanted
        distributed.run(lambda args: torch.tensor([[1], [2, 3]]), None)
    with pytest.raises(SystemExit):
        distributed.run(lambda args: Path("/proc/version/x").read_text(), None)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "0000001.pt"
    checkpoint.save(path, state(1))
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        checkpoint.save(path, {**state(2), "args": lambda: None})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_schedules():
    optimizer = adamw([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0}], 0.0)
    rates = schedule(optimizer, "cosine", total_steps=12, warmup_steps=2, end_factor=0.5)
    seen = []
    for _ in range(13):
        seen.append(rates.get_last_lr()[0])
        optimizer.step()
        rates.step()
    assert seen[:3] == [1.0, 2.0, 2.0]
    assert seen[7] == pytest.approx(2 * (0.5 + 0.25)) and seen[12] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="--lr-schedule linear"):
        schedule(optimizer, "linear", total_steps=1)


@pytest.mark.parametrize("max_norm", [0.5, None], ids=["clipped", "free"])
def test_steps_clip_as_pytorch_does(max_norm):
    """Gradients below, at and far above the norm; weights, norms and the moments of AdamW."""
    sides = []
    for own in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = adamw([{"params": list(layer.parameters()), "lr": 0.1}], weight_decay=0.1)
        guard, norms = StepGuard(optimizer, max_norm), []
        for factor in (1e-3, 1.0, 1e3, 1e-3, 1.0):
            optimizer.zero_grad()
            (layer(torch.ones(2, 4)).square().sum() * factor).backward()
            if own:
                norms.append(guard.step())
            else:
                norms.append(torch.nn.utils.clip_grad_norm_(layer.parameters(), guard.max_norm))
                optimizer.step()
        sides.append([*norms, *layer.parameters(), *optimizer.state[layer.weight].values()])
    assert min(sides[1][:5]) < 0.5 < max(sides[1][:5])
    torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-6)


def test_step_with_nan_is_skipped_and_counted():
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = adamw([{"params": list(layer.parameters()), "lr": 0.1}], 0.0)
    guard = StepGuard(optimizer, max_norm=1.0, patience=3)

    def step(factor: float) -> float:
        optimizer.zero_grad()
        (layer(torch.ones(2, 4)).square().sum() * factor).backward()
        return guard.step().item()

    assert math.isfinite(step(1.0))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for _ in range(2):
        assert math.isnan(step(math.nan))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert optimizer.state[layer.weight]["step"].item() == 1
    assert guard.check(3, None) == 2
    step(1.0)
    assert not torch.equal(layer.weight, before["weight"])
    for _ in range(3):
        step(math.inf)
    with pytest.raises(ValueError, match="step 7.*3 steps in a row: loss nan; lower --lr"):
        guard.check(7, lambda: "loss nan")


def test_draws_do_not_depend_on_the_batch():
    index = torch.tensor([5, 2, 9])
    together = draw(3, 1, index, (4, 8, 8), 1000, 0.5)
    alone = draw(3, 1, index[1:2], (4, 8, 8), 1000, 0.5)
    assert torch.equal(together.noise[1:2], alone.noise)
    assert together.t[1] == alone.t[0] and together.drop[1] == alone.drop[0]
    later = draw(3, 2, index, (4, 8, 8), 1000, 0.5)
    assert not torch.equal(later.noise, together.noise)
    assert draw(3, 1, torch.arange(4000), (), 1000, 0.1).drop.float().mean() < 0.13


def test_lora_trains_outside_the_excluded_and_merges_exactly():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"keep": torch.nn.Linear(4, 4), "graft": torch.nn.Linear(4, 4)}
    ).double()
    wrapped = torch.nn.ModuleDict({"pair": model})
    assert add_lora(wrapped, 2, 4, exclude=(".graft.",)) == ["pair.keep"]
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trained) and len(trained) == 2
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = wrapped["pair"]["keep"](x)
    merge_lora(wrapped)
    assert type(wrapped["pair"]["keep"]) is torch.nn.Linear
    torch.testing.assert_close(wrapped["pair"]["keep"](x), before, atol=1e-6, rtol=1e-5)


def test_runlog_writes_for_people_and_machines(tmp_path):
    log = RunLog(tmp_path, CPU, {"lr": 1.0})
    log.info("hello")
    log.metrics(3, loss=0.5, grad_norm=math.nan)
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert 'settings {"lr": 1.0}' in text and "hello" in text
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 3 and line["loss"] == 0.5 and line["grad_norm"] is None
    assert list((tmp_path / "tensorboard").iterdir())
    silent = RunLog(tmp_path / "other", distributed.World(1, 1, 2, CPU.device), {})
    silent.info("nothing")
    silent.metrics(1, loss=0.0)
    silent.close()
    assert not (tmp_path / "other").exists()


def test_a_claim_ends_with_the_run_and_needs_locks(tmp_path, monkeypatch, caplog):
    """Another process may have the folder after a failure, and what it left half written is gone
    then; without locks a warning says so."""
    program = (
        "import sys, torch; from pathlib import Path; from training.runlog import World, claim; "
    )
    program += "claim(World(0, 0, 1, torch.device('cpu')), Path(sys.argv[1]))"
    folder = tmp_path / "run"
    other = [sys.executable, "-c", program, str(folder)]

    def fail(args):
        claim(CPU, folder)
        half = folder / ".log.txt.1.partial"
        half.touch()
        assert b"in use by a run" in subprocess.run(other, cwd=root, capture_output=True).stderr
        half.unlink()
        raise ValueError("--flag 3: use 4")

    root = Path(__file__).parent.parent
    with pytest.raises(SystemExit):
        distributed.run(fail, None)
    assert not folder.exists()  # nothing was written
    halves = folder / ".a.json.1.partial", folder / "checkpoints" / ".0000001.pt.1.partial"
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.touch()
    subprocess.run(other, cwd=root, check=True)
    assert not caplog.records and not any(half.exists() for half in halves)

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    claim(CPU, folder)
    distributed.release()
    assert "no other run has this folder" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file is in its way"):
        claim(CPU, tmp_path / "file" / "deep")


def test_wandb_is_told_when_asked_for_alone(tmp_path, monkeypatch):
    said = []
    run = SimpleNamespace(
        log=lambda values, step: said.append((step, values)), finish=lambda: said.append("end")
    )

    def init(**settings):
        said.append((settings["name"], settings["config"]["lr"], settings["dir"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name, asked in (("calm", False), ("told", True)):
        log = RunLog(tmp_path / name, CPU, {"lr": 1.0, "wandb": asked})
        log.metrics(3, loss=0.5)
        log.close()
    assert said == [("told", 1.0, str(tmp_path / "told")), (3, {"loss": 0.5}), "end"]
    for other in ("calm", "told"):
        assert '"loss": 0.5' in (tmp_path / other / "metrics.jsonl").read_text()
    silent = RunLog(tmp_path / "other", distributed.World(1, 1, 2, CPU.device), {"wandb": True})
    silent.close()
    assert said.count("end") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--wandb: .*pip install wandb"):
        RunLog(tmp_path / "absent", CPU, {"wandb": True})


def test_streams_of_the_draws_are_distinct():
    names = ("LABEL", "START", "STEP", "TIMESTEP", "NOISE", "DROP", "POSTERIOR", "FLIP", "GATE")
    assert len({getattr(noise, name) for name in names}) == len(names)


def test_validation_draws_the_same_whatever_the_batch(tmp_path, write_latents):
    """Against each image alone; the model's mode and weights are left as they were."""
    write_latents(tmp_path, 5, classes=3, mirrors=1)
    store, diffusion = open_latents(tmp_path, num_classes=3), create_diffusion("")
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3).train()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    found = validation_loss(model, store, diffusion, CPU, torch.float32, batch_size=2)
    assert model.training
    model.eval()
    losses = []
    for i in range(5):
        index = torch.tensor([i])
        for number in range(4):
            epoch = 2**32 - 1 - number  # of no training
            x = store.latents(store.read(index), index, 0, epoch)
            t, added, _ = draw(0, epoch, index, (4, 8, 8), 1000, 0.0)
            labels = {"y": torch.tensor([i % 3])}
            losses.append(
                diffusion.training_losses(model, x, t, labels, noise=added)["loss"].item()
            )
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    ema = Ema(model, 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.final_layer.linear.weight.add_(1)
    ema.update()
    moved = model.final_layer.linear.weight.detach().clone()
    with ema.applied():
        inside = model.final_layer.linear.weight.detach()
        torch.testing.assert_close(inside, before["final_layer.linear.weight"] + 0.5)
    assert torch.equal(model.final_layer.linear.weight, moved)


def test_milestones_divide_the_rate():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = adamw([{"params": [weight], "lr": 8.0}], 0.0)
    rate = schedule(
        optimizer, "milestones", total_steps=9, warmup_steps=2, milestones=[4, 6], gamma=0.5
    )
    seen = []
    for _ in range(8):
        seen.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    assert seen == [4, 8, 8, 8, 4, 4, 2, 2]


def run_state(folder, **flags):
    """A RunState of a small layer over 10 steps, and that layer; `log.said` is what it says."""
    plan = GraftPlan(Path("p.yaml"), "DiT-Mini/2", 64, 9)
    settings = {"ckpt_every": 2, "keep_last": None, "keep_every": None, **flags}
    extent = checkpoint.Extent(folder, 5, 10, {"images": 9})
    layer = torch.nn.Linear(2, 2)
    means, said = Means(CPU, ["loss"]), []
    log = SimpleNamespace(info=said.append, said=said)
    return checkpoint.RunState(
        extent, CPU, plan, Namespace(**settings), means, log, model=layer, opt=layer
    ), layer


def test_a_checkpoint_is_plain_data_with_plan_and_random_state(tmp_path):
    run, _ = run_state(tmp_path)
    torch.manual_seed(5)
    torch.rand(3)
    run.save(2)
    run.step_done(10, False)  # waits for what is being written
    drawn = torch.rand(4)
    state = torch.load(tmp_path / "checkpoints/0000002.pt", weights_only=True)
    assert state["plan"] == run.plan.architecture() and state["args"]["ckpt_every"] == 2
    assert (state["position"]["epoch"], state["position"]["step_in_epoch"]) == (0, 2)
    torch.manual_seed(6)
    run.restore(state)
    assert torch.equal(torch.rand(4), drawn)


def test_checkpoints_are_written_aside_of_what_they_were_when_due(tmp_path, monkeypatch):
    held = threading.Event()
    written = checkpoint.save

    def slow(path, state):
        assert held.wait(20)
        written(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    run, layer = run_state(tmp_path)
    run.step_done(1, True)
    before = layer.weight.detach().clone()
    run.step_done(2, False)
    path = tmp_path / "checkpoints/0000002.pt"
    with torch.no_grad():
        layer.weight.add_(1)  # the training goes on before the file is there
    run.step_done(3, False)
    assert not path.exists() and not run.log.said
    held.set()
    run._writer.submit(int).result()  # after the checkpoint
    run.step_done(3, False)
    assert run.log.said == [f"saved {path}"]
    for step in range(4, 11):
        run.step_done(step, False)
    assert torch.equal(checkpoint.load(path)["model"]["weight"], before)
    assert checkpoint.load(tmp_path / "checkpoints/0000010.pt")["train_steps"] == 10
    files = sorted((tmp_path / "checkpoints").glob("*.pt"))
    assert len(files) == 5 and run.log.said == [f"saved {file}" for file in files]


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    run, _ = run_state(tmp_path, ckpt_every=1, keep_last=2, keep_every=4)
    for step in range(1, 11):
        run.step_done(step, False)
    kept = sorted(int(p.stem) for p in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == [4, 8, 9, 10]


def test_a_run_resumed_earlier_sets_aside_what_came_later(tmp_path):
    """What it writes stays, though later steps lay in the folder, and "auto" goes on from that."""
    folder = tmp_path / "checkpoints"
    first, _ = run_state(tmp_path)
    for step in range(1, 11):
        first.step_done(step, False)
    for aside in ("aside-1", "aside-2"):
        run, _ = run_state(tmp_path, ckpt_every=3, keep_last=2)
        run.restore(checkpoint.find(CPU, str(folder / "0000004.pt"), tmp_path))
        assert (folder / "latest").read_text() == "0000004.pt\n"
        later = sorted(path.name for path in (folder / aside).iterdir())
        assert run.log.said == [f"resumed before {', '.join(later)}: set aside in {folder / aside}"]
        run.signals.noted = True
        with pytest.raises(distributed.Preempted, match="goes on from .*0000005.pt"):
            run.step_done(5, False)
        assert checkpoint.find(CPU, "auto", tmp_path)["train_steps"] == 5
    assert sorted(path.name for path in (folder / "aside-1").iterdir()) == [
        "0000006.pt", "0000008.pt", "0000010.pt",
    ]  # fmt: skip
    assert [path.name for path in (folder / "aside-2").iterdir()] == ["0000005.pt"]


def test_partial_files_of_any_step_go(tmp_path):
    """A run killed in the checkpoint of a stop leaves one of a step that never comes again."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    old, young = folder / ".0000003.pt.11.partial", folder / ".0000005.pt.12.partial"
    for partial in (old, young):
        partial.touch()
    os.utime(old, (0, 0))
    run, _ = run_state(tmp_path)
    run.step_done(10, False)
    assert young.exists() and not old.exists()


def test_what_was_just_written_stays_whatever_lies_beside_it(tmp_path):
    run, _ = run_state(tmp_path, keep_last=1)
    for step in (1, 8, 9):
        checkpoint.save(tmp_path / "checkpoints" / f"000000{step}.pt", state(step))
    run.signals.noted = True
    with pytest.raises(distributed.Preempted):
        run.step_done(5, False)
    kept = [int(path.stem) for path in checkpoint.held_in(tmp_path / "checkpoints")]
    assert kept == [9, 8, 5]


def test_a_write_that_fails_is_heard_at_the_next_step(tmp_path, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    run, _ = run_state(tmp_path)
    run.step_done(2, False)
    run._writer.submit(int).result()  # after the checkpoint
    with pytest.raises(OSError, match="No space left"):
        run.step_done(3, False)
    assert not run.log.said


def test_a_signal_ends_the_run_after_a_whole_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    run, _ = run_state(tmp_path)
    run.step_done(3, True)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(distributed.Preempted, match="after step 5; --resume auto goes on from"):
        run.step_done(5, False)
    assert checkpoint.load(tmp_path / "checkpoints/0000005.pt")["train_steps"] == 5
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_run_gives_the_signals_back_and_its_helpers_die_of_them():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def signalled(args):
        fork = multiprocessing.get_context("fork")
        lives = fork.Event()
        helper = fork.Process(target=lambda: (lives.set(), time.sleep(60)))
        helper.start()
        assert lives.wait(30)
        helper.terminate()
        helper.join(10)
        seen.append(helper.exitcode)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        distributed.run(signalled, None)
    assert end.value.code == distributed.PREEMPTED and seen == [-signal.SIGTERM]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    elsewhere = threading.Thread(target=distributed.run, args=(seen.append, "in a thread"))
    elsewhere.start()
    elsewhere.join()
    assert seen[1:] == ["in a thread"]


def test_the_first_activation_that_is_not_finite_is_named():
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=3)
    for name, parameter in model.named_parameters():
        if "adaLN" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    again = lambda: model.forward(*inputs)  # noqa: E731
    assert nonfinite.first_nonfinite({"": model}, again) is None
    means = Means(CPU, ["loss", "mse"])
    means.add(torch.tensor([2.0, math.inf]))
    said = nonfinite.where(CPU, means, {"": model}, again)
    assert said == "on rank 0 loss 2, mse inf; its activations are finite"
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = math.inf
    assert nonfinite.first_nonfinite({"": model}, again) == "blocks.1.mlp.fc2"
    assert nonfinite.first_nonfinite({"dit": model}, again) == "dit.blocks.1.mlp.fc2"
    assert not any(module._forward_hooks for module in model.modules())
    assert means.take()["loss"] == 2 and math.isnan(means.take()["loss"])


def test_a_process_takes_the_gpu_of_its_place_on_its_node(monkeypatch):
    """Rank 6 of two nodes of four GPUs each: not GPU 6."""
    taken, wrapped = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "_meet", lambda *_: None)
    monkeypatch.setattr(
        distributed.averaging, "Averaged", lambda m, device: wrapped.append(device) or m
    )
    for name, value in (("RANK", "6"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    world = distributed.start()
    assert (world.rank, world.device, taken) == (6, torch.device("cuda:2"), [world.device])
    assert not world.main
    distributed.wrap(world, torch.nn.Linear(1, 1))
    assert wrapped == [world.device]
    with pytest.raises(ValueError, match="cuda:1 names one GPU but torchrun started 8"):
        distributed.start("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="wants GPU 4 but only 4 are visible"):
        distributed.start()


def test_precision_and_optimizer_are_the_fast_ones():
    assert precision.choose(None, torch.device("cuda")) is torch.bfloat16
    assert precision.choose(None, CPU.device) is torch.float32
    with pytest.raises(ValueError, match="--precision fp16: use one of bf16, fp32"):
        precision.choose("fp16", CPU.device)
    with precision.autocast(CPU.device, torch.bfloat16):
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.bfloat16
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = adamw([{"params": [weight], "lr": 1.0}], 0.0)
    assert optimizer.defaults["fused"] and weight.dtype is torch.float32


def test_parts_of_a_batch_reduce_gradients_once():
    class Net(Averaged):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.exchanges = True

    x = torch.arange(6)
    inputs = {"x": x, "tau": torch.tensor(4.0), "y": x[:, None] * 3}
    net, seen = Net(), []
    for part in distributed.micro_batches(net, inputs, 3):
        assert part["tau"] == 4 and torch.equal(part["y"][:, 0], part["x"] * 3)
        seen.append((part["x"].tolist(), net.exchanges))
    assert seen == [([0, 1], False), ([2, 3], False), ([4, 5], True)]
    assert len(list(distributed.micro_batches(torch.nn.Linear(1, 1), inputs, 6))) == 6
    with pytest.raises(
        ValueError, match="by the 2 processes x --grad-accum 4; use a multiple of 8"
    ):
        LatentLoader(None, 12, distributed.World(0, 0, 2, CPU.device), 0, grad_accum=4)


WAITING = """
import time
import torch
from training import compilation
from training.distributed import World

class Event:
    ended = True
    def record(self):
        pass
    def query(self):
        return Event.ended

torch.cuda.Event, torch.cuda.set_device = Event, lambda device: None
compilation.LOOK_SECONDS = 0.05
limit = compilation.Limit(World(3, 3, 4, torch.device("cuda", 3)), minutes=0.01)
limit.begun()
time.sleep(1.0)
print("steps that end are let be", flush=True)
Event.ended = False
limit.begun()
time.sleep(60)
"""


def test_a_step_that_waits_in_vain_ends_its_process():
    """What watches a step's CUDA graph, with an event made up for the device's."""
    command = [sys.executable, "-c", WAITING]
    result = subprocess.run(
        command, cwd=distributed.REPOSITORY, capture_output=True, text=True, timeout=50
    )
    assert result.returncode == 1
    assert result.stdout == "steps that end are let be\n"
    assert result.stderr.startswith("error (rank 3): a step has not ended within 0.01 minutes")


def test_graphs_with_an_exchange_in_them_end_before_the_processes_do(monkeypatch):
    """NCCL ends no process group before them: `stop` resets them, and a failure does not wait."""
    told = []
    graph = SimpleNamespace(reset=lambda: told.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("all is done"))
    monkeypatch.setattr(os, "_exit", told.append)
    distributed.ends_with(graph)
    distributed.stop()
    assert told == ["all is done", "reset"]

    def fail(args):
        distributed.ends_with(graph)
        raise PermissionError("no")

    distributed.run(fail, Namespace())
    assert told[2:] == [2]
    distributed.stop()
    with pytest.raises(SystemExit):
        distributed.run(lambda args: (_ for _ in ()).throw(PermissionError("no")), Namespace())
    assert told[2:] == [2, "all is done", "reset"]
