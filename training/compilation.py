"""torch.compile where it pays: on CUDA."""

from collections.abc import Callable

import torch

from training.distributed import World

# Left to itself Inductor folds the arange in diffusion.noise into 32-bit index arithmetic, where
# Philox's 32-bit multipliers do not fit.
FUNCTION_OPTIONS = {"constant_and_index_propagation": False}


def compile_step(
    world: World, wanted: bool, model: torch.nn.Module | None, *functions: Callable
) -> tuple[Callable, ...]:
    """Compiles a step's model in place and gives back its functions, compiled.

    Alone on a GPU the model runs as CUDA graphs, which take the launches of its kernels off the
    host; with several processes it does not, because gradients then leave the graph to be reduced.
    On the CPU, or when not wanted, nothing changes.
    """
    if not wanted or world.device.type != "cuda":
        return functions
    if model is not None:
        model.compile(mode="reduce-overhead" if world.size == 1 else "default")
    return tuple(torch.compile(function, options=FUNCTION_OPTIONS) for function in functions)
