"""Low-rank updates of frozen linear layers (LoRA, arXiv 2106.09685), by the peft library."""

import torch

from models.graft_plan import GraftPlan
from models.restructure import MERGES
from models.weights import SLOTS


def add_lora(
    model: torch.nn.Module, rank: int, alpha: float, exclude: tuple[str, ...] = ()
) -> list[str]:
    """Freezes `model` and gives every linear layer a LoRA update, in place.

    Args:
        rank: rank of the updates; at least 1.
        alpha: the update is scaled by alpha / rank.
        exclude: linears with one of these texts in their name, which is read with a dot before and
            behind it, are left alone (and frozen like the rest).

    Returns:
        Names of the layers that received an update.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(text in f".{name}." for text in exclude)
    ]
    if rank < 1:
        raise ValueError(f"--lora-rank {rank}: must be at least 1")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    return names


def add_lora_around(model: torch.nn.Module, plan: GraftPlan, rank: int, alpha: float) -> list[str]:
    """As `add_lora`, on all but what a plan put into the model, which is trained in full."""
    new = [f".blocks.{block}.{SLOTS[g.slot]}." for g in plan.grafts for block in g.blocks]
    new = (*new, *(f".{MERGES}{first}." for first, _ in plan.parallel_pairs))
    names = add_lora(model, rank, alpha, exclude=new)
    for name, parameter in model.named_parameters():
        if any(text in f".{name}" for text in new):
            parameter.requires_grad_(True)
    return names


def merge_lora(model: torch.nn.Module) -> None:
    """Folds every update into its linear layer and removes the adapters, in place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
