"""Work that goes on at the same time within a CUDA graph.

At small batches one kernel leaves most of a GPU idle, and what needs nothing of each other had
better not wait for each other. Only what takes no gradients within a graph is spread over streams,
sampling and the teacher of a training: launched from the host, kernels would hardly meet, and
gradients would have to find their streams. Anywhere else all runs in its order, on one stream.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")

# cuBLAS plans a product for the whole GPU, with blocks that leave no shared memory on a processor:
# two of them take turns on two streams. Up to so many rows in each it pays to plan both for this
# share of the processors instead.
SMALL, SHARE = 512, 0.455

# What one stream frees it may write to again before another has read it. Both functions here free
# nothing that crosses streams until these have met, and begin by waiting for the present one.


def beside(
    first: Callable[[], Result], second: Callable[[], Result], device: torch.device, rows: int
) -> tuple[Result, Result]:
    """The results of two functions that need nothing of each other.

    rows: of their matrix products.
    """
    if not _spreads(device):
        return first(), second()
    here, there = torch.cuda.current_stream(device), _stream(device, "beside")
    there.wait_stream(here)
    with _shared(device, rows):
        with torch.cuda.stream(there):
            other = second()
        one = first()
    here.wait_stream(there)
    return one, other


@contextmanager
def _shared(device: torch.device, rows: int) -> Iterator[None]:
    """Within it, products with few rows are planned for a share of the processors."""
    leave_out = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if rows > SMALL or leave_out is None:
        yield
        return
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    leave_out(processors - round(SHARE * processors))
    try:
        yield
    finally:
        leave_out(None)


def ahead(
    functions: Sequence[Callable[[], torch.Tensor]], device: torch.device
) -> Iterator[torch.Tensor]:
    """The results of functions, one by one as they are taken, while all are under way already.

    All must be taken, and kept until the last has been used.
    """
    if not _spreads(device):
        for function in functions:
            yield function()
        return
    here, there = torch.cuda.current_stream(device), _stream(device, "ahead")
    there.wait_stream(here)
    with torch.cuda.stream(there):
        begun = [(function(), there.record_event()) for function in functions]
    for result, event in begun:
        here.wait_event(event)
        yield result


def _spreads(device: torch.device) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and device.type == "cuda"
        and torch.cuda.is_current_stream_capturing()
    )


@cache
def _stream(device: torch.device, use: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
