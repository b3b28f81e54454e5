"""``nn.Embedding``: rows are one-hot, so that the input factor is a diagonal of counts, never a V×V matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronfac.layers.base import LayerAdapter, UnsupportedLayer, require_float
from kronfac.layers.registry import adapt


class EmbeddingAdapter(LayerAdapter):
    """``y = W[x]``; the parameter matrix is ``Wᵀ`` of shape ``[embedding_dim, num_embeddings]``.

    The input factor is kept as the vector of counts; ``sharing="reduce"`` would fill it and is refused.
    """

    diagonal_input = True
    join, features = "positions", (0, 1)

    def __init__(self, module: nn.Embedding, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, "expand")
        self._padding = module.padding_idx
        self.d_in, self.d_out = module.num_embeddings, module.embedding_dim

    def matrix_view(self, weight: Tensor) -> Tensor:
        """Return the transposed weight."""
        return weight.mT

    def _matrix_to_weight(self, columns: Tensor) -> Tensor:
        return columns.mT

    def lacks_batch(self, x: Tensor) -> bool:
        """True of a single index."""
        return x.ndim == 0

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Every index is a position."""
        self.require_batch(x)
        return tuple(x.shape)

    def expand(self, x: Tensor) -> Tensor:
        """Return one-hot rows ``[B, S, V]``: for exact per-example gradients of small vocabularies only."""
        rows = torch.nn.functional.one_hot(x.reshape(x.shape[0], -1), self.d_in).to(torch.get_default_dtype())
        if self._padding is not None:
            rows[..., self._padding] = 0.0
        return rows

    def per_example_gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradient of each example's loss, shape ``[B, embedding_dim, V]``, by scattering the cotangents."""
        cotangents, index = self.expand_cotangents(g), x.reshape(x.shape[0], -1)
        if self._padding is not None:
            cotangents = cotangents * (index != self._padding).unsqueeze(-1)
        out = cotangents.new_zeros(index.shape[0], self.d_in, self.d_out)
        return out.scatter_add_(1, index.unsqueeze(-1).expand_as(cotangents), cotangents).mT

    def gradient_columns(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the cotangents over the positions of each example that hold the same index.

        Args:
            x: Indices.
            g: The cotangent of the output.

        Returns:
            Indices ``[K]`` and columns ``[K, embedding_dim]``, at most one for each position; padding has none.
        """
        cotangents, index = self.expand_cotangents(g), x.reshape(x.shape[0], -1)
        example = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
        kept = torch.ones_like(index, dtype=torch.bool) if self._padding is None else index != self._padding
        pairs, place = torch.unique((example * self.d_in + index)[kept], return_inverse=True)
        columns = cotangents.new_zeros(pairs.shape[0], self.d_out).index_add_(0, place, cotangents[kept])
        return pairs % self.d_in, columns

    def expand_cotangents(self, g: Tensor) -> Tensor:
        """Return ``[B, S, embedding_dim]``."""
        return require_float(g).reshape(g.shape[0], -1, self.d_out)

    def add_input_gram_(
        self, total: Tensor, x: Tensor, weights: Tensor | None = None, alpha: float = 1.0
    ) -> float | Tensor:
        """Add the (weighted) counts of each index to the vector ``total`` ``[V]``; padding is not counted.

        Args:
            total: Running counts, changed in place.
            x: Indices.
            weights: Weight of each index, shape ``[B, S]``; None means one.
            alpha: Factor of what is added.

        Returns:
            The sum of all weights, padding included, so that the factor stays the mean over positions.
        """
        index = x.reshape(-1)
        weight = torch.ones_like(index, dtype=total.dtype) if weights is None else weights.reshape(-1).to(total.dtype)
        counted = weight if self._padding is None else weight * (index != self._padding)
        total.index_add_(0, index, counted, alpha=alpha)
        return weight.sum()

    def input_norms(self, x: Tensor) -> Tensor:
        """Return 1 for each index and 0 for padding, ``[B, S]``: rows are one-hot."""
        index = x.reshape(x.shape[0], -1)
        dtype = torch.get_default_dtype()
        return torch.ones_like(index, dtype=dtype) if self._padding is None else (index != self._padding).to(dtype)


@adapt.register
def _(module: nn.Embedding, name: str, sharing: str = "expand") -> LayerAdapter:
    if module.max_norm is not None:
        raise UnsupportedLayer("max_norm changes the weight inside the forward")
    if module.scale_grad_by_freq:
        raise UnsupportedLayer("scale_grad_by_freq=True changes the gradient")
    if module.sparse:
        raise UnsupportedLayer("sparse=True gives sparse gradients")
    if sharing == "reduce":
        raise UnsupportedLayer('sharing="reduce" would fill the V×V input factor')
    return EmbeddingAdapter(module, name, sharing)
