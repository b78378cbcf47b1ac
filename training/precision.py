"""bf16 where the hardware likes it, fp32 where the numbers need it."""

import contextlib

import torch


def choose(precision: str | None, device: torch.device) -> torch.dtype:
    """The autocast type: "bf16" | "fp32", or None for bf16 on CUDA and fp32 elsewhere."""
    legal = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in legal:
        raise ValueError(f"--precision {precision}: use one of {', '.join(legal)}")
    return legal[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `dtype`, or nothing when that is float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def allow_tf32(allow: bool = True) -> None:
    """Lets float32 matrix products of CUDA use TF32 (about 1e-3 relative); CPU is untouched."""
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow
