"""XK-FAC: the curvature between examples that batch norm in train mode makes, as a sum of two Kronecker products."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kronfac.approximations.base import Approximation, Mean, Statistic, blank, is_blank, require_finite, zeros
from kronfac.approximations.dense import DenseStatistic
from kronfac.approximations.kfac import KFACStatistic
from kronfac.blocks import Block, Kronecker, KroneckerSum
from kronfac.coupling import Coupling, couplings, refuse_synchronised
from kronfac.layers import LayerAdapter
from kronfac.layers.base import require_float
from kronfac.linalg.symmetric import add_gram_, all_finite, mirror_
from kronfac.measuring import couples_examples
from kronfac.sources import Sample, Source, require_examples
from kronfac.tape import Tape

_NAME = "xkfac"


class XKFACStatistic(KFACStatistic):
    """Moments about the batch's mean, and of the batch's means, of a layer behind which batch norm couples examples.

    A pull of a batch of ``N`` gives cotangents ``v_m`` of its sum loss, signs of examples independent, with inputs
    ``ā_m``. Over batches and pulls are summed, and divided by the weights on the right,

    - ``input``: ``Σ_m (ā_m - ā)(ā_m - ā)ᵀ``, by ``N - 1``: the pooled covariance ``C``;
    - ``input_mean``: ``N ā āᵀ``, by ``N``: ``Ā'``;
    - ``output``: ``Σ_m (v_m - v̄)(v_m - v̄)ᵀ``, by the loss's denominator: ``H' - H''/N``;
    - ``output_sum``: ``(Σ_m v_m)(Σ_m v_m)ᵀ``, by the denominator: ``H''``.

    The block ``C ⊗ (H' - H''/N) + Ā' ⊗ H''`` is equation (71) of Lee et al. 2020. Positions of a convolution are
    summed over on both sides, (75)-(79), and the inputs' weights count them. Centring before squaring keeps every
    factor positive semi-definite in floating point, too. Nothing coupled, the four are K-FAC's two, whatever the sizes
    of the batches, as far as inputs and cotangents are independent; such layers keep K-FAC's own in ``input`` and
    ``output``, and nothing in the others.

    Terms of the loss with weights have them in their cotangents. They do not weigh the inputs, other than K-FAC's: an
    ignored example acts on the others' losses through the batch's statistics.

    Args:
        layer: The layer's adapter.

    Attributes:
        coupling: What the forward passes showed; None before the first.
    """

    by_rows = frozenset({"input", "input_mean"})

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.input_mean = Mean(blank(layer, *layer.stack, layer.d_in, layer.d_in))
        self.output_sum = Mean(blank(layer, *layer.stack, layer.d_out, layer.d_out))
        self.coupling: Coupling | None = None

    def means(self) -> dict[str, Mean]:
        """Moments about the mean, and those of the means."""
        return {**super().means(), "input_mean": self.input_mean, "output_sum": self.output_sum}

    @property
    def empty(self) -> bool:
        """Whether nothing was gathered."""
        return self.input.weight == 0.0 or self.output.weight == 0.0

    def constants(self) -> dict[str, Tensor]:
        """The coupling, once known: a unit vector, of which any damage leaves one or another."""
        if self.coupling is None:
            return {}
        unit = zeros(self.layer, len(Coupling))
        unit[int(self.coupling)] = 1.0
        return {"coupling": unit}

    def constant_shapes(self) -> dict[str, torch.Size]:
        """Shape of the coupling's vector."""
        return {"coupling": torch.Size((len(Coupling),))}

    def restore(self, constants: Mapping[str, Tensor]) -> None:
        """Take the coupling back.

        Args:
            constants: What :meth:`constants` gave.
        """
        self.coupling = Coupling(int(constants["coupling"].argmax())) if constants else None

    def add(self, sample: Sample) -> None:
        """Add the moments of one pull.

        Args:
            sample: Input and cotangent of one pull.

        Raises:
            RuntimeError: The forward pass was not looked at, or there is no cotangent.
        """
        if self.coupling is None or (self.coupling is not Coupling.NONE and sample.cotangents is None):
            raise RuntimeError(
                f"approximation={_NAME!r} needs the graph of the forward pass and a cotangent of layer "
                f"{self.layer.name!r}; gather through kronfac.Estimator."
            )
        if self.coupling is Coupling.NONE:
            super().add(sample)
            return
        require_finite(sample)
        assert sample.cotangents is not None
        if sample.first:
            self._add_inputs(require_float(sample.inputs), sample.batch)
            self.output.weight += sample.denominator
            if self.coupling is Coupling.GENERAL:
                self.output_sum.weight += sample.denominator
        self._add_cotangents(require_float(sample.cotangents), sample.weight)

    def _add_inputs(self, x: Tensor, batch: int) -> None:
        # Rows are linear in the input: those of the centred input are the centred rows, but for the bias's ones.
        layer, mean = self.layer, x.mean(0, keepdim=True)
        rows = float(layer.add_input_gram_(self.input.total, x - mean, None, self.input.alpha))
        self.input.weight += rows * (batch - 1) / batch
        if self.coupling is Coupling.GENERAL:
            for moment in (self.input_mean, self.output_sum):
                if is_blank(moment.total):
                    moment.total = zeros(layer, *moment.total.shape)
            layer.add_input_gram_(self.input_mean.total, mean, None, batch * self.input_mean.alpha)
            self.input_mean.weight += rows

    def _add_cotangents(self, g: Tensor, weight: float) -> None:
        layer, total = self.layer, g.sum(0, keepdim=True)
        layer.add_output_gram_(self.output.total, g - total / len(g), weight * self.output.alpha)
        if self.coupling is Coupling.GENERAL:
            layer.add_output_gram_(self.output_sum.total, total, weight * self.output_sum.alpha)

    def block(self) -> Block:
        """Return ``C ⊗ (H' - H''/N) + Ā' ⊗ H''``, its first term where ``H'' = 0``, or K-FAC's without coupling.

        Raises:
            FloatingPointError: A moment overflowed.
        """
        if self.coupling in (None, Coupling.NONE):
            return super().block()
        covariance = mirror_(self.input.value())
        if self.layer.has_bias:  # a constant has no variance
            covariance[..., -1, :] = 0.0
            covariance[..., :, -1] = 0.0
        found = {"input": covariance, "output": mirror_(self.output.value())}
        if self.coupling is Coupling.GENERAL:
            found["second_input"] = mirror_(self.input_mean.value())
            found["second_output"] = mirror_(self.output_sum.value())
        for what, factor in found.items():
            if not all_finite(factor):
                raise FloatingPointError(
                    f"The {what.replace('_', ' ')} factor of layer {self.layer.name!r} overflowed to NaN or Inf."
                )
        return Kronecker(**found) if len(found) == 2 else KroneckerSum(**found)

    @property
    def drafts(self) -> bool:
        """Only K-FAC's own blocks."""
        return self.coupling in (None, Coupling.NONE) and super().drafts


class XKFACNormStatistic(DenseStatistic):
    """Exact block of a normalisation layer: its parameters have one gradient per pull, whatever is coupled.

    ``(1/D) Σ ∇∇ᵀ`` over pulls of whole batches is unbiased, cross terms of examples vanish in expectation. Where
    nothing behind the layer couples examples their gradients are taken one by one, which has less sampling error.

    Args:
        layer: The layer's adapter.
    """

    def __init__(self, layer: LayerAdapter) -> None:
        super().__init__(layer)
        self.coupling = Coupling.NONE

    def add(self, sample: Sample) -> None:
        """Add the outer product of one pull's gradient, or those of its examples."""
        if self.coupling is Coupling.NONE:
            super().add(sample)
            return
        require_finite(sample)
        assert sample.cotangents is not None
        if sample.first:
            self.moment.weight += sample.denominator
        gradients = self.layer.per_example_gradients(sample.inputs, sample.cotangents).sum(0, keepdim=True)
        rows = gradients.flatten(-2).movedim(0, -2).to(self.moment.total.dtype)
        add_gram_(self.moment.total, rows, alpha=sample.weight * self.moment.alpha)


class XKFAC(Approximation):
    """``F_ℓ ≈ Ā ⊗ H' + (N Ā' - Ā) ⊗ (H'' - H') / (N - 1)`` (Lee et al. 2020, equation 59), for models with batch norm.

    ``H'`` and ``H''`` hold the derivatives of every example's loss in every example's pre-activation. What batch norm
    couples is found from the graph of each forward pass: layers without batch norm in train mode behind them have
    K-FAC's block, a layer that feeds batch norm alone a single product, all others two; normalisation layers an exact
    block.
    """

    name = _NAME
    needs_pairs = True
    needs_examples = True
    keeps_trace = False
    couples_examples = True
    whole_batches = True

    def start(self, layer: LayerAdapter) -> Statistic:
        """Return empty statistics for a layer.

        Args:
            layer: The layer's adapter.

        Returns:
            The statistic.
        """
        if layer.unit_wise:
            return XKFACNormStatistic(layer)
        return KFACStatistic(layer) if layer.diagonal_input else XKFACStatistic(layer)

    def begin(
        self, model: nn.Module, source: Source, tape: Tape, outputs: Tensor, statistics: Mapping[str, Statistic]
    ) -> None:
        """Find out what batch norm couples in a forward pass.

        Args:
            model: The model.
            source: Whence the cotangents will come.
            tape: The recorded layers.
            outputs: The model's outputs, attached to the graph.
            statistics: Those of the model's layers.

        Raises:
            ValueError: The source, the model's batch norm, its batch or one of its layers is not what XK-FAC is for.
        """
        _check_model(model)
        tape.refuse_repeated(f"approximation={_NAME!r}")
        found = couplings(tape, outputs)
        coupled = any(coupling is not Coupling.NONE for coupling in found.values())
        if len(outputs) == 1 and (coupled or couples_examples(model)):
            raise ValueError(
                f"approximation={_NAME!r} needs batches of two examples at least where batch norm is in train mode, "
                "got a batch of one: it estimates a covariance between examples. Drop a smaller last batch "
                "(drop_last=True), or use approximation='kfac', which takes one example with several positions."
            )
        if source.exact and coupled:
            # Sources know of modules alone; a functional batch norm passes them.
            raise ValueError(
                f"source={source.name!r} pulls all examples at once without independent signs, which is wrong where "
                "batch norm in train mode couples them: use source='sampled'."
            )
        for name, coupling in found.items():
            statistic = statistics[name]
            if isinstance(statistic, XKFACStatistic):
                found[name] = _refined(coupling, tape, name, len(outputs))
                if statistic.coupling not in (None, found[name]):
                    raise ValueError(
                        f"Layer {name!r}: what batch norm couples behind it is no longer what it was in earlier "
                        "forward passes, and their statistics cannot be averaged. Either a batch norm changed its "
                        "mode: keep it in one, or start a new Estimator or optimiser after switching it. Or the "
                        "forward takes another path: with other sizes or branches, use approximation='kfac'."
                    )
            elif coupling is not Coupling.NONE and not isinstance(statistic, XKFACNormStatistic):
                raise ValueError(
                    f"approximation={_NAME!r}: batch norm in train mode lies behind the embedding {name!r}, whose mean "
                    "input would fill a vocabulary x vocabulary factor; freeze it, or use 'kfac'."
                )
        for name, statistic in statistics.items():
            if name in tape.calls and isinstance(statistic, (XKFACStatistic, XKFACNormStatistic)):
                # The outputs may not depend on a layer in this pass: it takes in zeros then.
                statistic.coupling = found.get(name, statistic.coupling or Coupling.NONE)


def _refined(coupling: Coupling, tape: Tape, name: str, batch: int) -> Coupling:
    """Cotangents of a layer that feeds batch norm add up to zero over batch *and* positions, not at each position."""
    call = tape.calls[name]
    if coupling is not Coupling.NONE:
        require_examples(call.adapter, call.input, batch, f"approximation={_NAME!r}")
    if coupling is not Coupling.DIRECT:
        return coupling
    alone = call.adapter.sharing == "reduce" or math.prod(call.adapter.positions(call.input)[1:]) == 1
    return Coupling.DIRECT if alone else Coupling.GENERAL


def _check_model(model: nn.Module) -> None:
    refuse_synchronised(model, _NAME)
    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    if norms and not couples_examples(model):
        raise ValueError(
            f"approximation={_NAME!r} is for batch norm in train mode, but all of this model's is in eval mode, where "
            "examples do not interact and XK-FAC is K-FAC: use approximation='kfac', or model.train()."
        )
