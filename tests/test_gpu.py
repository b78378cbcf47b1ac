"""On a CUDA device: the entries at DiT-XL/2's size, and compiled runs against eager ones.

python -m pytest -m gpu tests/test_gpu.py
"""

import contextlib
import copy
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_prune import forms, select_form

from latents import group_norm
from latents.store import open_latents
from models import cublaslt, restructure, streams
from models.dit import DiT, build_dit
from models.grafting import build_grafted, load_plan
from models.inference import quicken
from models.operators import accelerators
from scripts import loops
from training.compilation import compile_models, graphed
from training.distributed import World
from training.ema import Ema
from training.optimizer import StepGuard, adamw
from training.working import with_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REPOSITORY = Path(__file__).resolve().parent.parent


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def torchrun(processes: int, entry: str, *flags) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", entry, *map(str, flags)]


def run(entry: str, *flags, processes: int = 1) -> None:
    """An entry or script: alone in this process, without the time to start, else by torchrun."""
    if processes == 1:
        run_here(entry, *flags)
    else:
        command = torchrun(processes, entry, *flags)
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=150)


def run_here(entry: str, *flags) -> None:
    module = importlib.import_module(entry.removesuffix(".py").replace("/", "."))
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(REPOSITORY):
        patch.setattr(sys, "argv", [entry, *map(str, flags)])
        module.main(module.parse_args())
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Random weights in place of the published files, with their names, shapes and nesting."""
    from diffusers import AutoencoderKL
    from PIL import Image

    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    base = build_dit("DiT-XL/2", 32)
    for name, parameter in base.named_parameters():
        if "adaLN" in name or "final_layer" in name:  # zero at the start: nothing would flow
            torch.nn.init.normal_(parameter, std=0.01)
    torch.save(base.state_dict(), folder / "base.pt")
    configs = {}
    for name in ("75p_swa", "50p_graftfusion75_swa"):
        content = yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text())
        content["operator"]["config_filepath"] = "configs/sequence_mixers/swa.yaml"
        content["sample_config"]["base_ckpt_path"] = str(folder / "base.pt")
        content["sample_config"]["grafted_dit_ckpt_path"] = str(folder / "75.pt")
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(content))
    model, _ = build_grafted(load_plan(configs["75p_swa"]), weights=False)
    torch.save({"ema": model.state_dict()}, folder / "75.pt")
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=256,
    )
    vae.save_pretrained(folder / "vae")
    generator = np.random.default_rng(0)
    for label in range(2):
        (folder / "images" / f"n{label}").mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (280, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"n{label}" / f"{i}.png")
    run(
        "extract_features.py", "--model", "DiT-XL/2", "--data-path", folder / "images",
        "--features-path", folder / "latents", "--vae", folder / "vae",
    )  # fmt: skip
    return folder, configs


def test_xl_selects_finetunes_and_samples(large):
    folder, configs = large
    common = ["--data-path", folder / "latents", "--results-dir", folder, "--max-steps", 1]
    common += ["--global-batch-size", 4, "--log-every", 1, "--no-compile"]
    run(
        "prune_by_learning.py", "--load-weight", folder / "base.pt", "--delta-w", "--lora",
        "--config", configs["75p_swa"], "--prefix", "selection", *common,
    )  # fmt: skip
    answer = json.loads((folder / "selection-DiT-XL-2" / "selection.json").read_text())
    assert len(answer["kept"]) == 14
    run(
        "finetune_tinyfusion.py", "--model", "DiT-XL/2", "--prefix", "tuned",
        "--config", configs["50p_graftfusion75_swa"], *common,
    )  # fmt: skip
    record = json.loads((folder / "tuned-DiT-XL-2" / "metrics.jsonl").read_text())
    assert np.isfinite(record["loss"]) and record["skipped_steps"] == 0
    run(
        "sample_ddp_finetuned.py", "--num-fid-samples", 2, "--vae", folder / "vae",
        "--config-filepath", configs["50p_graftfusion75_swa"], "--sample-dir", folder,
        "--graft-fusion-ckpt-path", folder / "tuned-DiT-XL-2/checkpoints/0000001.pt",
        "--folder-name", "samples", "--no-compile",
    )  # fmt: skip
    assert np.load(folder / "samples.npz")["arr_0"].shape == (2, 256, 256, 3)


def extract_mini(folder, out, *flags):
    """Latents of the testbed's heldout pictures."""
    run(
        "extract_features.py", "--vae", "assets/mini/vae", "--image-size", 64,
        "--num-classes", 9, "--no-mirror", "--data-path", folder / "heldout",
        "--features-path", folder / out, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The testbed's pictures, and latents of the heldout ones."""
    folder = tmp_path_factory.mktemp("mini")
    run("scripts/unpack_mini.py", "--out", folder)
    extract_mini(folder, "latents")
    return folder


def test_compiled_extraction_gives_the_same_moments(mini):
    """Of 188 images in batches of 48, the last of which is filled up."""
    moments = {}
    for mode in ("--compile", "--no-compile"):
        extract_mini(mini, f"latents{mode}", mode, "--global-batch-size", 48)
        store = open_latents(mini / f"latents{mode}")
        moments[mode] = store.read(torch.arange(len(store))).float()
    assert distance(moments["--compile"], moments["--no-compile"]) < 2e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_vae_on_the_kernels_is_as_near_as_pytorchs(compiled):
    """Moments and images in bf16 beside float32's; of more than 64 images, which diffusers doubles
    in another layout."""
    torch.manual_seed(0)
    cuda, found = torch.device("cuda"), {}
    codec = loops.random_codec(cuda, torch.bfloat16, tiny=False)
    for name, parameter in codec.vae.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide much
            parameter.normal_(std=0.5).add_(1.0 if name.endswith("weight") else 0.0)
    images, latents = torch.randn(66, 3, 64, 64), torch.randn(66, 4, 8, 8)
    for path in ("exact", "torch", "triton"):
        dtype = torch.float32 if path == "exact" else torch.bfloat16
        mine = replace(codec, vae=copy.deepcopy(codec.vae), dtype=dtype)
        if path == "triton":
            lines = group_norm.accelerate(mine.vae, cuda, dtype)
            assert lines == ["group norms of the VAE: Triton"]
        if compiled and path != "exact":
            mine = mine.compiled(66, 64)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            moments = mine.encode(images)
            with mine._autocast():
                decoded = mine.vae.decode(latents.cuda()).sample
        assert decoded.dtype == dtype
        found[path] = (moments, decoded.float())
    torch.compiler.reset()
    for exact, usual, fused in zip(*found.values(), strict=True):
        assert distance(fused, exact) < 1.5 * distance(usual, exact)


def test_group_norms_reach_beyond_two_to_the_31():
    """The last sample of 2.2 G elements is what it is alone."""
    weight, bias, addend = torch.randn(3, 128, device="cuda")
    maps = torch.randn(65, 512, 512, 128, device="cuda", dtype=torch.bfloat16).movedim(-1, 1)
    for operation, given in (
        (group_norm.group_norm, (addend, weight, bias, 32, 1e-6, True)),
        (lambda x, bias: group_norm.add(x, x, bias), (bias,)),
    ):
        assert torch.equal(operation(maps, *given)[-1:], operation(maps[-1:], *given))


SELECT = ("prune_by_learning.py", "--delta-w", "--lora", "--tau-range", 4, 4)


ENTRIES = pytest.mark.parametrize(
    "entry, config",
    [
        (("finetune_tinyfusion.py",), "75p_swa"),
        (("finetune_tinyfusion.py",), "parallel_pairs"),
        (("finetune_tinyfusion.py", "--distill"), "75p_swa"),
        (SELECT, "75p_swa"),
    ],
    ids=["finetune", "parallel_pairs", "teacher", "select"],
)


def prefix_of(entry, config, flags):
    return "".join([entry[0][:-3], *entry[1:2], "-", config, *flags])


def last_of(mini, prefix):
    """The last checkpoint of a run of `losses_of`."""
    return mini / f"{prefix}-DiT-Mini-2" / "checkpoints" / "0000012.pt"


def losses_of(mini, entry, config, *flags, stopped_at=None):
    """The losses of a run's 12 steps; `stopped_at`: it goes on from there, having been whole."""
    prefix = prefix_of(entry, config, flags)
    if stopped_at is not None:
        last_of(mini, prefix).unlink()
        left = [file.name for file in last_of(mini, prefix).parent.glob("*.pt")]
        assert left == [f"{stopped_at:07d}.pt"]
        flags += ("--resume", "auto")
    run(
        *entry, "--config", f"configs/mini/{config}.yaml", *flags, "--results-dir", mini,
        "--data-path", mini / "latents", "--prefix", prefix, "--max-steps", 12,
        "--global-batch-size", 32, "--log-every", 1,
    )  # fmt: skip
    lines = (mini / f"{prefix}-DiT-Mini-2" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@ENTRIES
def test_compiled_steps_follow_eager_ones(mini, entry, config):
    """bf16 rounding apart: the same data, noise and draws, so the losses stay together."""
    compiled, eager = (losses_of(mini, entry, config, m) for m in ("--compile", "--no-compile"))
    np.testing.assert_allclose(compiled, eager, rtol=0.02)


def test_compiled_distillation_follows_the_eager_one(mini):
    losses = {}
    for mode in ("--compile", "--no-compile"):
        run(
            "distill_operators.py", "--config", "configs/mini/75p_hyena_y.yaml", mode,
            "--results-dir", mini, "--data-path", mini / "latents", "--prefix", f"stage1{mode}",
            "--num-samples", 128, "--val-samples", 60, "--global-batch-size", 32,
            "--max-steps", 12, "--log-every", 1,
        )  # fmt: skip
        lines = (mini / f"stage1{mode}-DiT-Mini-2" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses[mode] = [
            [value for key, value in record.items() if key.startswith("loss/")]
            for record in records
            if "steps_per_sec" in record
        ]
    assert np.shape(losses["--compile"]) == (12, 21)
    np.testing.assert_allclose(losses["--compile"], losses["--no-compile"], rtol=0.05)


@ENTRIES
@pytest.mark.parametrize("mode", ["--compile", "--no-compile"])
def test_blocks_that_run_again_in_backward_train_alike(mini, entry, config, mode):
    """On a seed of their own: the folders of the runs above are taken."""
    kept = losses_of(mini, entry, config, mode, "--global-seed=1")
    again = losses_of(mini, entry, config, mode, "--global-seed=1", "--grad-checkpoint")
    np.testing.assert_allclose(again, kept, rtol=0.02)


@ENTRIES
def test_a_compiled_run_goes_on_where_it_stopped(mini, entry, config):
    """After six steps: the moments of the optimiser tell a start without those of before."""
    flags = ("--compile", "--global-seed=2", "--ckpt-every=6")
    losses, moments = [], []
    for stopped_at in (None, 6):
        losses.append(losses_of(mini, entry, config, *flags, stopped_at=stopped_at))
        last = last_of(mini, prefix_of(entry, config, flags))
        states = torch.load(last, weights_only=True, map_location="cpu")["opt"]["state"].values()
        assert {state["step"].item() for state in states} == {12}
        moments.append(torch.cat([state["exp_avg"].flatten() for state in states]))
    assert losses[1][:6] == losses[0][:6]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.01)
    assert distance(moments[1], moments[0]) < 0.1


def test_fifty_compiled_steps_follow_eager_ones_as_bf16_follows_fp32(mini):
    losses = {}
    for name, flags in {
        "compiled": ["--compile"],
        "eager": ["--no-compile"],
        "fp32": ["--no-compile", "--precision", "fp32"],
    }.items():
        run(
            "finetune_tinyfusion.py", "--config", "configs/mini/75p_swa.yaml", *flags,
            "--results-dir", mini, "--data-path", mini / "latents", "--prefix", f"fifty-{name}",
            "--max-steps", 50, "--global-batch-size", 64, "--log-every", 1, "--lr", 3e-4,
        )  # fmt: skip
        lines = (mini / f"fifty-{name}-DiT-Mini-2" / "metrics.jsonl").read_text().splitlines()
        losses[name] = np.array([json.loads(line)["loss"] for line in lines])
    apart, noise = (np.abs(losses[n] / losses["eager"] - 1) for n in ("compiled", "fp32"))
    print(f"compiled and eager {apart.max():.1e}, bf16 and fp32 {noise.max():.1e} at most")
    assert len(apart) == 50 and losses["eager"][-10:].mean() < 0.9 * losses["eager"][:10].mean()
    assert apart.max() < 2 * noise.max()


# Hyena-Y in blocks where the inherited maps make large activations
HARD = [1, 3, 5, 7, 10, 11, 14, 15, 17, 19, 22, 23, 25, 26]


@pytest.mark.parametrize("mode", ["--compile", "--no-compile"])
def test_bf16_training_follows_fp32(mini, mode):
    content = yaml.safe_load((REPOSITORY / "configs/mini/75p_hyena_y.yaml").read_text())
    content["operator"]["config_filepath"] = "configs/mini/hyena_y.yaml"
    content["sample_config"]["graft_indexes"] = HARD
    config = mini / "hard.yaml"
    config.write_text(yaml.safe_dump(content))
    records = {}
    for precision in ("bf16", "fp32"):
        prefix = f"hard{mode}-{precision}"
        run(
            "finetune_tinyfusion.py", "--config", config, mode, "--results-dir", mini,
            "--data-path", mini / "latents", "--prefix", prefix, "--max-steps", 20,
            "--global-batch-size", 64, "--log-every", 1, "--lr", 3e-4, "--precision", precision,
        )  # fmt: skip
        lines = (mini / f"{prefix}-DiT-Mini-2" / "metrics.jsonl").read_text().splitlines()
        records[precision] = [json.loads(line) for line in lines]
    for key, tolerance in (("loss", 0.05), ("grad_norm", 0.5)):
        bf16, fp32 = ([record[key] for record in records[p]] for p in ("bf16", "fp32"))
        np.testing.assert_allclose(bf16, fp32, rtol=tolerance, err_msg=key)


@pytest.mark.parametrize("slot", ["mha", "mlp"])
@pytest.mark.parametrize(("model", "groups"), forms("DiT-Mini/2", "DiT-S/2", "DiT-XL/2"))
def test_selection_in_every_form(monkeypatch, tmp_path, write_latents, model, groups, slot):
    write_latents(tmp_path / "latents", 8, classes=5)
    select_form(monkeypatch, tmp_path, model, slot, groups, "cuda")


def test_samples_of_gpu_and_cpu_are_the_same_pictures(mini):
    """fp32 on all, compiled or not: an image's noise does not depend on the device."""
    settings = ["--config", "configs/mini/75p_swa.yaml", "--num-fid-samples", 4, "--no-tf32"]
    settings += ["--sampler", "dpm++", "--num-sampling-steps", 8, "--precision", "fp32"]
    settings += ["--sample-dir", mini]
    pictures = {}
    for name, mode in {
        "gpu": ["--no-compile"],
        "compiled": ["--compile"],
        "cpu": ["--no-compile", "--device", "cpu"],
    }.items():
        run("sample_ddp_finetuned.py", *settings, *mode, "--folder-name", name)
        pictures[name] = np.load(mini / f"{name}.npz")["arr_0"].astype(int)
    assert np.abs(pictures["gpu"] - pictures["cpu"]).mean() < 0.5
    assert np.abs(pictures["compiled"] - pictures["gpu"]).mean() < 0.5
    run("evaluate_fid.py", mini / "heldout", mini / "gpu", "--feature-net", "mini")
    score = json.loads((mini / "gpu" / "metrics.json").read_text())["metrics"]["fd_mini"]
    assert np.isfinite(score)


def test_lower_precisions_draw_like_fp32(mini):
    """512 pictures of the testbed's pretrained model from the same noise, and their scores."""
    content = yaml.safe_load((REPOSITORY / "configs/mini/no_graft.yaml").read_text())
    content["sample_config"]["base_ckpt_path"] = "assets/mini/dit_mini.safetensors"
    (mini / "base.yaml").write_text(yaml.safe_dump(content))
    pictures, scores = {}, {}
    for name, flags in {
        "fp32": ["--precision", "fp32", "--no-tf32"],
        "bf16": ["--precision", "bf16"],
        "fp8": ["--precision", "bf16", "--fp8"],
    }.items():
        run(
            "sample_ddp_finetuned.py", "--config", mini / "base.yaml", *flags,
            "--num-fid-samples", 512, "--labels", "balanced", "--sampler", "dpm++",
            "--num-sampling-steps", 20, "--per-proc-batch-size", 256, "--sample-dir", mini,
            "--folder-name", name,
        )  # fmt: skip
        pictures[name] = np.load(mini / f"{name}.npz")["arr_0"].astype(float)
        run("evaluate_fid.py", mini / "train", mini / name, "--feature-net", "mini")
        score = json.loads((mini / name / "metrics.json").read_text())["metrics"]
        scores[name] = score["fd_mini"]
    psnr = {}
    for name in ("bf16", "fp8"):
        squares = np.square(pictures[name] - pictures["fp32"]).mean((1, 2, 3))
        psnr[name] = 10 * np.log10(255**2 / squares.clip(1e-9))
        low, median = np.quantile(psnr[name], (0.05, 0.5))
        print(f"{name}: PSNR {median:.1f} dB, {low:.1f} at the 5th of 100")
    print("fd_mini:", scores)
    assert np.median(psnr["bf16"]) > 30 and np.median(psnr["fp8"]) > 18
    assert scores["bf16"] == pytest.approx(scores["fp32"], rel=0.1)
    assert scores["fp8"] == pytest.approx(scores["fp32"], rel=0.3)


@two_gpus
@pytest.mark.parametrize(
    ("precision", "mode", "exchange", "tolerance"),
    [
        ("fp32", "--no-compile", "fp32", 1e-4),
        ("bf16", "--compile", "fp32", 0.02),
        ("bf16", "--compile", "bf16", 0.02),
    ],
)
def test_two_gpus_train_like_one(mini, precision, mode, exchange, tolerance):
    """The same 20 steps: losses alike to fp32 rounding, and to 2 % in bf16 as users run it."""
    losses = {}
    for processes in (1, 2):
        prefix = f"world{processes}-{precision}-{exchange}"
        run(
            "finetune_tinyfusion.py", "--config", "configs/mini/75p_swa.yaml", mode,
            "--exchange", exchange,
            "--results-dir", mini, "--data-path", mini / "latents", "--prefix", prefix,
            "--max-steps", 20, "--global-batch-size", 32, "--log-every", 1,
            "--precision", precision, processes=processes,
        )  # fmt: skip
        lines = (mini / f"{prefix}-DiT-Mini-2" / "metrics.jsonl").read_text().splitlines()
        losses[processes] = np.array([json.loads(line)["loss"] for line in lines])
    assert len(losses[1]) == 20
    print("largest relative difference:", np.abs(losses[2] / losses[1] - 1).max())
    np.testing.assert_allclose(losses[2], losses[1], rtol=tolerance)


@two_gpus
def test_two_gpus_stop_at_a_signal_though_a_graph_holds_their_exchange(mini):
    folder = mini / "stopped-DiT-Mini-2"
    command = torchrun(
        2, "finetune_tinyfusion.py", "--config", "configs/mini/75p_swa.yaml", "--results-dir", mini,
        "--data-path", mini / "latents", "--prefix", "stopped", "--max-steps", 1_000_000,
        "--global-batch-size", 32, "--log-every", 5, "--compile",
    )  # fmt: skip
    with subprocess.Popen(command, cwd=REPOSITORY) as launched:
        try:
            deadline = time.monotonic() + 120
            records = folder / "metrics.jsonl"
            while not records.is_file() or len(records.read_text().splitlines()) < 6:
                assert launched.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text()
            os.kill(int(children.split()[0]), signal.SIGTERM)
            launched.wait(timeout=60)
        finally:
            launched.kill()
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 1


@two_gpus
@pytest.mark.parametrize(
    ("precision", "mode", "levels"),
    [("fp32", ["--no-compile", "--no-tf32"], 0.05), ("bf16", ["--compile"], 2.0)],
)
def test_two_gpus_draw_and_score_the_images_of_one(mini, precision, mode, levels):
    """The mean difference of two pixels, in grey levels of 255; and the scores of equal images."""
    pictures, scores = {}, {}
    for processes in (1, 2):
        run(
            "sample_ddp_finetuned.py", "--config", "configs/mini/75p_swa.yaml", *mode,
            "--num-fid-samples", 9, "--sampler", "dpm++", "--num-sampling-steps", 8,
            "--precision", precision, "--sample-dir", mini, "--per-proc-batch-size", 8,
            "--folder-name", f"drawn{processes}-{precision}", processes=processes,
        )  # fmt: skip
        pictures[processes] = np.load(mini / f"drawn{processes}-{precision}.npz")["arr_0"]
        output = mini / f"scores{processes}-{precision}.json"
        run(
            "evaluate_fid.py", mini / "heldout", mini / f"drawn1-{precision}", "--feature-net",
            "mini", "--output", output, processes=processes,
        )  # fmt: skip
        scores[processes] = json.loads(output.read_text())["metrics"]
    assert pictures[1].shape == pictures[2].shape == (9, 64, 64, 3)
    difference = np.abs(pictures[2].astype(int) - pictures[1]).mean()
    print("mean difference in grey levels:", difference)
    assert difference < levels
    assert scores[2] == pytest.approx(scores[1], rel=1e-6)


def strong_dit(width=128, depth=3, pairs=(), gain=0.5):
    """A small DiT with every layer at work, on CUDA.

    gain: of its maps. By 1.5 a block counts for about half of the output, by 0.5 for 1/250.
    """
    torch.manual_seed(0)
    model = DiT(input_size=16, hidden_size=width, depth=depth, num_heads=4, num_classes=5)
    restructure.parallelize(model, pairs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
    return model.cuda()


def inputs_of(batch):
    return (
        torch.randn(batch, 4, 16, 16, device="cuda"),
        torch.randint(1000, (batch,), device="cuda"),
        torch.randint(5, (batch,), device="cuda"),
    )


def distance(some, exact):
    return ((some.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("pairs", [(), ((0, 1),)], ids=["in sequence", "a pair"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fused_modulation_trains_like_pytorch(compiled, pairs):
    """Outputs and gradients in bf16 are no farther from float32 than PyTorch's own are."""
    found = {}
    drop = torch.zeros(6, dtype=torch.bool, device="cuda")
    for path in ("exact", "torch", "triton"):
        model, inputs = strong_dit(pairs=pairs), inputs_of(6)
        if path == "triton":
            kernels = accelerators.accelerate(model, torch.device("cuda"), torch.bfloat16, 64)
            assert kernels == ["norm and modulation: Triton"]
        if compiled and path != "exact":
            alone = World(0, 0, 1, torch.device("cuda"))
            compile_models(alone, True, model)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=path != "exact"):
            y = model(*inputs, drop=drop).float()
        y.square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[path] = [y.detach(), *gradients]
    for exact, usual, mine in zip(*found.values(), strict=True):
        assert distance(mine, exact) < 1.5 * distance(usual, exact) + 1e-3


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_fused_steps_are_those_of_pytorch(graph):
    """Twelve steps, the seventh and tenth not finite, at sizes with and without wide loads."""
    alone, ends = World(0, 0, 1, torch.device("cuda")), {}
    for kernels in ("torch", "auto"):
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 513), torch.nn.Tanh(), torch.nn.Linear(513, 64, bias=False)
        model = torch.nn.Sequential(*layers).cuda()
        groups = [{"params": [*layers[0].parameters()], "lr": 0.01}]
        groups.append({"params": [*layers[2].parameters()], "lr": 0.003})
        ema, optimizer = Ema(model, 0.9), adamw(groups, 0.1)
        guard = StepGuard(optimizer, 0.5, ema, kernels)
        reason = " (as --kernels says)" if kernels == "torch" else ""
        said = f"optimiser and averages: {'PyTorch' if reason else 'Triton'}{reason}"
        assert guard.line == said

        def on_device(x, factor, model=model, guard=guard):
            guard.zero_grad()
            ((model(x) - x).square().mean() * factor).backward()
            return guard.step()

        take_step = graphed(alone, graph, on_device)
        for number in range(12):
            factor = torch.nan if number in (6, 9) else 1.0 + number
            guard.set_rates()
            x = torch.randn(32, 64, device="cuda")
            take_step(x=x, factor=torch.full((), factor, device="cuda"))
            groups[0]["lr"] *= 0.9
        assert guard.skipped == 2
        states = [tensor for p in model.parameters() for tensor in optimizer.state[p].values()]
        ends[kernels] = [t.detach() for t in (*model.parameters(), *ema.averages, *states)]
    # PyTorch takes 1 - beta2 in float32
    torch.testing.assert_close(ends["auto"], ends["torch"], rtol=1e-3, atol=1e-4)


def test_steps_on_copies_are_those_on_casts():
    """Twelve steps in bf16, as one CUDA graph after the first."""
    alone, ends = World(0, 0, 1, torch.device("cuda")), []
    flags = Namespace(grad_accum=1, grad_checkpoint=False, exchange="fp32")
    for copies in (False, True):
        torch.manual_seed(0)
        layers = torch.nn.Linear(64, 512), torch.nn.Tanh(), torch.nn.Linear(512, 64, bias=False)
        model = torch.nn.Sequential(*layers).cuda()
        ema, optimizer = Ema(model, 0.9), adamw([{"params": [*model.parameters()], "lr": 1e-3}], 0)
        guard, net = StepGuard(optimizer, 0.5, ema), model
        if copies:
            net, lines = with_copies(alone, model, torch.bfloat16, guard, flags)
            assert lines == ["3 weights of products are kept in bf16 too"]

        def on_device(x, net=net, guard=guard):
            guard.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (net(x) - x).square().mean()
            loss.backward()
            return guard.step()

        take_step, norms = graphed(alone, True, on_device), []
        for _ in range(12):
            guard.set_rates()
            norms.append(take_step(x=torch.randn(32, 64, device="cuda")).clone())
        if copies:
            assert all(torch.equal(c, p.bfloat16()) for p, c in net.copies.items())
        ends.append([t.detach() for t in (*norms, *model.parameters(), *ema.averages)])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_models_prepared_for_sampling_compute_the_same():
    """GELU within its product, fused modulation, and 8-bit products with their own error."""
    inputs = inputs_of(6)
    exact = strong_dit(gain=1.5).eval()(*inputs)
    errors = {}
    for name, float8 in (("bf16", False), ("fp8", True)):
        model = strong_dit(gain=1.5).eval()
        accelerators.accelerate(model, torch.device("cuda"), torch.bfloat16, 64)
        quicken(model, torch.bfloat16, float8)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            errors[name] = distance(model(*inputs), exact)
    print(errors)
    assert errors["bf16"] < 3e-2
    assert errors["fp8"] < 1.5e-1


@torch.no_grad()
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("rows", [1, 2, 96, 1024])
@pytest.mark.parametrize(
    ("width", "depth"), [(6912, 1152), (3456, 1152), (1152, 1152), (1152, 4608), (128, 64)]
)
def test_stacked_products_are_those_of_float32(width, depth, rows, gelu):
    """By the way that cuBLASLt recommends first, by that which is taken, and in a graph."""
    torch.manual_seed(0)
    shapes = (2, rows, depth), (2, width, depth), (2, width)
    x, weight, bias = (torch.randn(s, device="cuda").bfloat16() for s in shapes)
    weight *= depth**-0.5
    exact = torch.baddbmm(bias.float()[:, None], x.float(), weight.float().mT)
    exact = torch.nn.functional.gelu(exact, approximate="tanh") if gelu else exact
    product = cublaslt._product(x.device, *x.shape, width, gelu)
    graph, found = torch.cuda.CUDAGraph(), [exact.bfloat16().zero_()]
    product.run(product.ways[0], x, weight, bias, found[0])
    found.append(cublaslt.linear(x, weight, bias, gelu))
    assert product.settled and product.ways
    with torch.cuda.graph(graph):
        found.append(cublaslt.linear(x, weight, bias, gelu))
    graph.replay()
    for y in found:
        assert distance(y, exact) < 4e-3
    assert torch.equal(found[1], found[2])


@torch.no_grad()
@pytest.mark.parametrize("how", ["stacked", "bf16", "fp8"])
def test_pairs_in_a_graph_compute_the_same(monkeypatch, how):
    """On two streams, or as one block; before the capture, on one stream, and in the graph."""
    float8 = how == "fp8"
    pairs, forks, stream = ((0, 1), (2, 3), (5, 6)), [], streams._stream
    monkeypatch.setattr(streams, "_stream", lambda d, use: forks.append(use) or stream(d, use))
    inputs = inputs_of(6)
    exact, model = (strong_dit(depth=7, pairs=pairs, gain=1.5).eval() for _ in range(2))
    exact, alone = exact(*inputs), World(0, 0, 1, torch.device("cuda"))
    accelerators.accelerate(model, alone.device, torch.bfloat16, 64)
    said = quicken(model, torch.bfloat16, float8)
    if how == "stacked":
        assert said == ["parallel pairs: one pass of both blocks up to 1024 tokens in a pass: 3"]
    else:
        model.stacks.clear()
    compile_models(alone, True, model)
    forward = graphed(alone, True, model, reduces=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = [forward(**dict(zip("xty", inputs, strict=True))).clone() for _ in range(20)]
    assert forks == ["ahead", *["beside"] * (0 if how == "stacked" else len(pairs))]
    errors = [distance(y, exact) for y in found]
    print(errors[0], errors[-1])
    assert max(errors) < (1.5e-1 if float8 else 3e-2)
    assert all(torch.equal(y, found[-1]) for y in found[-10:])
    # the same kernels on one stream and on two: at most a rounding of bfloat16 lies between them
    rounding, size = torch.finfo(torch.bfloat16).eps, exact.square().mean().sqrt().item()
    torch.testing.assert_close(found[-1], found[0], rtol=rounding, atol=rounding * size)
