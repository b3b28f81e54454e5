"""What an optimiser is to an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kronfac.experiments.errors import ExperimentError, did_you_mean
from kronfac.experiments.optimizers.options import COMMON, Option
from kronfac.experiments.problems.base import Problem

#: Makes the optimiser of a run from its network, its problem, its hyper-parameters and a generator for random labels.
Builder = Callable[[nn.Module, Problem, Mapping[str, object], torch.Generator], torch.optim.Optimizer]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimiser by name, with the hyper-parameters it takes.

    Attributes:
        name: What it is asked for by.
        title: How it is called in tables and pictures.
        description: One line for people.
        options: Its own hyper-parameters; those of `COMMON` come on top.
        build: Makes it.
        closure: Whether its step takes a closure that returns the loss, in place of a gradient.
        library: The import name of a library that it needs beside torch, and the extra of kronfac that installs it.
    """

    name: str
    title: str
    description: str
    options: tuple[Option, ...]
    build: Builder
    closure: bool = False
    library: tuple[str, str] | None = None

    @property
    def all_options(self) -> tuple[Option, ...]:
        """Its own hyper-parameters, and those of `COMMON`."""
        return (*self.options, *COMMON)

    def without_effect(self, values: Mapping[str, object]) -> dict[str, str]:
        """Find the hyper-parameters that do nothing beside the others.

        Args:
            values: A value for each.

        Returns:
            For each of them the hyper-parameter because of which it does nothing.
        """
        idle = {option.name: option.idle for option in self.all_options if option.idle is not None}
        return {name: other for name, (other, without) in idle.items() if values[other] in without}

    def resolve(self, *layers: Mapping[str, object]) -> dict[str, object]:
        """Complete and check hyper-parameters.

        Args:
            layers: Mappings from names to values (or texts of values), later ones winning over earlier ones.

        Returns:
            A checked value for every hyper-parameter.

        Raises:
            ExperimentError: If a name is not this optimiser's, or a value is out of range; the message names it.
        """
        options = {option.name: option for option in self.all_options}
        values = {name: option.default for name, option in options.items()}
        for layer in layers:
            for name, value in layer.items():
                if name not in options:
                    meant = did_you_mean(name, options)
                    raise ExperimentError(
                        f"{self.name} has no hyper-parameter {name!r}; it has: {', '.join(options)}{meant}"
                    )
                try:
                    values[name] = options[name].parse(value)
                except ValueError as error:
                    raise ExperimentError(f"{self.name}.{name} must be {error}, got {value!r}") from None
        return values
