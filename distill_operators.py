r"""Stage 1: initialises the new operators of a graft by distilling the ones that they replace.

The pretrained model runs forward once a batch; every grafted slot's input and output go to its new
operator, and all operators take their step together, each with its own optimiser (arXiv
2506.05340, which caches the activations and trains block by block). No activation is stored. A
parallel pair learns in the same pass, as a whole, what its two blocks did in sequence.

Inputs:  a latent store (extract_features.py), a graft YAML, the pretrained DiT.
Outputs: <results-dir>/<prefix>-<model>/ with operators/block01.mha.<operator>.pt, of a parallel
         pair block00.pair.parallel.pt (the weights of the lowest validation loss), distilled.yaml
         (the plan with `graft_weights` filled in, which finetuning, selection and sampling read),
         distillation.json, log.txt, metrics.jsonl, tensorboard/ and checkpoints/.

    torchrun --nnodes=1 --nproc_per_node=8 distill_operators.py --config configs/75p_hyena_y.yaml \
        --data-path data/imagenet_encoded --num-samples 8000 --epochs 200 --global-batch-size 64
"""

import argparse
import math
import time
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from diffusion import create_diffusion
from latents.loader import LatentLoader, balanced_rows
from latents.store import open_latents
from models.files import file_sha256
from models.graft_plan import PAIR
from models.grafting import with_base
from models.operators.accelerators import accelerate
from models.plan import find_file, plan_from_flags, write_plan
from models.provenance import environment
from training import arguments, checkpoint, distributed, nonfinite, precision
from training.compilation import compile_functions, compile_models, graphed
from training.distillation import (
    LOSSES,
    Best,
    Steps,
    Students,
    Teacher,
    build_students,
    failures,
    name_of,
    validation,
    write_operators,
)
from training.draws import HELD_OUT_EPOCH, draw
from training.optimizer import StepGuard, adamw, count, schedule
from training.runlog import Means, RunLog, claim, watched
from training.validation import read_rows

MILESTONES = (50, 100, 150)  # epochs
# A resumed run must have these flags as it was begun with
FIXED = ("num_samples", "val_samples", "loss_mha", "loss_mlp", "huber_delta", "gate_weighting")
FIXED += ("lr", "lr_schedule", "lr_end_factor", "milestones", "lr_gamma", "warmup_steps")
FIXED += ("weight_decay", "clip_grad", "class_dropout", "loss_pair")


def main(args: argparse.Namespace) -> None:
    # Processes, and all that can be wrong before any work starts
    world = distributed.start(args.device)
    dtype = precision.choose(args.precision, world.device)
    precision.allow_tf32(dtype != torch.float32)
    torch.manual_seed(args.global_seed)
    milestones = arguments.milestones(args, default=MILESTONES)
    plan = plan_from_flags(args.config_filepath, None, args.image_size, args.num_classes)
    plan = with_base(plan, args.load_weight)
    store = open_latents(args.data_path, num_classes=plan.num_classes)
    store.check_plan(plan)
    told = store.with_encoder(plan)  # what checkpoints say
    wanted = args.num_samples + args.val_samples
    if len(store) < wanted:
        raise ValueError(
            f"{args.data_path} holds {len(store)} images, fewer than --num-samples "
            f"{args.num_samples} + --val-samples {args.val_samples}; lower them or extract more"
        )
    rows = balanced_rows(store.labels, wanted, args.global_seed)
    train_rows, val_rows = rows.split([args.num_samples, args.val_samples])
    base = plan.base_ckpt_path and find_file(plan.base_ckpt_path, plan.path, "base_ckpt_path")
    teacher_sha256 = distributed.decide(world, lambda: base and file_sha256(base))
    extent = checkpoint.extent(
        args, plan, store, dtype, args.num_samples, stored=len(store), teacher_sha256=teacher_sha256
    )
    folder, total_steps = extent.folder, extent.total_steps
    claim(world, folder)
    resumed = checkpoint.find(world, args.resume, folder)
    start_step = 0
    if resumed is not None:
        start_step = checkpoint.check(resumed, told, args, extent.order, FIXED)
    loader = LatentLoader.from_flags(args, store, world, start_step, train_rows)

    # Teacher and students
    dit, operators, report, notes = build_students(plan, args.global_seed)
    teacher = Teacher(dit, list(operators)).to(world.device)
    kinds = {"mha": args.loss_mha, "mlp": args.loss_mlp, PAIR: args.loss_pair}
    students = Students(operators, kinds, args.huber_delta, args.gate_weighting)
    students.to(world.device).train()

    # Run folder
    log = RunLog(folder, world, vars(args), start_step=start_step)
    log.info(f"{plan.describe()}; {len(operators)} operators, {count(students.parameters()):,}")
    log.info(f"teacher: {'; '.join(report.lines())}; {len(dit.blocks)} blocks of it run")
    for line in notes if resumed is None else [f"resumed at step {start_step}"]:
        log.info(line)
    for each in (teacher, students):
        for line in accelerate(each, world.device, dtype, dit.num_tokens, args.kernels):
            log.info(line)
    log.info(
        f"{args.num_samples:,} images and {args.val_samples:,} to validate on; {total_steps:,} "
        f"steps of {args.global_batch_size} on {world.size} x {world.device.type}, {dtype}"
    )
    for line in store.notes:
        log.info(line)

    # Optimisers: one an operator
    guards, schedules = [], []
    for operator in students.operators:
        optimizer = adamw([{"params": [*operator.parameters()], "lr": args.lr}], args.weight_decay)
        guards.append(StepGuard(optimizer, args.clip_grad))
        schedules.append(
            schedule(
                optimizer,
                args.lr_schedule,
                total_steps=total_steps,
                warmup_steps=args.warmup_steps,
                end_factor=args.lr_end_factor,
                milestones=[epoch * extent.steps_per_epoch for epoch in milestones],
                gamma=args.lr_gamma,
            )
        )
    steps, best = Steps(guards, schedules), Best(students)
    slots = students.slots
    names = [name_of(slot) for slot in slots]
    parts = {"teacher": teacher, **dict(zip(names, students.operators, strict=True))}
    means = Means(world, [f"loss/{name}" for name in names])
    run = checkpoint.RunState(
        extent, world, told, args, means, log, model=students, opt=steps, best=best
    )
    if resumed is not None:
        run.restore(resumed)
        del resumed
    latents, draws_of = compile_functions(world, args.compile, store.latents, draw)
    compile_models(world, args.compile, teacher, students)
    distributed.start_alike(world, students)
    net = distributed.wrap(world, students)
    diffusion = create_diffusion("")

    def inputs_of(moments, index, labels, epoch, class_dropout):
        """What the teacher takes: noised latents, timesteps, labels and dropped labels."""
        x = latents(moments, index, args.global_seed, epoch)  # [B,C,H,W]
        number = diffusion.num_timesteps
        draws = draws_of(args.global_seed, epoch, index, x.shape[1:], number, class_dropout)
        x = diffusion.q_sample(x, draws.t, draws.noise)
        return {"x": x, "t": draws.t, "y": labels, "drop": draws.drop}

    def losses_of(net, teacher, **inputs):
        """The loss of every operator, [S]."""
        with precision.autocast(world.device, dtype):
            return net(*teacher(**inputs))[0]

    def step_on_device(**inputs):
        """A training step -> the loss of every operator, [S]."""
        steps.zero_grad()
        total = torch.zeros(len(names), device=world.device)
        for part in distributed.micro_batches(net, inputs, args.grad_accum):
            losses = losses_of(net, teacher, **part) / args.grad_accum
            losses.sum().backward()
            total += losses.detach()
        steps.step()
        return total

    take_step = graphed(world, args.compile, step_on_device)

    def validate(step: int) -> None:
        """Validation of all operators; the best weights are kept."""
        mine = val_rows[world.rank :: world.size]
        batches = (
            inputs_of(*read_rows(store, index, world), HELD_OUT_EPOCH, 0.0)
            for index in (mine.split(args.global_batch_size // world.size) if len(mine) else ())
        )
        losses, errors = validation(teacher, students, batches, world, dtype)
        best.update(losses, errors, step)
        log.metrics(step, **{f"val_loss/{n}": v for n, v in zip(names, losses, strict=True)})
        log.metrics(step, **{f"val_error/{n}": v for n, v in zip(names, errors, strict=True)})
        worst = max(range(len(errors)), key=lambda i: (math.isnan(errors[i]), errors[i]))
        log.info(f"step {step:07d}  relative error at most {errors[worst]:.1%}, {names[worst]}")

    # Training
    if start_step == 0:
        validate(0)
    logged_step, logged_at = start_step, time.perf_counter()
    before, _ = steps.skipped()
    bar = tqdm(total=total_steps, initial=start_step, disable=not watched(world), unit="step")
    for batch in loader:
        if batch.step >= total_steps:
            break
        steps.set_rates()
        inputs = inputs_of(
            batch.moments, batch.index, batch.labels, batch.epoch, args.class_dropout
        )
        losses = take_step(**inputs)
        steps.step_rates()
        means.add(losses)

        step = batch.step + 1
        bar.update()
        if step % args.log_every == 0 or step == total_steps:
            again = partial(losses_of, students, teacher, **inputs)
            skipped = steps.check(step, partial(nonfinite.where, world, means, parts, again))
            for i, (was, now) in enumerate(zip(before, skipped, strict=True)):
                if now > was:
                    log.info(f"{names[i]}: not finite in {now - was} steps, left out")
            before = skipped
            values = means.take()
            rate = (step - logged_step) / (time.perf_counter() - logged_at)
            log.metrics(
                step,
                **values,
                skipped_steps=sum(skipped),
                lr=schedules[0].get_last_lr()[0],
                steps_per_sec=rate,
                images_per_sec=rate * args.global_batch_size,
            )
            finite = [value for value in values.values() if math.isfinite(value)]
            mean = sum(finite) / len(finite) if finite else math.nan
            some = f" of {len(finite)}/{len(values)}" if len(finite) < len(values) else ""
            log.info(f"step {step:07d}  mean loss{some} {mean:.5f}  {rate:.2f} steps/s")
            logged_step, logged_at = step, time.perf_counter()
        if step % args.val_every == 0 or step == total_steps:
            began = time.perf_counter()
            validate(step)
            logged_at += time.perf_counter() - began
        run.step_done(step, logged=logged_step == step)
    bar.close()

    # The operators
    skipped, in_a_row = steps.skipped()
    failed = failures(names, best, skipped, in_a_row, total_steps)
    if world.main:
        provenance = {
            "plan": plan.architecture(),
            "settings": vars(args),
            "teacher": {"file": str(plan.base_ckpt_path), "sha256": teacher_sha256},
            "latents": store.manifest,
            **environment(world.device),
        }
        files = write_operators(folder, plan, best, skipped, provenance)
        if len(files) == len(slots):
            finished = replace(plan, grafted_ckpt_path=None, graft_weights=files, graft_init=None)
            header = f"Operators distilled by distill_operators.py from {plan.path.name}."
            write_plan(finished, folder / "distilled.yaml", {}, header)
            log.info(f"next: --config {folder}/distilled.yaml")
    log.close()
    distributed.barrier(world)
    distributed.stop()
    if failed:
        raise ValueError(
            f"{'; '.join(failed)}. Lower --lr, or look at the data; the other operators are whole, "
            f"in {folder}/operators"
        )


def parse_args() -> argparse.Namespace:
    parser = arguments.parser(__doc__)
    add = arguments.add_graft(parser)
    add(
        "--num-samples",
        type=arguments.positive,
        default=8000,
        help="images to train on, balanced over the classes; a function of --global-seed",
    )
    add("--val-samples", type=arguments.positive, default=256, help="further images, to validate")
    add = arguments.add_run(parser, prefix="distill")
    add("--val-every", type=arguments.positive, default=500, help="steps between validations")
    add = parser.add_argument_group("distillation").add_argument
    add("--loss-mha", choices=LOSSES, default="l1", help="of operators in the mha slot")
    add("--loss-mlp", choices=LOSSES, default="l2", help="of operators in the mlp slot")
    add("--loss-pair", choices=LOSSES, default="l1", help="of parallel pairs")
    add("--huber-delta", type=arguments.rate, default=1.0, help="where huber turns linear")
    add(
        "--gate-weighting",
        action="store_true",
        help="weigh errors by the gate with which the block adds them to its input",
    )
    add = arguments.add_optimisation(parser, ema_decay=None)
    arguments.add_schedule(add, kind="milestones", milestones=MILESTONES)
    arguments.add_machine(parser)
    parser.set_defaults(epochs=200, global_batch_size=64, clip_grad=10.0)
    return parser.parse_args()


if __name__ == "__main__":
    distributed.run(main, parse_args())
