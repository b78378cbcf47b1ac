"""diffusion/noise.py: known answers, invariance, distribution, independence."""

import math

import numpy as np
import pytest
import torch

from diffusion import noise
from diffusion.noise import NOISE, START, STEP, integers, normal, philox, uniform
from training.compilation import FUNCTION_OPTIONS

# Random123's kat_vectors: philox4x32-10, counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000")
    + ("6627e8d5 e169c58d bc57ac4c 9b00dbd8",),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff")
    + ("408f276d 41c83b0e a20bc7c6 6d5451fd",),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0")
    + ("d16cfe09 94fdcceb 5001e420 24126ea1",),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    # repeated, so that vectorised code paths are taken as well
    out = philox(tuple(torch.full((67,), word) for word in words(counter)), tuple(words(key)))
    for got, expected in zip(out, words(answer), strict=True):
        assert got.eq(expected).all()


def test_streams_are_distinct_constants():
    assert len(set(noise.STREAMS.values())) == len(noise.STREAMS) == 9
    for name, value in noise.STREAMS.items():
        assert getattr(noise, name) == value


def test_values_are_those_of_the_documented_counter():
    """One value of each kind, from Philox in plain Python integers."""

    def reference(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    seed, step, sample = 2**32 - 5, 77, 123 + (9 << 32)
    index = torch.tensor([5, sample])
    block = reference((2, 123, 9, step), (seed, STEP))  # elements 8..11 of a sample
    u = uniform(seed, STEP, index, (3, 5), step)[1].flatten()[8:12]
    np.testing.assert_array_equal(u.double(), [((w >> 9) + 0.5) / 2**23 for w in block])
    z = normal(seed, STEP, index, (3, 5), step)[1].flatten()[8:12].double()
    for pair in (0, 1):
        radius = math.sqrt(-2 * math.log((block[2 * pair] + 0.5) / 2**32))
        angle = 2 * math.pi * ((block[2 * pair + 1] >> 9) + 0.5) / 2**23
        np.testing.assert_allclose(
            z[2 * pair : 2 * pair + 2],
            [radius * math.cos(angle), radius * math.sin(angle)],
            rtol=0,
            atol=2e-6,
        )
    first = reference((0, 123, 9, step), (seed, STEP))[0]
    assert int(integers(seed, STEP, index, 1000, step)[1]) == first * 1000 >> 32


@pytest.mark.parametrize("draw", [normal, uniform])
def test_values_belong_to_the_sample(draw):
    index = torch.randperm(37, generator=torch.Generator().manual_seed(0)) * 2**28
    whole = draw(11, NOISE, index, (4, 9, 7), 3)
    assert whole.shape == (37, 4, 9, 7) and whole.dtype == torch.float32
    for size in (1, 5, 36):
        parts = [draw(11, NOISE, part, (4, 9, 7), 3) for part in index.split(size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    # a smaller tensor holds the first values of a larger one
    torch.testing.assert_close(
        draw(11, NOISE, index, (10,), 3), whole.flatten(1)[:, :10], rtol=1e-6, atol=1e-6
    )
    assert draw(11, NOISE, index[:0], (4, 2)).shape == (0, 4, 2)
    assert draw(11, NOISE, index, ()).shape == (37,)


def test_uniforms_and_integers_are_exact_whatever_the_split():
    index = torch.arange(50)
    for size in (1, 7):
        parts = index.split(size)
        assert torch.equal(
            torch.cat([uniform(1, NOISE, p, (5,)) for p in parts]), uniform(1, NOISE, index, (5,))
        )
        assert torch.equal(
            torch.cat([integers(1, NOISE, p, 1000) for p in parts]), integers(1, NOISE, index, 1000)
        )


def test_normal_moments():
    z = normal(0, START, torch.arange(512), (4, 16, 16)).double()  # half a million values
    n = z.numel()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    # and the distribution function, by Kolmogorov and Smirnov (1.63 is the 1 % level)
    cdf = torch.special.ndtr(z.flatten().sort().values)
    gap = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(gap) * math.sqrt(n) < 1.63


def test_uniform_stays_inside_and_is_flat():
    u = uniform(0, START, torch.arange(512), (1024,)).double()
    n = u.numel()
    assert float(u.min()) > 0 and float(u.max()) < 1
    counts = torch.histc(u, 64, 0, 1)
    chi2 = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 63 - 4 * math.sqrt(126) < chi2 < 63 + 4 * math.sqrt(126)


def test_extreme_words_give_finite_values(monkeypatch):
    def extremes(counter, key):
        low, high = torch.zeros_like(counter[1]), torch.full_like(counter[1], 2**32 - 1)
        return low, high, high, low

    monkeypatch.setattr(noise, "philox", extremes)
    index = torch.arange(3)
    z, u = normal(0, START, index, (4,)), uniform(0, START, index, (4,))
    assert z.isfinite().all() and 6.7 < float(z.abs().max()) < 6.8
    assert z[:, 2].gt(0).all()  # the topmost radius word stays below u = 1
    assert u.gt(0).all() and u.lt(1).all()
    assert integers(0, START, index, 2**31).eq(0).all()


def test_neighbours_are_independent():
    """Changing any one of seed, stream, index or step gives an uncorrelated tensor."""
    shape, index = (4, 32, 32), torch.tensor([0])

    def draw(seed=0, stream=STEP, sample=0, step=0):
        return normal(seed, stream, index + sample, shape, step).flatten().double()

    tensors = torch.stack(
        [draw(), draw(seed=1), draw(stream=START), draw(step=1), draw(sample=1)]
        + [draw(sample=2**32), draw(seed=STEP, stream=1), draw(step=2**32 - 1)]
    )
    correlation = torch.corrcoef(tensors) - torch.eye(len(tensors))
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(4096)
    # neither are the values of one tensor among themselves
    for shift in (1, 2, 3, 4, 32, 1024):
        one = torch.stack([tensors[0], tensors[0].roll(shift)])
        assert abs(float(torch.corrcoef(one)[0, 1])) < 4.5 / math.sqrt(4096)


def test_integers_are_flat():
    drawn = integers(4, noise.LABEL, torch.arange(100_000), 10)
    assert drawn.dtype == torch.int64 and drawn.shape == (100_000,)
    counts = drawn.bincount(minlength=10)
    assert len(counts) == 10
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 27.9  # 0.1 % level, 9 degrees
    assert integers(4, noise.LABEL, torch.arange(9), 1).eq(0).all()
    assert int(integers(4, noise.LABEL, torch.arange(1000), 2**31).max()) > 2**30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296"),
        ({"step": -1}, "step -1"),
        ({"step": 2.5}, "step 2.5"),
        ({"step": 2**32}, "step 4294967296"),
        ({"stream": 0}, "LABEL, START"),
        ({"index": torch.tensor([3, -2])}, "index -2"),
        ({"index": torch.tensor([3], dtype=torch.int32)}, "int64"),
        ({"index": torch.tensor(3)}, "int64"),
    ],
)
def test_arguments_out_of_range(change, message):
    arguments = {"seed": 0, "stream": STEP, "index": torch.arange(2), "step": 0} | change
    with pytest.raises(ValueError, match=message):
        normal(shape=(4,), **arguments)
    with pytest.raises(ValueError, match=message):
        uniform(shape=(4,), **arguments)
    with pytest.raises(ValueError, match=message):
        integers(high=7, **arguments)


@pytest.mark.parametrize("high", [0, -3, 2**31 + 1])
def test_high_out_of_range(high):
    with pytest.raises(ValueError, match="high"):
        integers(0, STEP, torch.arange(2), high)


def test_compiles_in_one_graph_for_all_steps():
    """No read-back, and the step is not baked in: 12 steps stay below the recompile limit of 8."""
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(index, step):
        return normal(5, STEP, index, (4, 8), step=step)

    index = torch.arange(6)
    for step in range(12):
        torch.testing.assert_close(compiled(index, step), normal(5, STEP, index, (4, 8), step=step))


def test_compiled_code_serves_all_seeds_and_steps():
    """As Inductor makes it, which takes for a variable what has had two values."""
    torch._dynamo.reset()
    compiled = torch.compile(uniform, options=FUNCTION_OPTIONS)
    index = torch.arange(3)
    for seed, step in ((0, 0), (1, 1), (2**32 - 1, 2**32 - 1), (7, 8)):
        expected = uniform(seed, STEP, index, (5,), step=step)
        assert torch.equal(compiled(seed, STEP, index, (5,), step=step), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_numbers():
    index = torch.arange(33) * 2**27
    on_gpu = index.cuda()
    assert torch.equal(integers(1, STEP, on_gpu, 1000).cpu(), integers(1, STEP, index, 1000))
    assert torch.equal(uniform(1, STEP, on_gpu, (99,)).cpu(), uniform(1, STEP, index, (99,)))
    torch.testing.assert_close(
        normal(1, STEP, on_gpu, (99,)).cpu(), normal(1, STEP, index, (99,)), rtol=1e-5, atol=1e-5
    )
