"""Gates that choose which pairs of blocks become parallel: the open model, its files, the entry."""

import copy
import json
import shutil

import pytest
import torch
from entries import refused_here
from gates import train_gates
from restructured import enter, fill, inputs, plan_file, scramble, some, tiny

import prune_by_learning
from models.grafting import build_grafted, build_open_pairs, gated_in, load_plan, new_parts
from models.restructure import ParallelPair, new_merge
from models.selection import GatedDiT, LayerGates, PairChoice, settle
from training.lora import add_lora

PAIRS = ((0, 1), (3, 4))


def opened(own=(), seed=0):
    """`tiny`, its pairs open; of `own`, by their first block, other blocks than run in sequence."""
    model, other = tiny(seed=seed), tiny(seed=seed + 7)
    for a, b in PAIRS:
        blocks = {i: other.blocks[i] for i in (a, b)} if a in own else {}
        model.merges[str(a)] = PairChoice(model.merges[str(a)], blocks)
    return model


def settled(parallel, own=()):
    model = opened(own)
    settle(model, {a: int(a in parallel) for a, _ in PAIRS})
    return model


# -- the model -------------------------------------------------------------------


@pytest.mark.parametrize("own", [(), (3,)])
def test_an_open_pair_runs_in_sequence_or_in_parallel(own):
    model, (x, t, y) = opened(own), inputs(batch=4)
    keep = torch.tensor([[1, 9, 9, 1, 9], [0, 9, 9, 1, 9], [1, 9, 9, 0, 9], [0, 9, 9, 0, 9]])
    y = torch.tensor([0, 2, 4, 5])
    t = torch.tensor([1, 200, 500, 900])
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    out = model(x, t, y, keep=keep)
    for sample, parallel in enumerate([(), (0,), (3,), (0, 3)]):
        alone = settled(parallel, own)
        assert len(alone.layers) == 5 - len(parallel)
        given = (v[sample : sample + 1] for v in (x, t, y))
        torch.testing.assert_close(out[sample : sample + 1], alone(*given), rtol=1e-11, atol=1e-11)
    # two samples and then four, so that their number is dynamic, as that of keep is not
    torch.compile(tiny(), fullgraph=True, backend="eager")(*inputs())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, y, keep=keep), out)
    plain = tiny()
    plain.merges.clear()
    torch.testing.assert_close(settled((), own)(x, t, y), plain(x, t, y))
    if not own:
        torch.testing.assert_close(settled((0, 3))(x, t, y), tiny()(x, t, y))
    with pytest.raises(ValueError, match="pass keep"):
        model(x, t, y)


def test_shares_between_mix_what_the_pair_adds():
    model, given = opened(), inputs()
    x, c = model.embed(*given)
    first, second = model.blocks[:2]
    in_sequence = second(first(x, c), c)
    at_once = x + ParallelPair(tiny(), (0, 1))(x, c)
    keep = torch.tensor([0.25, 1, 1, 1, 1])
    found, _ = model.run_blocks(*given, keep=keep)
    x = 0.25 * in_sequence + 0.75 * at_once
    settle(model, {3: 0})
    for block in model.blocks[2:]:
        x = block(x, c)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


def test_gradient_reaches_gates_merges_and_both_kinds_of_blocks():
    model = opened(own=(3,)).float().train()
    gated = GatedDiT(model, LayerGates(5, "1:2", pairs=PAIRS))
    t, y = torch.arange(32) * 30, torch.arange(32) % 5
    torch.manual_seed(0)
    uniform = torch.rand(32, 2).clamp(min=1e-6)
    out = gated(torch.randn(32, 4, 8, 8), t, y, uniform=uniform, tau=1.0, scaling=1.0)
    out.square().sum().backward()
    assert (gated.gates.gumbel_gates[0].grad != 0).all()
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks", "merges")):
            assert parameter.grad.abs().max() > 0, name


def test_low_rank_updates_leave_merges_and_grafts_whole(folder):
    grafts = [("mha", "swa", [1, 9])]
    plan = load_plan(plan_file(folder, "lora", some(0, 4), grafts, graft_init="inherit"))
    model, _ = build_open_pairs(plan, 0)
    names = add_lora(model, 2, 4, exclude=new_parts(plan, "pairs"))
    assert "blocks.0.attn.qkv" in names and "blocks.1.mlp.fc1" in names
    assert not [n for n in names if "merge" in n or n.startswith(("blocks.1.attn", "blocks.9.att"))]


# -- the gates -------------------------------------------------------------------


def test_gates_of_pairs_speak_of_first_blocks():
    pairs = ((0, 1), (3, 4), (5, 6), (8, 9))
    gates = LayerGates(10, "1:2", pinned=(3,), pairs=pairs)
    assert [o.tolist() for o in gates.options] == [[[0, 1]], [[1, 0], [0, 1]]]
    assert gates.settled() == {0: 1, 3: 0}
    with torch.no_grad():
        gates.gumbel_gates[1][0, 1] += 1
    assert gates.decide() == [3, 8] and gates.taking(1) == [0, 5] and gates.pinned == (3,)
    assert gates.keep_mask().tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    torch.manual_seed(0)
    drawn = gates.draw(4.0, 1.0, batch_size=64)
    assert drawn.shape == (64, 10)
    assert (drawn[:, [1, 2, 3, 4, 6, 7, 9]] == 1).all() and (drawn[:, 0] == 0).all()
    assert torch.equal(drawn[:, 5] + drawn[:, 8], torch.ones(64))
    assert 0 < drawn[:, 5].sum() < 64
    whole = LayerGates(28, "2:7", pairs=tuple((a, a + 1) for a in range(0, 28, 2)))
    assert [len(o) for o in whole.options] == [21, 21]


@pytest.mark.parametrize(
    ("groups", "pinned", "words"),
    [
        ("2:4", (), r"4 does not divide the 14 pairs: choose M from \[1, 2, 7, 14\]"),
        ("1:2,1:4", (), "cover 6 pairs but the model has 14"),
        ("3:2", (), "cannot keep 3 of 2 pairs"),
        ("1:2", (5,), r"pinned pairs \[5\]: no pair begins at these blocks; legal: \[0, 2, 4"),
        ("1:2", (4, 6), "group 1 keeps 1 of 2 pairs but 2 of them are pinned"),
    ],
)
def test_what_does_not_fit_is_refused_in_pairs(groups, pinned, words):
    with pytest.raises(ValueError, match=words):
        LayerGates(28, groups, pinned, pairs=tuple((a, a + 1) for a in range(0, 28, 2)))


@pytest.mark.parametrize("seed", range(2))
def test_gates_keep_the_pairs_that_do_worst_in_parallel(seed):
    """Blocks of two pairs do next to nothing, so that these two lose nothing in parallel."""
    torch.manual_seed(seed)
    pairs = tuple((a, a + 1) for a in range(0, 8, 2))
    dit = tiny(depth=8, seed=seed, pairs=pairs).float()
    weak = [4 * g + 2 * int(torch.randint(2, ())) for g in range(2)]  # one in each group
    with torch.no_grad():
        for a in weak:
            for block in dit.blocks[a : a + 2]:
                block.adaLN_modulation[1].weight.mul_(0.02)
                block.adaLN_modulation[1].bias.mul_(0.02)
    teacher = copy.deepcopy(dit)
    teacher.merges.clear()
    for a, _ in pairs:
        dit.merges[str(a)] = PairChoice(new_merge(dit.hidden_size))
    gated = GatedDiT(dit.requires_grad_(False), LayerGates(8, "1:2", pairs=pairs)).train()
    train_gates(gated, teacher)
    assert gated.gates.taking(1) == weak


# -- files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_latents):
    return fill(tmp_path_factory.mktemp("pair_choice"), write_latents)


def pair_file(folder, plan, first):
    """The file of a distilled pair: as it starts, every tensor another one."""
    torch.manual_seed(first)
    pair = scramble(ParallelPair(build_grafted(plan)[0], (first, first + 1)))
    torch.save({"model": pair.state_dict()}, folder / f"pair{first}.pt")
    return pair.state_dict()


def test_a_distilled_pair_has_its_own_blocks_and_the_others_share(folder):
    bare = load_plan(plan_file(folder, "bare", some(4, 8)))
    held, base = pair_file(folder, bare, 4), torch.load(folder / "base.pt")
    weights = {"graft_weights": {4: {"pair": str(folder / "pair4.pt")}}}
    plan = load_plan(plan_file(folder, "distilled", some(4, 8), **weights))
    model, report = build_open_pairs(plan, 0)
    state = model.state_dict()
    for name, tensor in base.items():
        assert torch.equal(state[name], tensor), name
    for name, tensor in held.items():
        place = name.replace("merges.4.", "merges.4.merge.")
        place = f"merges.4.{name}" if name.startswith("blocks") else place
        assert torch.equal(state[place], tensor) and report.sources[place] == "graft_weights"
    assert not model.merges["8"].blocks and report.sources["merges.8.merge.weight"] == "sum"
    assert report.sources.keys() == state.keys() and not report.dropped
    assert set(report.files) == {"base", "graft_weights[4].pair"}
    given = torch.randn(2, 4, 8, 8), torch.tensor([20, 700]), torch.tensor([0, 2])
    keep = torch.ones(28)
    keep[[4, 8]] = 0
    whole, _ = build_grafted(plan)
    torch.testing.assert_close(model.eval()(*given, keep=keep), whole.eval()(*given))
    keep[[4, 8]] = 1
    sequential, _ = build_grafted(plan.plain())
    torch.testing.assert_close(model(*given, keep=keep), sequential.eval()(*given))


def test_pairs_that_cannot_be_in_question_are_refused(folder):
    grafts = [("mha", "swa", [5])]
    plan = load_plan(plan_file(folder, "both", some(4, 8), grafts, graft_init="inherit"))
    whole, _ = build_grafted(plan)
    torch.save({"model": whole.state_dict(), "plan": plan.architecture()}, folder / "whole.pt")
    trained = {"grafted_dit_ckpt_path": str(folder / "whole.pt")}
    held = plan_file(folder, "trained", some(4, 8), grafts, **trained)
    with pytest.raises(ValueError, match=r"trained.yaml: .*whole.pt holds the pair \[4, 5\] "):
        build_open_pairs(load_plan(held), 0)
    pair_file(folder, plan, 4)
    weights = {"graft_weights": {4: {"pair": str(folder / "pair4.pt")}}}
    lonely = load_plan(plan_file(folder, "lonely", some(4), grafts, **weights))
    with pytest.raises(ValueError, match="lonely.yaml: graft_weights: 4: .*holds swa of block 5"):
        build_open_pairs(lonely, 0)
    alike, _ = build_grafted(plan.with_pairs(()))
    alike_plan = plan.with_pairs(()).architecture()
    torch.save({"model": alike.state_dict(), "plan": alike_plan}, folder / "alike.pt")
    begun = {"grafted_dit_ckpt_path": str(folder / "alike.pt"), **weights}
    both = load_plan(plan_file(folder, "ok", some(4), grafts, **begun))
    report = build_open_pairs(both, 0)[1]
    assert report.sources["blocks.5.attn.Wqkv.weight"] == "checkpoint"
    assert report.sources["merges.4.blocks.5.attn.Wqkv.weight"] == "graft_weights"
    with pytest.raises(ValueError, match="--candidates: .* chosen from one"):
        gated_in([plan, lonely], "pairs")
    with pytest.raises(ValueError, match="sequence.yaml: has no parallel pairs to choose from"):
        gated_in([load_plan(plan_file(folder, "sequence", None, grafts))], "pairs")


# -- the entry -------------------------------------------------------------------

STEPS = 4


def learn(monkeypatch, folder, config, name, *flags):
    enter(monkeypatch, prune_by_learning, "--config", config, "--data-path", folder / "latents",
          "--results-dir", folder, "--prefix", name, "--max-steps", STEPS, "--ckpt-every", 2,
          "--log-every", 1, "--global-batch-size", 4, "--gate-lr", 0.01, "--delta-w", "--lora",
          *flags)  # fmt: skip
    run = folder / f"{name}-DiT-Mini-2"
    return run, json.loads((run / "selection.json").read_text())


def test_selection_of_pairs_from_plan_to_merged_model_and_resumed(monkeypatch, folder):
    bare = load_plan(plan_file(folder, "bare", "parallel_pairs"))
    files = {}
    for first in range(0, 28, 2):
        pair_file(folder, bare, first)
        files[first] = {"pair": str(folder / f"pair{first}.pt")}
    files.pop(2)
    config = plan_file(folder, "fourteen", "parallel_pairs", graft_weights=files)
    merged = folder / "merged" / "model.pt"
    merged.parent.mkdir()
    flags = ["--groups", "1:2,3:7,5:5", "--pin", 0, "--save-model", merged]
    run, answer = learn(monkeypatch, folder, config, "choose", *flags)
    assert answer["slots"] == ["pair"] and answer["groups_spec"] == "1:2,3:7,5:5"
    assert [g["blocks"] for g in answer["groups"]] == [
        [0, 2], list(range(4, 18, 2)), list(range(18, 28, 2)),
    ]  # fmt: skip
    assert len(answer["kept"]) == 9 and {0, 18, 20, 22, 24, 26} <= set(answer["kept"])
    assert answer["pinned"] == [0] and 2 in answer["grafted"]
    assert sorted(answer["kept"] + answer["grafted"]) == list(range(0, 28, 2))
    parallel = answer["pairs"]["parallel"]
    assert parallel == [[a, a + 1] for a in answer["grafted"]]
    assert answer["pairs"]["sequential"] == [[a, a + 1] for a in answer["kept"]]
    assert len(answer["groups"][1]["options"]) == 35
    assert sum(o["probability"] for o in answer["groups"][1]["options"]) == pytest.approx(1)
    assert (run / "trajectory.png").read_bytes().startswith(b"\x89PNG")
    assert answer["settings"]["choose"] == "pairs"
    assert "graft_weights[4].pair" in answer["weights"]

    chosen = load_plan(run / "selected.yaml")
    assert [list(pair) for pair in chosen.parallel_pairs] == parallel
    assert {block for block, _ in chosen.graft_weights} == set(answer["grafted"]) - {2}
    model, report = build_grafted(chosen)
    assert len(model.layers) == 28 - len(parallel)
    assert report.sources["merges.2.weight"] == "sum"

    # what --save-model wrote is the model of the averages under the most likely choice
    started, report = build_grafted(load_plan(merged.with_suffix(".yaml")))
    assert set(report.counts()) == {"checkpoint"}
    gates = LayerGates(28, "1:2,3:7,5:5", [0], pairs=bare.parallel_pairs)
    again, _ = build_open_pairs(load_plan(config), 0)
    settle(again, gates.settled())
    add_lora(again, 8, 16, exclude=new_parts(bare, "pairs"))
    gated = GatedDiT(again, gates).eval()
    ema = torch.load(run / "checkpoints" / f"{STEPS:07d}.pt", weights_only=True)["ema"]
    gated.load_state_dict(ema, strict=True)
    given = torch.randn(2, 4, 8, 8), torch.tensor([20, 700]), torch.tensor([0, 2])
    torch.testing.assert_close(started.eval()(*given), gated(*given), rtol=1e-4, atol=1e-5)
    base, _ = build_grafted(bare.plain())
    assert not torch.equal(started.blocks[18].mlp.fc1.weight, base.blocks[18].mlp.fc1.weight)

    # stopped after two steps and resumed, it ends with the same bits
    stopped = folder / "stopped-DiT-Mini-2"
    shutil.copytree(run, stopped)
    (stopped / "checkpoints" / f"{STEPS:07d}.pt").unlink()
    (stopped / "checkpoints" / "latest").unlink()
    flags[-1] = folder / "merged" / "again.pt"
    _, resumed = learn(monkeypatch, folder, config, "stopped", *flags, "--resume", "auto")
    assert resumed["groups"] == answer["groups"]
    ends = [torch.load(r / "checkpoints" / f"{STEPS:07d}.pt", weights_only=True)["model"]
            for r in (run, stopped)]  # fmt: skip
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_grafts_stay_where_pairs_are_chosen(monkeypatch, folder):
    grafts = [("mha", "swa", [1, 9]), ("mlp", "mlp", [8])]
    config = plan_file(folder, "chosen", some(0, 8), grafts, graft_init="inherit")
    merged = folder / "grafted.pt"
    flags = ["--choose", "pairs", "--save-model", merged]
    with pytest.raises(ValueError, match="--save-model x: name a file"):
        learn(monkeypatch, folder, config, "grafted", "--save-model", "x")
    run, answer = learn(monkeypatch, folder, config, "grafted", *flags)
    assert answer["groups_spec"] == "1:2" and len(answer["kept"]) == len(answer["grafted"]) == 1
    for file in (run / "selected.yaml", merged.with_suffix(".yaml")):
        plan = load_plan(file)
        assert plan.grafted_blocks("mha") == (1, 9) and plan.grafted_blocks("mlp") == (8,)
        assert plan.parallel_pairs == (tuple(answer["pairs"]["parallel"][0]),)
    _, report = build_grafted(load_plan(merged.with_suffix(".yaml")))
    assert set(report.counts()) == {"checkpoint"}
    # without the flag, the grafts are in question and the pairs are not
    config = plan_file(folder, "quiet", some(0), grafts, graft_init="inherit")
    run, answer = learn(monkeypatch, folder, config, "quiet", "--groups", "26:28")
    assert answer["slots"] == ["mha", "mlp"] and "pairs" not in answer
    assert load_plan(run / "selected.yaml").parallel_pairs == ((0, 1),)


def test_flags_that_do_not_fit_are_one_line(folder):
    config = plan_file(folder, "flags", "parallel_pairs")
    common = ["--config", config, "--data-path", folder / "latents", "--results-dir", folder]
    for flags, words in (
        (["--candidates", config], "--candidates: grafts of several YAMLs compete for a block"),
        (["--pin", 5], "pinned pairs [5]: no pair begins at these blocks; legal: [0, 2, 4"),
        (["--groups", "2:4"], "groups '2:4': 4 does not divide the 14 pairs"),
        (["--choose", "grafts"], "has no grafts; selection chooses between them, or with --choose"),
    ):
        said = refused_here("prune_by_learning.py", *common, "--prefix", "no", *flags)
        assert words in said and said.count("\n") == 1, said
