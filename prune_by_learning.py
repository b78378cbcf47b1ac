r"""Learns which blocks of a grafted DiT keep their original operator.

After TinyFusion (arXiv 2412.01199): both operators of every grafted block stay in the model. In
each group of M blocks a Gumbel-softmax chooses, per sample, one of the ways to keep N originals;
its logits are trained with the diffusion loss, together with LoRA on the frozen linear layers and
with the grafted operators themselves. A block is kept or grafted whole: where the YAML grafts both
of its slots, both follow. With --candidates the grafts of several YAMLs compete for each block.

With --choose pairs, or a YAML of parallel pairs alone, the gates choose in the same way which of
these pairs stay in sequence and which become parallel; its grafts are not in question then.

Inputs:  a latent store (extract_features.py) and a graft YAML, commonly a 75 % graft.
Outputs: <results-dir>/<prefix>-<model>/ with selection.json (the decision and its probabilities),
         selected.yaml (the finished plan that finetuning and sampling read), trajectory.png and
         .jsonl, log.txt, metrics.jsonl, tensorboard/ and checkpoints/.

    torchrun --nnodes=1 --nproc_per_node=8 prune_by_learning.py --epochs 6 --global-batch-size 64 \
        --load-weight pretrained/DiT-XL-2-256x256.pt --data-path data/imagenet_encoded \
        --delta-w --lora --config configs/75p_swa.yaml --prefix swa_75_50_layerselection
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import create_diffusion, noise
from latents.loader import LatentLoader
from latents.store import open_latents
from models.grafting import build_open, gated_in, load_plan, new_parts, with_base
from models.operators.accelerators import accelerate
from models.plan import plan_from_flags
from models.provenance import environment
from models.recompute import recompute
from models.selection import GatedDiT, LayerGates, settle, summary
from training import arguments, checkpoint, distributed, nonfinite, precision
from training.compilation import compile_functions, compile_models, graphed
from training.draws import draw
from training.ema import Ema
from training.lora import add_lora
from training.optimizer import StepGuard, adamw, count, ramp, schedule
from training.runlog import Means, RunLog, claim, cut_records, watched
from training.selection_report import (
    TRAJECTORY,
    decision,
    save_merged,
    write_answer,
    write_trajectory_line,
)
from training.working import with_copies

# A resumed run must have these flags as it was begun with
FIXED = ("candidates", "choose", "groups", "pin", "delta_w", "lora", "lora_rank", "lora_alpha")
FIXED += ("tau_range", "scaling_range", "lr", "gate_lr", "clip_grad", "class_dropout", "ema_decay")


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    if args.save_model is not None and Path(args.save_model).suffix not in (".pt", ".pth"):
        raise ValueError(f"--save-model {args.save_model}: name a file that ends in .pt or .pth")
    if args.lora and not args.delta_w:
        raise ValueError("--lora needs --delta-w: together they train low-rank updates")
    plan = plan_from_flags(args.config_filepath, None, args.image_size, args.num_classes)
    plan = with_base(plan, args.load_weight)
    plans = [plan, *(with_base(load_plan(file), args.load_weight) for file in args.candidates)]
    if args.choose is None:
        args.choose = "pairs" if plan.parallel_pairs and not plan.grafts else "grafts"
    args.groups = args.groups or arguments.GROUPS[args.choose]
    gates = LayerGates(plan.depth, args.groups, args.pin, **gated_in(plans, args.choose))
    if all(len(options) == 1 for options in gates.options):
        raise ValueError(
            f"--groups {args.groups} and --pin {' '.join(map(str, args.pin)) or 'none'} leave "
            f"nothing to choose: with {list(gates.pinned)} pinned or without a graft, each group "
            "has one option; let --groups keep some of the others, not all or none, or --pin fewer"
        )
    store = open_latents(args.data_path, num_classes=plan.num_classes)
    store.check_plan(plan)
    told = store.with_encoder(plan)  # what checkpoints say
    architectures = json.dumps([each.architecture() for each in plans], sort_keys=True)
    extent = checkpoint.extent(args, plan, store, dtype, len(store), plans=architectures)
    folder, total_steps = extent.folder, extent.total_steps
    claim(world, folder)
    resumed = checkpoint.find(world, args.resume, folder)
    start_step = 0
    if resumed is not None:
        start_step = checkpoint.check(resumed, told, args, extent.order, FIXED)
    loader = LatentLoader.from_flags(args, store, world, start_step)

    # Model: original and grafts in every open block; what is trained beside the gates
    model, reports = build_open(plans, args.choose, args.global_seed)
    settle(model, gates.settled())  # these blocks run one branch
    adapted, new = [], new_parts(plan, args.choose)
    if args.lora:
        alpha = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
        adapted = add_lora(model, args.lora_rank, alpha, exclude=new)
    for name, parameter in model.named_parameters():
        moves = not args.lora or "lora_" in name or any(text in f".{name}" for text in new)
        parameter.requires_grad_(name != "pos_embed" and args.delta_w and moves)
    if args.grad_checkpoint:
        recompute(model)
    gated = GatedDiT(model, gates)
    gated.to(world.device).train()

    # Run folder
    log = RunLog(folder, world, vars(args), start_step=start_step)
    trajectory = folder / TRAJECTORY
    if world.main:
        cut_records(trajectory, start_step)
    for each, report in zip(plans, reports, strict=True):
        log.info(each.describe())
        for line in report.lines() if resumed is None else []:
            log.info(line)
    if resumed is not None:
        log.info(f"resumed at step {start_step}")
    number, words = gates.variants, "kind{} of graft"
    if gates.pairs:
        number, words = len(gates.pairs), "pair{}"
    what = f"{number} {words.format('s' * (number > 1))}"
    log.info(f"groups {args.groups}, pinned {list(gates.pinned)}, {what}")
    weights = [p for p in model.parameters() if p.requires_grad]
    log.info(
        f"training {count(gates.parameters())} gate logits and {count(weights):,} of "
        f"{count(model.parameters()):,} weights ({len(adapted)} LoRA layers) on {len(store):,} "
        f"images: {total_steps:,} steps of {args.global_batch_size} on {world.size} x "
        f"{world.device.type}, {dtype}"
    )
    for line in store.notes:
        log.info(line)
    for line in accelerate(model, world.device, dtype, model.num_tokens, args.kernels):
        log.info(line)

    # Optimiser, averages, wrappers
    groups = [{"params": list(gates.parameters()), "lr": args.gate_lr}]
    if weights:
        groups.append({"params": weights, "lr": args.lr})
    optimizer = adamw(groups, weight_decay=0.0)
    lr = schedule(optimizer, "constant", total_steps=total_steps)
    ema = Ema(gated, args.ema_decay)
    guard = StepGuard(optimizer, args.clip_grad, ema, args.kernels)
    log.info(guard.line)
    means = Means(world, ["loss"])
    parts = {"model": gated, "ema": ema, "opt": optimizer, "sched": lr, "guard": guard}
    run = checkpoint.RunState(extent, world, told, args, means, log, **parts)
    if resumed is not None:
        run.restore(resumed)
        del resumed
    latents, draws_of, uniform = compile_functions(
        world, args.compile, store.latents, draw, noise.uniform
    )
    compile_models(world, args.compile, gated)
    distributed.start_alike(world, gated)
    working, lines = with_copies(world, gated, dtype, guard, args)
    for line in lines:
        log.info(line)
    net = distributed.wrap(world, working)
    diffusion = create_diffusion("")
    options = sum(o.shape[0] for o in gates.options)

    def inputs_of(batch, tau, scaling):
        """What a step computes with: latents, their draws, those of the gates, temperatures."""
        seed, epoch, index = args.global_seed, batch.epoch, batch.index
        x = latents(batch.moments, index, seed, epoch)  # [B,C,H,W]
        steps = diffusion.num_timesteps
        draws = draws_of(seed, epoch, index, x.shape[1:], steps, args.class_dropout)
        return {
            "x": x,
            "y": batch.labels,
            **draws._asdict(),
            "uniform": uniform(seed, noise.GATE, index, (options,), step=epoch),
            "tau": torch.full((), tau, device=world.device),
            "scaling": torch.full((), scaling, device=world.device),
        }

    def loss_of(net, x, t, noise, **inputs):
        """The loss, a mean over the samples."""
        with precision.autocast(world.device, dtype):
            return diffusion.training_losses(net, x, t, inputs, noise=noise)["loss"].mean()

    def step_on_device(**inputs):
        """A training step -> the loss [1]."""
        guard.zero_grad()
        total = torch.zeros(1, device=world.device)
        for part in distributed.micro_batches(net, inputs, args.grad_accum):
            loss = loss_of(net, **part) / args.grad_accum
            loss.backward()
            total += loss.detach()
        guard.step()
        return total

    take_step = graphed(world, args.compile, step_on_device)

    # Training
    logged_step, logged_at = start_step, time.perf_counter()
    scaling = args.scaling_range[-1]
    bar = tqdm(total=total_steps, initial=start_step, disable=not watched(world), unit="step")
    for batch in loader:
        if batch.step >= total_steps:
            break
        done = batch.step / max(total_steps - 1, 1)
        tau, scaling = ramp(args.tau_range, done), ramp(args.scaling_range, done)
        guard.set_rates()
        inputs = inputs_of(batch, tau, scaling)
        loss = take_step(**inputs)
        lr.step()
        means.add(loss)

        step = batch.step + 1
        bar.update()
        if step % args.log_every == 0 or step == total_steps:
            again = partial(loss_of, gated, **inputs)
            where = partial(nonfinite.where, world, means, {"": model}, again)
            skipped = guard.check(step, where)
            mean = means.take()["loss"]
            rate = (step - logged_step) / (time.perf_counter() - logged_at)
            average = ema.averaged("gates")
            confidence = [p.max().item() for p in average.probabilities(scaling)]
            log.metrics(
                step,
                loss=mean,
                tau=tau,
                scaling=scaling,
                confidence=sum(confidence) / len(confidence),
                steps_per_sec=rate,
                images_per_sec=rate * args.global_batch_size,
                skipped_steps=skipped,
            )
            log.info(
                f"step {step:07d}  loss {mean:.4f}  tau {tau:.2f}  {rate:.2f} steps/s  "
                f"confidence {min(confidence):.2f} to {max(confidence):.2f}  "
                f"keeps {average.decide()}"
            )
            if world.main:
                write_trajectory_line(trajectory, step, average, scaling)
            logged_step, logged_at = step, time.perf_counter()
        run.step_done(step, logged=logged_step == step)
    bar.close()

    # The answer
    if world.main:
        average = ema.averaged("gates")
        answer = decision(average, plans, scaling, trajectory, total_steps)
        provenance = {
            "steps": total_steps,
            "settings": vars(args),
            "latents": store.manifest,
            "world_size": world.size,
            "device": world.device.type,
            "precision": str(dtype).removeprefix("torch."),
            **environment(world.device),
        }
        write_answer(folder, answer, average, plans, reports, provenance)
        if args.save_model is not None:
            gated.load_state_dict(ema.state_dict(), strict=True)
            written = save_merged(Path(args.save_model), model, average, plans)
            log.info(f"saved the merged model as {args.save_model}, to finetune by {written}")
        for line in summary(answer):
            log.info(line)
        log.info(f"next: --config {folder}/selected.yaml")
    log.close()
    distributed.barrier(world)
    distributed.stop()


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = arguments.add_graft(parser)
    add(
        "--candidates",
        nargs="*",
        default=[],
        metavar="YAML",
        help="further graft YAMLs of the same model whose operators compete with --config's",
    )
    add = arguments.add_selection(parser)
    add("--delta-w", action="store_true", help="train weights too, not the gates alone")
    add("--lora", action="store_true", help="with --delta-w: LoRA on all but the grafts")
    arguments.add_lora(add, rank=8)
    add(
        "--save-model",
        help="also write the selected model, LoRA merged, and beside it a YAML that starts from it",
    )
    add = arguments.add_run(parser, "learn_mask", whose="; DiT's own, for selection see above")
    arguments.add_grad_checkpoint(add)
    add = arguments.add_optimisation(parser, ema_decay=0.999)
    add("--gate-lr", type=arguments.rate, default=1e-3, help="learning rate of the gate logits")
    arguments.add_exchange(arguments.add_machine(parser))
    add = parser.add_argument_group("accepted so that old commands run").add_argument
    add("--vae", help="without effect: the images are encoded already")
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
