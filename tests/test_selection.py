"""Graft pairs and layer gates: golden cases, options, draws, gradients, errors."""

import copy
import math
from itertools import product

import pytest
import torch
from gates import train_gates

from models.dit import DiT
from models.operators import build_operator
from models.selection import GatedDiT, GraftChoice, GraftPair, LayerGates, settle

TOLERANCE = {"selection": 5e-6, "selection_strong": 5e-5}


def relative_error(mine, golden):
    golden = torch.as_tensor(golden)
    assert mine.shape == golden.shape
    return ((mine - golden).abs().max() / golden.abs().max()).item()


def own_name(name):
    """A golden tensor name is blocks.i.attn.* or blocks.i.attn_grafting.*; ours are in a pair."""
    name = name.replace(".attn.original.", ".attn.")
    return name.replace(".attn.graft.", ".attn_grafting.")


def golden_model(case, fill, seed):
    sizes = dict(case["construct"])
    groups, pinned = sizes.pop("groups"), sizes.pop("pinned_layers")
    model = DiT(**sizes).eval()
    candidate = case["candidate"]
    for i in candidate["blocks"]:
        graft = build_operator(candidate["operator"], **candidate["construct"])
        model.blocks[i].attn = GraftPair(model.blocks[i].attn, graft)
    starts = [sum(size for _, size in groups[:g]) for g in range(len(groups))]
    gates = LayerGates(
        sizes["depth"],
        groups=",".join(f"{keep}:{size}" for keep, size in groups),
        pinned=[start + p for start, inside in zip(starts, pinned, strict=True) for p in inside],
    )
    assert all((gate == case["initial_gate_value"]).all() for gate in gates.gumbel_gates)
    names = {own_name(n): list(v.shape) for n, v in model.state_dict().items()}
    names |= {n: list(v.shape) for n, v in gates.state_dict().items()}
    assert names == case["state_dict"]
    fill.fill_(model, seed, case["fill"]["scale"], rename=own_name)
    fill.fill_(gates, seed, case["fill"]["scale"])
    return model, gates


@pytest.mark.parametrize("name", TOLERANCE)
def test_golden_selection(golden, name):
    doc, arrays, fill = golden("selection")
    case, seed = doc["cases"][name], doc["seed"]
    model, gates = golden_model(case, fill, seed)
    x = fill.input_float("input.x", case["inputs"][0]["shape"], seed)
    t, y = (torch.tensor(case["values"][key]) for key in "ty")

    for g, table in enumerate(gates.options):
        assert table.tolist() == case["options"][g]
        assert table.tolist() == arrays[f"{name}.options_{g}"].tolist()

    for label, chosen in case["forced"].items():
        parts = [gates.options[g][choice] for g, choice in enumerate(chosen)]  # 1 or B, M
        keep = torch.cat(parts, dim=-1)
        out = model(x, t, y, keep=keep.expand(len(x), -1))
        assert relative_error(out, arrays[f"{name}.{label}"]) < TOLERANCE[name], label
        if len(keep) == 1:  # one mask for the whole batch gives the same
            torch.testing.assert_close(model(x, t, y, keep=keep[0]), out)
    soft = [torch.tensor(w) @ gates.options[g] for g, w in enumerate(case["soft_weights"])]
    out = model(x, t, y, keep=torch.cat(soft))
    assert relative_error(out, arrays[f"{name}.soft"]) < TOLERANCE[name]

    expected = case["filled_gates"]
    assert gates.decide() == expected["keeps_attention"]
    for g, gate in enumerate(gates.gumbel_gates):
        assert relative_error(gate[0], expected["logits"][g]) < 1e-6
        assert gate[0].argmax() == expected["chosen_option"][g]
    for scaling, confidence in expected["confidence_by_scaling"].items():
        for p, c in zip(gates.probabilities(float(scaling)), confidence, strict=True):
            assert p.sum().item() == pytest.approx(1)
            assert p.max().item() == pytest.approx(c, abs=1e-6)
    for label, kept in case["keeps_attention"].items():
        with torch.no_grad():
            for g, gate in enumerate(gates.gumbel_gates):
                gate.zero_()[0, case["forced"][label][g]] = 1
        assert gates.decide() == kept
        mask = gates.keep_mask()
        assert [i for i, m in enumerate(mask.tolist()) if m == 0] == case["grafted"][label]


def test_draws_are_exactly_one_hot_and_valid():
    torch.manual_seed(0)
    gates = LayerGates(28, "2:4", pinned=range(0, 28, 4))
    with torch.no_grad():  # uneven, so that the soft weights are no round numbers
        for gate in gates.gumbel_gates:
            gate.normal_(std=0.01)
    for tau in (4.0, 0.7, 0.1):
        keep = gates.draw(tau, 100, batch_size=256)
        assert keep.shape == (256, 28)
        assert ((keep == 0) | (keep == 1)).all()
        assert (keep.view(256, 7, 4).sum(-1) == 2).all() and (keep[:, ::4] == 1).all()
    assert len({tuple(row) for row in keep.tolist()}) > 32  # every sample draws its own


def test_draw_follows_the_noise_it_is_given():
    gates = LayerGates(8, "1:2,2:4,1:2")
    uniform = [torch.full((3, n), 0.5) for n in (2, 6, 2)]
    for sample, (a, b, c) in enumerate([(0, 3, 1), (1, 5, 0), (0, 0, 0)]):
        for u, option in zip(uniform, (a, b, c), strict=True):
            u[sample, option] = 0.9
    keep = gates.draw(1.0, 1.0, uniform)
    assert keep.tolist() == [
        [1, 0, 0, 1, 1, 0, 0, 1],
        [0, 1, 0, 0, 1, 1, 1, 0],
        [1, 0, 1, 1, 0, 0, 1, 0],
    ]
    with torch.no_grad():  # a logit can outweigh the noise, by the scaling
        gates.gumbel_gates[1][0, 2] += 0.1
    assert gates.draw(1.0, 100.0, uniform)[0].tolist() == [1, 0, 1, 0, 0, 1, 0, 1]


def test_draw_frequencies_follow_the_probabilities():
    torch.manual_seed(0)
    gates = LayerGates(4, "1:4")
    with torch.no_grad():
        gates.gumbel_gates[0].copy_(torch.tensor([[0.0, 0.01, 0.02, -0.01]]))
    shares = gates.draw(0.5, 100, batch_size=20_000).mean(0)
    torch.testing.assert_close(shares, gates.probabilities(100)[0], atol=0.015, rtol=0)


def test_gradient_is_that_of_the_soft_choice():
    torch.manual_seed(0)
    gates = LayerGates(4, "2:4", pinned=[0])
    uniform = [torch.rand(5, 3)]
    weights = torch.randn(5, 4)
    (gates.draw(0.7, 10, uniform) * weights).sum().backward()
    logits = gates.gumbel_gates[0].detach().clone().requires_grad_()
    noise = -torch.log(-torch.log(uniform[0]))
    soft = ((logits * 10 + noise) / 0.7).softmax(-1) @ gates.options[0]
    (soft * weights).sum().backward()
    torch.testing.assert_close(gates.gumbel_gates[0].grad, logits.grad)
    assert logits.grad.abs().max() > 0


def paired_model():
    """4 blocks with random weights; all but the first hold a pair."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=4, num_heads=4, num_classes=5)
    for i in (1, 2, 3):
        graft = build_operator("hyena_y", d_model=32)
        model.blocks[i].attn = GraftPair(model.blocks[i].attn, graft)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    return model


def test_gradients_reach_logits_and_both_branches():
    model = paired_model()
    gates = LayerGates(4, "2:4", pinned=[0])
    keep = gates.draw(1.0, 10, batch_size=8)
    out = model(torch.randn(8, 4, 8, 8), torch.arange(8) * 100, torch.arange(8) % 5, keep=keep)
    out.square().sum().backward()
    assert (gates.gumbel_gates[0].grad != 0).all()
    for i in (1, 2, 3):
        assert model.blocks[i].attn.original.qkv.weight.grad.abs().max() > 0
        assert model.blocks[i].attn.graft.in_proj.weight.grad.abs().max() > 0


def test_gated_model_draws_in_training_and_decides_in_eval():
    gated = GatedDiT(paired_model(), LayerGates(4, "2:4", pinned=[0]))
    gates, dit = gated.gates, gated.dit
    with torch.no_grad():
        gates.gumbel_gates[0][0, 2] += 0.01  # most likely: keep 0 and 3
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 1, 4])
    options = {"tau": 1.0, "scaling": 1.0, "drop": torch.tensor([True, False, False])}
    uniform = torch.tensor([[0.9, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.9]])
    drawn = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])
    decided = torch.tensor([1.0, 0, 0, 1])
    gated.train()
    out = gated(x, t, y, uniform=uniform, **options)
    assert torch.equal(out, dit(x, t, y, keep=drawn, drop=options["drop"]))
    with pytest.raises(ValueError, match="pass uniform, tau and scaling"):
        gated(x, t, y)
    gated.eval()
    expected = dit(x, t, y, keep=decided)
    assert torch.equal(gated(x, t, y), expected)
    assert torch.equal(gated(x, t, y, uniform=uniform, tau=1.0, scaling=1.0), expected)
    assert not torch.allclose(expected[:2], dit(x, t, y, keep=drawn)[:2])


def test_settling_leaves_the_chosen_operators():
    model = paired_model().eval()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([0, 4])
    expected = model(*inputs, keep=torch.tensor([1.0, 0, 1, 0]))
    pairs = [block.attn for block in model.blocks]
    settle(model, {0: 0, 1: 1, 2: 0, 3: 1})
    chosen = [block.attn for block in model.blocks]
    assert chosen == [pairs[0], pairs[1].graft, pairs[2].original, pairs[3].graft]
    torch.testing.assert_close(model(*inputs), expected)


VARIANTS = [(1, 2), (1,), (), (2, 1)]  # by block: two grafts, one, none (pinned), two


def test_options_of_several_variants_are_all_assignments_under_the_budget():
    gates = LayerGates(8, "2:4", pinned=[5], variants=VARIANTS * 2)
    assert gates.pinned == (2, 5, 6) and gates.variants == 2
    for g, pinned in enumerate([(2,), (1, 2)]):
        legal = [(0,) if i in pinned else (0, *v) for i, v in enumerate(VARIANTS)]
        expected = {row for row in product(*legal) if row.count(0) == 2}
        rows = [tuple(row) for row in gates.choices[g].tolist()]
        assert len(rows) == len(set(rows)) and set(rows) == expected
        assert torch.equal(gates.options[g], (gates.choices[g] == 0).float())
    with pytest.raises(ValueError, match=r"group 0 has 184756 ways"):
        LayerGates(20, "10:20")
    with pytest.raises(ValueError, match=r"group 0 has 189190144 ways"):  # C(20,10) * 2**10
        LayerGates(20, "10:20", variants=[(1, 2)] * 20)
    assert len(LayerGates(14, "7:14").options[0]) == math.comb(14, 7)


def open_model():
    """Variant 1 grafts attention in 0, 1, 3; variant 2 attention in 0 and the MLP in 3."""
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=4, num_heads=4, num_classes=5)

    def choice(original, operators, takes):
        return GraftChoice(original, [build_operator(n, d_model=32) for n in operators], takes)

    blocks = model.blocks
    blocks[0].attn = choice(blocks[0].attn, ["hyena_y", "hyena_x"], [0, 1])
    blocks[1].attn = choice(blocks[1].attn, ["hyena_y"], [0, None])
    blocks[3].attn = choice(blocks[3].attn, ["hyena_se"], [0, None])
    blocks[3].mlp = choice(blocks[3].mlp, ["mlp"], [None, 0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    return model.eval()


def test_drawn_variants_run_as_if_they_were_alone():
    """Every assignment of one draw a sample equals the settled model's output, exactly one-hot."""
    gates = LayerGates(4, "2:4", variants=VARIANTS)
    keep = gates.draw(1.0, 100, batch_size=64)
    assert keep.shape == (64, 4, 3) and set(keep.unique().tolist()) == {0.0, 1.0}
    assert (keep.sum(-1) == 1).all() and (keep[:, :, 0].sum(1) == 2).all()
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.tensor([2])
    outputs = []
    for row in gates.choices[0]:
        shares = torch.nn.functional.one_hot(row, 3).float()[None]
        mixed = open_model()(x, t, y, keep=shares)
        alone = open_model()
        settle(alone, dict(enumerate(row.tolist())))
        torch.testing.assert_close(mixed, alone(x, t, y))
        outputs.append(mixed)
    assert len({o.sum().item() for o in outputs}) == len(outputs)
    with torch.no_grad():
        gates.gumbel_gates[0][0, 3] += 0.01
    assert gates.chosen() == gates.choices[0][3].tolist()
    assert gates.decide() == [b for b, v in enumerate(gates.chosen()) if v == 0]
    assert torch.equal(gates.keep_mask().argmax(-1)[0], gates.choices[0][3])
    with pytest.raises(ValueError, match=r"pass keep \[B, depth, 3\]"):
        open_model()(x, t, y, keep=torch.ones(4))


def test_gradient_reaches_every_variant():
    model, gates = open_model(), LayerGates(4, "1:4", variants=[(1, 2), (1,), (1,), (1, 2)])
    keep = gates.draw(1.0, 10, batch_size=64)  # enough that each is drawn
    t, y = torch.arange(64) * 10, torch.arange(64) % 5
    model(torch.randn(64, 4, 8, 8), t, y, keep=keep).square().sum().backward()
    assert (gates.gumbel_gates[0].grad != 0).all()
    choices = [m for m in model.modules() if isinstance(m, GraftChoice)]
    for module in [m for c in choices for m in (c.original, *c.grafts)]:
        assert all(p.grad.abs().max() > 0 for p in module.parameters())


class Noisy(torch.nn.Module):
    """An operator that works, plus noise that no training of the gates can remove."""

    def __init__(self, operator, level):
        super().__init__()
        self.operator, self.level = operator, level

    def forward(self, x):
        return self.operator(x) + self.level * torch.randn_like(x)


@pytest.mark.parametrize("seed", range(5))
def test_selection_keeps_the_blocks_whose_graft_is_broken(seed):
    """The published settings of the gates; two broken grafts in each group of four."""
    torch.manual_seed(seed)
    dit = DiT(input_size=8, hidden_size=32, depth=8, num_heads=4, num_classes=5)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    teacher = copy.deepcopy(dit).eval()
    broken = sorted(g * 4 + b for g in range(2) for b in torch.randperm(4)[:2].tolist())
    for i, block in enumerate(dit.blocks):
        graft = Noisy(copy.deepcopy(block.attn), 0.5 if i in broken else 0.0)
        block.attn = GraftPair(block.attn, graft)
    gated = GatedDiT(dit.requires_grad_(False), LayerGates(8, "2:4")).train()
    train_gates(gated, teacher)
    assert gated.gates.decide() == broken


def test_pair_mixes_and_needs_a_choice():
    pair = GraftPair(torch.nn.Identity(), torch.nn.Tanh())
    x = torch.randn(3, 5, 2)
    assert torch.equal(pair(x, torch.tensor(1.0)), x)
    assert torch.equal(pair(x, torch.tensor([0, 1, 0]))[[0, 2]], x[[0, 2]].tanh())
    torch.testing.assert_close(pair(x, torch.tensor(0.25)), 0.25 * x + 0.75 * x.tanh())
    assert pair(x.bfloat16(), torch.tensor(0.25)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="pass keep"):
        pair(x)


def test_groups_cover_the_depth():
    gates = LayerGates(28)
    assert gates.spans == [(i, i + 4) for i in range(0, 28, 4)]
    assert [len(t) for t in gates.options] == [6] * 7
    assert [n for n, _ in gates.named_parameters()] == [f"gumbel_gates.{g}" for g in range(7)]
    assert [n for n in gates.state_dict()] == [f"gumbel_gates.{g}" for g in range(7)]
    gates = LayerGates(7, "2:4,1:3", pinned=(3, 4))
    assert gates.spans == [(0, 4), (4, 7)]
    assert gates.options[0].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert gates.options[1].tolist() == [[1, 0, 0]]
    table = LayerGates(5, "2:5").options[0]
    assert len(table) == math.comb(5, 2)
    kept = [[i for i, m in enumerate(row) if m] for row in table.tolist()]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("depth", "groups", "pinned", "words"),
    [
        (28, "2:5", (), "5 does not divide the depth 28.*choose M from"),
        (28, "2:4,1:4", (), "cover 8 blocks but the model has 28"),
        (28, "5:4", (), "keep 5 of 4"),
        (28, "2-4", (), "'2-4' is not N:M"),
        (28, "2:0", (), "keep 2 of 0"),
        (8, "1:4", (4, 6), "group 1 keeps 1 of 4 blocks but 2 of them are pinned"),
        (8, "2:4", (8,), r"pinned blocks \[8\].*0..7"),
        (28, "14:28", (), "group 0 has 40116600 ways.*smaller groups"),
    ],
)
def test_what_does_not_fit_is_refused(depth, groups, pinned, words):
    with pytest.raises(ValueError, match=words):
        LayerGates(depth, groups, pinned)


def test_draw_checks_its_arguments():
    gates = LayerGates(8, "2:4")
    with pytest.raises(ValueError, match="tau 0"):
        gates.draw(0, 1)
    with pytest.raises(ValueError, match=r"uniform has shapes \[\(3, 6\)\]"):
        gates.draw(1.0, 1.0, [torch.rand(3, 6)])
