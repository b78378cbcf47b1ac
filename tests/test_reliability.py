"""The promises of docs/reliability.md that need whole runs: kills, world sizes, NaNs, full disks.

A DiT of four small blocks learns from twelve random latents; most runs are forked processes.
"""

import ctypes
import fcntl
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from entries import MINI, REPOSITORY, Forked, free_port
from PIL import Image

from latents import store as store_module
from latents.loader import LatentLoader
from latents.store import StoreWriter
from models import recompute
from models.dit import PRESETS, build_dit
from training import checkpoint, distributed, preemption
from training.averaging import Averaged

TINY = {"depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "latent_downsample": 4}
STAGES = {
    "finetune_tinyfusion.py": ["--lr-schedule", "cosine", "--ema-decay", 0.9],
    "prune_by_learning.py": ["--groups", "1:2", "--delta-w", "--lora", "--ema-decay", 0.9],
    "distill_operators.py": ["--num-samples", 8, "--val-samples", 4, "--val-every", 3],
}
STEPS = 14
TIMES = ("time", "steps_per_sec", "images_per_sec")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, write_latents):
    """A folder with latents/, base.pt of DiT-Tiny/2 and graft.yaml, Hyena-Y in half its blocks."""
    folder = tmp_path_factory.mktemp("reliability")
    for name in ("peft", "torch.utils.tensorboard"):  # else every forked process imports them anew
        importlib.import_module(name)
    write_latents(folder / "latents", 12, classes=3)
    (folder / "plain.yaml").write_text("{}")
    graft = {"type": "mha", "name": "hyena_y", "config_filepath": "plain.yaml"}
    sample = {"dit_model_name": "DiT-Tiny/2", "image_size": 32, "num_classes": 3}
    sample |= {"base_ckpt_path": str(folder / "base.pt"), "graft_indexes": [1, 2, 3]}
    (folder / "graft.yaml").write_text(yaml.safe_dump({"operator": graft, "sample_config": sample}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "DiT-Tiny/2", TINY)
        torch.manual_seed(0)
        model = build_dit("DiT-Tiny/2", 8, num_classes=3)
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final" in name:  # zero at the start: no block would do anything
                torch.nn.init.normal_(parameter, std=0.05)
        torch.save(model.state_dict(), folder / "base.pt")
        yield folder


def begin(folder, stage, name, *flags, ranks=1, before=None):
    """Starts a run of STEPS steps of four images, which ends an epoch every second or third."""
    (folder / f"said-{name}").mkdir(exist_ok=True)
    common = ["--config", folder / "graft.yaml", "--data-path", folder / "latents"]
    common += ["--results-dir", folder, "--prefix", name, "--global-batch-size", 4, "--lr", 1e-3]
    common += ["--max-steps", STEPS, "--log-every", 2, "--ckpt-every", 3, "--device", "cpu"]
    common += ["--num-workers", 1, *STAGES[stage], *flags]
    return Forked(folder / f"said-{name}", stage, *common, ranks=ranks, before=before)


def ended(folder, name, step=STEPS):
    """The checkpoint of a run's last step, and the lines of its metrics but for times."""
    run = folder / f"{name}-DiT-Tiny-2"
    state = checkpoint.load(run / "checkpoints" / f"{step:07d}.pt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(a, b):
    """Whether nested plain data is equal, tensors to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_end(folder, one, two):
    """Weights, averages, optimizer, schedule, gates, metrics: the same bits."""
    (a, lines), (b, others) = ended(folder, one), ended(folder, two)
    assert a.keys() == b.keys()
    for key in a.keys() - {"args"}:
        assert same(a[key], b[key]), key
    assert lines == others and lines[-1]["step"] == STEPS
    for name in ("trajectory.jsonl", "selected.yaml", "finetuned.yaml", "distilled.yaml"):
        files = [folder / f"{run}-DiT-Tiny-2" / name for run in (one, two)]
        assert files[0].is_file() == files[1].is_file()
        if files[0].is_file() and name != "finetuned.yaml":
            texts = [f.read_text().replace(one, "").replace(two, "") for f in files]
            assert texts[0] == texts[1]


def wait_for(true, process):
    """Waits until `true()`, which a live process makes so."""
    deadline = time.perf_counter() + 60
    while not true():
        assert process.is_alive() and time.perf_counter() < deadline
        time.sleep(0.01)


def newest_whole(folder, name):
    """The step of the newest checkpoint that can be read, 0 for none."""
    steps = [0]
    for path in (folder / f"{name}-DiT-Tiny-2" / "checkpoints").glob("[0-9]*.pt"):
        try:
            steps.append(checkpoint.load(path)["train_steps"])
        except ValueError:
            continue
    return max(steps)


def write_slowly(rank):
    """Checkpoints take a tenth of a second to write, so that a kill finds them half written."""
    save = torch.save

    def slow(state, file):
        held = io.BytesIO()
        save(state, held)
        content = held.getvalue()
        for start in range(0, len(content), 1 + len(content) // 20):
            file.write(content[start : start + 1 + len(content) // 20])
            file.flush()
            time.sleep(0.005)

    torch.save = slow


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_bit_for_bit_like_an_undisturbed_one(tiny, stage):
    """Ten times kill -9: at a random moment of a checkpoint's write, or of the whole run."""
    chance = random.Random(stage)
    name = stage.split("_")[0]
    began = time.perf_counter()
    begin(tiny, stage, f"{name}-whole", before=write_slowly).join()
    whole_run = time.perf_counter() - began
    folder = tiny / f"{name}-killed-DiT-Tiny-2" / "checkpoints"
    torn = 0
    for number in range(10):
        kept = newest_whole(tiny, f"{name}-killed")
        left = set(folder.glob(".*.partial"))
        run = begin(tiny, stage, f"{name}-killed", "--resume", "auto", before=write_slowly)
        deadline = time.perf_counter() + 60
        if number % 2:
            time.sleep(chance.uniform(0, 0.5 * whole_run))
        else:
            while set(folder.glob(".*.pt.*.partial")) <= left and run.processes[0].is_alive():
                assert time.perf_counter() < deadline
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.12))
        run.kill()
        torn += bool(set(folder.glob(".*.pt.*.partial")) - left)
        said = run.said()
        if "resumed" in said:
            assert f"resumed at step {kept}\n" in said
        else:
            assert kept == 0 or "steps/s" not in said
        assert newest_whole(tiny, f"{name}-killed") >= kept
    assert torn, "no kill landed in a write"
    begin(tiny, stage, f"{name}-killed", "--resume", "auto").join()
    assert_same_end(tiny, f"{name}-whole", f"{name}-killed")


ACCUMULATED = [
    stage if stage.startswith("finetune") else pytest.param(stage, marks=pytest.mark.slow)
    for stage in STAGES
]


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_accumulated_gradients_train_alike(tiny, stage):
    """In 1, 2 and 4 passes a step, on two processes, and resumed with another number of passes."""
    reductions = tiny / "reductions.txt"

    def count_reductions(rank):
        average = Averaged._average

        def spied(self, gradients):
            with reductions.open("a") as file:
                file.write(f"{rank}")
            return average(self, gradients)

        Averaged._average = spied

    name, counts = stage.split("_")[0] + "-passes", []
    for passes, ranks in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        before = count_reductions if ranks > 1 else None
        flags = ["--grad-accum", passes, "--max-steps", 6]
        begin(tiny, stage, f"{name}{passes}{ranks}", *flags, ranks=ranks, before=before).join()
        if ranks > 1:
            counts.append(len(reductions.read_text()))
            reductions.unlink()
        state, lines = ended(tiny, f"{name}{passes}{ranks}", 6)
        if (passes, ranks) == (1, 1):
            first_state, first_lines = state, lines
        assert_close(tiny, first_state, first_lines, state, lines)
    assert counts[0] == counts[1] > 0, "gradients are averaged once a step, whatever the passes"
    checkpoints = tiny / f"{name}-across-DiT-Tiny-2" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(tiny / f"{name}11-DiT-Tiny-2" / "checkpoints" / "0000003.pt", checkpoints)
    flags = ["--grad-accum", 4, "--max-steps", 6, "--resume", "auto"]
    begin(tiny, stage, f"{name}-across", *flags).join()
    state, lines = ended(tiny, f"{name}-across", 6)
    assert_close(tiny, first_state, first_lines[-len(lines) :], state, lines)


@pytest.mark.parametrize("stage", ["finetune_tinyfusion.py", "prune_by_learning.py"])
def test_blocks_that_run_again_in_backward_train_to_the_same_bits(tiny, stage):
    """--grad-checkpoint, alone, and on two processes in two passes a step."""
    calls = tiny / "recomputed.txt"

    def count_blocks(rank):
        run_again = recompute.checkpoint

        def spied(*arguments, **options):
            with calls.open("a") as file:
                file.write(f"{rank}")
            return run_again(*arguments, **options)

        recompute.checkpoint = spied

    name = stage.split("_")[0] + "-recompute"
    for passes, ranks in ((1, 1), (2, 2)):
        flags = ["--grad-accum", passes, "--max-steps", 4]
        runs = [f"{name}{ranks}{way}" for way in ("without", "with")]
        begin(tiny, stage, runs[0], *flags, ranks=ranks).join()
        flags.append("--grad-checkpoint")
        begin(tiny, stage, runs[1], *flags, ranks=ranks, before=count_blocks).join()
        (state, lines), (other, others) = (ended(tiny, run, 4) for run in runs)
        assert same(state["model"], other["model"]) and same(state["opt"], other["opt"])
        assert lines == others
        assert len(calls.read_text()) == 4 * passes * ranks * TINY["depth"]
        calls.unlink()


def assert_close(folder, state, lines, other, others):
    """Two runs to rounding: AdamW divides a gradient by its size, and so rounding by next to 0."""
    for name, tensor in state["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, its in zip(lines, others, strict=True):
        for key in line:
            assert its[key] == pytest.approx(line[key], rel=1e-5 if "loss" in key else 1e-3), key


def note_images(record):
    """Each process writes the places of its images into a file of the folder `record`, by step."""

    def before(rank):
        hand_over = LatentLoader._batch

        def spied(self, step, read):
            with (record / f"{rank}").open("a") as file:
                file.write(json.dumps([step, read[0].tolist()]) + "\n")
            return hand_over(self, step, read)

        LatentLoader._batch = spied

    record.mkdir()
    return before


def images_of(record, first, last):
    """The places of the images of the steps from `first` to `last` that `note_images` wrote."""
    seen = {step: [] for step in range(first, last + 1)}
    for file in sorted(record.iterdir()):
        for step, places in map(json.loads, file.read_text().splitlines()):
            if step in seen:
                seen[step] += places
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_processes_trains_alike(tiny, stage):
    """1, 2 and 4: the same images in every one of 20 steps, and the same losses to rounding."""
    name, seen = stage.split("_")[0] + "-ranks", []
    for ranks in (1, 2, 4):
        record = tiny / f"images-{name}{ranks}"
        flags = ["--max-steps", 20, "--log-every", 1]
        begin(tiny, stage, f"{name}{ranks}", *flags, ranks=ranks, before=note_images(record)).join()
        seen.append(images_of(record, 0, 19))
        state, lines = ended(tiny, f"{name}{ranks}", 20)
        if ranks == 1:
            first_state, first_lines = state, lines
        assert_close(tiny, first_state, first_lines, state, lines)
    assert seen[0] == seen[1] == seen[2] and all(len(places) == 4 for places in seen[0].values())


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_a_run_goes_on_with_another_number_of_processes(tiny, stage):
    """1 process to step 3, 4 to step 6, 2 to the end: within an epoch, and within a log line."""
    name = stage.split("_")[0] + "-elastic"
    flags = ["--resume", "auto", "--ckpt-every", 3]
    record = tiny / f"images-{name}-one"
    begin(tiny, stage, f"{name}-one", *flags, before=note_images(record)).join()
    first_state, first_lines = ended(tiny, f"{name}-one")
    whole = images_of(record, 0, STEPS - 1)
    checkpoints = tiny / f"{name}-DiT-Tiny-2" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(tiny / f"{name}-one-DiT-Tiny-2" / "checkpoints" / "0000003.pt", checkpoints)
    for ranks, start in ((4, 3), (2, 6)):
        for later in checkpoints.glob("[0-9]*.pt"):
            if int(later.stem) > start:
                later.unlink()
        record = tiny / f"images-{name}-{ranks}"
        run = begin(tiny, stage, name, *flags, ranks=ranks, before=note_images(record))
        assert f"resumed at step {start}\n" in run.join()
        seen = images_of(record, start, STEPS - 1)
        assert seen == {step: whole[step] for step in range(start, STEPS)}
    state, lines = ended(tiny, name)
    assert_close(tiny, first_state, first_lines[-len(lines) :], state, lines)
    assert lines[0]["step"] == 4 and lines[-1]["step"] == STEPS


def spoil_rank_one(first, last=None):
    """Rank 1 of two reads NaN in the steps from `first` to `last`; both note what they hold."""

    def before(rank):
        read, done = LatentLoader._read, checkpoint.RunState.step_done

        def spoilt(self, step):
            index, moments, labels = read(self, step)
            if rank == 1 and first <= step and (last is None or step <= last):
                moments[0, :, 0, 0, 0] = float("nan")
            return index, moments, labels

        def note(self, step, logged):
            digest = hashlib.sha256()
            for tensor in self.parts["model"].state_dict().values():
                digest.update(tensor.numpy().tobytes())
            for tensor in self.parts["opt"].state_dict().get("state", {}).values():
                digest.update(tensor["exp_avg"].numpy().tobytes())
            print(f"after {step}: {digest.hexdigest()}", flush=True)
            return done(self, step, logged)

        LatentLoader._read, checkpoint.RunState.step_done = spoilt, note

    return before


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_nan_on_one_process_is_left_out_by_all(tiny, stage):
    name = stage.split("_")[0] + "-nan"
    run = begin(tiny, stage, name, ranks=2, before=spoil_rank_one(4, 5))
    run.join()
    held = [re.findall(r"after (\d+): (\w+)", path.read_text()) for path in run.outputs]
    assert held[0] == held[1] and len(held[0]) == STEPS
    digests = [digest for _, digest in held[0]]
    assert digests[3] == digests[4] == digests[5] and len(set(digests)) == STEPS - 2
    _, lines = ended(tiny, name)
    skipped = [line["skipped_steps"] for line in lines if "skipped_steps" in line]
    per_step = 3 if stage.startswith("distill") else 1  # each operator counts
    assert skipped[0] == 0 and skipped[-1] == 2 * per_step
    assert [line["loss"] is None for line in lines if "loss" in line] in ([], [False] * 7)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_stays_nan_ends_and_says_where(tiny, stage):
    name = stage.split("_")[0] + "-stays"
    run = begin(tiny, stage, name, "--max-steps", 60, ranks=2, before=spoil_rank_one(4))
    said = run.join(code=2)
    assert "Traceback" not in said
    assert "error: step 24: " in said and "finite for 20 steps in a row: on rank 1 loss" in said
    place = "teacher.dit.x_embedder" if stage.startswith("distill") else "x_embedder"
    assert f"that is not finite is what {place} gives" in said


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_a_signal_to_one_process_stops_all_after_a_checkpoint(tiny, stage):
    """The end is that of an undisturbed run; the stop falls on a step without a checkpoint."""
    name = stage.split("_")[0]

    def signal_at_five(rank):
        done = checkpoint.RunState.step_done

        def noted(self, step, logged):
            if rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            return done(self, step, logged)

        checkpoint.RunState.step_done = noted

    begin(tiny, stage, f"{name}-calm", ranks=2).join()
    flags = ["--ckpt-every", 4]
    run = begin(tiny, stage, f"{name}-stop", *flags, ranks=2, before=signal_at_five)
    said = run.join(code=distributed.PREEMPTED)
    assert "stopped by a signal after step 6; --resume auto goes on from" in said
    assert newest_whole(tiny, f"{name}-stop") == 6
    begin(tiny, stage, f"{name}-stop", *flags, "--resume", "auto", ranks=2).join()
    assert_same_end(tiny, f"{name}-calm", f"{name}-stop")


STAY = threading.Event()  # never set


@pytest.mark.parametrize("where", ["weights", "meeting", "waiting for rank 0", "hanging"])
def test_a_signal_before_the_first_step_ends_at_once(tiny, where):
    """Also where the main thread waits in a library, or does not end; the run then goes on."""
    name, stage = f"early-{where.split()[0]}", "finetune_tinyfusion.py"
    there = [tiny / f"{name}.{rank}" for rank in range(2)]

    def before(rank):
        def stay(*_, **__):
            there[rank].touch()
            try:
                STAY.wait()
            finally:
                if where == "hanging":
                    STAY.wait()

        if where == "meeting":
            os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
            join = torch.distributed.init_process_group
            join_late = lambda *a, **kw: (there[0].touch(), join(*a, **kw))  # noqa: E731
            torch.distributed.init_process_group = join_late
        elif where.startswith("waiting"):
            find = checkpoint.find
            checkpoint.find = (stay, lambda *a: (there[1].touch(), find(*a))[1])[rank]
        else:
            preemption.GRACE_SECONDS = 1.0
            importlib.import_module("finetune_tinyfusion").build_grafted = stay

    ranks = 2 if where.startswith("waiting") else 1
    run = begin(tiny, stage, name, ranks=ranks, before=before)
    wait_for(lambda: all(path.is_file() for path in there[:ranks]), run.processes[0])
    time.sleep(0.3)
    for process in run.processes:
        os.kill(process.pid, signal.SIGUSR1 if where == "weights" else signal.SIGTERM)
    said = run.join(code=distributed.PREEMPTED, seconds=10)
    if where == "meeting":
        assert said == "stopped by a signal before all processes had met\n"
    elif where != "hanging":
        assert said == (
            "stopped by a signal; the same command (training: with --resume auto) goes on\n"
        )
    begin(tiny, stage, name, "--resume", "auto", "--max-steps", 2).join()


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_is_one_live_runs_alone(tiny, stage):
    """Until it is killed: then the next goes on at once."""
    name = stage.split("_")[0] + "-held"
    folder = tiny / f"{name}-DiT-Tiny-2"

    def stay(rank):
        take = checkpoint.RunState.step_done

        def stays(self, step, logged):
            path = take(self, step, logged)
            while step == 4:
                time.sleep(1)
            return path

        checkpoint.RunState.step_done = stays

    first = begin(tiny, stage, name, before=stay)
    wait_for((folder / "checkpoints/0000003.pt").is_file, first.processes[0])
    before = (folder / "log.txt").read_text(), (folder / "metrics.jsonl").read_text()
    second = begin(tiny, stage, name, "--resume", "auto", ranks=2)
    second.join(code=2)
    for rank, path in enumerate(second.outputs):
        who = f"error (rank {rank})" if rank else "error"
        pid = first.processes[0].pid
        said = f"{who}: {folder} is in use by a run that has not ended, process {pid} on "
        assert path.read_text().startswith(said) and path.read_text().count("\n") == 1
    assert (folder / "log.txt").read_text().startswith(before[0])
    assert (folder / "metrics.jsonl").read_text().startswith(before[1])
    first.kill()
    begin(tiny, stage, name, "--resume", "auto", "--max-steps", STEPS).join()
    assert ended(tiny, name)[1][-1]["step"] == STEPS


def test_processes_whose_launcher_has_died_stop_after_a_checkpoint(tiny):
    """As torchrun's agent does that is killed, or ended by a signal that it does not handle."""
    name, stage = "orphan", "finetune_tinyfusion.py"
    folder = tiny / f"{name}-DiT-Tiny-2"

    def slowly(rank):
        os.environ["TORCHELASTIC_RUN_ID"] = "played"
        preemption.PARENT_SECONDS = 0.1
        take = checkpoint.RunState.step_done
        checkpoint.RunState.step_done = lambda *a, **kw: (time.sleep(0.3), take(*a, **kw))[1]

    def launch():
        begin(tiny, stage, name, ranks=2, before=slowly).join()

    launcher = multiprocessing.get_context("fork").Process(target=launch)
    launcher.start()
    wait_for((folder / "checkpoints/0000003.pt").is_file, launcher)
    launcher.kill()
    launcher.join()
    said = tiny / f"said-{name}" / "rank0.txt"
    deadline = time.perf_counter() + 60
    with open(folder / "run.lock", "a") as lock:
        while time.perf_counter() < deadline:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
    step = int(re.search(r"stopped by a signal after step (\d+)", said.read_text())[1])
    assert step < STEPS and newest_whole(tiny, name) == step
    begin(tiny, stage, name, "--resume", "auto", ranks=2).join()


@pytest.mark.parametrize("stage", STAGES)
def test_no_training_opens_a_vae(tiny, stage):
    from diffusers import AutoencoderKL

    def refuse(rank):
        def refused(*_, **__):
            raise AssertionError("a VAE in a training")

        AutoencoderKL.__init__ = AutoencoderKL.from_pretrained = refused

    flags = ["--max-steps", 1, "--ckpt-every", 1]
    begin(tiny, stage, f"{stage.split('_')[0]}-blind", *flags, before=refuse).join()


def test_processes_that_do_not_meet_end_with_one_line(tiny):
    """Of two only one begins; and a port that another program holds."""

    def alone(rank):
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(free_port()), "LOCAL_RANK": "0"}
        distributed.PREFLIGHT_SECONDS = 1.5

    stage = "finetune_tinyfusion.py"
    said = begin(tiny, stage, "alone", before=alone).join(code=2)
    assert re.match(
        r"error: rank 0 of 2 on \S+ did not meet the others at 127.0.0.1:\d+ within", said
    )
    assert "NCCL_SOCKET_IFNAME" in said and said.count("\n") == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def late(rank):
            alone(rank)
            os.environ["MASTER_PORT"] = str(taken.getsockname()[1])

        said = begin(tiny, stage, "late", before=late).join(code=2)
    assert said.splitlines()[-1].startswith("error: rank 0 of 2 on ") and "Traceback" not in said
    assert not list(tiny.glob("alone-DiT*")) and not list(tiny.glob("late-DiT*"))


@pytest.mark.slow
def test_two_nodes_train_like_one_process(tiny):
    """scripts/two_nodes.sh: two agents of torchrun on this machine, each with two processes."""
    content = yaml.safe_load((tiny / "graft.yaml").read_text())
    content["sample_config"] |= {"dit_model_name": "DiT-S/8", "image_size": 64}
    content["sample_config"]["base_ckpt_path"] = None
    (tiny / "small.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    torch.save(build_dit("DiT-S/8", 8, num_classes=3).state_dict(), tiny / "small.pt")
    flags = ["--config", tiny / "small.yaml", "--load-weight", tiny / "small.pt"]
    flags += ["--max-steps", 4, "--ckpt-every", 4]
    begin(tiny, "finetune_tinyfusion.py", "one-node", *flags).join()
    command = ["--data-path", tiny / "latents", "--results-dir", tiny, "--prefix", "two-nodes"]
    command += ["--global-batch-size", 4, "--lr", 1e-3, "--log-every", 2, "--device", "cpu"]
    command += STAGES["finetune_tinyfusion.py"] + flags
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"GPUS": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    nodes = [
        subprocess.Popen(
            ["bash", REPOSITORY / "scripts/two_nodes.sh", "finetune_tinyfusion.py"]
            + [str(word) for word in command],
            env={**environment, "NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    runs = [tiny / f"{name}-DiT-S-8" / "metrics.jsonl" for name in ("one-node", "two-nodes")]
    one, two = ([json.loads(line) for line in run.read_text().splitlines()] for run in runs)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [2, 4]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert "4 x cpu" in said[0] and "steps/s" not in said[1], "only rank 0 speaks"


@pytest.mark.parametrize(
    ("code", "requeued"),
    [
        (75, True),
        (128 + signal.SIGTERM, True),
        (128 + signal.SIGUSR1, True),
        (0, False),
        (2, False),
    ],
)
def test_slurm_example_starts_tasks_and_queues_again(tmp_path, code, requeued):
    """Its srun and scontrol are played: two tasks that say where they are, and exit with `code`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexport SLURM_NTASKS=2\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!\n'
        'SLURM_PROCID=1 SLURM_LOCALID=0 "$@"; wait $first\n'
    )
    (tools / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && printf "a1\\na2\\n" || echo "$@" > {tmp_path}/queued\n'
    )
    (tools / "python").symlink_to(sys.executable)
    for tool in ("srun", "scontrol"):
        (tools / tool).chmod(0o755)
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    (tmp_path / "task.py").write_text(
        "import os, sys\n"
        f"print(*[os.environ[n] for n in {names}], *sys.argv[1:])\nsys.exit({code})\n"
    )
    ended = subprocess.run(
        ["bash", REPOSITORY / "scripts/slurm.sh", "task.py", "--lr", "1"],
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_NODELIST": "a[1-2]",
            "SLURM_JOB_ID": "7",
        },
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code, ended.stderr
    assert sorted(ended.stdout.splitlines()) == [
        f"{rank} 0 2 a1 20007 --lr 1 --resume auto" for rank in range(2)
    ]
    assert (tmp_path / "queued").is_file() == requeued
    if requeued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"


def small_disk(megabytes, folder):
    """Puts a file system of so many megabytes at `folder`, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # users and mounts
        os._exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    folder.mkdir(exist_ok=True)
    size = f"size={int(megabytes * 1024)}k".encode()
    if libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, size):
        os._exit(77)


@pytest.mark.parametrize("stage", ACCUMULATED)
def test_a_full_disk_is_one_error_and_costs_no_checkpoint(tiny, stage):
    """A disk with room for one checkpoint and a half; the first is whole when the run has ended."""
    name = stage.split("_")[0] + "-full"
    begin(tiny, stage, f"{name}-size", "--max-steps", 3).join()
    (file,) = (tiny / f"{name}-size-DiT-Tiny-2" / "checkpoints").glob("*.pt")
    room = 1.5 * file.stat().st_size / 2**20 + 0.1
    disk = tiny / f"{name}-disk"

    def before(rank):
        small_disk(room, disk)
        end = sys.exit

        def look_first(code):
            kept = newest_whole(disk, name)
            left = [path.name for path in disk.rglob("*.partial")]
            print(f"kept step {kept}, partial files {left}", flush=True)
            end(code)

        distributed.sys = SimpleNamespace(exit=look_first, stderr=sys.stderr, argv=sys.argv)

    run = begin(tiny, stage, name, "--results-dir", disk, before=before)
    run.processes[0].join()
    if run.processes[0].exitcode == 77:
        pytest.skip("this system lets no user mount a file system of his own")
    said = run.join(code=2)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert re.search(r"No space left on device: '\S+/checkpoints/0000006.pt'", errors[0]), errors
    assert "kept step 3, partial files []" in said


def test_a_disk_too_full_for_tensorboard_is_one_error_that_names_it(tiny):
    board = tiny / "board-DiT-Tiny-2" / "tensorboard"
    board.mkdir(parents=True)

    def before(rank):
        small_disk(1 / 256, board)
        threading.excepthook = threading.__excepthook__  # not pytest's

    run = begin(tiny, "finetune_tinyfusion.py", "board", "--log-every", 1, before=before)
    run.processes[0].join()
    if run.processes[0].exitcode == 77:
        pytest.skip("this system lets no user mount a file system of his own")
    said = run.join(code=2)
    assert "Traceback" not in said and "Exception" not in said, said
    assert said.splitlines()[-1] == f"error: [Errno 28] No space left on device: '{board}'"


def test_a_limit_on_file_sizes_is_one_error_too(tiny):
    limit = lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    said = begin(tiny, "finetune_tinyfusion.py", "limit", before=limit).join(code=2)
    assert "Traceback" not in said
    assert re.search(r"error: \[Errno 27\] File too large: '\S+/0000003.pt'\n$", said)


def as_plain_user(rank):
    """Root keeps its files but may no longer pass over their permissions."""
    if os.getuid():
        return
    libc = ctypes.CDLL(None)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(head, held) == 0
    held[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(head, held) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_unwritable_results_folder_is_one_error(tiny, stage):
    closed = tiny / f"closed-{stage}"
    closed.mkdir()
    (closed / "earlier.txt").write_text("kept")
    closed.chmod(0o555)
    flags = ["--results-dir", closed / "deep"]
    run = begin(tiny, stage, "closed", *flags, ranks=2, before=as_plain_user)
    run.join(code=2)
    for who, path in zip(("error", "error (rank 1)"), run.outputs, strict=True):
        said = path.read_text()
        assert said.startswith(f"{who}: [Errno 13] Permission denied: ") and said.count("\n") == 1
        assert str(closed) in said
    assert [p.name for p in closed.iterdir()] == ["earlier.txt"]


def sharded(folder, scale=0.18215, seed=0):
    """A store of twelve images in three shards."""
    settings = {"kind": "sample", "count": 12, "shard_size": 4, "shape": [4, 8, 8]}
    settings |= {"dtype": "float16", "mirrors": 1, "vae": "ema", "vae_sha256": "0", "scale": scale}
    settings |= {"image_size": 32, "crop": "adm-center", "class_names": ["a", "b", "c"]}
    writer = StoreWriter(folder, settings)
    writer.begin([0, 1, 2])
    for shard in range(3):
        latents = (
            np.random.default_rng([seed, shard]).normal(size=(4, 1, 4, 8, 8)).astype(np.float16)
        )
        writer.write_shard(shard, latents, np.arange(4) % 3, [])
    writer.finish()
    return folder


def test_a_shard_that_vanishes_is_one_error(tiny):
    """Before the run, and while it goes on: what was saved stays."""
    store = sharded(tiny / "vanishing")
    flags = ["--data-path", store, "--ckpt-every", 1, "--log-every", 1]

    def vanish(rank):
        done = checkpoint.RunState.step_done

        def after(self, step, logged):
            done(self, step, logged)
            if step == 1:
                self._wait()
                for file in (store / "shards").glob("*-latents.npy"):
                    file.unlink()

        gather = store_module._Shards.gather

        def forgetful(self, indices):
            self._maps.clear()  # as if every shard were new
            return gather(self, indices)

        checkpoint.RunState.step_done, store_module._Shards.gather = after, forgetful

    stage = "finetune_tinyfusion.py"
    said = begin(tiny, stage, "vanish", *flags, before=vanish).join(code=2)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert re.match(r"error: \S+-latents.npy cannot be read as a .npy array .*No such file", last)
    assert newest_whole(tiny, "vanish") >= 1
    said = begin(tiny, stage, "vanish", *flags, "--resume", "auto").join(code=2)
    assert re.fullmatch(r"error: \S+-latents.npy is missing: rerun extract_features.py .*\n", said)


def test_another_precision_is_refused(tiny):
    """Also where the flag that was left out now means another."""
    stage, flags = "finetune_tinyfusion.py", ["--max-steps", 3]
    begin(tiny, stage, "precise", *flags).join()
    flags += ["--resume", "auto", "--precision"]
    said = begin(tiny, stage, "precise", *flags, "bf16").join(code=2)
    assert "had precision float32, this one has bfloat16 (set by --precision)" in said
    begin(tiny, stage, "precise", *flags, "fp32").join()


def test_latents_put_in_the_place_of_others_are_refused(tiny):
    """As many as before, of the same shape; a checkpoint that says nothing of them goes on."""
    stage, flags = "finetune_tinyfusion.py", ["--max-steps", 3, "--data-path", tiny / "replaced"]
    sharded(tiny / "replaced")
    begin(tiny, stage, "replaced", *flags).join()
    shutil.rmtree(tiny / "replaced")
    sharded(tiny / "replaced", seed=1)
    said = begin(tiny, stage, "replaced", *flags, "--resume", "auto").join(code=2)
    assert re.fullmatch(r"error: --resume: .* had latents_sha256 \w+, this one has .*\n", said)
    path = tiny / "replaced-DiT-Tiny-2" / "checkpoints" / "0000003.pt"
    state = torch.load(path, weights_only=True)
    del state["position"]["latents_sha256"]
    torch.save(state, path)
    said = begin(tiny, stage, "replaced", *flags, "--resume", "auto").join()
    assert "resumed at step 3\n" in said


@pytest.mark.parametrize("stage", STAGES)
def test_latents_of_another_scale_are_refused(tiny, stage):
    store = tiny / "scaled"
    if not store.exists():
        sharded(store, scale=0.5)
    said = begin(tiny, stage, "scaled", "--data-path", store).join(code=2)
    assert re.fullmatch(
        r"error: \S+/scaled holds latents of VAE ema, scaled by 0.5; VAE ema of \S+graft.yaml "
        r"scales by 0.18215: extract again with that VAE, or name the other .*\n",
        said,
    )
    assert not list(tiny.glob("scaled-DiT*"))


@pytest.mark.slow
def test_killed_extraction_ends_with_the_same_bytes(tmp_path):
    """Three times kill -9 at a random moment, of two processes."""
    pictures = tmp_path / "images"
    for i in range(48):
        path = pictures / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noisy).save(path)

    def extract(name):
        (tmp_path / f"said-{name}").mkdir(exist_ok=True)
        flags = ["--data-path", pictures, "--features-path", tmp_path / name, "--vae", MINI / "vae"]
        flags += ["--image-size", 64, "--num-workers", 0, "--device", "cpu", "--shard-size", 4]
        return Forked(tmp_path / f"said-{name}", "extract_features.py", *flags, ranks=2)

    began = time.perf_counter()
    extract("whole").join()
    took = time.perf_counter() - began
    chance = random.Random(0)
    for _ in range(3):
        run = extract("killed")
        time.sleep(chance.uniform(0.3, 0.9) * took)
        run.kill()
    extract("killed").join()
    whole, killed = (
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file() and path.name not in ("log.txt", "metrics.jsonl")
            if not path.name.endswith(".partial")
        }
        for name in ("whole", "killed")
    )
    assert whole == killed and len(whole) == 2 + 12 * 3
