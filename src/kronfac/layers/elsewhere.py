"""Linear layers of other libraries, known by the names of their classes: nothing of these libraries is imported."""

from __future__ import annotations

from torch import Tensor, nn

from kronfac.layers.linear import LinearAdapter
from kronfac.layers.registry import BY_NAME


class TransposedLinear(LinearAdapter):
    """``y = x W + b`` with a weight of shape ``[in_features, out_features]``, as in GPT-2 of transformers."""

    def __init__(self, module: nn.Module, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, sharing)
        self._features, self.d_out = self.d_out, self._features
        self.d_in = self._features * self.has_weight + self.has_bias

    def matrix_view(self, weight: Tensor) -> Tensor | None:
        """None: the matrix has another shape than the weight."""
        return None

    def _weight_to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def _matrix_to_weight(self, columns: Tensor) -> Tensor:
        return columns.mT


BY_NAME["transformers.pytorch_utils.Conv1D"] = TransposedLinear
BY_NAME["torch_geometric.nn.dense.linear.Linear"] = LinearAdapter
