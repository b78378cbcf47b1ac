"""Gradients that the processes average where they lie, while the backward pass goes on.

PyTorch's DistributedDataParallel copies every gradient into a bucket and divides it there, by a
kernel each. NCCL averages in place, and many tensors in one launch.
"""

import weakref
from collections.abc import Iterable
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import nn

GROUP_BYTES = 40 * 2**20  # of gradients, for one launch: about a block of DiT-XL/2 in bf16


class Averaged(nn.Module):
    """Runs a module whose gradients are averaged over all processes in the backward pass.

    Gradients of one dtype that come one after the other form a group, which goes out once all of
    them are there. Groups go out in one order on all processes, whichever is ready first: in the
    first pass as if parameters were used in the order of their registration, then as rank 0's
    gradients came in that pass. As gradients are averaged in place, the backward pass must not read
    the memory of one that it has handed over.

    Args:
        module: with the same parameters on all processes, see `start_alike`.
        device: where it lies.

    Attributes:
        exchanges: if False, backward passes leave each process its own gradients.

    Raises:
        RuntimeError: by a backward pass in which a trained parameter has got no gradient.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module, self.device, self.exchanges = module, device, True
        self._names = {p: name for name, p in module.named_parameters() if p.requires_grad}
        self._arrange(reversed(self._names))
        self._arranged = False  # as gradients come
        self._pass = -1  # autograd's number of the backward pass that the rest is about
        self._came: list[nn.Parameter] = []
        self._missing: list[int] = []  # gradients, by group
        self._under_way: list = []  # the first groups
        this = weakref.ref(self)  # a cycle through a parameter's hooks would never be freed

        def came(parameter: nn.Parameter) -> None:
            averaged = this()
            if averaged is not None and averaged.exchanges:
                averaged._gradient_came(parameter)

        for p in self._names:
            p.register_post_accumulate_grad_hook(came)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _arrange(self, parameters: Iterable[nn.Parameter]) -> None:
        """Forms groups of parameters whose gradients come in this order."""
        self._groups: list[list[nn.Parameter]] = []
        unfinished: dict[torch.dtype, list[nn.Parameter]] = {}  # NCCL's launches are of one dtype
        for p in parameters:
            group = unfinished.setdefault(p.dtype, [])
            group.append(p)
            if sum(each.nbytes for each in group) >= GROUP_BYTES:
                self._groups.append(unfinished.pop(p.dtype))
        self._groups += unfinished.values()
        self._group_of = {p: i for i, group in enumerate(self._groups) for p in group}

    def _gradient_came(self, parameter: nn.Parameter) -> None:
        current = torch._C._current_graph_task_id()
        if self._pass != current:  # however the one before has ended
            self._pass, self._came, self._under_way = current, [], []
            self._missing = [len(group) for group in self._groups]
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        self._came.append(parameter)
        self._missing[self._group_of[parameter]] -= 1
        while (i := len(self._under_way)) < len(self._groups) and not self._missing[i]:
            self._under_way.append(self._average([p.grad for p in self._groups[i]]))

    def _average(self, gradients: list[torch.Tensor]):
        """Begins to average them -> what can be waited for."""
        if self.device.type == "cuda":
            device, how = self.device, dist.ReduceOp.AVG
        else:  # gloo knows no average, and takes tensors together without being told where
            device, how = None, dist.ReduceOp.SUM
            torch._foreach_div_(gradients, dist.get_world_size())
        with dist._coalescing_manager(device=device, async_ops=True) as under_way:
            for gradient in gradients:
                dist.all_reduce(gradient, how)
        return under_way

    def _end_of_pass(self) -> None:
        if any(self._missing):
            name, p = next((name, p) for p, name in self._names.items() if p not in {*self._came})
            raise RuntimeError(
                f"{name} {list(p.shape)} has got no gradient: every trained parameter must take "
                "part in a step for which processes average their gradients"
            )
        for work in self._under_way:
            work.wait()
        if not self._arranged:
            self._arrange_as_rank_0()
        self._came, self._under_way = [], []  # or works would keep gradients alive

    def _arrange_as_rank_0(self) -> None:
        """Forms the groups in the order in which rank 0's gradients came."""
        parameters = list(self._names)
        places = {p: i for i, p in enumerate(parameters)}
        order = torch.tensor([places[p] for p in self._came], device=self.device)
        dist.broadcast(order, 0)
        self._arrange(parameters[i] for i in order.tolist())
        self._arranged = True


def start_alike(module: nn.Module) -> None:
    """Gives all processes rank 0's parameters and buffers.

    Raises:
        ValueError: they have different ones.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    mine = [(name, list(t.shape), t.dtype, t.requires_grad) for name, t in tensors]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        for one, other in zip_longest(found[0], theirs):
            if one != other:
                raise ValueError(
                    f"rank {rank} has parameter {other} where rank 0 has {one}: start all "
                    "processes with the same flags and files"
                )
    for _, tensor in tensors:
        dist.broadcast(tensor.detach(), 0)
