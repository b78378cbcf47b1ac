"""Exponential moving average of the trainable parameters; frozen ones need none."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """avg <- decay * avg + (1 - decay) * parameter, after each step, in float32.

    Args:
        model: the module whose parameters with `requires_grad` are averaged (not `wrap`ped).
        decay: 0..1; 0.9999 keeps about the last 10 000 steps.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"--ema-decay {decay}: must be at least 0 and below 1")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.decay = decay
        self.names, self.parameters = list(trained), list(trained.values())
        self._live = [p.detach() for p in self.parameters]
        self.averages = [p.detach().clone() for p in self.parameters]
        self.average_of = dict(zip(self.parameters, self.averages, strict=True))
        self._update = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, parameters: Sequence[torch.nn.Parameter] | None = None) -> None:
        """One averaging step towards the model's present parameters: all, or only these."""
        if parameters is None:
            self._update(self.averages, self._live, 0)
        else:
            self._update([self.average_of[p] for p in parameters], list(parameters), 0)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's state with the averages in place of the trained tensors."""
        state = self.model.state_dict()
        state.update(zip(self.names, self.averages, strict=True))
        return {name: tensor.detach() for name, tensor in state.items()}

    def averaged(self, child: str) -> torch.nn.Module:
        """A copy of the model's submodule `child` that holds the averages."""
        copied = copy.deepcopy(self.model.get_submodule(child))
        prefix = f"{child}."
        own = {n: t for n, t in self.state_dict().items() if n.startswith(prefix)}
        copied.load_state_dict({n.removeprefix(prefix): t for n, t in own.items()}, strict=True)
        return copied

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model holds the averages; afterwards what it held before."""
        with torch.no_grad():
            before = [p.clone() for p in self._live]
            torch._foreach_copy_(self._live, self.averages)
            try:
                yield
            finally:
                torch._foreach_copy_(self._live, before)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes the averages back from what `state_dict` gave."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(state[name])
