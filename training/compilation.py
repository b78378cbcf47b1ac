"""torch.compile where it pays: on CUDA."""

from collections.abc import Callable

import torch

from training.distributed import World

# Left to itself Inductor lays a graph with many convolutions out channels-last, and then hands
# FlashAttention's backward a gradient in other strides than it reads: bf16 gradients come out wrong
# (PyTorch 2.11; of the same family as github.com/pytorch/pytorch/pull/138879).
MODEL_OPTIONS = {"layout_optimization": False}

# Left to itself Inductor folds the arange in diffusion.noise into 32-bit index arithmetic, where
# Philox's 32-bit multipliers do not fit.
FUNCTION_OPTIONS = {"constant_and_index_propagation": False}


def compile_model(model: torch.nn.Module, graphs: bool = False) -> None:
    """Compiles a model in place; with `graphs`, into CUDA graphs."""
    model.compile(options={**MODEL_OPTIONS, "triton.cudagraphs": graphs})


def compile_step(
    world: World,
    wanted: bool,
    model: torch.nn.Module | None,
    *functions: Callable,
    graphs: bool = True,
) -> tuple[Callable, ...]:
    """Compiles a step's model in place and gives back its functions, compiled.

    Alone on a GPU the model runs as CUDA graphs, which take the launches of its kernels off the
    host; with several processes it does not, because gradients then leave the graph to be reduced.
    Neither does it without `graphs`: gradients that are to be accumulated lie in memory that the
    graphs' next run overwrites. On the CPU, or when not wanted, nothing changes.
    """
    if not wanted or world.device.type != "cuda":
        return functions
    if model is not None:
        compile_model(model, graphs=graphs and world.size == 1)
    return tuple(torch.compile(function, options=FUNCTION_OPTIONS) for function in functions)
