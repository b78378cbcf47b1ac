"""The promises of docs/reliability.md that need whole runs: kills, world sizes, NaNs, full disks.

A DiT of four small blocks learns from twelve random latents; most runs are forked processes.
"""

import hashlib
import importlib
import io
import json
import random
import re
import shutil
import time

import pytest
import torch
import yaml
from entries import Forked
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from latents.loader import LatentLoader
from models.dit import PRESETS, build_dit
from training import checkpoint, distributed

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

    def slow(state, path):
        held = io.BytesIO()
        save(state, held)
        content = held.getvalue()
        with open(path, "wb") as file:
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
        wrap = distributed.wrap

        def hook(state, bucket):
            with reductions.open("a") as file:
                file.write(f"{rank}")
            return default_hooks.allreduce_hook(None, bucket)

        def spied(world, module):
            net = wrap(world, module)
            net.register_comm_hook(None, hook)
            return net

        distributed.wrap = spied

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


def assert_close(folder, state, lines, other, others):
    """Two runs to rounding: AdamW divides a gradient by its size, and so rounding by next to 0."""
    for name, tensor in state["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=1e-3, atol=1e-4)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, its in zip(lines, others, strict=True):
        for key in line:
            assert its[key] == pytest.approx(line[key], rel=1e-5 if "loss" in key else 1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_processes_trains_alike(tiny, stage):
    """1, 2 and 4: the same images in every one of 20 steps, and the same losses to rounding."""
    name, seen = stage.split("_")[0] + "-ranks", []
    for ranks in (1, 2, 4):
        record = tiny / f"images-{name}{ranks}"
        record.mkdir()

        def note(rank, record=record):
            hand_over = LatentLoader._batch

            def spied(self, step, read):
                with (record / f"{rank}").open("a") as file:
                    file.write(json.dumps([step, read[0].tolist()]) + "\n")
                return hand_over(self, step, read)

            LatentLoader._batch = spied

        flags = ["--max-steps", 20, "--log-every", 1]
        begin(tiny, stage, f"{name}{ranks}", *flags, ranks=ranks, before=note).join()
        steps = [
            [json.loads(line) for line in (record / f"{rank}").read_text().splitlines()]
            for rank in range(ranks)
        ]
        seen.append(
            [sum((part[1] for part in parts), []) for parts in list(zip(*steps, strict=True))[:20]]
        )
        state, lines = ended(tiny, f"{name}{ranks}", 20)
        if ranks == 1:
            first_state, first_lines = state, lines
        assert_close(tiny, first_state, first_lines, state, lines)
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 20


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
    assert f"that is not finite is what {place}.proj gives" in said
