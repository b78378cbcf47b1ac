r"""Trains a DiT, grafted or plain, with the diffusion loss: final finetuning, Stage 2, pretraining.

Inputs:  a latent store (extract_features.py) and a graft YAML; its weight files, or --load-weight.
Outputs: <results-dir>/<prefix>-<model>/ with log.txt, metrics.jsonl, tensorboard/ and
         checkpoints/0040000.pt, whose weights sample_ddp_finetuned.py reads.

    torchrun --nnodes=1 --nproc_per_node=8 finetune_tinyfusion.py --epochs 20 \
        --data-path data/imagenet_encoded --config configs/50p_graftfusion75_swa.yaml \
        --global-batch-size 64 --prefix 50p_swa_graftfusion75_finetune --ckpt-every 40000

The defaults are the final finetuning of learned layer selection: AdamW at 1e-4, cosine to half of
it, gradient clip 1.0, EMA 0.9999. A YAML with `grafts: []` (or no YAML and --model) trains a plain
DiT. The same command runs without torchrun, on CPU or GPU.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import create_diffusion
from latents.loader import LatentLoader
from latents.store import open_latents
from models.grafting import build_grafted, with_base
from models.plan import plan_from_flags
from training import checkpoint, distributed, precision
from training.compilation import compile_step
from training.draws import draw
from training.ema import Ema
from training.optimizer import StepGuard, adamw, count, schedule
from training.runlog import RunLog, watched


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    plan = plan_from_flags(args.config_filepath, args.model, args.image_size, args.num_classes)
    plan = with_base(plan, args.load_weight)
    store = open_latents(args.data_path, num_classes=plan.num_classes)
    store.check_shape((4, plan.input_size, plan.input_size), f"{plan.model_name} of {plan.path}")
    folder = Path(args.results_dir) / f"{args.prefix}-{plan.model_name.replace('/', '-')}"
    resumed = checkpoint.find(args.resume, folder / "checkpoints")
    start_step = 0 if resumed is None else checkpoint.check(resumed, plan, len(store), args)
    loader = LatentLoader(
        store, args.global_batch_size, world, args.global_seed, start_step, args.num_workers
    )
    total_steps = args.epochs * loader.steps_per_epoch
    if args.max_steps is not None:
        total_steps = min(total_steps, args.max_steps)

    # Model: every tensor from a file, or from the checkpoint that is resumed
    model, report = build_grafted(plan, weights=resumed is None)
    model.to(world.device).train()

    # Run folder
    log = RunLog(folder, world, vars(args))
    log.info(f"{plan.describe()}; {count(model.parameters()):,} parameters")
    for line in report.lines() if resumed is None else [f"resumed at step {start_step}"]:
        log.info(line)
    log.info(
        f"{len(store):,} images in {args.data_path}; {total_steps:,} steps of "
        f"{args.global_batch_size} on {world.size} x {world.device.type}, {dtype}"
    )

    # Optimiser, averages, wrappers
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained, "lr": args.lr}], args.weight_decay)
    lr = schedule(
        optimizer,
        args.lr_schedule,
        total_steps=total_steps,
        warmup_steps=args.warmup_steps,
        end_factor=args.lr_end_factor,
    )
    guard = StepGuard(optimizer, args.clip_grad)
    ema = Ema(model, args.ema_decay)
    run = checkpoint.RunState(
        folder,
        world,
        plan,
        args,
        steps_per_epoch=loader.steps_per_epoch,
        images=len(store),
        model=model,
        ema=ema,
        opt=optimizer,
        sched=lr,
    )
    if resumed is not None:
        run.restore(resumed)
    latents, draws_of = compile_step(world, args.compile, model, store.latents, draw)
    net = distributed.wrap(world, model)
    diffusion = create_diffusion("")

    # Training
    running = torch.zeros(3, device=world.device)  # sums of loss, mse, vb since the last line
    logged_step, logged_at = start_step, time.perf_counter()
    bar = tqdm(total=total_steps, initial=start_step, disable=not watched(world), unit="step")
    for batch in loader:
        if batch.step >= total_steps:
            break
        x = latents(batch.moments, batch.index, args.global_seed, batch.epoch)  # [B,C,H,W]
        draws = draws_of(
            args.global_seed,
            batch.epoch,
            batch.index,
            x.shape[1:],
            diffusion.num_timesteps,
            args.class_dropout,
        )
        labels = {"y": batch.labels, "drop": draws.drop}
        with precision.autocast(world.device, dtype):
            terms = diffusion.training_losses(net, x, draws.t, labels, noise=draws.noise)
        loss = terms["loss"].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = guard.step()
        lr.step()
        ema.update()

        step = batch.step + 1
        running += torch.stack([terms[k].detach().mean() for k in ("loss", "mse", "vb")])
        bar.update()
        if step % args.log_every == 0 or step == total_steps:
            skipped = guard.check(step)
            mean = distributed.sum_across(world, running) / (world.size * (step - logged_step))
            rate = (step - logged_step) / (time.perf_counter() - logged_at)
            values = dict(zip(("loss", "mse", "vb"), mean.tolist(), strict=True))
            values |= {
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
            running.zero_()
            logged_step, logged_at = step, time.perf_counter()
        if step % args.ckpt_every == 0 and step < total_steps:
            log.info(f"saved {run.save(step)}")
    bar.close()
    if start_step < total_steps:
        log.info(f"saved {run.save(total_steps)}")
    log.info(f"done; weights to sample from: {folder}/checkpoints/{total_steps:07d}.pt")
    log.close()
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data-path", required=True, help="latent store, from extract_features.py")
    add("--config-filepath", "--config", help="graft YAML; without it --model is trained plain")
    add("--model", help="preset, such as DiT-XL/2; must agree with the YAML when both are given")
    add("--image-size", type=int, help="pixels; must agree with the YAML (256 without one)")
    add("--num-classes", type=int, help="must agree with the YAML (1000 without one)")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path; "
        "'none' trains from scratch")  # fmt: skip
    add("--results-dir", default="outputs", help="run folders are made here")
    add("--prefix", default="finetune", help="the run folder is <prefix>-<model>")
    add("--resume", help="checkpoint to continue, or 'auto' for the run's newest whole one")
    add("--epochs", type=int, default=1400, help="passes over the data")
    add("--max-steps", type=int, help="stop after this many steps if the epochs are longer")
    add("--global-batch-size", type=int, default=256, help="images a step, over all processes")
    add("--global-seed", type=int, default=0, help="0 to 2^32-1; all random numbers follow from it")
    add("--lr", type=float, default=1e-4, help="peak learning rate")
    add("--lr-schedule", default="cosine", help="constant, or cosine over all steps")
    add("--lr-end-factor", type=float, default=0.5, help="cosine ends at this share of --lr")
    add("--warmup-steps", type=int, default=0, help="linear warm-up")
    add("--weight-decay", type=float, default=0.0, help="AdamW's")
    add("--clip-grad", type=float, default=1.0, help="gradient-norm clip")
    add("--class-dropout", type=float, default=0.1, help="share of labels made the null class")
    add("--ema-decay", type=float, default=0.9999, help="of the averaged weights")
    add("--precision", help="bf16 or fp32 (unset: bf16 on CUDA, fp32 on CPU)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA")
    add("--device", help="cuda or cpu (unset: CUDA where there is any)")
    add("--num-workers", type=int, default=4, help="reader threads a process")
    add("--log-every", type=int, default=100, help="steps between log lines")
    add("--ckpt-every", type=int, default=10_000, help="steps between checkpoints")
    add("--vae", default="ema", help="no effect here, kept for old commands: latents are encoded")
    add("--strict", action="store_true", help="no effect, kept for old commands: always strict")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
