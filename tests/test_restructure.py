"""Parallel pairs: their definition, how they run, what they load, learn and refuse."""

import copy
from functools import partial

import pytest
import torch
import yaml
from entries import REPOSITORY
from restructured import WIDTH, enter, fill, inputs, plan_file, scramble, some, tiny
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import distill_operators
import finetune_tinyfusion
import sample_ddp_finetuned
from models import costs
from models.dit import PRESETS, build_dit
from models.grafting import build_grafted, load_plan, load_trained
from models.operators import build_operator
from models.plan import differences, write_plan
from models.restructure import ParallelPair, all_pairs, parallelize
from models.selection import GraftPair
from scripts.restructuring_study import HALF, every_second
from training.distillation import Students, Teacher
from training.knowledge import WithHidden
from training.lora import add_lora

CONFIGS = REPOSITORY / "configs"


def by_definition(model, x, t, y):
    """x + W [F_a; F_b] + b with F_k = block_k - x, from the blocks' own forward."""
    x, c = model.embed(x, t, y)
    blocks = list(enumerate(model.blocks))
    while blocks:
        i, block = blocks.pop(0)
        if str(i) not in model.merges:
            x = block(x, c)
            continue
        merge, (_, other) = model.merges[str(i)], blocks.pop(0)
        both = torch.cat([block(x, c) - x, other(x, c) - x], dim=-1)  # B T 2D
        x = x + both @ merge.weight.T + merge.bias
    return model.unpatchify(model.final_layer(x, c))


# -- the definition --------------------------------------------------------------


def test_model_of_pairs_equals_its_definition():
    model = tiny()
    x, t, y = inputs()
    out = model(x, t, y)
    torch.testing.assert_close(out, by_definition(model, x, t, y), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), out, rtol=1e-12, atol=1e-12)
    assert model.layers == [(0, 1), (2,), (3, 4)]
    assert [n for n in model.state_dict() if "merges" in n] == [
        "merges.0.weight", "merges.0.bias", "merges.3.weight", "merges.3.bias",
    ]  # fmt: skip
    assert model.merges["0"].weight.shape == (WIDTH, 2 * WIDTH)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, y), out)
    neighbours = tiny(depth=6, pairs=((1, 2), (3, 4)))
    out = neighbours(x, t, y)
    torch.testing.assert_close(out, by_definition(neighbours, x, t, y), rtol=1e-12, atol=1e-12)


def test_a_merge_starts_as_the_sum():
    model = tiny(depth=2, pairs=())
    x, t, y = inputs()
    tokens, c = model.embed(x, t, y)
    first, second = (block(tokens, c) - tokens for block in model.blocks)
    parallelize(model, [(0, 1)]).double()
    found = ParallelPair(model, (0, 1))(tokens, c)
    torch.testing.assert_close(found, first + second, rtol=1e-12, atol=1e-12)


def test_pairs_of_unlike_operators_equal_their_definition():
    mamba = {"d_model": WIDTH, "d_state": 8, "headdim": 8}
    operators = [(0, "attn", "swa", {"embed_dim": WIDTH, "num_heads": 4})]
    operators += [(block, "attn", "mamba2", mamba) for block in (3, 4)]
    operators += [(4, "mlp", "mlp", {"d_model": WIDTH, "expansion_ratio": 3})]
    model, given = tiny(operators=operators), inputs()
    expected = by_definition(model, *given)
    torch.testing.assert_close(model(*given), expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_pairs_are_those_of_their_definition():
    model, given = tiny(), inputs()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (
        torch.autograd.grad(run(*given).square().sum(), parameters, materialize_grads=True)
        for run in (model, partial(by_definition, model))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    # the table of labels apart, whose rows are not all drawn, nothing is left out
    assert all(gradient.any() for gradient in found)


def test_low_rank_updates_inside_pairs_count():
    model, given = tiny(), inputs()
    names = add_lora(model, rank=2, alpha=4)
    assert "blocks.0.attn.qkv" in names and "merges.0" in names
    scramble(model.double())
    x, c = model.embed(*given)
    both = torch.cat([block(x, c) - x for block in model.blocks[:2]], dim=-1)
    found = ParallelPair(model, (0, 1))(x, c)
    torch.testing.assert_close(found, model.merges["0"](both), rtol=1e-10, atol=1e-10)


def test_open_slots_inside_pairs_follow_keep():
    model, given = tiny(), inputs()
    graft = build_operator("hyena_y", d_model=WIDTH).double()
    original = model.blocks[4].attn
    model.blocks[4].attn = GraftPair(original, graft)
    keep = torch.ones(5)
    kept, model_kept = model(*given, keep=keep), tiny()
    torch.testing.assert_close(kept, model_kept(*given))
    keep[4] = 0
    model_kept.blocks[4].attn = graft
    torch.testing.assert_close(model(*given, keep=keep), model_kept(*given))
    assert (model(*given, keep=keep) - kept).abs().max() > 1e-3


# -- sizes -----------------------------------------------------------------------


def test_published_size():
    plan = load_plan(CONFIGS / "parallel_pairs.yaml")
    cost, before = costs.model_cost(plan), costs.model_cost(costs.plain(plan))
    assert cost.parameters == 712_304_672
    added = 14 * 2 * 1152**2  # products of the merges
    assert cost.work.multiply_adds - before.work.multiply_adds == 256 * added
    assert plan.describe() == "DiT-XL/2 at 256 px, 14 parallel pairs"
    model = costs.meta_model(plan)
    assert len(model.layers) == 14
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
    assert counter.get_total_flops() == 2 * cost.work.multiply_adds


# -- the pretrained testbed ------------------------------------------------------


def test_pairs_start_nearer_than_dropping_every_second_block():
    plan = load_plan(CONFIGS / "mini" / "parallel_pairs.yaml")
    model, report = build_grafted(plan)
    base = load_file(REPOSITORY / "assets/mini/dit_mini.safetensors")
    assert report.counts() == {"base": len(base), "sum": 28}
    whole, _ = build_grafted(plan.plain())
    dropped = build_dit(HALF, plan.input_size, plan.num_classes)
    state = {name: tensor.float() for name, tensor in every_second(base).items()}
    assert torch.equal(state["blocks.3.mlp.fc1.bias"], base["blocks.6.mlp.fc1.bias"].float())
    dropped.load_state_dict(state, strict=True)
    torch.manual_seed(0)
    x, y = torch.randn(4, 4, 16, 16), torch.tensor([0, 3, 5, 9])
    with torch.inference_mode():
        for step in (20, 300, 600, 980):
            t = torch.full((4,), step)
            target = whole.eval()(x, t, y)
            near, far = ((m.eval()(x, t, y) - target).norm() for m in (model, dropped))
            assert near < 0.6 * far, (step, near / target.norm(), far / target.norm())


# -- plans and files -------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_latents):
    """Latents of 4x8x8, a live DiT-Mini/2 as base, and operator files."""
    return fill(tmp_path_factory.mktemp("pairs"), write_latents)


@pytest.mark.parametrize(
    "restructured, message",
    [
        ("drop", "'drop'; legal is parallel_pairs, or {parallel_pairs: list}"),
        ({"pairs": []}, "legal is parallel_pairs"),
        ({"parallel_pairs": []}, r"\[\] must be a list of pairs"),
        ({"parallel_pairs": [[0, 1, 2]]}, r"\[0, 1, 2\] is no pair of neighbouring blocks"),
        ({"parallel_pairs": [[3, 5]]}, r"\[3, 5\] is no pair of neighbouring"),
        ({"parallel_pairs": [[5, 4]]}, r"\[5, 4\] is no pair of neighbouring"),
        ({"parallel_pairs": [[True, 2]]}, r"\[True, 2\] is no pair"),
        ({"parallel_pairs": [4]}, "4 is no pair of neighbouring"),
        ({"parallel_pairs": [[27, 28]]}, r"\[27, 28\] lies outside the model: .* 0 to 27"),
        ({"parallel_pairs": [[-1, 0]]}, r"\[-1, 0\] lies outside"),
        (some(4, 5), r"block 5 stands in the pairs \[4, 5\] and \[5, 6\]: pairs must not overlap"),
    ],
)
def test_plans_that_are_refused(folder, restructured, message):
    with pytest.raises(ValueError, match=f"bad.yaml: restructure: .*{message}"):
        load_plan(plan_file(folder, "bad", restructured))


def test_odd_number_of_blocks_is_refused(monkeypatch, folder):
    monkeypatch.setitem(PRESETS, "DiT-Mini/2", {**PRESETS["DiT-Mini/2"], "depth": 27})
    with pytest.raises(ValueError, match="odd.yaml: restructure: parallel_pairs: 27 blocks do not"):
        load_plan(plan_file(folder, "odd", "parallel_pairs"))
    assert load_plan(plan_file(folder, "odd", some(25))).parallel_pairs == ((25, 26),)


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="5 blocks do not divide into pairs"):
        all_pairs(5)
    with pytest.raises(ValueError, match="block 1 stands in the pairs"):
        parallelize(tiny(), [(1, 2)])


def test_plan_is_written_as_it_was_read(folder, tmp_path):
    grafts = [("mha", "swa", [4, 9])]
    files = {"graft_weights": {4: {"pair": str(folder / "base.pt")}, 9: {"mha": "swa.pt"}}}
    for name, restructured in (("all", "parallel_pairs"), ("some", some(12, 4))):
        plan = load_plan(plan_file(folder, name, restructured, grafts, **files))
        write_plan(plan, tmp_path / f"{name}.yaml", {})
        again = load_plan(tmp_path / f"{name}.yaml")
        assert again.architecture() == plan.architecture()
        assert again.parallel_pairs == (all_pairs(28) if name == "all" else ((4, 5), (12, 13)))
        assert again.graft_weights.keys() == {(4, "pair"), (9, "mha")}
    assert "14 parallel pairs" in load_plan(tmp_path / "all.yaml").describe()
    sequential = load_plan(plan_file(folder, "seq", None, grafts)).architecture()
    assert "parallel_pairs" not in sequential
    said = differences(again.architecture(), sequential)
    assert said == "parallel pairs none there, [[4, 5], [12, 13]] here"


def test_weights_of_pairs_that_are_refused(folder):
    for weights, message in (
        ({4: "x.pt"}, "4: begins a parallel pair: write {pair: file}"),
        ({5: {"pair": "x.pt"}}, "5: takes no graft in this plan, and begins no parallel pair"),
        ({4: {"pair": "x"}, 5: {"mha": "y"}}, r"5: mha: the file of the pair \[4, 5\] holds"),
    ):
        grafts = [("mha", "swa", [5])] if "y" in str(weights) else []
        with pytest.raises(ValueError, match=f"graft_weights: {message}"):
            load_plan(plan_file(folder, "bad", some(4), grafts, graft_weights=weights))


def test_restructured_model_goes_into_a_checkpoint_and_back(folder):
    plan = load_plan(plan_file(folder, "one", some(4, 12), [("mha", "swa", [5])],
                               graft_init="inherit"))  # fmt: skip
    model, report = build_grafted(plan)
    assert report.counts()["sum"] == 4 and report.counts()["inherited"] == 4
    scramble(model)
    state = {"model": model.state_dict(), "plan": plan.architecture()}
    torch.save(state, folder / "one.pt")
    start = plan_file(folder, "start", some(4, 12), [("mha", "swa", [5])],
                      grafted_dit_ckpt_path=str(folder / "one.pt"))  # fmt: skip
    again, report = build_grafted(load_plan(start))
    assert set(report.counts()) == {"checkpoint"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    more = plan_file(folder, "more", some(4, 8, 12), [("mha", "swa", [5])],
                     grafted_dit_ckpt_path=str(folder / "one.pt"))  # fmt: skip
    _, report = build_grafted(load_plan(more))
    assert report.counts()["sum"] == 2
    assert report.sources["merges.8.bias"] == "sum"
    fresh, _ = build_grafted(plan, weights=False)
    load_trained(fresh, plan, folder / "one.pt")
    assert torch.equal(fresh.merges["12"].weight, model.merges["12"].weight)

    fewer = load_plan(plan_file(folder, "fewer", some(4), [("mha", "swa", [5])],
                                grafted_dit_ckpt_path=str(folder / "one.pt")))  # fmt: skip
    listed = r"holds the parallel pairs \[\[4, 5\], \[12, 13\]\]; .*fewer.yaml has \[\[4, 5\]\]"
    with pytest.raises(ValueError, match=listed):
        build_grafted(fewer)
    with pytest.raises(ValueError, match="another plan than .*parallel pairs .* there"):
        load_trained(fresh, fewer, folder / "one.pt")
    torch.save(model.state_dict(), folder / "bare.pt")
    with pytest.raises(ValueError, match=listed):
        load_trained(fresh, fewer, folder / "bare.pt")
    as_base = plan_file(folder, "as_base", None, base_ckpt_path=str(folder / "bare.pt"))
    with pytest.raises(ValueError, match="put it in grafted_dit_ckpt_path"):
        build_grafted(load_plan(as_base))


# -- distillation and the entries --------------------------------------------------


def test_teacher_hands_over_what_pairs_see():
    torch.manual_seed(0)
    model = tiny(depth=4, pairs=())
    x, t, y = inputs()
    drop = torch.tensor([False, True, False])
    tokens, c = model.embed(x, t, y, drop)
    states = [tokens]
    for block in model.blocks:
        states.append(block(states[-1], c))
    hooked = []
    model.blocks[0].mlp.register_forward_hook(lambda _, h, f: hooked.append((h[0], f)))
    model.blocks[0](tokens, c)
    slots = [(0, "mlp"), (1, "pair")]
    given, wanted, gates = Teacher(model, slots)(x, t, y, drop)
    assert len(model.blocks) == 3  # no block after the last one that is wanted
    torch.testing.assert_close((given[0], wanted[0]), hooked[0])
    torch.testing.assert_close(given[1], (states[1], c))
    torch.testing.assert_close(wanted[1], states[3] - states[1])
    assert torch.equal(gates[1], torch.ones_like(c))
    student = ParallelPair(tiny(depth=4, seed=2, pairs=((1, 2),)), (1, 2))
    losses, _ = Students({(1, "pair"): student}, {"pair": "l1"}, 1.0, False)(
        given[1:], wanted[1:], gates[1:]
    )
    error = states[1] + student(states[1], c) - states[3]  # output against output
    torch.testing.assert_close(losses[0], error.abs().mean(), check_dtype=False)


def test_features_of_a_teacher_are_those_after_each_pair():
    student, teacher = tiny(), tiny(pairs=())
    given = inputs()
    _, every = WithHidden(teacher)(*given)
    _, some_of = WithHidden(teacher, student.layers)(*given)
    _, own = WithHidden(student)(*given)
    assert len(own) == len(some_of) == 3 and len(every) == 5
    for found, i in zip(some_of, (1, 2, 4), strict=True):
        torch.testing.assert_close(found, every[i])


def test_pairs_and_grafts_go_through_the_entries(monkeypatch, folder):
    """Distilled in one pass, one graft inside a pair and one outside; then finetuned from there."""
    grafts = [("mha", "hyena_y", [1, 6])]
    config = plan_file(folder, "road", some(0, 4), grafts)
    training = ["--data-path", folder / "latents", "--results-dir", folder, "--log-every", 1]
    training += ["--global-batch-size", 4, "--lr", 3e-4]
    enter(monkeypatch, distill_operators, "--config", config, "--prefix", "distill", *training,
          "--num-samples", 8, "--val-samples", 4, "--max-steps", 6)  # fmt: skip
    run = folder / "distill-DiT-Mini-2"
    names = ["block00.pair.parallel", "block04.pair.parallel", "block06.mha.hyena_y"]
    assert sorted(p.stem for p in (run / "operators").iterdir()) == names
    lines = [yaml.safe_load(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("block00.pair", "block04.pair"):
        errors = [line[f"val_error/{name}"] for line in lines if f"val_error/{name}" in line]
        assert errors[-1] < errors[0], (name, errors)
    distilled = load_plan(run / "distilled.yaml")
    model, report = build_grafted(distilled)
    held = torch.load(run / "operators" / f"{names[0]}.pt", weights_only=True)["model"]
    assert {n.split(".")[0] for n in held} == {"blocks", "merges"}
    assert "blocks.1.attn.in_proj.weight" in held and "blocks.0.attn.qkv.weight" in held
    for name, tensor in held.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert report.sources["blocks.6.attn.in_proj.weight"] == "graft_weights"
    assert report.sources["blocks.2.attn.qkv.weight"] == "base" and not report.counts().get("fresh")
    pairs, _ = build_grafted(distilled, pairs=True)  # as layer selection holds it
    state = pairs.state_dict()
    assert torch.equal(state["blocks.1.attn.graft.in_proj.weight"],
                       held["blocks.1.attn.in_proj.weight"])  # fmt: skip
    assert torch.equal(state["blocks.1.attn.original.qkv.weight"],
                       torch.load(folder / "base.pt")["blocks.1.attn.qkv.weight"])  # fmt: skip

    enter(monkeypatch, finetune_tinyfusion, "--config", run / "distilled.yaml", "--prefix", "tune",
          *training, "--max-steps", 2, "--distill")  # fmt: skip
    tuned = folder / "tune-DiT-Mini-2"
    again, report = build_grafted(load_plan(tuned / "finetuned.yaml"))
    assert set(report.counts()) == {"checkpoint"}
    ema = torch.load(tuned / "checkpoints" / "0000002.pt", weights_only=True)["ema"]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, ema[name]), name
    assert not torch.equal(ema["merges.0.weight"], held["merges.0.weight"])


def test_pair_file_of_other_operators_is_refused(folder):
    state = ParallelPair(build_grafted(load_plan(plan_file(folder, "own", some(4))))[0], (4, 5))
    torch.save({"model": state.state_dict()}, folder / "pair.pt")
    weights = {"graft_weights": {4: {"pair": str(folder / "pair.pt")}}}
    other = plan_file(folder, "other", some(4), [("mha", "swa", [5])], **weights)
    with pytest.raises(ValueError, match="holds 'mha' in the mha slot of block 5; .* wants 'swa'"):
        build_grafted(load_plan(other))
    lacking = {n: t for n, t in state.state_dict().items() if n != "merges.4.bias"}
    torch.save(lacking, folder / "pair.pt")
    with pytest.raises(ValueError, match="tensor merges.4.bias is missing"):
        build_grafted(load_plan(plan_file(folder, "own", some(4), **weights)))


def test_pairs_are_sampled(monkeypatch, tmp_path):
    enter(monkeypatch, sample_ddp_finetuned, "--config", CONFIGS / "mini/parallel_pairs.yaml",
          "--sample-dir", tmp_path, "--folder-name", "one", "--num-fid-samples", 1,
          "--num-sampling-steps", 2, "--sampler", "ddim")  # fmt: skip
    assert len(list((tmp_path / "one").glob("*.png"))) == 1
