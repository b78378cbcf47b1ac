"""The DiT against golden outputs, its presets, initialisation, guidance and label dropout."""

import pytest
import torch
from timm.models.vision_transformer import PatchEmbed

from models.dit import PRESETS, DiT, Patches, build_dit
from models.operators import build_operator
from models.presets import latent_size
from models.selection import GraftPair

TINY = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


def relative_error(mine, golden):
    golden = torch.as_tensor(golden)
    assert mine.shape == golden.shape
    return ((mine - golden).abs().max() / golden.abs().max()).item()


def shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def tiny_model(**changes):
    """A small model in eval mode whose output is not zero."""
    torch.manual_seed(0)
    model = DiT(**TINY | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_inputs(batch=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=g)
    return x, torch.arange(batch) * 200, torch.arange(batch) % 5


@pytest.mark.parametrize("P", [1, 2, 4])
def test_patches_are_those_of_timm(P):
    """Values and gradients in float64, also of a latent that is not contiguous."""
    torch.manual_seed(0)
    ours, theirs = (kind(8, P, 3, 12).double() for kind in (Patches, PatchEmbed))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 8, 3, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    ends = []
    for embedder in (ours, theirs):
        out = embedder(x)
        wanted = (x, *embedder.parameters())
        ends.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), wanted)])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    assert ends[0][0].is_contiguous()


@pytest.mark.parametrize(("name", "tolerance"), [("dit_small", 5e-6), ("dit_small_strong", 5e-5)])
def test_forward_and_guidance_match_golden(golden, name, tolerance):
    doc, arrays, fill = golden("dit_small")
    case, seed = doc["cases"][name], doc["seed"]
    model = DiT(**case["construct"]).eval()
    assert shapes(model) == case["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]["total"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == case["parameters"]["trainable"]
    fill.fill_(model, seed, case["fill"]["scale"])
    x = fill.input_float("input.x", case["inputs"][0]["shape"], seed)
    t, y = (torch.tensor(case["values"][key]) for key in "ty")
    t_cfg, y_cfg = (torch.tensor(case["values"][f"{key}_cfg"]) for key in "ty")
    with torch.no_grad():
        assert relative_error(model(x, t, y), arrays[f"{name}.forward"]) < tolerance
        guided = model.forward_with_cfg(x, t_cfg, y_cfg, 1.5)
    assert relative_error(guided, arrays[f"{name}.cfg"]) < tolerance
    if name == "dit_small":
        table = model.pos_embed[0, ::7, ::5]
        assert relative_error(table, arrays["dit_small.pos_embed_slice"]) < 1e-6


@pytest.mark.parametrize(
    "name", ["DiT-XL/2@256", "DiT-L/2@256", "DiT-B/2@256", "DiT-S/2@256", "DiT-XL/2@512"]
)
def test_full_size_names_shapes_and_counts(golden, name):
    doc, _, _ = golden("state_dicts")
    case = doc["cases"][name]
    model_name, image_size = name.split("@")
    with torch.device("meta"):
        model = build_dit(model_name, latent_size(model_name, int(image_size)))
    assert shapes(model) == case["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == case["parameters"]["total"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == case["parameters"]["trainable"]


def test_presets():
    sizes = [f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)]
    assert set(PRESETS) == {*sizes, "DiT-Mini/2", "DiT-Mini-D14/2"}
    keys = ("depth", "hidden_size", "num_heads", "patch_size")
    for size, widths in {  # arXiv 2212.09748, Table 1
        "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)
    }.items():  # fmt: skip
        for patch in (2, 4, 8):
            found = PRESETS[f"DiT-{size}/{patch}"]
            assert tuple(found[key] for key in keys) == (*widths, patch)
    assert latent_size("DiT-XL/2", 512) == 64 and latent_size("DiT-Mini/2", 64) == 16
    with torch.device("meta"):
        model = build_dit("DiT-Mini/2", 16, num_classes=9, in_channels=6)
    assert (model.depth, model.hidden_size, model.num_heads, model.num_tokens) == (28, 128, 4, 64)
    assert (model.num_classes, model.out_channels) == (9, 12)
    with pytest.raises(ValueError, match="'DiT-XXL/2'.*DiT-XL/2.*DiT-Mini/2"):
        build_dit("DiT-XXL/2", 32)
    with pytest.raises(ValueError, match="image_size 100.*16-pixel"):
        latent_size("DiT-XL/2", 100)
    with pytest.raises(ValueError, match="patch_size 2.*input_size 15"):
        build_dit("DiT-S/2", 15)


def test_initialisation_is_adaln_zero():
    torch.manual_seed(0)
    model = DiT(**TINY)
    x, t, y = tiny_inputs()
    assert not model(x, t, y).any()
    for block in model.blocks:
        h = torch.randn(2, 16, 32)
        assert torch.equal(block(h, torch.randn(2, 32)), h)
        bound = (6 / (32 + 96)) ** 0.5  # xavier uniform of the 32 -> 96 projection
        assert 0.9 * bound < block.attn.qkv.weight.abs().max() <= bound
    assert 0.015 < model.y_embedder.embedding_table.weight.std() < 0.025
    assert 0.018 < model.t_embedder.mlp[0].weight.std() < 0.022
    patch_bound = (6 / (16 + 32)) ** 0.5
    assert 0.9 * patch_bound < model.x_embedder.proj.weight.abs().max() <= patch_bound
    assert not model.pos_embed.requires_grad and model.pos_embed.dtype == torch.float32


def test_guidance_reads_the_first_half_and_guides_the_chosen_channels():
    model = tiny_model()
    x, t, _ = tiny_inputs()
    t, y = torch.tensor([3, 900, 3, 900]), torch.tensor([1, 2, 5, 5])
    plain = model(torch.cat([x[:2], x[:2]]), t, y)
    cond, uncond = plain.chunk(2)
    for channels, guided in ((3, 3), ("all", 4)):
        out = model.forward_with_cfg(x, t, y, 2.0, cfg_channels=channels)
        mixed = (uncond + 2.0 * (cond - uncond))[:, :guided]
        torch.testing.assert_close(out[:, :guided], torch.cat([mixed, mixed]))
        torch.testing.assert_close(out[:, guided:], plain[:, guided:])
    certain = tiny_model(class_dropout_prob=1.0)  # guidance drops no label, in training mode too
    expected = certain.forward_with_cfg(x, t, y, 2.0)
    torch.testing.assert_close(certain.train().forward_with_cfg(x, t, y, 2.0), expected)
    with pytest.raises(ValueError, match="two halves.*3"):
        model.forward_with_cfg(x[:3], t[:3], y[:3], 1.5)
    with pytest.raises(ValueError, match="cfg_channels 2"):
        model.forward_with_cfg(x, t, y, 1.5, cfg_channels=2)


def test_label_dropout():
    model = tiny_model()
    x, t, y = tiny_inputs()
    null = torch.full_like(y, 5)
    drop = torch.tensor([True, False, True, False])
    expected = torch.where(drop[:, None, None, None], model(x, t, null), model(x, t, y))
    torch.testing.assert_close(model(x, t, y, drop=drop), expected)
    torch.testing.assert_close(model.train()(x, t, y, drop=drop), expected)
    certain = tiny_model(class_dropout_prob=1.0)
    torch.testing.assert_close(certain.train()(x, t, y), certain(x, t, null))
    without = tiny_model(class_dropout_prob=0.0)
    assert without.y_embedder.embedding_table.weight.shape == (5, 32)
    torch.testing.assert_close(without.train()(x, t, y), without.eval()(x, t, y))
    with pytest.raises(ValueError, match="null class"):
        without(x, t, y, drop=drop)


def test_without_learned_sigma():
    model = tiny_model(learn_sigma=False)
    assert model(*tiny_inputs()).shape == (4, 4, 8, 8)


def test_wrong_shapes_are_named():
    model = tiny_model()
    x, t, y = tiny_inputs()
    for bad, words in (
        ((x[..., :6], t, y), r"x has shape \[4, 4, 8, 6\]"),
        ((x, t[:1], y), r"t has shape \[1\].*\[4\]"),
        ((x, t, y[:2]), r"y has shape \[2\]"),
        ((x, t, y, torch.ones(4)), r"keep has shape \[4\].*\[3\] or \[4, 3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            model(*bad)


def test_graft_pairs_in_both_slots():
    model = tiny_model()
    x, t, y = tiny_inputs()
    original = model(x, t, y)
    torch.manual_seed(3)
    swa = build_operator("swa", embed_dim=32, num_heads=4)
    mlp = build_operator("mlp", d_model=32, expansion_ratio=3)
    model.blocks[1].attn = GraftPair(model.blocks[1].attn, swa)
    model.blocks[2].mlp = GraftPair(model.blocks[2].mlp, mlp)
    with pytest.raises(ValueError, match="pass keep"):
        model(x, t, y)
    torch.testing.assert_close(model(x, t, y, keep=torch.ones(3)), original, rtol=0, atol=0)
    a = model(x, t, y, keep=torch.tensor([1.0, 0.0, 1.0]))
    b = model(x, t, y, keep=torch.tensor([1.0, 1.0, 0.0]))
    mask = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    mixed = model(x, t, y, keep=mask)
    for i, expected in enumerate((a, b, original, a)):
        torch.testing.assert_close(mixed[i], expected[i])
    model.blocks[1].attn = swa  # a chosen graft needs no pair
    model.blocks[2].mlp = model.blocks[2].mlp.original
    torch.testing.assert_close(model(x, t, y), a)


def test_compiles_whole_with_and_without_keep():
    torch.compiler.reset()  # sizes that other tests compiled would turn these into symbols
    model = tiny_model()
    x, t, y = tiny_inputs()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))
    swa = build_operator("swa", embed_dim=32, num_heads=4)
    model.blocks[1].attn = GraftPair(model.blocks[1].attn, swa)
    mask = torch.tensor([1.0, 0.3, 1.0]).expand(4, 3)
    torch.testing.assert_close(compiled(x, t, y, keep=mask), model(x, t, y, keep=mask))


def test_runs_in_bf16_autocast_and_in_bf16_weights():
    model = tiny_model()
    x, t, y = tiny_inputs()
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x, t, y).float(), expected) < 5e-2
    model.bfloat16()
    assert relative_error(model(x.bfloat16(), t, y).float(), expected) < 1e-1


def test_norms_and_the_sum_of_blocks_stay_float32_under_autocast(monkeypatch):
    model, (x, t, y) = tiny_model(), tiny_inputs()
    given, norm = [], torch.nn.functional.layer_norm

    def seen(tokens, *others, **options):
        given.append(tokens.dtype)
        return norm(tokens, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", seen)
    with torch.autocast("cpu", torch.bfloat16):
        model(x, t, y)
    assert given == [torch.float32] * (2 * model.depth + 1)


def test_timestep_embedding_keeps_float32_angles_under_autocast():
    model = tiny_model()
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([998, 999])
    with torch.autocast("cpu", torch.bfloat16):
        model.t_embedder(t)
    k = torch.arange(128, dtype=torch.float64)
    angles = t[:, None] * 10_000 ** (-k / 128)
    expected = torch.cat([angles.cos(), angles.sin()], -1)
    assert seen[0].dtype == torch.float32
    assert (seen[0] - expected).abs().max() < 2e-4
