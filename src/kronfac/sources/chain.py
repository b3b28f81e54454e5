"""A network as a chain of modules, each of which takes what the one before it gives: what a recursion can walk back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from kronfac.layers.registry import runs_as

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: One number in, one number out, the same function everywhere, and nothing random in either mode.
ELEMENTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
#: Linear maps without parameters.
AVERAGES = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)
MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
DROPOUT = (nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
#: Each example's numbers stay as they are and in their order.
UNCHANGED = (nn.Flatten, nn.Identity, nn.Unflatten, *DROPOUT)

KNOWN: tuple[type[nn.Module], ...] = (*LINEAR, *CONVOLUTIONS, *ELEMENTWISE, *AVERAGES, *MAXIMA, *UNCHANGED)

_WALKS = (
    "source='recursive' walks back through an nn.Sequential (nested ones too) of nn.Linear, nn.Conv1d/2d/3d, "
    "elementwise activations, average and max pooling, Flatten, and dropout in eval mode"
)
_INSTEAD = "Use source='exact' (KFLR: no averaged recursion, one pull per output) or 'sampled' instead."


@dataclass(frozen=True)
class Link:
    """One module of the chain.

    Attributes:
        name: Its full name within the model.
        module: The module.
    """

    name: str
    module: nn.Module

    def __str__(self) -> str:
        return f"{type(self.module).__name__} {self.name!r}" if self.name else type(self.module).__name__


def read_chain(model: nn.Module) -> list[Link]:
    """Read the modules that follow one another, from the first one with a trained parameter on.

    What comes before (a frozen part, reshaping) may be of any kind, since nothing is ever pulled through it. A module
    whose only child is an ``nn.Sequential``, and that has no parameter of its own, is taken for that child; whoever
    walks the chain must compare its values with those of the forward pass.

    Args:
        model: The model.

    Returns:
        The chain.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A module cannot be walked through; the text names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}.")
    links = list(_flatten(_unwrap(model)))
    trained = [index for index, link in enumerate(links) if any(p.requires_grad for p in link.module.parameters())]
    if not trained:
        raise ValueError("The model has no trainable parameter (requires_grad=True).")
    links = links[trained[0] :]
    for link in links:
        _require_known(link)
    return links


def require_still(links: list[Link]) -> None:
    """Refuse dropout that would draw a mask: the recursion would need the one of the forward pass.

    Args:
        links: The chain.

    Raises:
        ValueError: A dropout module is in train mode.
    """
    for link in links:
        if isinstance(link.module, DROPOUT) and link.module.training and link.module.p > 0:
            raise ValueError(
                f"source='recursive' does not see which units {link} drops in train mode: set its p to 0, call "
                "model.eval(), or use source='sampled' or 'exact', which differentiate the forward pass as it was."
            )


def is_known(module: nn.Module, kinds: tuple[type[nn.Module], ...] = KNOWN) -> bool:
    """Whether a module computes what one of these classes computes: subclasses with a forward of their own do not.

    Args:
        module: The module.
        kinds: The classes.

    Returns:
        True if so.
    """
    return any(runs_as(module, kind) for kind in kinds)


def window_dims(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Number of dimensions that a window slides over: a batched input has two more, examples and channels.

    Args:
        module: A convolution or a pooling.
        kinds: Classes for one, two and three dimensions, one of which it is.

    Returns:
        1, 2 or 3.
    """
    return 1 + next(index for index, kind in enumerate(kinds) if isinstance(module, kind))


def takes_one_example(module: nn.Module, dims: int) -> bool:
    """Whether a module takes an input for a single example without a batch, and so mixes the rows of a batch.

    Poolings do so too, but keep what they take for channels apart.

    Args:
        module: A module that the chain knows.
        dims: Number of the input's dimensions.

    Returns:
        True if so.
    """
    if is_known(module, CONVOLUTIONS):
        return dims == window_dims(module, CONVOLUTIONS) + 1
    return is_known(module, LINEAR) and dims == 1


def require_unbroken(links: list[Link], feeders: Mapping[str | None, set[str]]) -> None:
    """Refuse a forward pass whose values are the chain's, but whose derivatives are not.

    Args:
        links: The chain.
        feeders: From which layers, directly, each recorded layer takes its input, and the outputs (``None``) theirs.

    Raises:
        ValueError: One does not take it from the recorded layer before it alone.
    """
    recorded = [link for link in links if link.name in feeders]
    wholes = [*(f"the input of {link}" for link in recorded[1:]), "the model's outputs"]
    for before, name, what in zip(recorded, [*(link.name for link in recorded[1:]), None], wholes, strict=True):
        if feeders.get(name, set()) != {before.name}:
            raise ValueError(
                f"source='recursive' read a chain of modules, but {what} is not differentiated through {before} alone: "
                "the forward pass detaches it, or adds another path. Use source='exact' or 'sampled'."
            )


def _unwrap(model: nn.Module) -> Link:
    children = list(model._modules.items())
    if is_known(model) or is_known(model, (nn.Sequential,)) or len(children) != 1:
        return Link("", model)
    name, child = children[0]
    own = list(model.parameters(recurse=False)) + list(model.buffers(recurse=False))
    return Link(name, child) if child is not None and is_known(child, (nn.Sequential,)) and not own else Link("", model)


def _flatten(link: Link) -> Iterator[Link]:
    if not is_known(link.module, (nn.Sequential,)):
        yield link
        return
    for name, child in link.module._modules.items():  # named_children leaves out what occurs a second time
        if child is not None:
            yield from _flatten(Link(f"{link.name}.{name}" if link.name else name, child))


def _require_known(link: Link) -> None:
    module = link.module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"source='recursive' has no recursion for batch norm: {link} couples the examples in train mode, and "
            "scales by parameters of its own. " + _INSTEAD
        )
    if is_known(module):
        if isinstance(module, MAXIMA) and module.return_indices:
            raise ValueError(f"source='recursive' cannot walk through {link}, which returns its indices. " + _INSTEAD)
        return
    if list(module.children()):
        raise ValueError(f"{_WALKS}; it cannot read what {link} does with its submodules from its forward. " + _INSTEAD)
    raise ValueError(f"{_WALKS}; it has no recursion for {link}. " + _INSTEAD)
