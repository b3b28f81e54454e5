"""``nn.ConvTranspose1d/2d/3d``, exactly: a plain convolution of the zero-stuffed input with the flipped kernel."""

from __future__ import annotations

from torch import Tensor, nn

from kronfac.layers.base import LayerAdapter, UnsupportedLayer
from kronfac.layers.conv import ConvAdapter
from kronfac.layers.geometry import Geometry, reads
from kronfac.layers.registry import adapt

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvTransposeAdapter(ConvAdapter):
    """``stride - 1`` zeros between input positions, unit stride, padding ``dilation (kernel - 1) - padding``.

    An ``output_size`` passed to the forward changes the output padding of that call; the cotangent's shape then
    disagrees with the rows and is refused.
    """

    def __init__(self, module: Transposed, name: str, sharing: str = "expand") -> None:
        super().__init__(module, name, sharing)  # type: ignore[arg-type]
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        padding: list[tuple[int, int]] = []
        for k, d, p, extra in zip(kernel, dilation, _integers(module.padding), module.output_padding, strict=True):
            before = d * (k - 1) - p
            padding.append((before, before + extra))
        self._stuff = tuple(module.stride)
        ones = tuple(1 for _ in kernel)
        self.geometry = Geometry(kernel, ones, dilation, tuple(padding), "constant", module.groups)

    def _zero_stuffed(self, x: Tensor) -> Tensor:
        if all(s == 1 for s in self._stuff):
            return x
        size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self._stuff, strict=True)]
        out = x.new_zeros(*x.shape[:2], *size)
        out[(slice(None), slice(None), *(slice(None, None, s) for s in self._stuff))] = x
        return out

    def positions(self, x: Tensor) -> tuple[int, ...]:
        """Batch and output positions."""
        self.require_batch(x)
        size = tuple((n - 1) * s + 1 for n, s in zip(x.shape[2:], self._stuff, strict=True))
        return (x.shape[0], *self.geometry.output_size(size))

    def reads(self, size: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Which input position each tap reads; -1 for the zeros between positions too."""
        return reads(self.geometry, size, self._stuff)

    def expand(self, x: Tensor) -> Tensor:
        """Return patches ``[B, T, *stack, d_in]`` of the zero-stuffed input."""
        return super().expand(self._zero_stuffed(x))

    def add_input_gram_(
        self, total: Tensor, x: Tensor, weights: Tensor | None = None, alpha: float = 1.0
    ) -> float | Tensor:
        """Add the second moment of the zero-stuffed input's patches."""
        if self.sharing == "reduce" or not self.has_weight:  # the general path expands, and so stuffs, itself
            return super().add_input_gram_(total, x, weights, alpha)
        return super().add_input_gram_(total, self._zero_stuffed(x), weights, alpha)

    def input_norms(self, x: Tensor) -> Tensor:
        """Return the norms of the zero-stuffed input's patches."""
        if self.sharing == "reduce" or not self.has_weight:
            return super().input_norms(x)
        return super().input_norms(self._zero_stuffed(x))

    def matrix_view(self, weight: Tensor) -> Tensor | None:  # type: ignore[override]
        """The weight is transposed and flipped: there is no view."""
        return None

    def _weight_to_matrix(self, weight: Tensor) -> Tensor:
        spatial = tuple(range(3, weight.ndim + 1))
        grouped = weight.unflatten(0, (self.geometry.groups, -1)).transpose(1, 2).flip(spatial)
        return grouped.reshape(*self.stack, self.d_out, self._columns)

    def _matrix_to_weight(self, columns: Tensor) -> Tensor:
        groups, kernel = self.geometry.groups, self.geometry.kernel
        grouped = columns.reshape(groups, self.d_out, -1, *kernel).transpose(1, 2)
        return grouped.flip(tuple(range(3, grouped.ndim))).flatten(0, 1)


def _integers(padding: object) -> tuple[int, ...]:
    assert isinstance(padding, tuple)  # transposed convolutions know no "same" or "valid"
    return tuple(int(p) for p in padding)


@adapt.register(nn.ConvTranspose1d)
@adapt.register(nn.ConvTranspose2d)
@adapt.register(nn.ConvTranspose3d)
def _(module: Transposed, name: str, sharing: str = "expand") -> LayerAdapter:
    padding = _integers(module.padding)
    if any(d * (k - 1) < p for d, k, p in zip(module.dilation, module.kernel_size, padding, strict=True)):
        raise UnsupportedLayer("its padding exceeds dilation·(kernel-1)")
    return ConvTransposeAdapter(module, name, sharing)
