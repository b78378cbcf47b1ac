r"""Trains a grafted or plain model with the diffusion loss: final finetuning, Stage 2, pretraining.

Inputs:  a latent store (extract_features.py) and a graft YAML; its weight files, or --load-weight.
Outputs: <results-dir>/<prefix>-<model>/ with log.txt, metrics.jsonl, tensorboard/,
         checkpoints/0040000.pt, whose weights sample_ddp_finetuned.py reads, and of a graft
         finetuned.yaml, the plan that starts from the last of them (for selection, or sampling).

    torchrun --nnodes=1 --nproc_per_node=8 finetune_tinyfusion.py --epochs 20 \
        --data-path data/imagenet_encoded --config configs/50p_graftfusion75_swa.yaml \
        --global-batch-size 64 --prefix 50p_swa_graftfusion75_finetune --ckpt-every 40000

The defaults of optimisation are the final finetuning of learned layer selection: AdamW at 1e-4,
cosine to half of it, gradient clip 1.0, EMA 0.9999; its extent is the command's above, as --epochs
and --global-batch-size keep the defaults of DiT's own training. Stage 2 (arXiv 2506.05340): 50 000
steps with --num-images 128000 --max-steps 50000 --lr-schedule constant --warmup-steps 1000
--clip-grad 10. A YAML with `grafts: []` (or no YAML and --model) trains a plain DiT; with --distill
the pretrained DiT teaches a grafted one; with --lora all but the new operators learn low-rank
updates. The same command runs without torchrun, on CPU or GPU.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import create_diffusion
from latents.loader import LatentLoader, balanced_rows
from latents.store import open_latents
from models.grafting import build_grafted, with_base
from models.operators.accelerators import accelerate
from models.plan import plan_from_flags, write_plan
from models.recompute import recompute
from training import arguments, checkpoint, distributed, nonfinite, precision
from training.compilation import compile_functions, compile_models, graphed
from training.draws import draw
from training.ema import Ema
from training.knowledge import WithHidden, distilled_losses, pretrained
from training.lora import add_lora_around
from training.optimizer import StepGuard, adamw, count, schedule
from training.runlog import Means, RunLog, claim, watched
from training.validation import validation_loss
from training.working import with_copies

# A resumed run must have these flags as it was begun with
FIXED = ("lr", "lr_schedule", "lr_end_factor", "warmup_steps", "weight_decay", "clip_grad")
FIXED += ("class_dropout", "ema_decay", "milestones", "lr_gamma")
FIXED += ("distill", "kd_weight", "feature_weight", "lora", "lora_rank", "lora_alpha")


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    milestones = arguments.milestones(args)
    if args.lora and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank  # its readers find it in the checkpoint
    plan = plan_from_flags(args.config_filepath, args.model, args.image_size, args.num_classes)
    plan = with_base(plan, args.load_weight)
    store = open_latents(args.data_path, num_classes=plan.num_classes)
    store.check_plan(plan)
    told = store.with_encoder(plan)  # what checkpoints say
    rows = None
    if args.num_images is not None:
        rows = balanced_rows(store.labels, args.num_images, args.global_seed)
    images = args.num_images or len(store)
    extent = checkpoint.extent(
        args, plan, store, dtype, images, stored=len(store), num_images=args.num_images
    )
    folder, total_steps = extent.folder, extent.total_steps
    held_out = {
        Path(p).name: open_latents(p, num_classes=plan.num_classes) for p in args.val_data_path
    }
    if len(held_out) < len(args.val_data_path):
        raise ValueError(
            f"--val-data-path {' '.join(args.val_data_path)}: two folders have the same name, "
            "under which their losses would be logged; rename one"
        )
    for other in held_out.values():
        other.check_plan(plan)
    claim(world, folder)
    resumed = checkpoint.find(world, args.resume, folder)
    start_step = 0
    if resumed is not None:
        start_step = checkpoint.check(resumed, told, args, extent.order, FIXED)
    loader = LatentLoader.from_flags(args, store, world, start_step, rows)

    # Model: every tensor from a file, or from the checkpoint that is resumed; its teacher
    model, report = build_grafted(plan, weights=resumed is None)
    adapted = add_lora_around(model, plan, args.lora_rank, args.lora_alpha) if args.lora else []
    if args.grad_checkpoint:
        recompute(model)
    model.to(world.device).train()
    learner, teacher = model, None
    if args.distill:
        learner, teacher = WithHidden(model), WithHidden(pretrained(plan), model.layers)
        teacher.to(world.device).eval()

    # Run folder
    log = RunLog(folder, world, vars(args), start_step=start_step)
    log.info(f"{plan.describe()}; {count(model.parameters()):,} parameters")
    for line in report.lines() if resumed is None else [f"resumed at step {start_step}"]:
        log.info(line)
    trained = [p for p in model.parameters() if p.requires_grad]
    if adapted:
        log.info(f"training {count(trained):,} of them ({len(adapted)} LoRA layers)")
    log.info(
        f"{extent.order['images']:,} images of {args.data_path}; {total_steps:,} steps of "
        f"{args.global_batch_size} on {world.size} x {world.device.type}, {dtype}"
    )
    for each in (store, *held_out.values()):
        for line in each.notes:
            log.info(line)
    for each in filter(None, (model, teacher)):
        for line in accelerate(each, world.device, dtype, model.num_tokens, args.kernels):
            log.info(line)

    # Optimiser, averages, wrappers
    optimizer = adamw([{"params": trained, "lr": args.lr}], args.weight_decay)
    lr = schedule(
        optimizer,
        args.lr_schedule,
        total_steps=total_steps,
        warmup_steps=args.warmup_steps,
        end_factor=args.lr_end_factor,
        milestones=[epoch * extent.steps_per_epoch for epoch in milestones],
        gamma=args.lr_gamma,
    )
    ema = Ema(model, args.ema_decay)
    guard = StepGuard(optimizer, args.clip_grad, ema, args.kernels)
    log.info(guard.line)
    names = ("loss", "mse", "vb") if teacher is None else ("loss", "mse", "vb", "kd", "features")
    means = Means(world, names)
    parts = {"model": model, "ema": ema, "opt": optimizer, "sched": lr, "guard": guard}
    run = checkpoint.RunState(extent, world, told, args, means, log, **parts)
    if resumed is not None:
        run.restore(resumed)
        del resumed
    latents, draws_of = compile_functions(world, args.compile, store.latents, draw)
    compile_models(world, args.compile, learner, *([] if teacher is None else [teacher]))
    distributed.start_alike(world, learner)
    working, lines = with_copies(world, learner, dtype, guard, args)
    for line in lines:
        log.info(line)
    net = distributed.wrap(world, working)
    diffusion = create_diffusion("")

    def inputs_of(batch):
        """What a step computes with: latents, their draws, and what depends on the step."""
        seed, index = args.global_seed, batch.index
        x = latents(batch.moments, index, seed, batch.epoch)  # [B,C,H,W]
        steps = diffusion.num_timesteps
        draws = draws_of(seed, batch.epoch, index, x.shape[1:], steps, args.class_dropout)
        beta = args.feature_weight * (1 - batch.step / total_steps)
        beta = torch.full((), beta, device=world.device)
        return {"x": x, "y": batch.labels, **draws._asdict(), "beta": beta}

    def losses(net, x, t, noise, y, drop, beta):
        """The loss terms, each a mean over the samples, in the order of `names`."""
        labels = {"y": y, "drop": drop}
        with precision.autocast(world.device, dtype):
            if teacher is None:
                terms = diffusion.training_losses(net, x, t, labels, noise=noise)
            else:
                terms = distilled_losses(
                    diffusion, net, teacher, x, t, noise, labels, args.kd_weight, beta
                )
        return torch.stack([terms[name].mean() for name in names])

    def step_on_device(**inputs):
        """A training step -> the loss terms, and the gradient norm before clipping."""
        guard.zero_grad()
        total = torch.zeros(len(names), device=world.device)
        for part in distributed.micro_batches(net, inputs, args.grad_accum):
            terms = losses(net, **part) / args.grad_accum
            terms[0].backward()
            total += terms.detach()
        norm = guard.step()
        return total, norm

    take_step = graphed(world, args.compile, step_on_device)

    # Training
    logged_step, logged_at = start_step, time.perf_counter()
    bar = tqdm(total=total_steps, initial=start_step, disable=not watched(world), unit="step")
    for batch in loader:
        if batch.step >= total_steps:
            break
        guard.set_rates()
        inputs = inputs_of(batch)
        terms, norm = take_step(**inputs)
        lr.step()
        means.add(terms)

        step = batch.step + 1
        bar.update()
        if step % args.log_every == 0 or step == total_steps:
            again = partial(losses, learner, **inputs)
            where = partial(nonfinite.where, world, means, {"": model}, again)
            skipped = guard.check(step, where)
            rate = (step - logged_step) / (time.perf_counter() - logged_at)
            values = means.take() | {
                "grad_norm": norm.item(),
                "lr": lr.get_last_lr()[0],
                "steps_per_sec": rate,
                "images_per_sec": rate * args.global_batch_size,
                "skipped_steps": skipped,
            }
            log.metrics(step, **values)
            log.info(
                f"step {step:07d}  loss {values['loss']:.4f}  mse {values['mse']:.4f}  "
                f"lr {values['lr']:.2e}  {rate:.2f} steps/s"
            )
            logged_step, logged_at = step, time.perf_counter()
        due = step == total_steps or (args.val_every and step % args.val_every == 0)
        began = time.perf_counter()
        for name, other in held_out.items() if due else ():
            with ema.applied():
                found = validation_loss(model, other, diffusion, world, dtype)
            log.metrics(step, **{f"val_{key}/{name}": value for key, value in found.items()})
            log.info(f"step {step:07d}  loss of the EMA on {name} {found['loss']:.4f}")
        logged_at += time.perf_counter() - began
        run.step_done(step, logged=logged_step == step)
    bar.close()
    last = folder / "checkpoints" / f"{total_steps:07d}.pt"
    if world.main and not plan.is_plain:
        finished = replace(
            plan, grafted_ckpt_path=last.resolve(), graft_weights={}, graft_init=None
        )
        header = f"Starts from the finetuned {last.name}."
        write_plan(finished, folder / "finetuned.yaml", {}, header)
    log.info(f"done; weights to sample from: {last}")
    log.close()
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--data-path", required=True, help="latent store, from extract_features.py")
    add(
        "--num-images",
        type=arguments.positive,
        help="train on so many images, balanced over the classes; a function of --global-seed",
    )
    add(
        "--val-data-path",
        nargs="*",
        default=[],
        help="latent stores on which the EMA's loss is logged, each under its folder's name",
    )
    add("--config-filepath", "--config", help="graft YAML; without one --model is trained plain")
    add("--model", help="preset, such as DiT-XL/2; must agree with the YAML when both are given")
    add("--image-size", type=arguments.positive, help="pixels; as the YAML (256 without one)")
    add("--num-classes", type=arguments.positive, help="as the YAML (1000 without one)")
    add(
        "--load-weight",
        help="base DiT checkpoint, instead of the YAML's base_ckpt_path; none: from scratch",
    )
    add = arguments.add_run(parser, prefix="finetune", whose="; DiT's own, for grafts see above")
    arguments.add_grad_checkpoint(add)
    add("--val-every", type=arguments.positive, help="steps between validations (unset: the end)")
    add = parser.add_argument_group("knowledge distillation").add_argument
    add("--distill", action="store_true", help="learn from the pretrained DiT too (TinyFusion)")
    add(
        "--kd-weight",
        type=arguments.share,
        default=0.9,
        help="of the teacher's outputs; the diffusion loss has the rest",
    )
    add(
        "--feature-weight",
        type=arguments.weight,
        default=1e-2,
        help="of the masked features of all blocks at the start, falling linearly to 0",
    )
    add = arguments.add_optimisation(parser, ema_decay=0.9999)
    add("--lora", action="store_true", help="low-rank updates of all but the new operators")
    arguments.add_lora(add, rank=64)
    arguments.add_schedule(add, kind="cosine")
    arguments.add_exchange(arguments.add_machine(parser))
    add = parser.add_argument_group("accepted so that old commands run").add_argument
    add("--vae", help="without effect: the images are encoded already")
    add("--strict", action="store_true", help="without effect: loading is always strict")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
