"""Linear layers whose bias has its gradient from what comes next.

That gradient is the sum of the output's gradients over all tokens. A kernel that makes these holds
them already; PyTorch reads them again.
"""

import torch
import torch.nn.functional as F
from torch import nn


def bias_apart(linear: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's output, and its bias, to which the output's graph then does not lead.

    None for a bias that has no gradient, and where `linear` is more than that, as with an adapter.
    """
    bias = linear.bias if type(linear) is nn.Linear else None
    if bias is None or not bias.requires_grad or not torch.is_grad_enabled():
        return linear(x), None
    return F.linear(x, linear.weight, bias.detach()), bias
