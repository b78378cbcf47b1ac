"""Mamba-2's scan in Triton, forward and backward, from the convolution's output to the gate.

Made for DiT's grafts: many narrow heads that share their B and C. States pass from chunk to chunk
in one kernel that walks along the tokens; another gives what each chunk yields, all of them at
once, its product of C and B shared by its heads. The backward pass walks both ways and then takes
a chunk's gradients in one kernel, which writes those of x, B and C side by side, where the
convolution reads them. It computes the states anew: kept, they would take as much memory as x.
"""

import torch

LEAST_DOT = 16  # channels of a product in Triton
CHUNK = 64  # tokens a chunk, at most
PROGRAMS = 528  # at least, where there are heads enough: four for each processor of an H200
HEAD_BLOCK = 16  # heads of a program that has no products

# Heads of a program, at most, and how Triton compiles it. All have more than one stage, and turns
# of their loops that are counted when they run: of a loop that becomes straight code ptxas makes
# wrong reads; see `fused_attention._settings`.
PLANS = {
    "walk": (2, 4, 3),
    "outputs": (72, 4, 4),
    "gradients": (144, 4, 3),
}


def fused_scan(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    steps: torch.Tensor,
    skip: torch.Tensor,
    groups: int,
    d_state: int,
) -> torch.Tensor:
    """`mamba2.chunked_scan` plus x * D, on CUDA in half precision.

    Args:
        xbc: [B, T, heads * P + 2 * groups * d_state]; of a token x, then B, then C. P: 8, 16, 32
            or 64. Neighbouring heads / groups heads share a group's B and C.
        dt: float32 [B, T, heads] >= 0, the step sizes.
        steps: float32 [B, T, heads] <= 0, the logarithms of the decays, dt * A.
        skip: float32 [heads], D.
        d_state: 16, 32, 64 or 128.

    Returns:
        [B, T, heads * P]

    Raises:
        RuntimeError: xbc on CUDA in another precision, which products would not keep.
    """
    if xbc.is_cuda and xbc.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"the fused scan takes bfloat16 and float16, not {xbc.dtype}")
    return _scan(xbc, dt, steps, skip, groups, d_state)


# The kernels as operations of our own: opaque to torch.compile, and with their gradient.


@torch.library.custom_op("grafts::scan", mutates_args=())
def _scan(
    xbc: torch.Tensor,
    dt: torch.Tensor,
    steps: torch.Tensor,
    skip: torch.Tensor,
    groups: int,
    d_state: int,
) -> torch.Tensor:
    xbc, skip = xbc.contiguous(), skip.contiguous()
    shape = Shape(xbc, dt, groups, d_state)
    sizes, sums = _prepare(shape, dt, steps)
    states = _walk(shape, xbc, xbc, sizes, sums, back=False)
    return _outputs(shape, xbc, sizes, sums, states, skip)


@torch.library.custom_op("grafts::scan_backward", mutates_args=())
def _scan_backward(
    grad: torch.Tensor,
    xbc: torch.Tensor,
    dt: torch.Tensor,
    steps: torch.Tensor,
    skip: torch.Tensor,
    groups: int,
    d_state: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of xbc, dt, steps and skip"""
    grad, xbc, skip = grad.contiguous(), xbc.contiguous(), skip.contiguous()
    shape = Shape(xbc, dt, groups, d_state)
    sizes, sums = _prepare(shape, dt, steps)
    states = _walk(shape, xbc, xbc, sizes, sums, back=False)
    dstates = _walk(shape, grad, xbc, sizes, sums, back=True)
    dxbc, notes = _gradients(shape, xbc, sizes, sums, states, dstates, skip, grad)
    ddt, dsteps, dskip = _close(shape, notes)
    return dxbc, ddt, dsteps, dskip.to(skip.dtype)


@_scan.register_fake
def _(xbc, dt, steps, skip, groups, d_state):
    return xbc.new_empty((*xbc.shape[:2], xbc.shape[2] - 2 * groups * d_state))


@_scan_backward.register_fake
def _(grad, xbc, dt, steps, skip, groups, d_state):
    dxbc = xbc.new_empty(xbc.shape)
    return dxbc, dt.new_empty(dt.shape), dt.new_empty(dt.shape), skip.new_empty(skip.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.groups, ctx.d_state = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    rest = ctx.groups, ctx.d_state
    return *_scan_backward(grad, *ctx.saved_tensors, *rest), None, None


_scan.register_autograd(_backward, setup_context=_keep)


class Shape:
    """Sizes of a scan, and how its kernels divide it."""

    def __init__(self, xbc: torch.Tensor, dt: torch.Tensor, groups: int, d_state: int):
        self.B, self.T, self.heads = dt.shape
        self.groups = groups
        self.N = d_state
        self.width = xbc.shape[2] - 2 * groups * d_state
        self.P = self.width // self.heads
        self.chunk = min(CHUNK, max(LEAST_DOT, _power_of_two(self.T)))
        self.chunks = -(-self.T // self.chunk)
        self.counts = self.T, self.chunks, self.heads, groups
        self.blocks = -(-self.heads // HEAD_BLOCK)

    def by_chunk(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((self.B, self.chunks, self.heads, self.chunk))

    def divided(self, kernel: str, programs: int) -> tuple[int, int, dict[str, int]]:
        """Parts of a group of heads, so that there are PROGRAMS of a kernel of which each group
        would have `programs`; heads of a part; and what the kernel is compiled for."""
        most, warps, stages = PLANS[kernel]
        per_group = self.heads // self.groups
        wanted = max(-(-per_group // most), -(-PROGRAMS // (programs * self.groups)))
        each = -(-per_group // min(wanted, per_group))
        options = {
            "P": self.P,
            "WIDTH": max(LEAST_DOT, self.P),
            "N": self.N,
            "CHUNK": self.chunk,
            "num_warps": warps,
            "num_stages": stages,
        }
        return -(-per_group // each), each, options


def _power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _prepare(shape, dt, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """-> float32 [B, chunks, heads, chunk] step sizes and running sums, as scan_kernels.py says"""
    from models.operators import scan_kernels

    sizes, sums = shape.by_chunk(dt), shape.by_chunk(dt)
    scan_kernels.prepare[(shape.B * shape.chunks * shape.blocks,)](
        dt.contiguous(), steps.contiguous(), sizes, sums, *shape.counts[:3], shape.blocks,
        CHUNK=shape.chunk, BLOCK=HEAD_BLOCK,
    )  # fmt: skip
    return sizes, sums


def _walk(shape, values, xbc, sizes, sums, back: bool) -> torch.Tensor:
    """-> [B, links, heads, N, P] states at the links of chunks, or their gradients"""
    from models.operators import scan_kernels

    _, each, options = shape.divided("walk", shape.B)
    each = _power_of_two(each)  # as the width of its tiles has to be
    parts = -(-(shape.heads // shape.groups) // each)
    links = shape.B, shape.chunks - 1, shape.heads, shape.N, options["WIDTH"]
    states = xbc.new_empty(links)
    if shape.chunks > 1:
        keys = xbc[..., shape.width + back * shape.groups * shape.N :]
        scan_kernels.walk[(shape.B * shape.groups * parts,)](
            values, values.stride(1), keys, xbc.stride(1), sizes, sums, states, *shape.counts,
            parts, **options, HEADS=each, BACK=back,
        )  # fmt: skip
    return states


def _outputs(shape, xbc, sizes, sums, states, skip) -> torch.Tensor:
    from models.operators import scan_kernels

    y = xbc.new_empty((shape.B, shape.T, shape.width))
    places = shape.B * shape.chunks
    parts, each, options = shape.divided("outputs", places)
    scan_kernels.outputs[(places * shape.groups * parts,)](
        xbc, sizes, sums, states, skip, y, *shape.counts, parts, each,
        CARRIED=shape.chunks > 1, **options,
    )  # fmt: skip
    return y


def _gradients(shape, xbc, sizes, sums, states, dstates, skip, grad) -> tuple[torch.Tensor, ...]:
    """-> of xbc; and float32 [B, chunks, heads, chunk, 4] what `close` makes the others of"""
    from models.operators import scan_kernels

    places = shape.B * shape.chunks
    parts, each, options = shape.divided("gradients", places)
    dxbc, notes = torch.empty_like(xbc), sizes.new_empty((*sizes.shape, 4))
    dbc = dxbc[..., shape.width :]
    shares = dbc if parts == 1 else sizes.new_empty((parts, *dbc.shape))
    scan_kernels.gradients[(places * shape.groups * parts,)](
        xbc, sizes, sums, states, dstates, skip, grad, dxbc, notes,
        shares, shares.stride(0), shares.stride(-2), *shape.counts, parts, each,
        CARRIED=shape.chunks > 1, **options,
    )  # fmt: skip
    if parts > 1:
        dbc.copy_(shares.sum(0))
    return dxbc, notes


def _close(shape, notes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> of dt, steps and skip"""
    from models.operators import scan_kernels

    ddt, dsteps = (notes.new_empty((shape.B, shape.T, shape.heads)) for _ in range(2))
    dskips = notes.new_empty((shape.B * shape.chunks, shape.heads))
    scan_kernels.close[(shape.B * shape.chunks * shape.blocks,)](
        notes, ddt, dsteps, dskips, *shape.counts[:3], shape.blocks,
        CHUNK=shape.chunk, BLOCK=HEAD_BLOCK,
    )  # fmt: skip
    return ddt, dsteps, dskips.sum(0)
