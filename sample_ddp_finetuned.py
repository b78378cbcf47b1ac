r"""Samples images of classes from a DiT, or of prompts from PixArt, grafted or plain.

Inputs:  a graft YAML and, with --graft-fusion-ckpt-path, a checkpoint of finetune_tinyfusion.py
         (without it: the YAML's own weight files); the VAE; for PixArt --prompts, a .txt or a
         .jsonl file such as GenEval's evaluation_metadata.jsonl, and the text encoder.
Outputs: <sample-dir>/<name>/000000.png ..., samples.json (all that the images depend on) in the
         same folder, and beside it <name>.npz (arr_0, for the ADM evaluator) and <name>-grid.png.
         With --prompts GenEval's layout, <name>/00000/samples/0000.png ..., and no .npz.

    torchrun --nnodes=1 --nproc_per_node=4 sample_ddp_finetuned.py --num-fid-samples 50000 \
        --config-filepath configs/50p_graftfusion75_swa.yaml \
        --graft-fusion-ckpt-path outputs/<run>/checkpoints/0400000.pt

Label (unless --labels names a file), starting noise and step noise of image i follow from
(--global-seed, i) alone: neither the number of processes nor the batch size changes an image beyond
rounding. A run that was stopped goes on with the images that are missing.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import noise
from diffusion.samplers import sample
from evaluation.writers import (
    default_name,
    describe_run,
    is_whole_png,
    save_grid,
    save_npz,
    save_png,
)
from latents import group_norm
from latents.codec import load_codec
from latents.labels import LABELS, read_labels
from latents.prompts import read_prompts
from latents.text import load_text_encoder
from models.files import file_sha256
from models.graft_plan import GraftPlan
from models.grafting import build_grafted, load_trained, with_base
from models.inference import quicken
from models.operators.accelerators import accelerate
from models.plan import network_of, plan_from_flags
from models.presets import MAX_TOKENS
from training import arguments, distributed, precision
from training.compilation import compile_functions, compile_models, graphed
from training.runlog import watched

# What flags left unset stand for: the papers' for DiT, those of diffusers' pipeline for PixArt
DEFAULTS_DIT = {"sampler": "ddpm", "num_sampling_steps": 250, "cfg_scale": 1.5, "cfg_channels": 3}
DEFAULTS_PIXART = {
    "sampler": "dpm++", "num_sampling_steps": 20, "cfg_scale": 4.5, "cfg_channels": "all"
}  # fmt: skip


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(args.tf32)
    torch.manual_seed(args.global_seed)
    plan = plan_from_flags(args.config_filepath, args.model, args.image_size, args.num_classes)
    plan = with_base(plan, args.load_weight)
    settle_sampler(args, plan)
    labels = None
    if args.labels not in LABELS:
        labels = read_labels(args.labels, args.num_fid_samples, plan.num_classes).to(world.device)
    prompts, encoder, told = None, None, plan
    if plan.captioned:
        prompts = read_prompts(args.prompts, args.images_per_prompt)
        text, text_path = network_of(plan, "text_encoder", args.text_encoder)
        encoder = load_text_encoder(text_path, MAX_TOKENS, world.device, dtype, recorded=text)
        encoder.check_plan(plan)
        told = plan.with_encoder(encoder.id, encoder.sha256)
    number = args.num_fid_samples if prompts is None else len(prompts)
    vae, vae_path = network_of(plan, "vae", args.vae)

    # Model
    checkpoint = args.graft_fusion_ckpt_path
    model, report = build_grafted(told, weights=checkpoint is None)
    if checkpoint is not None:
        load_trained(model, told, checkpoint)
    files = report.resolved if checkpoint is None else {"trained": Path(checkpoint)}
    tensors = report.counts() if checkpoint is None else {"trained": len(model.state_dict())}
    untrained = tensors.get("fresh", 0)
    if untrained and not args.allow_untrained:
        raise ValueError(
            f"{plan.path}: {untrained} tensors have no weights, the images would be noise; give "
            "--graft-fusion-ckpt-path, weight files in the YAML, or --allow-untrained"
        )
    model.to(world.device).eval()
    paths = accelerate(model, world.device, dtype, model.num_tokens, args.kernels)
    paths += quicken(model, dtype, args.fp8)
    codec = load_codec(str(vae_path), world.device, dtype, name=vae)
    if codec.downsample * plan.input_size != plan.image_size or codec.channels != model.in_channels:
        raise ValueError(
            f"--vae {vae}: makes latents of {codec.channels} channels, 1/{codec.downsample} of the "
            f"pixels; {plan.model_name} at {plan.image_size} px needs {model.in_channels} channels "
            f"of {plan.input_size} x {plan.input_size}"
        )
    paths += group_norm.accelerate(codec.vae, world.device, dtype, args.kernels)
    (step_normal,) = compile_functions(world, args.compile, noise.normal)
    compile_models(world, args.compile, model)

    # Folder: made once, described, never mixed with images of other settings
    name = args.folder_name or default_name(args, plan.model_name, checkpoint)
    folder = Path(args.sample_dir) / name
    settings = {
        "plan": plan.architecture(),
        "config": args.config_filepath,
        "checkpoint": checkpoint or report.files,
        "tensors": tensors,
        "checkpoint_sha256": {n: file_sha256(f) for n, f in files.items() if world.main},
        "sampler": args.sampler,
        "steps": args.num_sampling_steps,
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "labels": args.labels,
        "labels_sha256": None if labels is None else file_sha256(args.labels),
        "seed": args.global_seed,
        "vae": codec.id,
        "vae_sha256": codec.sha256,
        "precision": str(dtype).removeprefix("torch.") + (" and fp8" if args.fp8 else ""),
        "num_samples": number,
    }
    if prompts is not None:
        settings |= {"labels": None, **prompts.settings(encoder)}
    describe = partial(describe_run, folder, settings, device=world.device)
    distributed.decide(world, lambda: describe(complete=False))

    def file_of(image: int) -> Path:
        return prompts.file_of(folder, image) if prompts else folder / f"{image:06d}.png"

    # The images that are not there yet, or not whole, shared out evenly
    def absent() -> list[int]:
        return [i for i in range(number) if not is_whole_png(file_of(i))]

    missing = distributed.decide(world, absent)[world.rank :: world.size]
    batches = torch.tensor(missing, dtype=torch.int64).split(args.per_proc_batch_size)
    batches = batches if missing else ()
    if world.main:
        origin = report.lines() if checkpoint is None else [f"all tensors of {checkpoint}"]
        extent = f"{plan.describe()}: {number} images to {folder}"
        print("\n".join([*origin, *paths, extent]))
    if prompts is not None:
        cut = prompts.too_long(encoder) if world.main else 0
        if cut:
            print(f"prompts cut at {encoder.max_tokens} tokens: {cut}")
        if world.main:
            prompts.write_metadata(folder)
        prompts.embed(encoder, missing)
        del encoder

    def guided(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One guided evaluation: x [B,C,H,W], t [B], labels y [B] -> [B,2C,H,W]."""
        with precision.autocast(world.device, dtype):
            if args.cfg_scale == 1.0:
                return model(x, t, y).float()
            both = model.forward_with_cfg(
                torch.cat([x, x]),
                torch.cat([t, t]),
                y.guided() if prompts else torch.cat([y, torch.full_like(y, plan.num_classes)]),
                args.cfg_scale,
                cfg_channels=args.cfg_channels,
            )
            return both[: len(x)].float()

    evaluate = graphed(world, args.compile, guided, reduces=False)
    shape = (model.in_channels, plan.input_size, plan.input_size)
    seed = args.global_seed
    with ThreadPoolExecutor(max_workers=args.num_workers) as writers:
        pending = []
        for index in tqdm(batches, disable=not watched(world), unit="batch"):
            count = len(index)
            index = index.to(world.device)
            if evaluate is not guided and len(batches) > 1:  # a graph has one size: fill up
                index = index[torch.arange(args.per_proc_batch_size) % count]
            if prompts is not None:
                y = prompts.conditions(index)
            elif labels is not None:
                y = labels[index]
            elif args.labels == "balanced":
                y = index % plan.num_classes
            else:
                y = noise.integers(seed, noise.LABEL, index, plan.num_classes)
            latents = sample(
                lambda x, t, y=y: evaluate(x=x, t=t, y=y),
                (len(index), *shape),
                sampler=args.sampler,
                steps=args.num_sampling_steps,
                start=noise.normal(seed, noise.START, index, shape),
                step_noise=lambda k, i=index: step_normal(seed, noise.STEP, i, shape, step=k),
            )
            images = codec.decode(latents[:count]).cpu().numpy()  # [B,H,W,3] uint8
            for i, image in zip(index[:count].tolist(), images, strict=True):
                pending.append(writers.submit(save_png, file_of(i), image))
            while len(pending) > 4 * args.per_proc_batch_size:
                pending.pop(0).result()
        for task in pending:
            task.result()
    distributed.barrier(world)

    # One process gathers
    if world.main:
        files = [file_of(i) for i in range(number)]
        made = [str(folder), f"{folder}-grid.png"]
        save_grid(Path(made[1]), files[: args.grid])
        if args.npz and prompts is None:
            made.append(f"{folder}.npz")
            save_npz(Path(made[2]), files, args.num_workers)
        describe(complete=True)
        print(f"done: {', '.join(made)}")
    distributed.barrier(world)
    distributed.stop()


def settle_sampler(args: argparse.Namespace, plan: GraftPlan) -> None:
    """Gives unset flags the defaults of the plan's model; ValueError for what it does not take."""
    for flag, value in (DEFAULTS_PIXART if plan.captioned else DEFAULTS_DIT).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if not 2 <= args.num_sampling_steps <= 1000:
        raise ValueError(f"--num-sampling-steps {args.num_sampling_steps}: use 2 to 1000")
    if plan.captioned and args.prompts is None:
        raise ValueError(f"{plan.model_name} is told what to draw by --prompts: name a file")
    if plan.captioned and args.cfg_channels != "all":
        raise ValueError(f"--cfg-channels {args.cfg_channels}: {plan.model_name} is guided on all")
    if plan.captioned and args.labels != "random":
        raise ValueError(f"--labels {args.labels}: {plan.model_name} is told prompts; drop it")
    if not plan.captioned and args.prompts is not None:
        raise ValueError(f"--prompts {args.prompts}: {plan.model_name} is told classes; drop it")


def cfg_channels(text: str) -> int | str:
    """--cfg-channels as the model takes it."""
    if text not in ("3", "all"):
        raise argparse.ArgumentTypeError(f"{text!r}: use 3 or all")
    return 3 if text == "3" else "all"


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--config-filepath", "--config", help="graft YAML; without one --model is sampled plain")
    add("--graft-fusion-ckpt-path", help="trained checkpoint; unset: the YAML's weight files")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path")
    add("--model", help="preset, such as DiT-XL/2; must agree with the YAML when both are given")
    add("--image-size", type=arguments.positive, help="pixels; as the YAML (256 without one)")
    add("--num-classes", type=arguments.positive, help="as the YAML (1000 without one)")
    add("--vae", help="ema, mse, sdxl or a folder (unset: the YAML's, or the model's)")
    add("--text-encoder", help="of prompts: t5 or a folder (unset: the YAML's, and t5 without one)")
    add(
        "--allow-untrained",
        action="store_true",
        help="sample although some weights are fresh, to see what training adds",
    )
    add = parser.add_argument_group("images").add_argument
    add("--sample-dir", default="samples", help="folders of images are made here")
    add("--folder-name", help="name of this run's folder (unset: made from the settings)")
    add("--num-fid-samples", type=arguments.positive, default=5000, help="images; papers: 50000")
    add(
        "--labels",
        default="random",
        metavar="random|balanced|FILE",
        help="classes drawn, i mod n, or from a file: one a line, or a .npy; more than images is "
        "fine",
    )
    add("--prompts", help="for PixArt: .txt of one prompt a line, or .jsonl of GenEval's kind")
    add("--images-per-prompt", type=arguments.positive, default=4, help="with --prompts")
    add("--global-seed", type=arguments.seed, default=0, help="labels and noise follow from it")
    add("--grid", type=arguments.positive, default=64, help="images in the grid picture")
    add(
        "--npz",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pack the images as .npz too, of 0.2 MB each at 256 px",
    )
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", choices=("ddpm", "ddim", "dpm++"), help="(unset: ddpm; PixArt: dpm++)")
    add("--num-sampling-steps", type=arguments.positive, help="2 to 1000 (unset: 250; PixArt: 20)")
    add("--cfg-scale", type=arguments.guidance, help="1 is no guidance (unset: 1.5; PixArt: 4.5)")
    add(
        "--cfg-channels",
        type=cfg_channels,
        help="guided: 3 or all (unset: 3; PixArt: all)",
    )
    add = arguments.add_machine(parser)
    add("--per-proc-batch-size", type=arguments.positive, default=32, help="images at a time")
    add("--fp8", action="store_true", help="8-bit products in the blocks; faster, less exact")
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TF32 in what fp32 products remain; CUDA only",
    )
    add = parser.add_argument_group("accepted so that old commands run").add_argument
    add("--lora", action="store_true", help="without effect: updates are merged")
    add("--lora-rank", type=int, help="without effect")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
