"""Activation distillation: new operators regress onto the ones they replace, all blocks at once.

Stage 1 of "Exploring Diffusion Transformer Designs via Grafting" (arXiv 2506.05340): the pretrained
model runs forward once a batch, and every new operator learns to give what the old one gave for
the same input. A parallel pair is distilled like an operator: as a whole, with the grafts that it
holds, it learns to add to its input what the two blocks in sequence added.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.dit import DiT
from models.files import write_json
from models.graft_plan import PAIR, GraftPlan
from models.grafting import LoadReport, build_grafted
from models.operators import build_operator
from models.restructure import ParallelPair
from models.weights import SLOTS
from training import distributed, precision
from training.checkpoint import write_tensors
from training.distributed import World
from training.optimizer import StepGuard

LOSSES = ("l1", "l2", "huber")
PATIENCE = 20  # steps left out in a row after which an operator counts as failed
GATE_CHUNK = {"mha": 2, "mlp": 5}  # of the six parts of a block's adaLN modulation

Slot = tuple[int, str]  # (block, "mha" or "mlp"), or of a parallel pair (its first block, PAIR)


def name_of(slot: Slot) -> str:
    """The slot in names of files and logs: block07.mha, block08.pair"""
    return f"block{slot[0]:02d}.{slot[1]}"


class _Tap(nn.Module):
    """Runs a module and keeps what went in and came out, for who called it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.module(x)
        self.seen = (x, y)
        return y

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        seen, self.seen = self.seen, None
        return seen


class Teacher(nn.Module):
    """The frozen model up to its last wanted slot: what enters and leaves each slot, in eval mode.

    forward(x [B,C,H,W], t [B], y [B], drop bool [B]) -> inputs, outputs and gates, each a list over
    `slots`: [B,T,D], [B,T,D], and [B,D], the factor of the block on what the operator gives. Of a
    parallel pair: (tokens [B,T,D], condition [B,D]), what its two blocks in sequence add to the
    tokens, and ones. `dit` is changed in place and loses the blocks that come after.
    """

    def __init__(self, dit: DiT, slots: Sequence[Slot]):
        super().__init__()
        self.slots = tuple(slots)
        self.dit = dit.eval().requires_grad_(False)
        self.pairs = {block for block, slot in slots if slot == PAIR}  # their first blocks
        self.tapped = sorted({block for block, slot in slots if slot != PAIR})
        last = max([*self.tapped, *(block + 1 for block in self.pairs)])
        del dit.blocks[1 + last :]
        for block, slot in self.slots:
            if slot != PAIR:
                holder, name = dit.blocks[block], SLOTS[slot]
                setattr(holder, name, _Tap(getattr(holder, name)))
        for block in self.tapped:
            holder = dit.blocks[block]
            holder.adaLN_modulation = _Tap(holder.adaLN_modulation)

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor
    ) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
        x, c = self.dit.embed(x, t, y, drop)
        tokens = {}  # what enters and leaves the pairs, by the block that it enters
        for i, block in enumerate(self.dit.blocks):
            if {i, i - 2} & self.pairs:
                tokens[i] = x
            x = block(x, c)
        tokens[len(self.dit.blocks)] = x
        inputs, outputs, gates = [], [], []
        modulation = {b: self.dit.blocks[b].adaLN_modulation.take()[1] for b in self.tapped}
        for block, slot in self.slots:
            if slot == PAIR:
                inputs.append((tokens[block], c))
                outputs.append(tokens[block + 2] - tokens[block])
                gates.append(torch.ones_like(c))
                continue
            h, f = getattr(self.dit.blocks[block], SLOTS[slot]).take()
            inputs.append(h)
            outputs.append(f)
            gates.append(modulation[block].chunk(6, dim=1)[GATE_CHUNK[slot]])
        return inputs, outputs, gates


class Lesson(nn.Module):
    """The loss of one operator or pair; without tensors of its own, so that it compiles in place.

    forward(operator, slot, h, f, gate), see `Students`, -> loss 0-d, and [2] the sums of
    (g - f)^2 and of f^2.
    """

    def __init__(self, kinds: dict[str, str], delta: float, weigh_by_gate: bool):
        super().__init__()
        self.kinds, self.delta, self.weigh_by_gate = dict(kinds), delta, weigh_by_gate

    def forward(
        self,
        operator: nn.Module,
        slot: str,
        h: torch.Tensor | tuple[torch.Tensor, ...],
        f: torch.Tensor,
        gate: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        f = f.float()
        g = operator(*h) if slot == PAIR else operator(h)
        error = g.float() - f  # B T D
        squares = torch.stack([error.detach().square().sum(), f.square().sum()])
        if self.weigh_by_gate:
            error = error * gate.float().unsqueeze(1)
        return self._loss(self.kinds[slot], error), squares

    def _loss(self, kind: str, error: torch.Tensor) -> torch.Tensor:
        if kind == "l1":
            return error.abs().mean()
        if kind == "l2":
            return error.square().mean()
        return F.huber_loss(error, torch.zeros_like(error), delta=self.delta)


class Students(nn.Module):
    """The new operators and pairs of a plan, each with its loss; they share nothing.

    forward(inputs, targets, gates), as from the teacher, -> losses [S], and [2, S] the sums of
    (g - f)^2 and of f^2, of which the root of their ratio is the relative error; in the order of
    `slots`. `kinds`: "mha", "mlp" or PAIR -> one of LOSSES.
    weigh_by_gate: the error of a sample and channel counts by the gate with which it enters the
    model.
    """

    def __init__(
        self,
        operators: dict[Slot, nn.Module],
        kinds: dict[str, str],
        delta: float,
        weigh_by_gate: bool,
    ):
        super().__init__()
        self.slots = tuple(operators)
        self.operators = nn.ModuleList(operators.values())
        self.lesson = Lesson(kinds, delta, weigh_by_gate)

    def regions(self) -> list[nn.Module]:
        """The parts that torch.compile takes one by one."""
        return [self.lesson]

    def forward(
        self,
        inputs: list,
        targets: list[torch.Tensor],
        gates: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = [
            self.lesson(operator, slot, h, f, gate)
            for (_, slot), operator, h, f, gate in zip(
                self.slots, self.operators, inputs, targets, gates, strict=True
            )
        ]
        losses, squares = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(squares, dim=1)


def build_students(
    plan: GraftPlan, seed: int
) -> tuple[DiT, dict[Slot, nn.Module], LoadReport, list[str]]:
    """The pretrained model of a plan, its new operators and pairs, and where these start, for logs.

    Operators start from the plan's `graft_weights` or `graft_init`, pairs with them and the blocks
    of the pretrained model, their merges as the sum; a fresh tensor is a function of (seed, block,
    slot), whichever other operators there are. A graft inside a pair is no student of its own: the
    pair learns as a whole. The plan's grafted checkpoint is not read.

    Raises:
        FileNotFoundError, ValueError: as `build_grafted`; the plan has neither grafts nor pairs, no
            pretrained model, or a graft that begins as the very operator it replaces.
    """
    if plan.is_plain:
        raise ValueError(
            f"{plan.path}: has no grafts and no parallel pairs; there is nothing to distill"
        )
    if plan.base_ckpt_path is None:
        raise ValueError(
            f"{plan.path}: has no base_ckpt_path: name the pretrained model to learn from there or "
            "with --load-weight"
        )
    started, report = build_grafted(replace(plan, grafted_ckpt_path=None))
    students: dict[Slot, nn.Module] = {}
    for block in plan.grafted_blocks():
        for slot, attribute in SLOTS.items():
            if plan.graft_at(block, slot) is None:
                continue
            operator = _seeded(plan, (block, slot), started, report, seed)
            if plan.pair_of(block) is None:
                students[block, slot] = operator
            else:
                setattr(started.blocks[block], attribute, operator)
    for pair in plan.parallel_pairs:
        students[pair[0], PAIR] = ParallelPair(started, pair)
    students = dict(sorted(students.items()))
    starts = Counter(
        report.sources[name if slot == PAIR else f"blocks.{block}.{SLOTS[slot]}.{name}"]
        for (block, slot), student in students.items()
        for name in student.state_dict()
    )
    del started
    teacher, base = build_grafted(plan.plain())
    notes = [f"{n} tensors of what learns: {source}" for source, n in sorted(starts.items())]
    if plan.grafted_ckpt_path is not None:
        notes.append(f"{plan.grafted_ckpt_path} is not read: the operators start anew")
    return teacher, students, base, notes


def _seeded(plan: GraftPlan, place: Slot, started: DiT, report: LoadReport, seed: int) -> nn.Module:
    """The operator of a grafted slot, its fresh tensors a function of (seed, block, slot)."""
    block, slot = place
    graft, attribute = plan.graft_at(block, slot), SLOTS[slot]
    held = getattr(started.blocks[block], attribute).state_dict()
    sources = {name: report.sources[f"blocks.{block}.{attribute}.{name}"] for name in held}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(((seed * 1000 + block) * 2 + (slot == "mlp")) % 2**63)
        operator = build_operator(graft.operator, **graft.config)
    taken = {name: tensor for name, tensor in held.items() if sources[name] != "fresh"}
    same = graft.operator == slot and all(s == "inherited" for s in sources.values())
    if same and plan.pair_of(block) is None:
        raise ValueError(
            f"{plan.path}: block {block}: {graft.operator} in the {slot} slot starts as "
            "the very operator that it replaces: there is nothing to learn; say "
            "graft_init: fresh"
        )
    operator.load_state_dict({**operator.state_dict(), **taken}, strict=True)
    return operator


class Steps:
    """One optimiser, schedule and guard an operator: nothing of one touches another's step."""

    def __init__(self, guards: list[StepGuard], schedules: list):
        self.guards, self.schedules = guards, schedules

    def step(self) -> torch.Tensor:
        """A step of every operator whose gradient is finite; their norms before clipping, [S]."""
        return torch.stack([guard.step() for guard in self.guards])

    def set_rates(self) -> None:
        """See `StepGuard.set_rates`."""
        for guard in self.guards:
            guard.set_rates()

    def step_rates(self) -> None:
        """The schedules' next learning rates."""
        for schedule in self.schedules:
            schedule.step()

    def zero_grad(self) -> None:
        for guard in self.guards:
            guard.zero_grad()

    def skipped(self) -> tuple[list[int], list[int]]:
        """Steps that each operator left out, its gradient not being finite; waits for the device.

        Returns:
            In all, and since its last good one.
        """
        counts = torch.stack([torch.stack([g.skipped, g.in_a_row]) for g in self.guards])
        return tuple(counts.int().T.tolist())

    def check(self, step: int, where: Callable[[], str]) -> list[int]:
        """Steps that each operator left out in all.

        Args:
            where: says what is not finite, see `training.nonfinite.where`; called before raising.

        Raises:
            ValueError: no operator took one of the last `PATIENCE` steps.
        """
        skipped, in_a_row = self.skipped()
        if min(in_a_row) >= PATIENCE:
            raise ValueError(
                f"step {step}: no operator's gradient was finite for {min(in_a_row)} steps in a "
                f"row: {where()}; look at the teacher and the data, or lower --lr"
            )
        return skipped

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {
            "optimizers": [guard.optimizer.state_dict() for guard in self.guards],
            "guards": [guard.state_dict() for guard in self.guards],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes everything back."""
        for guard, optimizer, counts in zip(
            self.guards, state["optimizers"], state["guards"], strict=True
        ):
            guard.optimizer.load_state_dict(optimizer)
            guard.load_state_dict(counts)
        for schedule, held in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(held)


class Best:
    """The weights of every operator where its validation loss was lowest."""

    def __init__(self, students: Students):
        self.students = students
        self.losses = [math.inf] * len(students.slots)
        self.errors = [math.nan] * len(students.slots)
        self.steps = [-1] * len(students.slots)
        self.weights = [
            {n: t.detach().clone() for n, t in operator.state_dict().items()}
            for operator in students.operators
        ]

    def update(self, losses: list[float], errors: list[float], step: int) -> None:
        """Keeps the operators that are better than ever; a NaN never is."""
        for i, loss in enumerate(losses):
            if loss < self.losses[i]:
                self.losses[i], self.errors[i], self.steps[i] = loss, errors[i], step
                for name, tensor in self.students.operators[i].state_dict().items():
                    self.weights[i][name].copy_(tensor)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {
            "losses": self.losses,
            "errors": self.errors,
            "steps": self.steps,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes everything back."""
        for key in ("losses", "errors", "steps"):
            setattr(self, key, list(state[key]))
        for mine, held in zip(self.weights, state["weights"], strict=True):
            for name, tensor in held.items():
                mine[name].copy_(tensor)


def failures(
    names: Sequence[str], best: Best, skipped: list[int], in_a_row: list[int], total_steps: int
) -> list[str]:
    """What went wrong with which operators, one clause a kind.

    Args:
        skipped, in_a_row: steps of each operator left out in all, and up to the end.
    """
    kinds: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        if best.steps[i] < 0:
            kind = "never finite in validation, so without a file, and without a distilled.yaml"
        elif best.steps[i] == 0 < total_steps:
            kind = "never better in validation than it began, and kept as it began"
        elif in_a_row[i] >= PATIENCE or 2 * skipped[i] > total_steps:
            kind = "not finite in training, what was best before that is kept"
        else:
            continue
        kinds.setdefault(kind, []).append(name)
    return [f"{', '.join(found)}: {kind}" for kind, found in kinds.items()]


@torch.no_grad()
def validation(
    teacher: Teacher,
    students: Students,
    batches: Iterable[dict[str, torch.Tensor]],
    world: World,
    dtype: torch.dtype,
) -> tuple[list[float], list[float]]:
    """Loss and relative error of every operator over all processes' batches, in eval mode.

    Args:
        batches: this process's, perhaps none; each the teacher's keywords.
        dtype: of the autocast, as in training.
    """
    sums = torch.zeros(3, len(students.slots), device=world.device)  # losses, (g - f)^2, f^2
    seen = torch.zeros((), device=world.device)
    students.eval()
    for batch in batches:
        with precision.autocast(world.device, dtype):
            losses, squares = students(*teacher(**batch))
        sums += torch.cat([losses[None] * len(batch["x"]), squares])
        seen += len(batch["x"])
    students.train()
    total, wrong, whole = distributed.sum_across(world, sums)
    losses = total / distributed.sum_across(world, seen)
    return losses.tolist(), (wrong / whole).sqrt().tolist()


def write_operators(
    folder: Path, plan: GraftPlan, best: Best, skipped: list[int], provenance: dict
) -> dict[Slot, Path]:
    """Writes operators/<slot>.<operator>.pt and distillation.json into a run folder.

    An operator whose validation loss was never finite gets no file, and null in the JSON.
    """
    files, summary = {}, {}
    for i, (block, slot) in enumerate(best.students.slots):
        name = name_of((block, slot))
        operator = "parallel" if slot == PAIR else plan.graft_at(block, slot).operator
        found = {"val_loss": best.losses[i], "val_error": best.errors[i], "step": best.steps[i]}
        found = found if best.steps[i] >= 0 else dict.fromkeys(found)
        found |= {"operator": operator, "skipped_steps": skipped[i]}
        summary[name] = found
        if best.steps[i] >= 0:
            path = folder / "operators" / f"{name}.{operator}.pt"
            weights = {n: t.cpu() for n, t in best.weights[i].items()}
            state = {"model": weights, "provenance": {**provenance, **found}}
            write_tensors(path, state)
            files[block, slot] = path.resolve()
    write_json(folder / "distillation.json", {"operators": summary, **provenance})
    return files
