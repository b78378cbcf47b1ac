"""training/working.py: the same numbers with copies as with casts, in steps and in whole runs."""

import json
from argparse import Namespace

import pytest
import torch
import yaml
from entries import Forked

from models.dit import DiT
from training import checkpoint, distributed, fused_step, optimizer, precision
from training.ema import Ema
from training.lora import add_lora
from training.optimizer import StepGuard, adamw
from training.working import WorkingWeights, with_copies

CPU = torch.device("cpu")
ALONE = distributed.World(0, 0, 1, CPU)
FLAGS = Namespace(grad_accum=1, grad_checkpoint=False, exchange="fp32")


def small(lora: bool) -> DiT:
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    if lora:
        add_lora(model, 4, 8)
    return model


def backward(net) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    t, y = torch.tensor([3, 500, 999, 0]), torch.tensor([0, 1, 2, 0])
    with precision.autocast(CPU, torch.bfloat16):
        out = net(x, t, y, drop=torch.zeros(4, dtype=torch.bool)).float()
    out.square().mean().backward()
    return out.detach()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("trained", [True, False], ids=["all", "frozen"])
def test_copies_give_the_numbers_of_casts(lora, trained):
    plain, model = small(lora), small(lora)
    working = WorkingWeights(model, torch.bfloat16, trained)
    assert torch.equal(backward(working), backward(plain))
    linear = [w for m in model.modules() if isinstance(m, torch.nn.Linear) for w in m.parameters()]
    assert len(working.names) == sum(trained or not w.requires_grad for w in linear)
    assert set(working.copies) == {w for w in linear if trained and w.requires_grad}
    seen = 0
    for (name, p), same in zip(plain.named_parameters(), model.parameters(), strict=True):
        leaf = working.copies.get(same, same)
        assert (leaf is same or same.grad is None) and leaf.requires_grad == p.requires_grad, name
        if p.grad is not None:
            seen += 1
            assert torch.equal(leaf.grad.float(), p.grad), name
            assert any(leaf is each for each in working.parameters())
    assert seen > 5 and len(list(working.parameters())) == sum(
        p.requires_grad for p in model.parameters()
    )


class PlainStep:
    """What FusedStep does, by PyTorch."""

    def __init__(self, optimizer, ema):
        self.optimizer, self.ema, self.copies = optimizer, ema, {}

    @torch.no_grad()
    def __call__(self, rates, scale, bad):
        for p, copy in self.copies.items():
            p.grad = None if copy.grad is None else copy.grad.float()
        self.optimizer.grad_scale, self.optimizer.found_inf = scale, bad
        self.optimizer.step()
        self.ema.update()
        for p, copy in self.copies.items():
            p.grad = None
            copy.copy_(p)


def guard_of(model: torch.nn.Module) -> StepGuard:
    weights = [p for p in model.parameters() if p.requires_grad]
    steps, ema = adamw([{"params": weights, "lr": 0.01}], 0.1), Ema(model, 0.9)
    guard = StepGuard(steps, 0.5, ema)
    guard.fused = PlainStep(steps, ema)
    return guard


def test_guard_steps_on_the_gradients_of_copies():
    ends = []
    for copies in (False, True):
        guard = guard_of(model := small(lora=False))
        net = model
        if copies:
            net, lines = with_copies(ALONE, model, torch.bfloat16, guard, FLAGS)
            assert lines == [f"{len(net.names)} weights of products are kept in bf16 too"]
        norms = []
        for _ in range(3):
            guard.zero_grad()
            backward(net)
            guard.set_rates()
            norms.append(guard.step())
        assert 0.1 < min(norms) < 0.5 < max(norms)
        ends.append([*norms, *model.parameters(), *guard.ema.averages])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("size", "dtype", "changed", "all_of_them", "frozen"),
    [
        (1, torch.bfloat16, {}, True, True),
        (1, torch.float32, {}, False, False),
        (1, torch.bfloat16, {"grad_checkpoint": True}, False, False),
        (1, torch.bfloat16, {"grad_accum": 2}, False, True),
        (2, torch.bfloat16, {}, False, True),
        (2, torch.bfloat16, {"exchange": "bf16"}, True, True),
        (2, torch.bfloat16, {"exchange": "bf16", "grad_accum": 2}, False, True),
        (2, torch.float32, {"exchange": "bf16", "grad_checkpoint": True}, False, False),
    ],
)
def test_trained_weights_have_copies_where_they_may(size, dtype, changed, all_of_them, frozen):
    flags, world = Namespace(**{**vars(FLAGS), **changed}), distributed.World(0, 0, size, CPU)
    guard = guard_of(model := small(lora=True))
    net, _ = with_copies(world, model, dtype, guard, flags)
    assert (net is not model) == frozen
    assert bool(guard.copies) == all_of_them
    guard = guard_of(model := small(lora=False))
    net, _ = with_copies(world, model, dtype, guard, flags)
    assert (net is not model) == all_of_them
    guard.fused = None
    assert with_copies(world, model, dtype, guard, flags)[0] is model


def test_an_exchange_that_is_not_in_bf16_says_why():
    world = distributed.World(0, 0, 2, CPU)

    def said(dtype=torch.bfloat16, **changed):
        guard = guard_of(model := small(lora=False))
        guard.fused = changed.pop("fused", guard.fused)
        flags = Namespace(**{**vars(FLAGS), "exchange": "bf16", **changed})
        return with_copies(world, model, dtype, guard, flags)[1]

    begins = "gradients are exchanged in fp32, not bf16 "
    assert said(grad_accum=2) == [begins + "(--grad-accum)"]
    assert said(fused=None) == [begins + "(PyTorch's optimiser)"]
    both = "(a run in float32, --grad-checkpoint)"
    assert said(torch.float32, grad_checkpoint=True) == [begins + both]
    assert len(said()) == 1 and "kept in bf16 too" in said()[0]
    assert said(exchange="fp32", grad_accum=2) == []


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_of_a_copy_that_is_not_finite_leaves_the_step_out(value):
    guard = guard_of(model := small(lora=False))
    net, _ = with_copies(ALONE, model, torch.bfloat16, guard, FLAGS)
    before = [p.clone() for p in (*model.parameters(), *net.parameters())]
    guard.zero_grad()
    backward(net)
    next(iter(net.copies.values())).grad[0] = value
    guard.set_rates()
    assert not guard.step().isfinite()
    after = [*model.parameters(), *net.parameters()]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("entry", ["finetune_tinyfusion", "prune_by_learning"])
def test_runs_with_copies_are_those_with_casts(tmp_path, write_latents, entry):
    """bf16 runs, one of them interrupted and resumed, against one without copies."""
    write_latents(tmp_path / "latents", 8, classes=3)
    graft = {"type": "mha", "name": "hyena_y", "config_filepath": str(tmp_path / "none.yaml")}
    (tmp_path / "none.yaml").write_text("{}")
    sample = {"dit_model_name": "DiT-S/2", "image_size": 64, "num_classes": 3}
    content = {
        "grafts": [graft | {"graft_indexes": list(range(12))}],
        "sample_config": {**sample, "base_ckpt_path": None, "graft_init": "fresh"},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))

    def train(name: str, copies: bool, *flags) -> None:
        def before(rank):
            fused_step.refusal = lambda *_: ""
            fused_step.FusedStep = PlainStep
            if not copies:
                optimizer.StepGuard.use_copies = lambda *_: pytest.fail("copies")

        flags = [*flags, "--config", tmp_path / "plan.yaml", "--data-path", tmp_path / "latents"]
        flags += ["--results-dir", tmp_path, "--prefix", name, "--global-batch-size", 4]
        flags += ["--log-every", 1, "--ckpt-every", 2, "--precision", "bf16", "--device", "cpu"]
        flags += [] if copies else ["--grad-checkpoint"]
        flags += ["--delta-w"] if entry.startswith("prune") else []
        run = Forked(tmp_path, f"{entry}.py", *flags, before=before)
        run.join()
        assert ("are kept in bf16 too" in run.said()) == copies

    train("casts", False, "--max-steps", 4)
    train("copies", True, "--max-steps", 4)
    train("resumed", True, "--max-steps", 4)
    (tmp_path / "resumed-DiT-S-2" / "checkpoints" / "0000004.pt").unlink()
    train("resumed", True, "--max-steps", 4, "--resume", "auto")
    states, losses = {}, {}
    for name in ("casts", "copies", "resumed"):
        folder = tmp_path / f"{name}-DiT-S-2"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        states[name] = checkpoint.load(folder / "checkpoints" / "0000004.pt")
    assert losses["copies"] == losses["resumed"] and len(losses["copies"]) == 4
    assert losses["copies"] == pytest.approx(losses["casts"], rel=1e-4)
    for part in ("model", "ema"):
        for name, tensor in states["copies"][part].items():
            assert tensor.dtype == states["casts"][part][name].dtype, name
            assert torch.equal(tensor, states["resumed"][part][name]), name
            torch.testing.assert_close(tensor, states["casts"][part][name], rtol=1e-3, atol=1e-4)
