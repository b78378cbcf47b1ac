"""Where a GPU's time goes: the kernels of a step, by kind and one by one.

Not a command: benchmark.py prints it with --profile.
"""

import re
from collections import Counter
from collections.abc import Callable

import torch

STEPS = 3
IDLE = "no kernel"
KINDS = {  # the first that is found in a kernel's name
    "between processes": r"nccl",
    "optimiser, averages, norms": r"multi_tensor|Adam|adamw|foreach|lerp",
    "Inductor's own": r"^triton_",
    "modulation": r"^(forward|backward)$",
    "the VAE's norms and sums": r"^(measure|combine|normalise|total)$",
    "GELU": r"^gelu",
    "attention": r"flash|fmha|attention|^backward_|cudnn_generated|cudnn::fusion|sdpa",
    "convolutions": r"conv|fprop|dgrad|wgrad",
    "products": r"gemm|nvjet|cutlass|xmma|wgmma|splitK",
    "copies": r"Memcpy|Memset|copy_kernel|direct_copy",
    IDLE: rf"^{IDLE}$",
    "other": r"",
}


def kernel_times(once: Callable[[], None]) -> dict[str, tuple[float, float]]:
    """Kernel -> milliseconds and launches a step, over a few calls of a warm step on CUDA.

    IDLE among them: time between the first start and the last end in which none ran.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            once()
        torch.cuda.synchronize()
    times: Counter = Counter()
    launches: Counter = Counter()
    found = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    latest = None
    for event in sorted(found, key=lambda e: e.time_range.start):
        times[event.name] += event.time_range.elapsed_us() / 1e3 / STEPS
        launches[event.name] += 1 / STEPS
        start, end = event.time_range.start, event.time_range.end
        if latest is not None and start > latest:
            times[IDLE] += (start - latest) / 1e3 / STEPS
            launches[IDLE] += 1 / STEPS
        latest = end if latest is None else max(latest, end)
    return {name: (ms, launches[name]) for name, ms in times.most_common()}


def by_kind(times: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Kind -> milliseconds a step, the greatest first."""
    kinds: Counter = Counter()
    for name, (ms, _) in times.items():
        kinds[next(kind for kind, text in KINDS.items() if re.search(text, name))] += ms
    return dict(kinds.most_common())


def table(times: dict[str, tuple[float, float]], most: int = 24) -> str:
    """Milliseconds a step by kind, and of the kernels that take most."""
    lines = [f"  {ms:9.3f} ms  {kind}" for kind, ms in by_kind(times).items()]
    lines += [
        f"  {ms:9.3f} ms {number:7.1f} x  {name[:110]}"
        for name, (ms, number) in list(times.items())[:most]
    ]
    return "\n".join(lines)
