"""KK-FAC: XK-FAC with the blocks between layers, a Khatri-Rao product over the partition into layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kronfac.approximations.base import Mean, Statistic, require_finite, zeros
from kronfac.approximations.joint import JointApproximation, JointStatistic
from kronfac.approximations.xkfac import XKFACNormStatistic
from kronfac.blocks.khatri_rao import KhatriRao
from kronfac.coupling import Coupling, refuse_synchronised
from kronfac.layers import LayerAdapter
from kronfac.layers.base import require_float
from kronfac.layers.linear import LinearAdapter
from kronfac.linalg.symmetric import add_gram_, all_finite, mirror_
from kronfac.sources import Sample, Source, require_examples
from kronfac.tape import Tape

_NAME = "kkfac"


class KKFACStatistic(JointStatistic):
    """The four moments of XK-FAC, over the inputs and the cotangents of all linear layers together.

    Batches are pooled as in `kronfac.approximations.xkfac.XKFACStatistic`. Normalisation layers have an exact block of
    their own and are coupled to none.

    Args:
        layers: The layers' adapters by name.
    """

    def __init__(self, layers: Mapping[str, LayerAdapter]) -> None:
        super().__init__(layers)
        self.linear = {name: layer for name, layer in layers.items() if not layer.unit_wise}
        self.norms = {name: XKFACNormStatistic(layer) for name, layer in layers.items() if layer.unit_wise}
        for norm in self.norms.values():
            norm.coupling = Coupling.GENERAL
        some = next(iter(self.linear.values()))
        d_in, d_out = (sum(getattr(layer, key) for layer in self.linear.values()) for key in ("d_in", "d_out"))
        self.input, self.input_mean = (Mean(zeros(some, d_in, d_in)) for _ in range(2))
        self.output, self.output_sum = (Mean(zeros(some, d_out, d_out)) for _ in range(2))

    def means(self) -> dict[str, Mean]:
        """Moments of the linear layers, and of every normalisation layer."""
        found = {key: getattr(self, key) for key in ("input", "input_mean", "output", "output_sum")}
        return found | {f"{name}.moment": norm.moment for name, norm in self.norms.items()}

    def add(self, samples: Sequence[Sample]) -> None:
        """Add the moments of one pull; nothing is changed if it is refused.

        Args:
            samples: One of each layer.

        Raises:
            ValueError: A layer was not called, or with positions that share its weights.
        """
        given = {sample.layer.name: sample for sample in samples}
        if missing := [name for name in self.layers if name not in given]:
            raise ValueError(
                f"approximation={_NAME!r} needs every layer to be called in a forward pass; it never called {missing}. "
                "Freeze them (requires_grad=False) or call them."
            )
        own = [given[name] for name in self.linear]
        for sample in samples:
            require_finite(sample)
        for sample in own:
            _check(sample)
        some, count = own[0], own[0].batch
        if some.first:
            rows = torch.cat([sample.layer.rows(require_float(sample.inputs))[:, 0] for sample in own], 1)
            mean = rows.mean(0, keepdim=True)
            add_gram_(self.input.total, rows - mean, alpha=self.input.alpha)
            add_gram_(self.input_mean.total, mean, alpha=count * self.input_mean.alpha)
            self.input.weight += count - 1
            self.input_mean.weight += count
            self.output.weight += some.denominator
            self.output_sum.weight += some.denominator
        cotangents = torch.cat([_cotangents(sample) for sample in own], 1)
        total = cotangents.sum(0, keepdim=True)
        add_gram_(self.output.total, cotangents - total / count, alpha=some.weight * self.output.alpha)
        add_gram_(self.output_sum.total, total, alpha=some.weight * self.output_sum.alpha)
        for name, norm in self.norms.items():
            norm.add(given[name])

    def blocks(self) -> KhatriRao:
        """Return the matrix over all layers.

        Raises:
            FloatingPointError: A moment overflowed.
        """
        found = {key: mirror_(getattr(self, key).value()) for key in ("input", "input_mean", "output", "output_sum")}
        for what, moment in found.items():
            if not all_finite(moment):
                raise FloatingPointError(f"The {what.replace('_', ' ')} factor of all layers overflowed to NaN or Inf.")
        shapes = {name: (layer.d_out, layer.d_in) for name, layer in self.linear.items()}
        first, second = (found["input"], found["output"]), (found["input_mean"], found["output_sum"])
        return KhatriRao(shapes, first, second, {name: norm.block() for name, norm in self.norms.items()})


class KKFAC(JointApproximation):
    """``F ≈ Ā ∗ H' + (N Ā' - Ā) ∗ (H'' - H') / (N - 1)``, Khatri-Rao (Lee et al. 2020, equations 59 and 71).

    For linear layers that are called with one row per example; normalisation layers keep exact blocks of their own.
    """

    name = _NAME
    blocks_alone = "xkfac"
    couples_examples = True
    whole_batches = True
    keeps_trace = False

    def start_all(self, layers: Mapping[str, LayerAdapter]) -> KKFACStatistic:
        """Return empty moments.

        Args:
            layers: The layers' adapters by name.

        Returns:
            The statistic.

        Raises:
            ValueError: A layer is neither linear nor a normalisation, or none is linear.
        """
        other = [
            f"{type(layer.module).__name__} {name!r}"
            for name, layer in layers.items()
            if not (isinstance(layer, LinearAdapter) or layer.unit_wise)
        ]
        if other or all(layer.unit_wise for layer in layers.values()):
            named = f"it does not take {', '.join(other)}" if other else "there is none"
            raise ValueError(
                f"approximation={self.name!r} is for nn.Linear layers, beside normalisation layers; {named}. Freeze "
                "other layers (requires_grad=False), or use 'xkfac'."
            )
        return KKFACStatistic(layers)

    def check(self, source: Source) -> None:
        """Refuse a source whose cotangents carry no independent signs of the examples.

        Args:
            source: The source.

        Raises:
            ValueError: The two do not fit.
        """
        super().check(source)
        if source.exact:
            raise ValueError(
                f"approximation={self.name!r} sums the cotangents of a batch, for which the examples need independent "
                f"signs; source={source.name!r} gives none: use source='sampled'."
            )

    def begin(
        self, model: nn.Module, source: Source, tape: Tape, outputs: Tensor, statistics: Mapping[str, Statistic]
    ) -> None:
        """Refuse synchronised batch norm and a batch of one example.

        Args:
            model: The model.
            source: Whence the cotangents will come.
            tape: The recorded layers.
            outputs: The model's outputs.
            statistics: None, since layers are taken together.

        Raises:
            ValueError: There is one of them.
        """
        refuse_synchronised(model, self.name)
        if len(outputs) == 1:
            raise ValueError(
                f"approximation={self.name!r} needs batches of two examples at least, got a batch of one: it "
                "estimates a covariance between examples, with or without batch norm. Drop a smaller last batch "
                "(drop_last=True), or use approximation='kfac'."
            )


def _check(sample: Sample) -> None:
    if sample.inputs.ndim != 2:
        raise ValueError(
            f"approximation={_NAME!r} takes one row per example, but layer {sample.layer.name!r} was called with an "
            f"input of shape {tuple(sample.inputs.shape)}, whose positions share its weights; use 'xkfac'."
        )
    require_examples(sample.layer, sample.inputs, sample.batch, f"approximation={_NAME!r}")


def _cotangents(sample: Sample) -> Tensor:
    assert sample.cotangents is not None
    return sample.layer.output_rows(require_float(sample.cotangents))[:, 0]
