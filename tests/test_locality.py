"""Band-k attention mass against its definition, and the script that measures it."""

import json
import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn

from models import locality
from models.config_files import REPOSITORY
from models.dit import DiT, build_dit
from models.locality import BandMass, attention_rows, default_band, timestep_bins, uniform_mass
from models.operators import build_operator
from models.plan import load_plan
from scripts import attention_locality

BANDS = (0, 1, 5, 15, 99)
TOKENS = 16
CANDIDATE = REPOSITORY / "configs/mini/75p_swa.yaml"


@pytest.fixture
def model():
    """Two blocks of two heads on 16 tokens, in double precision, with weights far from zero.

    Block 1 normalises its queries and keys, and has a scale of its own.
    """
    model = DiT(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    model.blocks[1].attn = Attention(
        16, num_heads=2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm
    )
    model.blocks[1].attn.scale = 0.7
    model.blocks[1].attn.fused_attn = False  # the fused path has no way to take another scale
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.35, generator=generator)
    return model.double().eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 199, 200, 450, 900, 999]), torch.tensor([0, 1, 2, 3, 0, 1])


def brute_force(attn, x, band):
    """L_k of one input x [T,D], term by term."""
    heads, width = attn.num_heads, attn.head_dim
    qkv = attn.qkv(x).view(len(x), 3, heads, width)
    total = 0.0
    for h in range(heads):
        q, k = attn.q_norm(qkv[:, 0, h]), attn.k_norm(qkv[:, 1, h])
        for i in range(len(x)):
            scores = [math.exp(attn.scale * float(q[i] @ k[j])) for j in range(len(x))]
            near = sum(s for j, s in enumerate(scores) if abs(i - j) <= band)
            total += near / sum(scores)
    return total / (heads * len(x))


@torch.no_grad()
def test_mass_is_the_definition(model, inputs):
    seen = {}
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]}))
    with BandMass(model, BANDS, bins=5) as meter:
        model(*inputs)
    parts = [[0, 1], [2], [3], [], [4, 5]]  # of t = 0 199 | 200 | 450 | none | 900 999
    for i, block in enumerate(model.blocks):
        for k in BANDS[:3]:
            each = [brute_force(block.attn, x, k) for x in seen[i]]
            assert meter.mass()[i][k] == pytest.approx(sum(each) / 6, abs=1e-13)
            for part, found in zip(parts, meter.mass_by_timestep()[i][k], strict=True):
                expected = sum(each[n] for n in part) / len(part) if part else None
                assert found == (None if expected is None else pytest.approx(expected, abs=1e-13))


@torch.no_grad()
def test_attention_is_what_the_module_attends_with(model, monkeypatch):
    """With one head the averaged attention, applied to the values, gives the module's output."""
    attn = Attention(16, num_heads=1, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    attn.double()
    x = torch.randn(3, TOKENS, 16, generator=torch.Generator().manual_seed(2)).double()
    monkeypatch.setattr(locality, "MAX_SCORES", 3 * TOKENS * 5)  # 5 rows at a time
    chunks = [rows for _, rows in attention_rows(attn, x)]
    assert [c.shape[1] for c in chunks] == [5, 5, 5, 1]
    v = attn.qkv(x)[..., 32:]
    torch.testing.assert_close(attn.proj(torch.cat(chunks, dim=1) @ v), attn(x))


@torch.no_grad()
def test_row_chunks_and_batches_do_not_matter(model, inputs, monkeypatch):
    with BandMass(model, BANDS) as whole:
        model(*inputs)
    monkeypatch.setattr(locality, "MAX_SCORES", 1)
    with BandMass(model, BANDS) as parts:
        for n in range(0, 6, 2):
            x, t, y = (value[n : n + 2] for value in inputs)
            model(x, y=y, t=t)
    for a, b in zip(whole.mass(), parts.mass(), strict=True):
        assert a == pytest.approx(b, abs=1e-14)
    for i, attention in whole.maps().items():
        torch.testing.assert_close(attention, parts.maps()[i])
        near = sum(attention.diagonal(d).sum() for d in range(-5, 6)) / TOKENS
        assert whole.mass()[i][5] == pytest.approx(float(near), abs=1e-13)


@torch.no_grad()
def test_uniform_attention_has_the_closed_form(model, inputs):
    for block in model.blocks:
        block.attn.qkv.weight.zero_()
        block.attn.qkv.bias.zero_()
    with BandMass(model.float(), BANDS) as meter:
        model(inputs[0].float(), *inputs[1:])
    for k in BANDS:
        pairs = sum(abs(i - j) <= k for i in range(TOKENS) for j in range(TOKENS))
        assert uniform_mass(TOKENS, k) == pairs / TOKENS**2
        assert meter.mass()[0][k] == meter.mass()[1][k] == pytest.approx(pairs / TOKENS**2)


@torch.no_grad()
def test_a_band_of_all_tokens_holds_exactly_one(model, inputs):
    with BandMass(model.float(), BANDS) as meter:
        model(inputs[0].float(), *inputs[1:])
    for mass in meter.mass():
        assert mass[15] == mass[99] == 1.0 and 0 < mass[0] < mass[1] < mass[5] < 1


@torch.no_grad()
def test_autocast_does_not_reach_the_measured_attention(model):
    x = torch.randn(2, TOKENS, 16)
    (_, plain), = attention_rows(model.float().blocks[1].attn, x)  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, cast), = attention_rows(model.blocks[1].attn, x)  # fmt: skip
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)


@torch.no_grad()
def test_hooks_end_with_the_measurement(model, inputs):
    with pytest.raises(RuntimeError), BandMass(model, BANDS) as meter:
        model(*inputs)
        raise RuntimeError
    before = meter.mass()
    model(*inputs)
    assert meter.mass() == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_operators_have_no_mass(model, inputs):
    swa = build_operator("swa", embed_dim=16, num_heads=2, window_size=[4, 4])
    model.blocks[0].attn = swa.double()
    with BandMass(model, BANDS) as meter:
        model(*inputs)
    assert meter.mass()[0] is None and meter.mass_by_timestep()[0] is None
    assert list(meter.mass()[1]) == list(BANDS) and list(meter.maps()) == [1]
    assert not meter.maps()[1].requires_grad  # whether gradients are on or not


def test_bins_and_the_papers_band():
    assert timestep_bins(5) == [[0, 199], [200, 399], [400, 599], [600, 799], [800, 999]]
    for bins in (1, 3, 7):
        for i, (first, last) in enumerate(timestep_bins(bins)):
            assert first * bins // 1000 == last * bins // 1000 == i
    assert default_band(256) == 32 and default_band(64) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_cuda_gives_the_cpus_mass_in_little_memory(model, inputs):
    found = []
    for device in ("cpu", "cuda"):
        with BandMass(model.to(device), BANDS) as meter:
            model(*(value.to(device) for value in inputs))
        found.append(meter.mass())
    for cpu, cuda in zip(*found, strict=True):
        assert cpu == pytest.approx(cuda, abs=1e-5)

    large = build_dit("DiT-XL/2", input_size=32).cuda().eval()
    x = torch.randn(32, 4, 32, 32, device="cuda")
    t, y = (torch.arange(32, device="cuda") * step for step in (31, 1))
    with torch.autocast("cuda", dtype=torch.bfloat16), BandMass(large, [32]) as meter:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        large(x, t, y)
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**30
    assert all(0 < mass[32] < 1 for mass in meter.mass())


# -- the script ----------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A store of the old layout: five drawn latents of DiT-Mini/2's size and mirrors."""
    folder = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    for name in ("imagenet64_features", "imagenet64_labels"):
        (folder / name).mkdir()
    for i in range(5):
        latent = rng.standard_normal((2, 4, 16, 16)).astype(np.float32)
        np.save(folder / "imagenet64_features" / f"{i}.npy", latent)
        np.save(folder / "imagenet64_labels" / f"{i}.npy", np.array([i]))
    return folder


def measure(out, *flags, config=CANDIDATE):
    flags = ("--config", config, "--device", "cpu", "--out", out, *flags)
    attention_locality.main(attention_locality.parse_args([str(flag) for flag in flags]))
    assert (out / "locality.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((out / "locality.json").read_text())


def test_script_measures_the_plain_dit_whatever_the_batch(tmp_path, latents):
    flags = ("--data-path", latents, "--num-samples", 5)
    whole = measure(tmp_path / "a", *flags)
    parts = measure(tmp_path / "b", *flags, "--batch", 2, "--band", 4)
    assert whole["bands"] == [1, 4, 8, 16, 32] and parts["bands"] == [4]
    assert whole["num_tokens"] == 64 and whole["uniform"]["4"] == uniform_mass(64, 4)
    assert whole["plan"]["grafts"] == [] and len(whole["blocks"]) == 28
    assert len(whole["weights"]["base"]["sha256"]) == 64
    for a, b in zip(whole["blocks"], parts["blocks"], strict=True):
        assert a["operator"] == "mha" and a["mass"]["4"] == pytest.approx(b["mass"]["4"], abs=1e-6)


def test_script_leaves_grafted_blocks_null(tmp_path):
    found = measure(
        tmp_path, "--sampled", "--num-samples", 1, "--num-sampling-steps", 2, "--grafted"
    )
    null = [entry["block"] for entry in found["blocks"] if entry["mass"] is None]
    assert tuple(null) == load_plan(CANDIDATE).grafted_blocks()
    assert {found["blocks"][b]["operator"] for b in null} == {"swa"}
    # the two steps of DDIM are t = 0 and t = 999, with as many evaluations each
    entry = found["blocks"][0]
    first, *middle, last = entry["mass_by_timestep"]["8"]
    assert middle == [None] * 3 and entry["mass"]["8"] == pytest.approx((first + last) / 2)


REFUSED = {
    "no input": ((), "give either --data-path .* or --sampled"),
    "two inputs": (("--sampled", "--data-path", "x"), "give either --data-path .* or --sampled"),
    "too few": (("--data-path", "LATENTS"), "--num-samples 250: the store holds 5"),
    "base none": (("--sampled", "--load-weight", "none"), "name the pretrained DiT with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_script_refuses(case, tmp_path, latents):
    flags, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        measure(tmp_path, *(latents if flag == "LATENTS" else flag for flag in flags))
