"""diffusion/samplers.py, against diffusers' schedulers and an exactly solvable case."""

import numpy as np
import pytest
import torch

from diffusion import create_diffusion
from diffusion.samplers import sample

SHAPE = (3, 4, 6, 6)
LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def start(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy(x, t):
    """A model whose noise and variance both vary with x and t."""
    t = t.to(x.dtype).view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(x) * (0.7 - 0.0004 * t) + 0.1 * x, torch.sin(3 * x)], dim=1)


def gaussian_model(std):
    """The exact noise prediction for independent N(0, std^2) data."""
    abar = torch.from_numpy(create_diffusion("").alphas_cumprod).float()

    def model(x, t):
        a = abar[t].view(-1, 1, 1, 1)
        return torch.cat([(1 - a).sqrt() / (a * std**2 + 1 - a) * x, torch.zeros_like(x)], dim=1)

    return model


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_agrees_with_diffusers(eta, clip):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **LINEAR, beta_schedule="linear", clip_sample=clip, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)
    noises = [start(seed=10 + k) for k in range(20)]
    d = create_diffusion("ddim20")
    assert scheduler.timesteps.tolist() == d.timestep_map[::-1].tolist()
    x = start()
    for k, t in zip(range(19, -1, -1), scheduler.timesteps, strict=True):
        eps = toy(x, t.expand(len(x)))[:, :4]
        x = scheduler.step(
            eps, t, x, eta=eta, use_clipped_model_output=clip, variance_noise=noises[k]
        ).prev_sample
    ours = d.ddim_sample_loop(
        toy, start(), eta=eta, clip_denoised=clip, step_noise=lambda k: noises[k]
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)  # both float32, 20 steps


@pytest.mark.parametrize("clip", [False, True])
def test_ancestral_agrees_with_diffusers(clip):
    """Mean, learned variance and whole loop, diffusers drawing the same noise."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        **LINEAR,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=clip,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(20)
    theirs = torch.Generator().manual_seed(5)
    ours = torch.Generator().manual_seed(5)
    x = start()
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(len(x))), t, x, generator=theirs).prev_sample
    out = create_diffusion("ddim20").p_sample_loop(
        toy, start(), clip_denoised=clip, step_noise=lambda k: torch.randn(SHAPE, generator=ours)
    )
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)  # both float32, 20 steps


def test_sample_is_the_respaced_loop():
    d = create_diffusion("7")

    def step_noise(k):
        return start(seed=100 + k)

    torch.testing.assert_close(
        sample(toy, SHAPE, sampler="ddpm", steps=7, start=start(), step_noise=step_noise),
        d.p_sample_loop(toy, start(), {}, step_noise=step_noise),
        rtol=0,
        atol=0,
    )
    for eta in (0.0, 0.5):
        torch.testing.assert_close(
            sample(
                toy, SHAPE, sampler="ddim", steps=7, start=start(), step_noise=step_noise, eta=eta
            ),
            d.ddim_sample_loop(toy, start(), {}, eta=eta, step_noise=step_noise),
            rtol=0,
            atol=0,
        )


def test_deterministic_samplers_solve_the_gaussian_case():
    """For N(0, s^2) data the flow from x_T to x_0 scales by s / sqrt(abar_T s^2 + 1 - abar_T)."""
    std = 0.5
    abar = create_diffusion("").alphas_cumprod[-1]
    exact = start() * std / np.sqrt(abar * std**2 + 1 - abar)

    def error(sampler, steps):
        out = sample(gaussian_model(std), SHAPE, sampler=sampler, steps=steps, start=start())
        return float((out - exact).norm() / exact.norm())

    coarse, fine = error("ddim", 250), error("ddim", 1000)
    assert fine < 4e-3
    assert 3.5 < coarse / fine < 4.5  # first order
    assert error("dpm++", 50) < 1e-3


def test_ancestral_sampling_reaches_the_data_variance():
    std = 0.5
    shape = (64, 4, 16, 16)
    torch.manual_seed(0)
    out = sample(gaussian_model(std), shape, sampler="ddpm", steps=250, start=start(shape))
    assert float(out.mean()) == pytest.approx(0, abs=0.01)
    assert float(out.std()) == pytest.approx(std, rel=0.03)


def test_dpm_solver_ignores_the_variance_channels():
    def other_variance(x, t):
        return torch.cat([toy(x, t)[:, :4], torch.full_like(x, 9.0)], dim=1)

    a = sample(toy, SHAPE, sampler="dpm++", steps=6, start=start())
    b = sample(other_variance, SHAPE, sampler="dpm++", steps=6, start=start())
    assert torch.equal(a, b)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_model_sees_original_timesteps_and_result_is_like_start(sampler, capsys):
    seen = []

    def model(x, t):
        assert t.dtype == torch.int64 and t.shape == (3,) and t.eq(t[0]).all()
        seen.append(int(t[0]))
        return toy(x, t)

    x = start().double().requires_grad_()
    out = sample(model, SHAPE, sampler=sampler, steps=10, start=x, progress=True)
    assert len(seen) == 10 and seen[0] == 999 and sorted(seen, reverse=True) == seen
    assert out.shape == SHAPE and out.dtype == x.dtype and not out.requires_grad
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "euler"}, "ddpm, ddim, dpm"),
        ({"shape": (3, 4, 6, 7)}, "not that of start"),
        ({"steps": 0}, "respacing '0'"),
        ({"steps": 0, "sampler": "dpm++"}, "takes 1..1000 steps"),
        ({"steps": 1001, "sampler": "dpm++"}, "takes 1..1000 steps"),
        ({"eta": 0.5}, "has no eta"),
        ({"eta": 2.0, "sampler": "ddim"}, "0..1"),
    ],
)
def test_bad_requests(change, message):
    request = {"shape": SHAPE, "steps": 5, "start": start()} | change
    with pytest.raises(ValueError, match=message):
        sample(toy, request.pop("shape"), **request)
