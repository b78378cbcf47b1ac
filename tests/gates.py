"""Training of gates alone on a small DiT, for tests; not a test itself."""

import torch

from models.selection import GatedDiT

SCALING = 100.0


def train_gates(gated: GatedDiT, teacher: torch.nn.Module, steps: int = 120) -> None:
    """The gates learn, by the published settings, to give what `teacher` gives."""
    options = sum(gate.shape[1] for gate in gated.gates.gumbel_gates)
    optimizer = torch.optim.AdamW(gated.gates.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        x, t, y = torch.randn(16, 4, 8, 8), torch.randint(1000, (16,)), torch.randint(5, (16,))
        with torch.no_grad():
            target = teacher(x, t, y)
        tau = 4.0 + (0.1 - 4.0) * step / (steps - 1)
        drawn = {"uniform": torch.rand(16, options).clamp(min=1e-6), "tau": tau, "scaling": SCALING}
        loss = (gated(x, t, y, drop=torch.zeros(16, dtype=bool), **drawn) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.max() > 0.9 for p in gated.gates.probabilities(SCALING))
