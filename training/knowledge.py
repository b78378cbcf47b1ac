"""Knowledge distillation in finetuning: the grafted model also learns from the pretrained one.

After the masked knowledge distillation of TinyFusion (arXiv 2412.01199), for a student of the
teacher's blocks: block i learns from block i, a parallel pair from the second of its blocks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from diffusion.gaussian import Diffusion
from models.dit import DiT
from models.graft_plan import GraftPlan
from models.grafting import build_grafted

OUTLIER = 2.0  # standard deviations from the mean beyond which a feature is not compared


def pretrained(plan: GraftPlan) -> DiT:
    """The frozen DiT that a plan grafts or restructures.

    Raises:
        FileNotFoundError: its weights are missing.
        ValueError: the plan has neither grafts nor parallel pairs, or no pretrained model.
    """
    if plan.is_plain or plan.base_ckpt_path is None:
        lacks = "grafts" if plan.is_plain else "base_ckpt_path"
        raise ValueError(
            f"{plan.path}: --distill needs a plan with grafts and the pretrained model they come "
            f"from; it has no {lacks}"
        )
    model, _ = build_grafted(plan.plain())
    return model.requires_grad_(False)


class WithHidden(nn.Module):
    """A DiT that also gives the tokens after every layer of another, the student.

    layers: the student's `DiT.layers`; None for its own.
    forward(x, t, y, drop) -> output [B,2C,H,W], list of [B,T,D], one a layer.
    """

    def __init__(self, dit: DiT, layers: Sequence[tuple[int, ...]] | None = None):
        super().__init__()
        self.dit = dit
        ends = [layer[-1] for layer in layers or dit.layers]
        self.given = [i for i, layer in enumerate(dit.layers) if layer[-1] in ends]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden: list[torch.Tensor] = []
        tokens, c = self.dit.run_blocks(x, t, y, drop=drop, hidden=hidden)
        output = self.dit.unpatchify(self.dit.final_layer(tokens, c))
        return output, [hidden[i] for i in self.given]


def distilled_losses(
    diffusion: Diffusion,
    student: Callable,
    teacher: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    labels: dict,
    kd_weight: float,
    feature_weight: float | torch.Tensor,
) -> dict[str, torch.Tensor]:
    """kd_weight * kd + (1 - kd_weight) * (mse + vb) + feature_weight * features.

    Args:
        student, teacher: as `WithHidden`; both see the same noised latents, timesteps and labels.
        x, t, noise: latents [B,C,H,W], timesteps [B], unit normal like x.
        labels: the keywords of the models beside x and t.

    Returns:
        "loss", "mse", "vb" (see `Diffusion.training_losses`), "kd", the mean squared difference of
        the predicted noise plus that of the variance's interpolation weight, and "features", see
        `masked_difference`; each [B] float32.
    """
    seen = {}

    def once(x_t: torch.Tensor, t: torch.Tensor, **keywords) -> torch.Tensor:
        seen["output"], seen["hidden"] = student(x_t, t, **keywords)
        seen["given"] = x_t, t, keywords
        return seen["output"]

    terms = diffusion.training_losses(once, x, t, labels, noise=noise)
    x_t, t, keywords = seen["given"]
    with torch.no_grad():
        target, hidden = teacher(x_t, t, **keywords)
    difference = (seen["output"].float() - target.float()).square()
    eps, v = difference.flatten(2).mean(2).chunk(2, dim=1)  # B C each
    kd = eps.mean(1) + v.mean(1)
    features = torch.stack(
        [masked_difference(s, f) for s, f in zip(seen["hidden"], hidden, strict=True)]
    ).mean(0)
    own = terms["mse"] + terms["vb"]
    loss = kd_weight * kd + (1 - kd_weight) * own + feature_weight * features
    return {"loss": loss, "mse": terms["mse"], "vb": terms["vb"], "kd": kd, "features": features}


def masked_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference [B] of two [B,T,D] over the entries that are outliers in neither.

    An outlier lies `OUTLIER` standard deviations or more from the mean of its sample: a few huge
    activations would else outweigh all the others.
    """
    student, teacher = student.float(), teacher.float()
    inside = _inside(student.detach()) & _inside(teacher)
    difference = (student - teacher).square() * inside
    return difference.sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


def _inside(x: torch.Tensor) -> torch.Tensor:
    mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
    return (x - mean).abs() < OUTLIER * std
