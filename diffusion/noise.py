"""Random numbers that belong to a sample: f(seed, stream, index, step), wherever they are made.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a
128-bit counter and a 64-bit key into four 32-bit words. Here

    key     = (seed, stream)
    counter = (block of four words, index low 32 bits, index high 32 bits, step)

so there is no state to save or to keep in step between processes, and the numbers of one index
do not depend on the batch it is in, the number of processes, or the device (words, integers and
uniforms exactly, normals to the rounding of log, sin and cos). Element j of the flattened result is
the same for every shape that has one.

Streams keep the uses apart; `index` and `step` mean:

    LABEL      class of a generated sample              sample index            0
    START      starting point of a generated sample     sample index            0
    STEP       noise added by a reverse step            sample index            respaced step k
    TIMESTEP   diffusion timestep in training           position in data        epoch
    NOISE      noise of the training loss               position in data        epoch
    DROP       label dropout                            position in data        epoch
    POSTERIOR  draw from the VAE posterior              position in data        epoch
    FLIP       which mirror of an image                 position in data        epoch
    GATE       which operators a training sample uses   position in data        epoch

Sampling contract: sample i starts from normal(seed, START, i, shape) and reverse step k (of the
respaced chain, N-1 .. 0) adds normal(seed, STEP, i, shape, step=k).
"""

import math

import torch

LABEL = 1
START = 2
STEP = 3
TIMESTEP = 4
NOISE = 5
DROP = 6
POSTERIOR = 7
FLIP = 8
GATE = 9
STREAMS = {
    "LABEL": LABEL,
    "START": START,
    "STEP": STEP,
    "TIMESTEP": TIMESTEP,
    "NOISE": NOISE,
    "DROP": DROP,
    "POSTERIOR": POSTERIOR,
    "FLIP": FLIP,
    "GATE": GATE,
}

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[int | torch.Tensor, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10: four int64 tensors of values 0..2**32-1, broadcast together -> four words.

    A product of two words fills all 64 bits; int64 wraps, and what is masked after a shift has the
    bits of the unsigned product. Words 1 and 3 only ever meet an xor that is masked later, so they
    carry surplus high bits until the end.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) ^ (c1 ^ k0)) & _WORD, p1
        c2, c3 = ((p0 >> 32) ^ (c3 ^ k1)) & _WORD, p0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _check_int(name: str, value: int, low: int, high: int, limits: str) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} {value!r} is out of range; it must be an int in {limits}.")


def _words(
    seed: int, stream: int, index: torch.Tensor, blocks: int, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words of `blocks` consecutive blocks for each index: four [B, blocks] tensors."""
    _check_int("seed", seed, 0, _WORD, "0..2**32-1")
    _check_int("step", step, 0, _WORD, "0..2**32-1")
    if stream not in STREAMS.values():
        raise ValueError(
            f"stream {stream!r} is unknown; use one of diffusion.noise's {', '.join(STREAMS)}."
        )
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(
            f"index must be an int64 tensor [B], not {index.dtype} {list(index.shape)}."
        )
    # Reading values back from an accelerator would stall it at every call, so only the host checks.
    on_host = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and index.numel() and int(index.min()) < 0:
        raise ValueError(f"index {int(index.min())} is out of range; it must lie in 0..2**63-1.")
    index = index[:, None]  # [B,1]
    block = torch.arange(blocks, device=index.device)[None]  # [1,blocks]
    if torch.compiler.is_compiling():  # Inductor does not take the bits of an int that varies
        seed = torch.full((), seed, dtype=torch.int64, device=index.device)
    return philox((block, index & _WORD, index >> 32, torch.full_like(block, step)), (seed, stream))


def _open_unit(word: torch.Tensor) -> torch.Tensor:
    """Word -> float32 strictly within (0,1): the centres of 2**23 equal cells, all exact."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def uniform(
    seed: int, stream: int, index: torch.Tensor, shape: tuple[int, ...], step: int = 0
) -> torch.Tensor:
    """Uniform float32 strictly within (0,1), [B, *shape], on index's device.

    seed and step 0..2**32-1; stream one of this module's constants; index [B] int64, not negative
    (checked on the CPU only). Raises ValueError when one of them is out of range.
    """
    count = math.prod(shape)
    words = _words(seed, stream, index, -(-count // 4), step)
    values = _open_unit(torch.stack(words, dim=-1)).flatten(1)  # [B, 4*blocks]
    return values[:, :count].reshape(len(index), *shape)


def normal(
    seed: int, stream: int, index: torch.Tensor, shape: tuple[int, ...], step: int = 0
) -> torch.Tensor:
    """Unit normal float32, [B, *shape], on index's device. Arguments and errors as `uniform`.

    Box-Muller: two words give a radius and an angle, these give two values. The radius uses all 32
    bits, so that values reach 6.7 standard deviations.
    """
    count = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, stream, index, -(-count // 4), step)
    u = (torch.stack((w0.float(), w2.float()), dim=-1) + 0.5) * 2.0**-32  # [B,blocks,2]
    u = u.clamp(max=1.0 - 2.0**-24)  # the topmost words would round to 1
    radius = torch.sqrt(-2.0 * torch.log(u))
    angle = (2.0 * math.pi) * torch.stack((_open_unit(w1), _open_unit(w3)), dim=-1)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].reshape(len(index), *shape)


def integers(seed: int, stream: int, index: torch.Tensor, high: int, step: int = 0) -> torch.Tensor:
    """Integers 0..high-1, [B] int64, on index's device; high 1..2**31. Otherwise as `uniform`.

    The high part of word * high (32 bits): each value's probability differs from 1/high by less
    than 2**-32, that is relatively by high / 2**32 (2.4e-7 for 1000 classes).
    """
    _check_int("high", high, 1, 2**31, "1..2**31")
    word = _words(seed, stream, index, 1, step)[0]
    return ((word * high) >> 32)[:, 0]
