"""Averages, checkpoints, schedules, the guarded step, LoRA and logs."""

import json
import math

import pytest
import torch

from diffusion import noise
from training import checkpoint, distributed
from training.draws import draw
from training.ema import Ema
from training.lora import add_lora, merge_lora
from training.optimizer import StepGuard, adamw, schedule
from training.runlog import RunLog

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
    entries = dict.fromkeys(set(checkpoint.KEYS) - {"format"}, {})
    return {**entries, "model": {"w": torch.full((2,), value)}, "train_steps": int(value)}


def test_checkpoints_are_whole_or_passed_over(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path / f"000000{step}.pt", state(step))
    assert (tmp_path / "latest").read_text() == "0000002.pt\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000001.pt", "0000002.pt", "latest"]
    assert checkpoint.find("auto", tmp_path)["train_steps"] == 2
    whole = (tmp_path / "0000002.pt").read_bytes()
    (tmp_path / "0000002.pt").write_bytes(whole[: len(whole) // 2])
    assert checkpoint.find("auto", tmp_path)["train_steps"] == 1
    assert "0000002.pt cannot be read" in caplog.text
    assert checkpoint.find(None, tmp_path) is None
    assert checkpoint.find("auto", tmp_path / "empty") is None


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--resume .*gone.pt"):
        checkpoint.load(tmp_path / "gone.pt")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt lacks .*--load-weight"):
        checkpoint.load(tmp_path / "weights.pt")
    torch.save({**state(1), "format": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="newer.pt has format 99"):
        checkpoint.load(tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="entries"):
        checkpoint.save(tmp_path / "x.pt", {"model": {}})


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
    assert guard.check(3) == 2
    step(1.0)
    assert not torch.equal(layer.weight, before["weight"])
    for _ in range(3):
        step(math.inf)
    with pytest.raises(RuntimeError, match="step 7.*3 steps in a row"):
        guard.check(7)


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
    assert add_lora(wrapped, 2, 4, exclude=".graft.") == ["pair.keep"]
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
    log.metrics(3, loss=0.5)
    log.close()
    text = (tmp_path / "log.txt").read_text()
    assert 'settings {"lr": 1.0}' in text and "hello" in text
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 3 and line["loss"] == 0.5
    assert list((tmp_path / "tensorboard").iterdir())
    silent = RunLog(tmp_path / "other", distributed.World(1, 1, 2, CPU.device), {})
    silent.info("nothing")
    silent.metrics(1, loss=0.0)
    silent.close()
    assert not (tmp_path / "other").exists()


def test_streams_of_the_draws_are_distinct():
    names = ("LABEL", "START", "STEP", "TIMESTEP", "NOISE", "DROP", "POSTERIOR", "FLIP", "GATE")
    assert len({getattr(noise, name) for name in names}) == len(names)
