"""Copies in bf16 of the weights that matrix products read, beside the float32 ones under training.

Under autocast every such weight is cast at every step, and its gradient, which the product gives in
bf16, is cast back: for each number 6 bytes read and written either way, and 4 of the gradient where
2 would do. With copies that last from step to step nothing is cast: the optimiser's step reads
their gradients and, with the weights, writes the copies anew. The module itself keeps its float32
weights, for optimiser, averages and checkpoints; only its forward pass runs on the copies.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.func import functional_call

from training.distributed import World
from training.optimizer import StepGuard


class WorkingWeights(nn.Module):
    """Runs a module on bf16 copies of the weights and biases of its linear layers.

    Its parameters are what then receives gradients, by the module's names: the copies of trained
    weights, and the module's other trained parameters.

    Args:
        trained: copy trained weights too, not only frozen ones, which never change.

    Attributes:
        copies: from trained weights to their copies.
        names: of all weights that have one.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, trained: bool = True) -> None:
        super().__init__()
        self._module = [module]  # in a list, so that its parameters are not those of this module
        made: dict[nn.Parameter, nn.Parameter] = {}
        self._by_name: dict[str, nn.Parameter] = {}
        for place, layer in module.named_modules():
            for name, weight in layer.named_parameters(place, recurse=False):
                if not isinstance(layer, nn.Linear) or weight.dtype != torch.float32:
                    continue
                if weight.requires_grad and not trained:
                    continue
                if weight not in made:
                    copy = weight.detach().to(dtype)
                    made[weight] = nn.Parameter(copy, requires_grad=weight.requires_grad)
                self._by_name[name] = made[weight]
        self.names = tuple(self._by_name)
        self.copies: Mapping[nn.Parameter, nn.Parameter] = {
            weight: copy for weight, copy in made.items() if weight.requires_grad
        }
        self.leaves = nn.ParameterList(p for _, p in self.named_parameters())

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        named = self._module[0].named_parameters(*args, **kwargs)
        return ((name, self.copies.get(p, p)) for name, p in named if p.requires_grad)

    def forward(self, *args, **kwargs):
        return functional_call(self._module[0], self._by_name, args, kwargs)


def with_copies(
    world: World,
    module: nn.Module,
    dtype: torch.dtype,
    guard: StepGuard,
    flags: Namespace,
) -> tuple[nn.Module, list[str]]:
    """What a training's forward pass is to call, and lines for the log.

    The module on `WorkingWeights` where it runs in bf16, else itself. Trained weights have copies
    where Triton takes the optimiser's steps; where gradients are not added up over several passes,
    which bf16 is too coarse for; and with several processes where these exchange gradients in bf16.

    Args:
        flags: grad_accum; exchange, "fp32" or "bf16"; and grad_checkpoint, by which the forward
            pass is run again within the backward pass, where the module has its float32 weights
            back: there are no copies then.
    """
    reasons = {
        f"a run in {str(dtype).removeprefix('torch.')}": dtype != torch.bfloat16,
        "--grad-checkpoint": flags.grad_checkpoint,
        "--grad-accum": flags.grad_accum > 1,
        "PyTorch's optimiser": guard.fused is None,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    lines = []
    if against and world.size > 1 and flags.exchange == "bf16":
        lines = [f"gradients are exchanged in fp32, not bf16 ({', '.join(against)})"]
    if dtype != torch.bfloat16 or flags.grad_checkpoint:
        return module, lines
    trained = not against and (world.size == 1 or flags.exchange == "bf16")
    working = WorkingWeights(module, dtype, trained)
    if not working.names:
        return module, lines
    if trained:
        guard.use_copies(working.copies)
    return working, [f"{len(working.names)} weights of products are kept in bf16 too", *lines]
