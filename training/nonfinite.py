"""Where numbers stop being finite: asked once a run gives up, so it may take its time."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from training.distributed import World, gather_objects
from training.runlog import Means


def where(
    world: World, means: Means, models: Mapping[str, nn.Module], forward: Callable[[], object]
) -> str:
    """The loss terms of the last step, and the first activation of it that is not finite.

    Every process calls it and gets the same: what the first one found for which a term or an
    activation is not finite.

    Args:
        means: of the run; holds the terms.
        models: name -> module, for the message; "" for a model whose blocks speak for themselves.
        forward: repeats the step's forward passes.
    """
    terms = ", ".join(
        f"{name} {value:.4g}" for name, value in zip(means.names, means.last.tolist(), strict=True)
    )
    place = first_nonfinite(models, forward)
    found = f"the first activation that is not finite is what {place} gives"
    if place is None:
        found = "its activations are finite"
    healthy = place is None and bool(means.last.isfinite().all())
    reports = gather_objects(world, (healthy, f"on rank {world.rank} {terms}; {found}"))
    return min(reports, key=lambda report: report[0])[1]


@torch.no_grad()
def first_nonfinite(models: Mapping[str, nn.Module], forward: Callable[[], object]) -> str | None:
    """The module that, in the order of work, is the first to give a NaN or an infinity."""
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and not all(t.isfinite().all() for t in _floats(output)):
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(".".join(filter(None, (prefix, name)))))
        for prefix, model in models.items()
        for name, module in model.named_modules()
        if prefix or name
    ]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled modules call no hooks
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _floats(output: object) -> list[torch.Tensor]:
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() else []
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _floats(item)]
    return []
