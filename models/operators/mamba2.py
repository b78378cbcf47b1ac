"""Mamba-2 (state space duality, arXiv 2405.21060) in plain PyTorch, for the mha slot.

Parameter names, defaults and initialisation are those of mamba-ssm's Mamba2, one direction, over a
whole sequence of any length. The scan is done chunk by chunk in matrix products.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.operators.fused_gated_norm import fused_gated_norm
from models.operators.fused_scan import fused_scan
from models.operators.hyena import CausalConv

DT_RANGE = (1e-3, 1e-1)  # of the step sizes at initialisation
DT_FLOOR = 1e-4
A_RANGE = (1.0, 16.0)  # of the decay rates at initialisation
NORM_EPS = 1e-5
UNBOUNDED = torch.finfo(torch.float32).max  # infinity does not survive code generation
KERNEL_CHUNK = 128  # tokens a chunk in mamba-ssm's kernels


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


class GatedRMSNorm(nn.Module):
    """RMS norm over groups of channels, joined with a gate SiLU(z): y, z [..., C] -> [..., C].

    path: "triton" where `fused_gated_norm` may do it, which rounds nothing on the way.
    """

    def __init__(self, channels: int, groups: int, norm_before_gate: bool):
        super().__init__()
        self.groups = groups
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: torch.Tensor, z: torch.Tensor, path: str = "torch") -> torch.Tensor:
        if path == "triton" and self.groups == 1 and not self.norm_before_gate:
            return fused_gated_norm(y, z, self.weight, NORM_EPS)
        full = torch.promote_types(y.dtype, torch.float32)
        y, gate = y.to(full), F.silu(z.to(full))
        y = y if self.norm_before_gate else y * gate
        grouped = y.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + NORM_EPS)
        y = (grouped * scale).flatten(-2) * self.weight
        return y * gate if self.norm_before_gate else y


class Mamba2(nn.Module):
    """[B,T,D] -> [B,T,D]; causal along tokens.

    `chunk_size` groups the scan and changes speed and memory, not the result. `dt_limit` bounds the
    step sizes after the softplus; None (or infinity) as its second value means no upper bound.
    ValueError when `headdim` does not divide expand * d_model, or `ngroups` the number of heads.

    `path` names what computes the scan: "torch", "triton", which takes the norm too, or "mamba-ssm"
    (accelerators.py chooses).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        chunk_size: int = 32,
        ngroups: int = 1,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        D_has_hdim: bool = False,
        dt_limit: tuple[float, float | None] = (0.0, None),
    ):
        super().__init__()
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(
                f"mamba2: headdim {headdim} does not divide expand * d_model = {d_inner}: "
                f"choose one of {_divisors(d_inner)}"
            )
        heads = d_inner // headdim
        if heads % ngroups:
            raise ValueError(
                f"mamba2: ngroups {ngroups} does not divide the {heads} heads that expand * "
                f"d_model / headdim = {d_inner} / {headdim} gives: choose one of {_divisors(heads)}"
            )
        self.d_inner = d_inner
        self.d_state = d_state
        self.headdim = headdim
        self.heads = heads
        self.ngroups = ngroups
        self.chunk_size = chunk_size
        self.dt_limit = tuple(dt_limit)
        self.path = "torch"

        d_xbc = d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + d_xbc + heads, bias=bias)
        self.conv1d = CausalConv(d_xbc, d_conv, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(d_inner if D_has_hdim else heads))
        self.norm = GatedRMSNorm(d_inner, ngroups, norm_before_gate) if rmsnorm else None
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        self.reset_state_parameters()

    def reset_state_parameters(self) -> None:
        with torch.no_grad():
            low, high = (math.log(edge) for edge in DT_RANGE)
            dt = self.dt_bias.uniform_(low, high).exp().clamp(min=DT_FLOOR)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
            self.A_log.uniform_(*A_RANGE).log_()
            self.D.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        state_width = self.ngroups * self.d_state
        z, xbc, dt = self.in_proj(x).split(
            [self.d_inner, self.d_inner + 2 * state_width, self.heads], dim=-1
        )
        xbc = self.conv1d(xbc.transpose(1, 2), silu=True).transpose(1, 2)

        # the scan and the norm add up in float32 whatever the precision around them; in PyTorch
        # they multiply in it too, in kernels in that of xbc
        with torch.autocast(x.device.type, enabled=False):
            full = torch.promote_types(x.dtype, torch.float32)
            A = -self.A_log.to(full).exp()
            if self.path == "triton":
                y = self._fused_scan(xbc, dt, A)
            else:
                u, b, c = xbc.split([self.d_inner, state_width, state_width], dim=-1)
                u = u.unflatten(-1, (self.heads, self.headdim))  # B T heads headdim
                b = b.unflatten(-1, (self.ngroups, self.d_state))  # B T groups d_state
                c = c.unflatten(-1, (self.ngroups, self.d_state))
                scan = self._mamba_ssm_scan if self.path == "mamba-ssm" else self._scan
                y = scan(u, dt, A, b, c).flatten(-2)  # B T d_inner
            y = y * F.silu(z.to(full)) if self.norm is None else self.norm(y, z, self.path)
        return self.out_proj(y.to(xbc.dtype))

    def _step_sizes(self, dt: torch.Tensor) -> torch.Tensor:
        return F.softplus(dt + self.dt_bias).clamp(*self.dt_limit)  # B T heads

    def _scan(self, u, dt, A, b, c):
        full = A.dtype
        u, b, c = u.to(full), b.to(full), c.to(full)
        dt = self._step_sizes(dt.to(full))
        y = chunked_scan(u, dt, A, b, c, self.chunk_size)
        return y + u * self.D.view(self.heads, -1)

    def _mamba_ssm_scan(self, u, dt, A, b, c):
        """The kernels multiply in the precision of u, b and c and add up in float32."""
        D = self.D.view(self.heads, -1).squeeze(-1)  # heads, or heads headdim
        low, high = self.dt_limit
        high = UNBOUNDED if high is None else min(high, UNBOUNDED)
        y = mamba_ssm_scan(u, dt, A, b, c, D, self.dt_bias, low, high)
        return y.to(A.dtype)

    def _fused_scan(self, xbc, dt, A):
        """As `_mamba_ssm_scan` in our kernels, of x, B and C side by side."""
        dt = self._step_sizes(dt.to(A.dtype))
        per_head = len(self.D) == self.heads
        D = self.D if per_head else A.new_zeros(self.heads)
        y = fused_scan(xbc, dt, dt * A, D, self.ngroups, self.d_state)
        return y if per_head else (y + xbc[..., : self.d_inner] * self.D).to(xbc.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, headdim={self.headdim}, d_state={self.d_state}"


def chunked_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """y_t = S_t C_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and S_0 = 0.

    x [b, T, heads, p], dt [b, T, heads] >= 0, A [heads] < 0, B and C [b, T, groups, n], each group
    shared by heads / groups neighbouring heads -> y [b, T, heads, p]. Within a chunk the scan is a
    masked matrix product (the dual form, arXiv 2405.21060 section 6); states pass between chunks.
    """
    b, T, heads, p = x.shape
    groups = B.shape[2]
    Q = min(chunk_size, T)
    chunks = -(-T // Q)
    fill = chunks * Q - T  # zero steps: the state stands still

    def by_chunk(v, per_group):  # b T heads|groups w -> b chunks groups per_group Q w
        v = F.pad(v, (0, 0, 0, 0, 0, fill))
        return v.reshape(b, chunks, Q, groups, per_group, -1).permute(0, 1, 3, 4, 2, 5)

    step = by_chunk((dt * A)[..., None], heads // groups).squeeze(-1)  # log decays, <= 0
    x = by_chunk(x * dt[..., None], heads // groups)  # b chunks groups r Q p
    B = by_chunk(B, 1)  # b chunks groups 1 Q n
    C = by_chunk(C, 1)

    decay = decay_between(step)  # b chunks groups r Q Q
    y = ((C @ B.transpose(-1, -2)) * decay) @ x
    if chunks > 1:
        gained = (x * decay[..., -1, :, None]).transpose(-1, -2) @ B  # b chunks groups r p n
        over_chunks = decay_between(step[:, :-1].sum(-1).movedim(1, -1))  # b groups r chunks-1 ^2
        entering = torch.einsum("bgrij,bjgrpn->bigrpn", over_chunks, gained[:, :-1])
        since_start = step[:, 1:].cumsum(-1).exp()[..., None]
        carried = (C[:, 1:] @ entering.transpose(-1, -2)) * since_start
        y = torch.cat([y[:, :1], y[:, 1:] + carried], dim=1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, chunks * Q, heads, p)
    return y[:, :T]


def decay_between(step: torch.Tensor) -> torch.Tensor:
    """[..., n] log decays -> [..., n, n]: exp(step[j+1] + ... + step[i]) for j <= i, else 0.

    The sums are differences of running sums, which reach hundreds: in float32 alone they would lose
    the digits of the small ones. So the running sum is a float64 number held as two float32.
    """
    n = step.shape[-1]
    total = step.double().cumsum(-1)
    coarse = total.to(step.dtype)
    fine = (total - coarse).to(step.dtype)
    between = (coarse[..., :, None] - coarse[..., None, :]) + (
        fine[..., :, None] - fine[..., None, :]
    )
    future = torch.ones(n, n, dtype=torch.bool, device=step.device).triu(1)
    return between.masked_fill(future, -math.inf).exp()


# mamba-ssm's scan as an operation of our own: opaque to torch.compile, and with its gradient.


@torch.library.custom_op("grafts::ssd_scan", mutates_args=())
def mamba_ssm_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_low: float,
    dt_high: float,
) -> torch.Tensor:
    """`chunked_scan` plus x * D by mamba-ssm's kernels, on CUDA, at steps
    clamp(softplus(dt + dt_bias), dt_low, dt_high); D [heads] or [heads, p] -> like x."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    options = _scan_options(D, dt_bias, dt_low, dt_high)
    y, *_ = _mamba_chunk_scan_combined_fwd(x, dt, A, B, C, KERNEL_CHUNK, **options)
    return y.contiguous()


@torch.library.custom_op("grafts::ssd_scan_backward", mutates_args=())
def _scan_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_low: float,
    dt_high: float,
) -> list[torch.Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

    options = _scan_options(D, dt_bias, dt_low, dt_high)
    # the output, its seventh argument, matters only to a gate inside the kernel: any will do
    dx, ddt, dA, dB, dC, dD, _, dbias, _ = _mamba_chunk_scan_combined_bwd(
        grad, x, dt, A, B, C, grad, KERNEL_CHUNK, **options
    )
    grads = zip((dx, ddt, dA, dB, dC, dD, dbias), (x, dt, A, B, C, D, dt_bias), strict=True)
    return [d.to(given.dtype).contiguous() for d, given in grads]


def _scan_options(D, dt_bias, dt_low, dt_high) -> dict:
    return {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": (dt_low, dt_high)}


@mamba_ssm_scan.register_fake
def _(x, dt, A, B, C, D, dt_bias, dt_low, dt_high):
    return x.new_empty(x.shape)


@_scan_backward.register_fake
def _(grad, x, dt, A, B, C, D, dt_bias, dt_low, dt_high):
    return [given.new_empty(given.shape) for given in (x, dt, A, B, C, D, dt_bias)]


def _keep_for_backward(ctx, inputs, output):
    *tensors, ctx.dt_low, ctx.dt_high = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *_scan_backward(grad, *ctx.saved_tensors, ctx.dt_low, ctx.dt_high), None, None


mamba_ssm_scan.register_autograd(_backward, setup_context=_keep_for_backward)
