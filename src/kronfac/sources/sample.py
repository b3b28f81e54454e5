"""The message between sources and approximations."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kronfac.layers import LayerAdapter


@dataclass
class Sample:
    """One pull as seen by one layer: always the *pair* of input and cotangent.

    Attributes:
        layer: The layer's adapter.
        inputs: The layer's input.
        cotangents: Derivative of the **sum** loss with respect to its output; None for sources without a pull.
        weight: Weight of this pull in the sum over pulls (``1/k`` for ``k`` samples, 1 for columns of a root).
        denominator: What the sum loss is divided by (``Likelihood.denominator``).
        batch: Number of examples, as the outputs' first dimension says.
        first: Whether this is the first pull of its forward pass: inputs and denominators count once.
        row_weights: Weight of every row, ``[B, S]`` as the layer's rows, or None for ones.
        checked: Whether the cotangents are known to be finite.
        output_moment: From a source that averages without cotangents: the denominator times the output factor,
            ``[*stack, d_out, d_out]``, summed over positions as the layer's rows are. None for all others.
    """

    layer: LayerAdapter
    inputs: Tensor
    cotangents: Tensor | None
    weight: float
    denominator: float
    batch: int
    first: bool
    row_weights: Tensor | None = None
    output_moment: Tensor | None = None
    checked: bool = False


def not_finite(what: str, layer: str) -> str:
    """Say that a layer's input or cotangent is not finite.

    Args:
        what: Which of the two.
        layer: The layer's name.

    Returns:
        The message.
    """
    return (
        f"NaN or Inf in the {what} of layer {layer!r}: its statistics were not updated and no parameter was changed. "
        "Look for a diverged loss or invalid inputs; lower lr or raise damping."
    )
