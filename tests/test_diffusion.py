"""diffusion/schedule.py and diffusion/gaussian.py against the golden outputs and DDPM's algebra."""

import math

import numpy as np
import pytest
import torch

from diffusion import create_diffusion
from diffusion.gaussian import reverse_update
from diffusion.noise import STEP, normal

TABLES = [
    "tables_full1000",
    "tables_respaced_250",
    "tables_respaced_50",
    "tables_respaced_25",
    "tables_respaced_ddim25",
    "tables_respaced_ddim50",
    "tables_sections_10_15_20",
]


def toy(x, t):
    """The toy model of the golden outputs."""
    wave = torch.cos(0.003 * t.to(x.dtype)).view(-1, 1, 1, 1)
    return torch.cat([(0.6 - 0.3 * wave) * x, 0.1 * x], dim=1)


def inputs(case, doc, fill):
    return {
        s["arg"]: fill.input_float(s["name"], s["shape"], doc["seed"], s["scale"])
        for s in case["inputs"]
        if "{" not in s["name"]
    }


def relative(value, golden):
    golden = torch.from_numpy(golden).double()
    return float((value.double() - golden).abs().max() / golden.abs().max())


# ---- schedule ----


@pytest.mark.parametrize("name", TABLES)
def test_tables_match_golden(golden, name):
    doc, arrays, _ = golden("diffusion")
    case = doc["cases"][name]
    d = create_diffusion(case["respacing"])
    assert d.num_timesteps == case["num_steps"] == len(d.timestep_map)
    np.testing.assert_array_equal(d.timestep_map, arrays[f"{name}.timestep_map"])
    for table, summary in case["statistics"].items():
        values = getattr(d, table)
        assert values.dtype == np.float64
        ends = np.concatenate([values[:8], values[-8:]])
        np.testing.assert_allclose(
            ends, arrays[f"{name}.{table}_head_tail"], rtol=1e-12, atol=1e-12
        )
        assert values.sum() == pytest.approx(summary["sum"], rel=1e-12)
        assert values.std() == pytest.approx(summary["std"], rel=1e-12)


def test_respaced_chain_keeps_the_marginals():
    full, short = create_diffusion(""), create_diffusion("10,15,20")
    np.testing.assert_allclose(
        short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-12
    )
    np.testing.assert_allclose(np.cumprod(1 - short.betas), short.alphas_cumprod, rtol=1e-12)


def test_respacing_ends_and_remainders():
    assert create_diffusion("2").timestep_map.tolist() == [0, 999]
    assert create_diffusion("1000").timestep_map.tolist() == list(range(1000))
    assert create_diffusion("1,2,1").timestep_map.tolist() == [0, 334, 666, 667]
    # 10 * 999 / 20 is 499.5, a tie that would round to 500; summed up it falls just short
    assert create_diffusion("21").timestep_map[10] == 499


@pytest.mark.parametrize(
    "respacing",
    ["0", "1", "1001", "10,0,5", "10,400,5", "ddim600", "ddim0", "ddim1", "ddim", "ddim2000"]
    + ["fast", "25 ", "-5", "2.5", "10,", "ddim10,10", "٢٥", None, 250],
)
def test_bad_respacing_names_the_legal_forms(respacing):
    with pytest.raises(ValueError, match=r"respacing .* use \"\" .*ddim25"):
        create_diffusion(respacing)


# ---- training ----


def test_training_losses_match_golden(golden):
    doc, arrays, fill = golden("diffusion")
    case = doc["cases"]["training_losses"]
    given = inputs(case, doc, fill)
    t = torch.tensor(case["t"])
    seen = []

    def model(x, t, scale):
        seen.append((x, t, scale))
        return toy(x, t)

    losses = create_diffusion(case["respacing"]).training_losses(
        model, given["x_start"], t, {"scale": 3}, noise=given["noise"]
    )
    assert set(losses) == {"loss", "mse", "vb"}
    for key, value in losses.items():
        assert value.shape == (6,) and value.dtype == torch.float32
        assert relative(value, arrays[f"training_losses.{key}"]) < 1e-5
        # each sample by itself too: the KL terms are a thousand times smaller than the decoder's
        torch.testing.assert_close(
            value, torch.from_numpy(arrays[f"training_losses.{key}"]), rtol=1e-4, atol=2e-6
        )
    ((x_t, timestep, scale),) = seen  # one call
    assert relative(x_t, arrays["training_losses.x_t"]) < 1e-6
    assert scale == 3 and torch.equal(timestep, t)
    d = create_diffusion(case["respacing"])
    assert torch.equal(d.q_sample(given["x_start"], t, given["noise"]), x_t)


def test_vb_teaches_only_the_variance():
    d = create_diffusion("50")
    x, noise = torch.randn(2, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 0, 1, 5, 20, 30, 48, 49])
    eps = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    v = torch.zeros(8, 2, 4, 4, requires_grad=True)
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.cat([eps, v], dim=1)

    losses = d.training_losses(model, x, t, noise=noise)
    from_vb = torch.autograd.grad(
        losses["vb"].sum(), (eps, v), retain_graph=True, materialize_grads=True
    )
    from_mse = torch.autograd.grad(losses["mse"].sum(), (eps, v), materialize_grads=True)
    assert from_vb[0].eq(0).all() and from_vb[1].ne(0).any(dim=(1, 2, 3)).all()
    assert from_mse[1].eq(0).all() and from_mse[0].ne(0).all()
    assert torch.equal(seen[0], torch.from_numpy(d.timestep_map)[t])


def test_vb_is_the_kl_between_the_two_gaussians():
    """Against torch.distributions in float64, with the means written out."""
    d = create_diffusion("")
    g = torch.Generator().manual_seed(0)
    x, noise, eps, v = torch.randn(4, 5, 2, 4, 4, generator=g)
    t = torch.tensor([1, 10, 100, 500, 999])
    losses = d.training_losses(lambda x, t: torch.cat([eps, v], 1), x, t, noise=noise)

    def at(table):
        return torch.from_numpy(table)[t].view(-1, 1, 1, 1)

    x, noise, eps, v = (a.double() for a in (x, noise, eps, v))
    x_t = at(np.sqrt(d.alphas_cumprod)) * x + at(np.sqrt(1 - d.alphas_cumprod)) * noise
    beta, variance = at(d.betas), at(d.posterior_variance)
    true_mean = at(d.posterior_mean_coef1) * x + at(d.posterior_mean_coef2) * x_t
    # DDPM, equation 11
    mean = (x_t - beta / at(np.sqrt(1 - d.alphas_cumprod)) * eps) / torch.sqrt(1 - beta)
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, variance.sqrt()),
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
    )
    expected = kl.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(losses["vb"].double(), expected, rtol=1e-5, atol=0)


def test_decoder_bins_cover_all_mass():
    """At t = 0 the 256 bins' probabilities add up to 1, the open outer ones included."""
    d = create_diffusion("")
    centres = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    out = torch.tensor([0.3, 0.5]).view(1, 2, 1, 1).expand(256, 2, 1, 1)
    # The predicted mean must be the same for every bin: choose the noise that gives one x_t.
    x_t = 0.9
    a, b = d.sqrt_alphas_cumprod[0], d.sqrt_one_minus_alphas_cumprod[0]
    noise = (x_t - a * centres) / b
    losses = d.training_losses(
        lambda x, t: out, centres, torch.zeros(256, dtype=torch.long), noise=noise
    )
    assert float(torch.exp2(-losses["vb"].double()).sum()) == pytest.approx(1, abs=1e-5)


def test_losses_are_float32_under_autocast():
    d = create_diffusion("")
    x, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 3, 400, 999])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = d.training_losses(lambda x, t: toy(x, t).bfloat16(), x, t, noise=noise)
    plain = d.training_losses(lambda x, t: toy(x, t).bfloat16().float(), x, t, noise=noise)
    for key in plain:
        assert mixed[key].dtype == torch.float32 and torch.equal(mixed[key], plain[key])


def test_model_without_variance_channels_is_refused():
    d = create_diffusion("")
    with pytest.raises(ValueError, match="returned 4 channels for 4 input channels"):
        d.training_losses(lambda x, t: x, torch.zeros(1, 4, 2, 2), torch.tensor([3]))


# ---- reverse steps and loops ----


@pytest.mark.parametrize("name", ["p_step_250", "p_step_50"])
def test_reverse_step_matches_golden(golden, name):
    doc, arrays, fill = golden("diffusion")
    case = doc["cases"][name]
    x, t = inputs(case, doc, fill)["x_t"], torch.tensor(case["t"])
    d = create_diffusion(case["respacing"])
    free = d.p_mean_variance(toy, x, t, {})
    clipped = d.p_mean_variance(toy, x, t, {}, clip_denoised=True)
    assert set(free) == {"mean", "variance", "log_variance", "pred_xstart"}
    for key in ("mean", "pred_xstart", "log_variance"):
        assert relative(free[key], arrays[f"{name}.{key}"]) < 1e-5
    for key in ("mean", "pred_xstart"):
        assert relative(clipped[key], arrays[f"{name}.{key}_clipped"]) < 1e-5
    torch.testing.assert_close(free["variance"], free["log_variance"].exp())

    # the loops' step is a draw from that distribution, also where steps differ within a batch
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows = d.ancestral_rows("cpu")
    stepped = reverse_update(x, toy(x, d.timesteps("cpu")[t]), rows[t], noise)
    added = (t > 0).view(-1, 1, 1, 1) * free["variance"].sqrt() * noise
    torch.testing.assert_close(stepped, free["mean"] + added, rtol=1e-5, atol=1e-6)
    one = reverse_update(x[2:3], toy(x, d.timesteps("cpu")[t])[2:3], rows[case["t"][2]], noise[2:3])
    torch.testing.assert_close(one, stepped[2:3], rtol=0, atol=0)


@pytest.mark.parametrize(
    "key",
    ["p_sample_loop_50.sample", "p_sample_loop_50.sample_clipped"]
    + ["ddim_sample_loop_25.sample", "ddim_sample_loop_25.sample_clipped"]
    + ["ddim_sample_loop_ddim25.sample", "ddim_sample_loop_ddim25.sample_clipped"]
    + ["ddim_sample_loop_25_eta.sample_clipped"],
)
def test_loops_match_golden(golden, key):
    doc, arrays, fill = golden("diffusion")
    name, clip = key.split(".")[0], key.endswith("clipped")
    case = doc["cases"][name]
    start = inputs(case, doc, fill)["initial x"]
    d = create_diffusion(case["respacing"])
    asked = []

    def step_noise(index):
        asked.append(index)
        return fill.input_float(f"noise.{index}", start.shape, doc["seed"], 1.0)

    options = {"clip_denoised": clip, "step_noise": step_noise}
    if name.startswith("ddim"):
        out = d.ddim_sample_loop(toy, start, {}, eta=case["eta"], **options)
    else:
        out = d.p_sample_loop(toy, start, {}, **options)
    assert relative(out, arrays[key]) < 1e-5
    steps = list(range(d.num_timesteps - 1, -1, -1))
    assert asked == ([] if case.get("eta") == 0.0 else steps)


def test_loops_return_the_kind_of_their_start_and_take_no_gradient():
    d = create_diffusion("5")
    start = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    seen = []

    def model(x, t, y):
        seen.append((x.dtype, t.tolist(), y))
        return toy(x, t)

    out = d.p_sample_loop(model, start, {"y": 7})
    assert out.shape == start.shape and out.dtype == start.dtype and not out.requires_grad
    maps = d.timestep_map.tolist()[::-1]
    assert seen == [(torch.float64, [t, t], 7) for t in maps]


def test_undrawn_step_noise_comes_from_torch():
    d = create_diffusion("5")
    start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for loop in (d.p_sample_loop, lambda m, s: d.ddim_sample_loop(m, s, eta=1.0)):
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(loop(toy, start))
        assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_sample_does_not_depend_on_its_batch():
    d = create_diffusion("8")
    index = torch.arange(6)

    def draw(index):
        start = normal(3, STEP, index, (4, 4, 4), step=99)
        return d.p_sample_loop(
            toy, start, step_noise=lambda k: normal(3, STEP, index, (4, 4, 4), step=k)
        )

    torch.testing.assert_close(
        draw(index), torch.cat([draw(index[:1]), draw(index[1:])]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_eta_out_of_range(eta):
    with pytest.raises(ValueError, match="eta"):
        create_diffusion("5").ddim_sample_loop(toy, torch.zeros(1, 4, 2, 2), eta=eta)


def test_tables_made_in_inference_mode_serve_a_backward_pass():
    d = create_diffusion("5")
    with torch.inference_mode():
        rows = d.ancestral_rows("cpu")
    output = torch.zeros(2, 8, 2, 2, requires_grad=True)
    noise = torch.ones(2, 4, 2, 2)
    reverse_update(torch.zeros(2, 4, 2, 2), output, rows[3], noise).sum().backward()
    assert output.grad.ne(0).all()


def test_loss_and_reverse_step_compile_in_one_graph():
    torch._dynamo.reset()
    d = create_diffusion("20")
    x, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 7, 19])

    def loss(x, t, noise):
        return d.training_losses(toy, x, t, {}, noise)["loss"]

    def step(x, timestep, row, noise):
        return reverse_update(x, toy(x, timestep), row, noise)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, noise), loss(x, t, noise))
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    rows, timesteps = d.ancestral_rows("cpu"), d.timesteps("cpu")
    for i in range(19, -1, -1):
        given = (x, timesteps[i].expand(3), rows[i], noise)
        torch.testing.assert_close(compiled(*given), step(*given))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_gpu():
    d = create_diffusion("10")
    x = torch.randn(3, 4, 4, 4, device="cuda")
    t = torch.tensor([0, 3, 9], device="cuda")

    def run():
        d.training_losses(toy, x, t)
        d.p_sample_loop(toy, x)
        d.ddim_sample_loop(toy, x, eta=0.5)
        normal(3, STEP, t, (4, 4, 4), step=2)

    run()  # uploads the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ddim_takes_the_smallest_stride_that_gives_its_steps():
    for count in (7, 30, 500):
        stride = next(s for s in range(1, 1000) if len(range(0, 1000, s)) == count)
        assert create_diffusion(f"ddim{count}").timestep_map.tolist() == list(
            range(0, 1000, stride)
        )
