"""A network that gives its own second derivatives, each layer called once: for losses made of differential equations.

Curvature needs the derivatives to be *outputs of layers*.  Values, first and second derivatives of a unit go through
the network side by side (Taylor mode), as positions of one input, so that the weights are shared between them as they
are between the places of a sequence (Dangel et al. 2024, Kronecker-factored approximate curvature for physics-informed
neural networks).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class TaylorPerceptron(nn.Module):
    """Layers with tanh between them, on points; gives the value and the Laplacian.

    A bias is the weight of a constant input, whose derivatives are zero: ``nn.Linear``'s own would be added to the
    derivatives too.

    Args:
        widths: Of inputs, hidden layers and outputs.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        layers = [nn.Linear(before + 1, after, bias=False) for before, after in pairwise(widths)]
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.weight[:, -1])
        self.layers = nn.ModuleList(layers)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Compute value and Laplacian.

        Args:
            points: ``[N, d]``.

        Returns:
            ``u`` and ``Σ_i ∂²u/∂x_i²``, ``[N, outputs]`` each.
        """
        count, d = points.shape
        steps = torch.eye(d, dtype=points.dtype, device=points.device).expand(count, d, d)
        jet = torch.cat([points.unsqueeze(1), steps, torch.zeros_like(steps)], dim=1)  # [N, 1 + 2 d, width]
        constant = points.new_zeros(count, 1 + 2 * d, 1)
        constant[:, 0] = 1
        for index, layer in enumerate(self.layers):
            if index:
                value, first, second = jet.split([1, d, d], dim=1)
                bent = value.tanh()
                slope = 1 - bent.square()
                jet = torch.cat([bent, slope * first, slope * (second - 2 * bent * first.square())], dim=1)
            jet = layer(torch.cat([jet, constant], dim=2))
        return jet[:, 0], jet[:, 1 + d :].sum(1)


class PoissonResidual(nn.Module):
    """What a network lacks to solve ``−Δu = f`` in a domain with ``u`` given on its border.

    Args:
        network: Gives ``u`` and its Laplacian.
        border: Factor of ``u`` on the border, the root of its weight in the loss.
    """

    def __init__(self, network: nn.Module, border: float = 10.0) -> None:
        super().__init__()
        self.network, self.border = network, border

    def forward(self, rows: Tensor) -> Tensor:
        """Compute what the equation says of each point.

        Args:
            rows: Points, and behind the coordinates what is asked there: ``[N, d + 1]``, see `ASKED`.

        Returns:
            ``−Δu``, ``border · u`` or ``u``, ``[N, 1]``.
        """
        value, laplacian = self.network(rows[:, :-1])
        asked = rows[:, -1:]
        return torch.where(
            asked == ASKED["equation"], -laplacian, torch.where(asked == ASKED["border"], self.border, 1.0) * value
        )


#: What is asked of a point: the equation, the border's value, or the solution.
ASKED = {"equation": 0.0, "border": 1.0, "solution": 2.0}
