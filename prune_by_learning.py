r"""Learns which blocks of a grafted DiT keep their original operator.

After TinyFusion (arXiv 2412.01199): both operators of every grafted block stay in the model. In
each group of M blocks a Gumbel-softmax chooses, per sample, one of the ways to keep N originals;
its logits are trained with the diffusion loss, together with LoRA on the frozen linear layers and
with the grafted operators themselves.

Inputs:  a latent store (extract_features.py) and a graft YAML, commonly a 75 % graft.
Outputs: <results-dir>/<prefix>-<model>/ with selection.json (the decision and its probabilities),
         selected.yaml (the finished plan that finetuning and sampling read), trajectory.png and
         .jsonl, log.txt, metrics.jsonl, tensorboard/ and checkpoints/.

    torchrun --nnodes=1 --nproc_per_node=8 prune_by_learning.py --epochs 6 --global-batch-size 64 \
        --load-weight pretrained/DiT-XL-2-256x256.pt --data-path data/imagenet_encoded \
        --delta-w --lora --config configs/75p_swa.yaml --prefix swa_75_50_layerselection
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import create_diffusion, noise
from evaluation.writers import environment
from latents.loader import LatentLoader
from latents.store import open_latents
from models.files import file_sha256, write_json, write_whole
from models.grafting import build_grafted, with_base
from models.plan import load_plan, write_plan
from models.selection import GatedDiT, LayerGates, settle
from training import checkpoint, distributed, precision
from training.compilation import compile_step
from training.draws import draw
from training.ema import Ema
from training.lora import add_lora, merge_lora
from training.optimizer import StepGuard, adamw, count, schedule
from training.runlog import RunLog, watched
from training.selection_report import decision, plot_trajectory, write_trajectory_line


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    if args.lora and not args.delta_w:
        raise ValueError("--lora needs --delta-w: together they train low-rank updates")
    plan = with_base(load_plan(args.config_filepath), args.load_weight)
    slots = {g.slot for g in plan.grafts}
    if len(slots) != 1:
        raise ValueError(f"{plan.path}: needs grafts in one slot, has them in {len(slots)}")
    pinned = [b for b in range(plan.depth) if b not in plan.grafted_blocks()]
    gates = LayerGates(plan.depth, args.groups, sorted({*pinned, *args.pin}))
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

    # Model: pairs of original and graft in every grafted block; what is trained beside the gates
    model, report = build_grafted(plan, pairs=True)
    adapted: list[str] = []
    if args.lora:
        adapted = add_lora(model, args.lora_rank, 2 * args.lora_rank, exclude=".graft.")
    for name, parameter in model.named_parameters():
        is_graft = ".graft." in name
        parameter.requires_grad_(
            name != "pos_embed" and args.delta_w and (not args.lora or is_graft or "lora_" in name)
        )
    gated = GatedDiT(model, gates)
    gated.to(world.device).train()

    # Run folder
    log = RunLog(folder, world, vars(args))
    log.info(f"{plan.describe()}; groups {args.groups}, pinned {pinned + args.pin}")
    for line in report.lines() if resumed is None else [f"resumed at step {start_step}"]:
        log.info(line)
    weights = [p for p in model.parameters() if p.requires_grad]
    log.info(
        f"training {count(gates.parameters())} gate logits and {count(weights):,} of "
        f"{count(model.parameters()):,} weights ({len(adapted)} LoRA layers) on {len(store):,} "
        f"images: {total_steps:,} steps of {args.global_batch_size} on {world.size} x "
        f"{world.device.type}, {dtype}"
    )

    # Optimiser, averages, wrappers
    groups = [{"params": list(gates.parameters()), "lr": args.gate_lr}]
    if weights:
        groups.append({"params": weights, "lr": args.lr})
    optimizer = adamw(groups, weight_decay=0.0)
    lr = schedule(optimizer, "constant", total_steps=total_steps)
    guard = StepGuard(optimizer, args.clip_grad)
    ema = Ema(gated, args.ema_decay)
    run = checkpoint.RunState(
        folder,
        world,
        plan,
        args,
        steps_per_epoch=loader.steps_per_epoch,
        images=len(store),
        model=gated,
        ema=ema,
        opt=optimizer,
        sched=lr,
    )
    if resumed is not None:
        run.restore(resumed)
    latents, draws_of, uniform = compile_step(
        world, args.compile, model, store.latents, draw, noise.uniform
    )
    net = distributed.wrap(world, gated)
    diffusion = create_diffusion("")
    options = sum(o.shape[0] for o in gates.options)

    def averaged_gates() -> LayerGates:
        average = copy.deepcopy(gates)
        state = {n.removeprefix("gates."): t for n, t in ema.state_dict().items()}
        average.load_state_dict({n: state[n] for n in average.state_dict()})
        return average

    # Training
    running = torch.zeros((), device=world.device)
    logged_step, logged_at = start_step, time.perf_counter()
    scaling = args.scaling_range[-1]
    bar = tqdm(total=total_steps, initial=start_step, disable=not watched(world), unit="step")
    for batch in loader:
        if batch.step >= total_steps:
            break
        done = batch.step / max(total_steps - 1, 1)
        tau = args.tau_range[0] + (args.tau_range[1] - args.tau_range[0]) * done
        scaling = args.scaling_range[0] + (args.scaling_range[1] - args.scaling_range[0]) * done
        seed, epoch, index = args.global_seed, batch.epoch, batch.index
        x = latents(batch.moments, index, seed, epoch)  # [B,C,H,W]
        draws = draws_of(
            seed, epoch, index, x.shape[1:], diffusion.num_timesteps, args.class_dropout
        )
        inputs = {
            "y": batch.labels,
            "drop": draws.drop,
            "uniform": uniform(seed, noise.GATE, index, (options,), step=epoch),
            "tau": tau,
            "scaling": scaling,
        }
        with precision.autocast(world.device, dtype):
            terms = diffusion.training_losses(net, x, draws.t, inputs, noise=draws.noise)
        loss = terms["loss"].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        guard.step()
        lr.step()
        ema.update()

        step = batch.step + 1
        running += loss.detach()
        bar.update()
        if step % args.log_every == 0 or step == total_steps:
            skipped = guard.check(step)
            mean = distributed.sum_across(world, running) / (world.size * (step - logged_step))
            rate = (step - logged_step) / (time.perf_counter() - logged_at)
            average = averaged_gates()
            confidence = [p.max().item() for p in average.probabilities(scaling)]
            log.metrics(
                step,
                loss=mean.item(),
                tau=tau,
                scaling=scaling,
                confidence=sum(confidence) / len(confidence),
                steps_per_sec=rate,
                images_per_sec=rate * args.global_batch_size,
                skipped_steps=skipped,
            )
            log.info(
                f"step {step:07d}  loss {mean.item():.4f}  tau {tau:.2f}  {rate:.2f} steps/s  "
                f"confidence {min(confidence):.2f} to {max(confidence):.2f}  "
                f"keeps {average.decide()}"
            )
            if world.main:
                write_trajectory_line(folder / "trajectory.jsonl", step, average, scaling)
            running.zero_()
            logged_step, logged_at = step, time.perf_counter()
        if step % args.ckpt_every == 0 and step < total_steps:
            log.info(f"saved {run.save(step)}")
    bar.close()
    if start_step < total_steps:
        log.info(f"saved {run.save(total_steps)}")

    # The answer
    if world.main:
        average = averaged_gates()
        answer = decision(average, plan, scaling)
        slot = slots.pop()
        header = (
            f"Learned by prune_by_learning.py from {plan.path.name} in {total_steps} steps;\n"
            f"selection.json beside this file holds the probabilities."
        )
        write_plan(plan, folder / "selected.yaml", {slot: answer["grafted"]}, header)
        plot_trajectory(folder / "trajectory.jsonl", average, folder / "trajectory.png")
        write_json(
            folder / "selection.json",
            {
                **answer,
                "slot": slot,
                "groups_spec": args.groups,
                "pinned": sorted({*pinned, *args.pin}),
                "steps": total_steps,
                "config": str(plan.path),
                "config_sha256": file_sha256(plan.path),
                "weights": report.files,
                "settings": vars(args),
                "trajectory": "trajectory.jsonl",
                "plan": "selected.yaml",
                **environment(),
            },
        )
        if args.save_model is not None:
            gated.load_state_dict(ema.state_dict(), strict=True)
            merge_lora(model)
            settle(model, answer["kept"])
            merged = {
                "model": model.state_dict(),
                "plan": load_plan(folder / "selected.yaml").architecture(),
            }
            write_whole(args.save_model, lambda partial: torch.save(merged, partial))
            log.info(f"saved the merged model as {args.save_model}")
        log.info(f"keeps {answer['kept']}")
        log.info(f"grafts {answer['grafted']}; next: --config {folder}/selected.yaml")
    log.close()
    distributed.barrier(world)
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data-path", required=True, help="latent store, from extract_features.py")
    add("--config-filepath", "--config", required=True, help="graft YAML to choose from")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path")
    add("--results-dir", default="outputs", help="run folders are made here")
    add("--prefix", default="learn_mask", help="the run folder is <prefix>-<model>")
    add("--resume", help="checkpoint to continue, or 'auto' for the run's newest whole one")
    add(
        "--groups", default="2:4", help="N:M keeps N originals in each M blocks; or a,b,... of such"
    )
    add("--pin", type=int, nargs="*", default=[], help="further blocks that keep their original")
    add("--delta-w", action="store_true", help="train weights beside the gates")
    add("--lora", action="store_true", help="with --delta-w: LoRA on all but the grafts")
    add("--lora-rank", type=int, default=8, help="rank; alpha is twice the rank")
    add("--tau-range", type=float, nargs=2, default=[4.0, 0.1], help="Gumbel temperature, linear")
    add("--scaling-range", type=float, nargs=2, default=[100.0, 100.0], help="factor on the logits")
    add("--save-model", help="also write the selected model with LoRA merged, as a starting point")
    add("--epochs", type=int, default=1400, help="passes over the data; 6 in the recipe")
    add("--max-steps", type=int, help="stop after this many steps if the epochs are longer")
    add("--global-batch-size", type=int, default=256, help="images a step, over all processes")
    add("--global-seed", type=int, default=0, help="0 to 2^32-1; all random numbers follow from it")
    add("--lr", type=float, default=1e-4, help="of the weights")
    add("--gate-lr", type=float, default=1e-3, help="of the gate logits")
    add("--clip-grad", type=float, default=1.0, help="gradient-norm clip")
    add("--class-dropout", type=float, default=0.1, help="share of labels made the null class")
    add("--ema-decay", type=float, default=0.999, help="the averaged gates decide")
    add("--precision", help="bf16 or fp32 (unset: bf16 on CUDA, fp32 on CPU)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="on CUDA")
    add("--device", help="cuda or cpu (unset: CUDA where there is any)")
    add("--num-workers", type=int, default=4, help="reader threads a process")
    add("--log-every", type=int, default=100, help="steps between log lines")
    add("--ckpt-every", type=int, default=10_000, help="steps between checkpoints")
    for name in ("--image-size", "--num-classes", "--vae"):
        add(name, help="no effect, kept for old commands: the YAML says it")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
