"""torch.compile and CUDA graphs where they pay: on CUDA.

A model is compiled block by block: blocks of a kind share their code, so that 28 of them compile in
the time of one, and each block's gradients are there, and on their way to the other processes,
while those of the blocks before it are still computed. The launches that this leaves are taken off
the host by running the whole step, from the model's input to the averages, as one CUDA graph, with
the exchange of gradients in it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.utils._pytree import tree_leaves, tree_map

from training import distributed
from training.distributed import LOST_MINUTES, World

# Left to itself Inductor lays a graph with many convolutions out channels-last, and then hands
# FlashAttention's backward a gradient in other strides than it reads: bf16 gradients come out wrong
# (PyTorch 2.11; of the same family as github.com/pytorch/pytorch/pull/138879). And it pads the rows
# of a product that are no multiple of 128 bytes, as Mamba-2's first one has, and then copies every
# part of them that an operation of our own reads.
MODEL_OPTIONS = {"layout_optimization": False, "comprehensive_padding": False}

# Left to itself Inductor folds the arange in diffusion.noise into 32-bit index arithmetic, where
# Philox's 32-bit multipliers do not fit.
FUNCTION_OPTIONS = {"constant_and_index_propagation": False}

# Kinds of blocks, times batch sizes, times training or not, for which one block may be compiled;
# one more is an error, as PyTorch would then run it eagerly without a word.
KINDS = 256

# Calls before a graph is captured. The first compiles, and with several processes settles in which
# order they exchange gradients; in the next NCCL meets the sizes that the graph will hold.
WARM = 3
LOOK_SECONDS = 10.0


def _wanted(world: World, flag: bool) -> bool:
    """Whether --compile is to have an effect here."""
    return flag and world.device.type == "cuda"


def compile_models(world: World, flag: bool, *models: torch.nn.Module) -> None:
    """Compiles models in place: a DiT, or what holds one as `dit`, block by block."""
    if not _wanted(world, flag):
        return
    allow_kinds()
    for model in models:
        dit = getattr(model, "dit", model)
        for region in dit.regions() if hasattr(dit, "regions") else [model]:
            region.compile(options=MODEL_OPTIONS, dynamic=False)


def allow_kinds() -> None:
    """Lets one piece of code be compiled for KINDS of modules."""
    torch._dynamo.config.recompile_limit = KINDS
    torch._dynamo.config.accumulated_recompile_limit = 8 * KINDS
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compile_functions(world: World, flag: bool, *functions: Callable) -> tuple[Callable, ...]:
    """Functions of a step beside its model, compiled where --compile has an effect."""
    if not _wanted(world, flag):
        return functions
    return tuple(torch.compile(function, options=FUNCTION_OPTIONS) for function in functions)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Graphed:
    """A function of tensors that runs as one CUDA graph after some calls.

    function(**inputs) takes tensors, and named tuples of them, and gives tensors; it must do the
    same work at every call and wait for nothing. It may change what it closes over (weights,
    averages): the calls before the capture count like the others. Results are overwritten by the
    next call. Inputs must keep their shapes. With `meets`, the processes exchange gradients in it.
    """

    def __init__(self, function: Callable, world: World, meets: bool):
        self.function, self.device = function, world.device
        self.limit = Limit(world) if meets else None
        self.left = WARM
        self.stream = _stream(world.device)
        self.inputs: dict | None = None  # where the graph reads; the calls before it too, so that
        self.graph: torch.cuda.CUDAGraph | None = None  # capturing finds nothing left to compile

    def __call__(self, **inputs):
        if self.inputs is None:
            self.inputs = tree_map(torch.clone, inputs)
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            mine.copy_(given)
        if self.left > 0:
            self.left -= 1
            return self._aside()
        if self.graph is None:
            self._capture()
        self.graph.replay()
        if self.limit is not None:
            self.limit.begun()
        return self.results

    def _aside(self):
        """A call on the stream of the capture, as capturing asks for."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.function(**self.inputs)
        current.wait_stream(self.stream)
        return results

    def _capture(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        # Other threads read latents, write checkpoints and watch NCCL meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.results = self.function(**self.inputs)
        if self.limit is not None:
            distributed.ends_with(self.graph)


class Limit:
    """Ends this process when a step of its graph waits too long for the other processes.

    NCCL's own watchdog does not see what runs within a CUDA graph.
    """

    def __init__(self, world: World, minutes: float = LOST_MINUTES):
        self.world, self.minutes = world, minutes
        self.done, self.at = torch.cuda.Event(), time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()

    def begun(self) -> None:
        """A step has been put on the device; on its current stream."""
        self.at = time.monotonic()
        self.done.record()

    def _look(self) -> None:
        torch.cuda.set_device(self.world.device)  # a thread begins on the first
        while True:
            time.sleep(LOOK_SECONDS)
            if self.done.query() or time.monotonic() - self.at < 60 * self.minutes:
                continue
            who = f"error (rank {self.world.rank})"
            print(
                f"{who}: a step has not ended within {self.minutes:g} minutes: another process "
                "hangs or is lost; start the run again with --resume auto",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # the main thread waits in CUDA, which nothing else interrupts


def graphed(world: World, flag: bool, function: Callable, reduces: bool = True) -> Callable:
    """`function` as a `Graphed` where --compile has an effect, else as it is.

    reduces: the processes, if there are several, exchange gradients in it.
    """
    if not _wanted(world, flag):
        return function
    return Graphed(function, world, meets=reduces and world.size > 1)
