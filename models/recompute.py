"""Blocks that run again in the backward pass, so that nothing of their insides is kept for it.

Gradient checkpointing (arXiv 1604.06174): of each block only the input stays in memory, and the
activations of one block at a time; the price is a second forward pass.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module) -> None:
    """Makes a DiT or PixArt run its blocks, and pairs of blocks, again in backward, in place.

    Raises:
        ValueError: an operator has dropout, and would draw other numbers the second time.
    """
    for name, module in model.named_modules():
        dropout = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
        if isinstance(dropout, (int, float)) and dropout > 0:
            raise ValueError(
                f"--grad-checkpoint: {name} has dropout {dropout}, which a second pass draws anew; "
                "set it to 0 in the operator's YAML, or leave the flag out"
            )
    model.recomputes = True


def run_block(model: nn.Module, block: Callable, *inputs):
    """block(*inputs), again in the backward pass where `recompute` was asked for.

    block: a block of the model, compiled or not, or `run_pair`.
    """
    if not (model.recomputes and torch.is_grad_enabled()):
        return block(*inputs)
    # random numbers are part of the inputs, and a captured step has no generator to set back
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
