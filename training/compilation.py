"""torch.compile and CUDA graphs where they pay: on CUDA.

A model is compiled block by block: blocks of a kind share their code, so that 28 of them compile in
the time of one, and each block's gradients are there, and on their way to the other processes,
while those of the blocks before it are still computed. On one process the launches that this leaves
are taken off the host by running the whole step, from the model's input to the averages, as one
CUDA graph; so does sampling on any number, and on several what follows the gradients.
"""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map

from training.distributed import World

# Left to itself Inductor lays a graph with many convolutions out channels-last, and then hands
# FlashAttention's backward a gradient in other strides than it reads: bf16 gradients come out wrong
# (PyTorch 2.11; of the same family as github.com/pytorch/pytorch/pull/138879).
MODEL_OPTIONS = {"layout_optimization": False}

# Left to itself Inductor folds the arange in diffusion.noise into 32-bit index arithmetic, where
# Philox's 32-bit multipliers do not fit.
FUNCTION_OPTIONS = {"constant_and_index_propagation": False}

# Kinds of blocks, times batch sizes, times training or not, for which one block may be compiled.
KINDS = 64

WARM = 3  # calls before a graph is captured


def _wanted(world: World, flag: bool) -> bool:
    """Whether --compile is to have an effect here."""
    return flag and world.device.type == "cuda"


def compile_models(world: World, flag: bool, *models: torch.nn.Module) -> None:
    """Compiles models in place: a DiT, or what holds one as `dit`, block by block."""
    if not _wanted(world, flag):
        return
    torch._dynamo.config.recompile_limit = KINDS
    for model in models:
        dit = getattr(model, "dit", model)
        for region in dit.regions() if hasattr(dit, "regions") else [model]:
            region.compile(options=MODEL_OPTIONS, dynamic=False)


def compile_functions(world: World, flag: bool, *functions: Callable) -> tuple[Callable, ...]:
    """Functions of a step beside its model, compiled where --compile has an effect."""
    if not _wanted(world, flag):
        return functions
    return tuple(torch.compile(function, options=FUNCTION_OPTIONS) for function in functions)


class Graphed:
    """A function of tensors that runs as one CUDA graph after some calls.

    function(**inputs) takes tensors, and named tuples of them, and gives tensors; it must do the
    same work at every call and wait for nothing. It may change what it closes over (weights,
    averages): the calls before the capture count like the others. Results are overwritten by the
    next call. Inputs must keep their shapes.
    """

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device, self.left = function, device, WARM
        self.stream = torch.cuda.Stream(device)
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
        # Other threads read latents and write checkpoints meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.results = self.function(**self.inputs)


def graphed(world: World, flag: bool, function: Callable, reduces: bool = True) -> Callable:
    """`function` as a `Graphed` where --compile has an effect, else as it is.

    reduces: the processes meet in it. Several then launch their kernels one by one: a graph would
    hide from NCCL's watchdog that one of them is lost.
    """
    if not _wanted(world, flag) or (reduces and world.size > 1):
        return function
    return Graphed(function, world.device)


def graphed_apart(world: World, flag: bool, function: Callable) -> Callable:
    """A part of a step in which processes do not meet, as a `Graphed` where the step is none."""
    return graphed(world, flag and world.size > 1, function, reduces=False)
