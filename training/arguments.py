"""What the entries' command lines share: value types with clear refusals, and a readable --help."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from training.optimizer import SCHEDULES

GROUPS = {"grafts": "2:4", "pairs": "1:2"}  # by what is chosen; half keeps the original


def parser(doc: str, positional: str = "") -> argparse.ArgumentParser:
    """A parser whose --help shows the entry's docstring and every default that says something.

    Args:
        doc: the entry's docstring.
        positional: arguments without a flag, for the usage line.
    """
    usage = " ".join(["%(prog)s", *positional.split(), "[flags]"])
    return _Parser(description=doc, usage=usage, formatter_class=_Help, allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        silent = (None, False, argparse.SUPPRESS)
        if (
            any(action.default is value for value in silent)
            or action.default == []
            or not action.option_strings
            or "%(default)" in action.help
        ):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return f"{action.help} (default: %(default)s)"


def _number(kind: type, legal: Callable[[float], bool], words: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not legal(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return convert


positive = _number(int, lambda n: n >= 1, "a whole number of at least 1")
nonnegative = _number(int, lambda n: n >= 0, "a whole number of at least 0")
seed = _number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
rate = _number(float, lambda x: x > 0, "a number above 0")
weight = _number(float, lambda x: x >= 0, "a number of at least 0")
share = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
decay = _number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
guidance = _number(float, lambda x: x >= 1, "a number of at least 1")


def add_graft(parser: argparse.ArgumentParser) -> Callable:
    """The flags of what is grafted and on which latents; returns the group's add_argument."""
    add = parser.add_argument_group("model and data").add_argument
    add("--data-path", required=True, help="latent store, from extract_features.py")
    add("--config-filepath", "--config", required=True, help="graft YAML: which operators, where")
    add("--load-weight", help="base DiT checkpoint, instead of the YAML's base_ckpt_path")
    add("--image-size", type=positive, help="pixels; must agree with the YAML")
    add("--num-classes", type=positive, help="must agree with the YAML")
    return add


def add_run(parser: argparse.ArgumentParser, prefix: str, whose: str = "") -> Callable:
    """The flags of a training run's extent and record; returns the group's add_argument.

    whose: a remark on the defaults of extent, those of DiT's own training, where the recipe of the
    entry has others.
    """
    add = parser.add_argument_group("run").add_argument
    add("--results-dir", default="outputs", help="run folders are made here")
    add("--prefix", default=prefix, help="the run folder is <prefix>-<model>")
    add("--resume", help="checkpoint to continue, or auto for the run's newest whole one")
    add("--epochs", type=positive, default=1400, help=f"passes over the data{whose}")
    add("--max-steps", type=positive, help="end earlier, after so many steps")
    add("--global-batch-size", type=positive, default=256, help=f"images a step, in all{whose}")
    add(
        "--grad-accum",
        type=positive,
        default=1,
        help="passes a step, each of an equal part of the batch: less memory, the same result",
    )
    add("--global-seed", type=seed, default=0, help="all random numbers follow from it")
    add("--log-every", type=positive, default=100, help="steps between log lines")
    add("--ckpt-every", type=positive, default=10_000, help="steps between checkpoints")
    add("--keep-last", type=positive, help="delete older checkpoints than so many (unset: none)")
    add("--keep-every", type=positive, help="with --keep-last: multiples of so many steps stay")
    add(
        "--wandb",
        action="store_true",
        help="report to Weights & Biases too (pip install wandb; WANDB_PROJECT and the like say "
        "where to)",
    )
    return add


def add_selection(parser: argparse.ArgumentParser) -> Callable:
    """The flags of what layer selection chooses from, and how; returns the group's add_argument."""
    add = parser.add_argument_group("selection").add_argument
    add(
        "--choose",
        choices=GROUPS,
        help="between each block and its graft, or between each pair of blocks in sequence and in "
        "parallel (unset: grafts, where the YAML has any)",
    )
    add(
        "--groups",
        help="N:M keeps N originals in every M blocks, or pairs (1:2, 3:4, 7:14, ...); 2:4,1:8,... "
        "gives each group its own (unset: 2:4, of pairs 1:2)",
    )
    add(
        "--pin",
        type=int,
        nargs="*",
        default=[],
        help="blocks to keep, beside those without a graft; pairs by their first block",
    )
    add(
        "--tau-range",
        type=rate,
        nargs=2,
        metavar=("START", "END"),
        default=[4.0, 0.1],
        help="temperature of the Gumbel softmax, linear over the run",
    )
    add(
        "--scaling-range",
        type=rate,
        nargs=2,
        metavar=("START", "END"),
        default=[100.0, 100.0],
        help="factor on the logits, linear over the run",
    )
    return add


def add_lora(add: Callable, rank: int) -> None:
    """The flags of low-rank updates, by default of this rank."""
    add("--lora-rank", type=positive, default=rank, help="rank of each update")
    add("--lora-alpha", type=rate, help="updates are scaled by alpha / rank (2 x rank)")


def add_grad_checkpoint(add: Callable) -> None:
    """The flag of `models.recompute`."""
    add(
        "--grad-checkpoint",
        action="store_true",
        help="keep the inputs of blocks alone and run each again in the backward pass: for batches "
        "that do not fit otherwise, at about 4/3 of the work",
    )


def add_exchange(add: Callable) -> None:
    """In what several processes average the gradients of `training.working`'s weights."""
    add(
        "--exchange",
        choices=("fp32", "bf16"),
        default="fp32",
        help="how processes exchange the gradients of matrix products, which a bf16 run computes "
        "in bf16: bf16 halves what is sent, and rounds their sum at each process",
    )


def add_optimisation(parser: argparse.ArgumentParser, ema_decay: float | None) -> Callable:
    """The flags of every training loss and optimiser; returns the group's add_argument.

    ema_decay: default of the averages; None for training without them.
    """
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=rate, default=1e-4, help="learning rate of the weights (AdamW), at its peak")
    add("--clip-grad", type=rate, default=1.0, help="largest gradient norm")
    add("--class-dropout", type=share, default=0.1, help="share of labels left out")
    if ema_decay is not None:
        add("--ema-decay", type=decay, default=ema_decay, help="of the averaged weights")
    return add


def add_schedule(add: Callable, kind: str, milestones: tuple[int, ...] = ()) -> None:
    """The flags of `training.optimizer.schedule`, by default of this kind.

    milestones: what the entry takes where none are given, to be named.
    """
    usual = f" (default {' '.join(map(str, milestones))})" if milestones else ""
    add("--lr-schedule", choices=SCHEDULES, default=kind, help="after the warm-up")
    add("--lr-end-factor", type=share, default=0.5, help="cosine ends at this x --lr")
    add(
        "--milestones",
        type=positive,
        nargs="+",
        metavar="EPOCH",
        help=f"where --lr-schedule milestones multiplies the rate by --lr-gamma{usual}",
    )
    add("--lr-gamma", type=share, default=0.5, help="see --milestones")
    add("--warmup-steps", type=nonnegative, default=0, help="linear from 0 to --lr")
    add("--weight-decay", type=weight, default=0.0, help="of AdamW")


def milestones(args: argparse.Namespace, default: tuple[int, ...] = ()) -> list[int]:
    """The epochs of --milestones; `default` where the schedule needs some and none are given.

    Raises:
        ValueError: milestones for another schedule, or the schedule without milestones.
    """
    if args.lr_schedule != "milestones":
        if args.milestones:
            raise ValueError(
                f"--milestones {args.milestones}: --lr-schedule {args.lr_schedule} has none; say "
                "--lr-schedule milestones"
            )
        return []
    epochs = args.milestones or list(default)
    if not epochs:
        raise ValueError("--lr-schedule milestones: say at which epochs with --milestones")
    return epochs


def add_compile(add: Callable) -> None:
    """The flag of `training.compilation`, and of `Codec.compiled`."""
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile; CUDA only",
    )


def add_kernels(add: Callable) -> None:
    """The flag of `models.operators.accelerators` and its like."""
    add(
        "--kernels",
        choices=("auto", "torch"),
        default="auto",
        help="auto: faster kernels for operators, norms and optimiser, where they are installed "
        "and agree with PyTorch's; torch: PyTorch's alone; CUDA only",
    )


def add_machine(parser: argparse.ArgumentParser) -> Callable:
    """The flags of where and how it runs; returns the group's add_argument."""
    add = parser.add_argument_group("machine").add_argument
    add("--precision", choices=("bf16", "fp32"), help="autocast (unset: bf16 on CUDA, else fp32)")
    add("--device", help="cuda, cuda:1 or cpu (unset: CUDA where there is any)")
    add("--num-workers", type=positive, default=4, help="reader or writer threads a process")
    add_compile(add)
    add_kernels(add)
    return add
