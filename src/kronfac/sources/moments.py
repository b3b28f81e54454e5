"""One step of KFRA's recursion: a second moment pulled back through a module, averaged over the batch.

For a module with Jacobian ``J_n`` at example ``n``, the step is ``M ↦ E_n[J_nᵀ M J_n]`` with ``M`` held fixed. Every
example's numbers are flattened to one dimension; ``M`` is over all of them, channels and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.layers.base import require_float
from kronfac.sources.chain import AVERAGES, CONVOLUTIONS, ELEMENTWISE, LINEAR, MAXIMA, is_known, window_dims

#: Entries of the rows that are pulled through a convolution or a pooling at once.
CHUNK = 1 << 24


def run(module: nn.Module, x: Tensor) -> Tensor:
    """Evaluate a module without its hooks, in float32 at least, and leave its input as it was.

    Args:
        module: A module that the chain knows.
        x: Its input, float32 at least.

    Returns:
        Its output.
    """
    if is_known(module, LINEAR):
        return functional.linear(x, *_parameters(module, x))
    if is_known(module, CONVOLUTIONS):
        return cast(nn.Conv2d, module)._conv_forward(x, *_parameters(module, x))
    # In-place activations change their argument.
    return module.forward(x.clone() if is_known(module, ELEMENTWISE) else x)


def pull_back(
    module: nn.Module, x: Tensor, moment: Tensor, shape: Sequence[int], weights: Tensor | None = None
) -> Tensor:
    """Compute ``E_n[J_nᵀ M J_n]``.

    - Linear maps (linear layers, convolutions, average pooling): ``Jᵀ M J``; all examples share ``J``.
    - Elementwise activations: ``M ⊙ E_n[f′(h_n) f′(h_n)ᵀ]`` (Botev et al. 2017, Algorithm G).
    - Max pooling: ``J_n`` routes each output to the input that was greatest. ``M`` times the frequency with which two
      inputs were both chosen, summed over the pairs of windows they lie in: the Hadamard product of an activation,
      and the same for windows that overlap.

    Args:
        module: A module that the chain knows.
        x: Its inputs, ``[B, *in]``.
        moment: ``M``, ``[d_out, d_out]``.
        shape: Shape of one example's output.
        weights: Weights of the examples in the mean, ``[B]``, of sum one; None for equal ones.

    Returns:
        ``[d_in, d_in]``, or ``moment`` itself where the module changes nothing.
    """
    if is_known(module, ELEMENTWISE):
        slopes = slope(module, x).reshape(len(x), -1)
        return _second_moment(slopes, slopes, weights).mul_(moment)
    if is_known(module, MAXIMA):
        return _pull_maximum(module, x, moment, weights)
    if is_known(module, LINEAR):
        weight = _parameters(module, x)[0]

        def pull(rows: Tensor) -> Tensor:
            return (rows.reshape(len(rows), *shape) @ weight).flatten(1)

        return pull(pull(moment).T)
    if is_known(module, CONVOLUTIONS):
        weight = _parameters(module, x)[0]
        convolution = cast(nn.Conv2d, module)
        return _pull_linear(lambda image: convolution._conv_forward(image, weight, None), x, moment, shape)
    if is_known(module, AVERAGES):
        return _pull_linear(module.forward, x, moment, shape)
    return moment


def slope(module: nn.Module, x: Tensor) -> Tensor:
    """Derivative of an elementwise activation.

    Args:
        module: The activation.
        x: Pre-activations.

    Returns:
        ``f′(x)``.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = module.forward(leaf.clone())
        # A sum of independent terms: its gradient holds each term's own derivative.
        (found,) = torch.autograd.grad(values.sum(), leaf)
    return found


def _parameters(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype)


def _second_moment(left: Tensor, right: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of ``left_n right_nᵀ`` over the batch."""
    if weights is None:
        return (left.T @ right).div_(len(left))
    return (left * weights.to(left).unsqueeze(1)).T @ right


def _pull_linear(function: Callable[[Tensor], Tensor], x: Tensor, moment: Tensor, shape: Sequence[int]) -> Tensor:
    """``Jᵀ M J`` for a linear function without a bias, by its transpose."""

    def pull(rows: Tensor) -> Tensor:
        width = x[0].numel()
        found, at_once = x.new_empty(len(rows), width), max(1, CHUNK // max(width, rows.shape[1]))
        for part, here in zip(rows.split(at_once), found.split(at_once), strict=True):
            here.copy_(_transpose(function, part, x.shape[1:], shape))
        return found

    return pull(pull(moment).T)


def _transpose(function: Callable[[Tensor], Tensor], rows: Tensor, into: Sequence[int], shape: Sequence[int]) -> Tensor:
    with torch.enable_grad():
        leaf = rows.new_zeros(len(rows), *into).requires_grad_()
        values = function(leaf)
    (pulled,) = torch.autograd.grad(values, leaf, rows.reshape(len(rows), *shape))
    return pulled.flatten(1)


def _pull_maximum(module: nn.Module, x: Tensor, moment: Tensor, weights: Tensor | None) -> Tensor:
    """``E_n[P_nᵀ M P_n]`` with ``P_n`` the routing, as a sum over pairs of places in a window."""
    pool, dims = cast(nn.MaxPool2d, module), window_dims(module, MAXIMA)
    # Torch pools an input one dimension short channel by channel, and the examples are its channels.
    x = x.unsqueeze(1) if x.ndim == dims + 1 else x
    kernel, stride, padding, dilation = (
        _each(value, dims) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[dims - 1]
    values, chosen = function(x, kernel, stride, padding, dilation, pool.ceil_mode, True)
    table = _places(tuple(x.shape[2:]), tuple(values.shape[2:]), kernel, stride, padding, dilation).to(x.device)
    channels, size = x.shape[1], x[0, 0].numel()
    # Whether the place with this number in the window was the greatest: [B, places, channels · windows].
    hits = (chosen.flatten(2).unsqueeze(1) == table.unsqueeze(1)).to(x.dtype).flatten(2)
    # Places beyond the border are never chosen: they may point anywhere.
    offsets = torch.arange(channels, device=x.device).unsqueeze(1) * size
    inputs = (table.clamp(min=0).unsqueeze(1) + offsets).flatten(1)
    pulled = x.new_zeros(channels * size, channels * size)
    for first, rows in enumerate(inputs):
        half = x.new_zeros(len(moment), channels * size)
        for second, columns in enumerate(inputs):
            half.index_add_(1, columns, _second_moment(hits[:, first], hits[:, second], weights).mul_(moment))
        pulled.index_add_(0, rows, half)
    return pulled


def _places(
    size: Sequence[int],
    windows: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Index into the flattened image for each place of each window, ``[places, windows]``; -1 beyond the border."""
    table, inside = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for n, count, k, s, p, d in zip(size, windows, kernel, stride, padding, dilation, strict=True):
        at = torch.arange(k).unsqueeze(1) * d + torch.arange(count) * s - p
        shape = (table.shape[0] * k, table.shape[1] * count)
        table = (table[:, None, :, None] * n + at[None, :, None, :]).reshape(shape)
        inside = (inside[:, None, :, None] & ((at >= 0) & (at < n))[None, :, None, :]).reshape(shape)
    return table.masked_fill(~inside, -1)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def example_means(weights: Tensor | None, batch: int) -> Tensor | None:
    """Weights of the examples in a mean over the batch, from those of the loss's terms.

    Args:
        weights: ``[B, *terms]``, or None for ones.
        batch: Number of examples.

    Returns:
        ``[B]`` of sum one; None for equal weights, and where no term counts at all.
    """
    if weights is None:
        return None
    sums = require_float(weights).reshape(batch, -1).sum(1)
    total = sums.sum()
    return None if not float(total) or float(sums.min()) == float(sums.max()) else sums / total
