"""How much damping rules add, beside what is there: Figure 3 of Gao et al. (2020), for every rule and layer.

Gao et al. plot ``sqrt(lambda) / (tr(delta Phi) / m)``, damping over mean diagonal, for both factors, and the traces.
There ``delta Phi x Psi`` is a layer's block with ``tr Phi = tr Psi = 1``, hence ``tr(delta Phi) = delta`` is the trace
of the block. The matrix that ``sqrt(lambda)`` is added to is ``sqrt(delta) Phi``, however (equation 5.15), of mean
diagonal ``sqrt(delta) / m``. Both are recorded: ``printed_input`` and ``printed_output`` as in the figure, and
``input_ratio`` and ``output_ratio`` of what a rule really adds to the factor it adds it to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.analysis.measurement import along_training
from kronfac.approximations import Approximation
from kronfac.blocks import Block, Shift, Uniform
from kronfac.curvature import BlockDiagonal
from kronfac.damping import Rule, check_damping, get_rule
from kronfac.estimation import estimate
from kronfac.estimator import CoverageWarning
from kronfac.forwards import batches_of
from kronfac.likelihoods import Likelihood
from kronfac.measuring import apart_from_training
from kronfac.operators.passes import same_random_state
from kronfac.sources import Source

#: A rule by name, as a function, or one function for each layer by its name.
AnyRule = str | Rule | Mapping[str, Rule]


@dataclass(frozen=True)
class LayerDamping:
    """What one rule adds to one layer's block.

    For layers with a stack of blocks (groups, channels) the means are over the stack. Figures of factors are NaN
    where the block is no Kronecker product or the rule adds to the block as a whole.

    Attributes:
        layer: The layer.
        rule: The damping rule.
        trace: Trace of the block (``delta`` of Gao et al.), before damping.
        mean: Mean eigenvalue of the block, its trace over its size.
        input_mean: Mean eigenvalue of the input factor that the rule adds to (rescaled, if the rule does that).
        output_mean: Mean eigenvalue of the output factor.
        input_added: What the rule adds to the input factor.
        output_added: What it adds to the output factor.
        input_ratio: The former over ``input_mean``.
        output_ratio: The latter over ``output_mean``.
        pi: ``sqrt(input_added / output_added)``; the ``pi`` of Martens & Grosse (2015, section 6.3) for ``"factored"``.
        inflation: Trace of the damped block over that of the block, minus 1: over 1, damping outweighs curvature. A
            rule that rescales the block inflates it by that as well.
        printed_input: ``sqrt(lambda) d_in / trace``, as printed in Figure 3(a).
        printed_output: ``sqrt(lambda) d_out / trace``, as printed in Figure 3(b).
        step: Steps of training done.
    """

    layer: str
    rule: str
    trace: float
    mean: float
    input_mean: float
    output_mean: float
    input_added: float
    output_added: float
    input_ratio: float
    output_ratio: float
    pi: float
    inflation: float
    printed_input: float
    printed_output: float
    step: int = 0


def damping_of(
    curvature: BlockDiagonal, damping: float, rules: Sequence[AnyRule] = ("factored",), *, step: int = 0
) -> list[LayerDamping]:
    """Look at what damping rules add to the blocks of a curvature.

    Args:
        curvature: The curvature, such as `kronfac.estimate` or an optimiser's ``curvature()`` gives.
        damping: ``lambda``, on the scale of the curvature.
        rules: Rules by name (see `kronfac.damping.RULES`), as functions, or one function for each layer by its name.
        step: Steps of training done, for the record.

    Returns:
        A row per rule and layer.
    """
    damping = check_damping(damping)
    rows = []
    for rule in rules:
        own = rule if isinstance(rule, Mapping) else dict.fromkeys(curvature.blocks, get_rule(rule))
        name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
        rows += [
            _row(layer, name, block, own[layer](block, damping), damping, step)
            for layer, block in curvature.blocks.items()
        ]
    return rows


def damping_during_training(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any] | tuple[Any, Any],
    advance: Callable[[], object],
    *,
    steps: int,
    every: int = 100,
    damping: float = 1e-3,
    rules: Sequence[AnyRule] = ("factored",),
    approximation: str | Approximation = "kfac",
    source: str | Source = "sampled",
    samples: int = 1,
    sharing: str = "expand",
    norm: str = "unitwise",
    seed: int = 0,
    outputs: Callable[[Any], Tensor] | None = None,
) -> list[LayerDamping]:
    """Follow `damping_of` along a training, as in Figure 3 of Gao et al. (2020).

    The curvature is estimated anew at each measurement, in the model's own mode (as training sees it) and on the same
    data. Buffers and modes are left as they are.

    Args:
        model: The model in training.
        likelihood: The loss.
        data: Pairs ``(inputs, targets)``, or one.
        advance: Does one step of training.
        steps: Number of steps.
        every: Steps between measurements; the first is before any step, the last after all. Gao et al. take 100.
        damping: ``lambda``.
        rules: Damping rules.
        approximation: As for `kronfac.estimate`.
        source: As for `kronfac.estimate`.
        samples: As for `kronfac.estimate`.
        sharing: As for `kronfac.estimate`.
        norm: As for `kronfac.estimate`.
        seed: As for `kronfac.estimate`.
        outputs: As for `kronfac.estimate`.

    Returns:
        The rows of all measurements.
    """
    batches = list(batches_of(data))
    check_damping(damping)
    for rule in rules:
        if not isinstance(rule, Mapping):
            get_rule(rule)

    def measure(step: int) -> list[LayerDamping]:
        # No optimiser that watches the model shall gather from this, nor dropout's masks in training change by it.
        with apart_from_training(), same_random_state(model), warnings.catch_warnings():
            if step:  # once is enough
                warnings.simplefilter("ignore", CoverageWarning)
            curvature = estimate(
                model,
                likelihood,
                batches,
                approximation=approximation,
                source=source,
                samples=samples,
                sharing=sharing,
                norm=norm,
                seed=seed,
                outputs=outputs,
            )
        return damping_of(curvature, damping, rules, step=step)

    return along_training(advance, steps, every, measure)


def _row(layer: str, rule: str, block: Block, shift: Shift, damping: float, step: int) -> LayerDamping:
    height, width = block.shape[-2:]
    trace = float(block.trace())
    mean = trace / block.shape.numel()
    means = block.factor_means()
    inputs, outputs = means if means is not None else (torch.tensor(math.nan), torch.tensor(math.nan))
    if isinstance(shift, Uniform):
        added_in = added_out = torch.full_like(inputs, math.nan)
        inflation = _ratio(shift.value, mean)
    elif hasattr(shift, "input") and hasattr(shift, "output"):
        # Where the rule changes the scale of the block too, it adds to balanced factors of that scale.
        scale = getattr(shift, "scale", None)
        if scale is not None:
            inputs, outputs = _like(scale, inputs).sqrt() / width, _like(scale, outputs).sqrt() / height
        added_in, added_out = _like(shift.input, inputs), _like(shift.output, outputs)
        damped = ((inputs + added_in) * (outputs + added_out)).double().mean()
        inflation = _ratio(float(damped), mean) - 1.0
    else:
        raise TypeError(
            f"rule {rule!r} gave a {type(shift).__name__} for layer {layer!r}: neither one number for the block "
            "nor one for each factor"
        )
    return LayerDamping(
        layer=layer,
        rule=rule,
        trace=trace,
        mean=mean,
        input_mean=_mean(inputs),
        output_mean=_mean(outputs),
        input_added=_mean(added_in),
        output_added=_mean(added_out),
        input_ratio=_mean(added_in / inputs),
        output_ratio=_mean(added_out / outputs),
        pi=_mean((added_in / added_out).sqrt()),
        inflation=inflation,
        printed_input=_ratio(math.sqrt(damping) * width, trace),
        printed_output=_ratio(math.sqrt(damping) * height, trace),
        step=step,
    )


def _like(value: Tensor | float, means: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=means.dtype, device=means.device).expand_as(means)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _ratio(over: float, under: float) -> float:
    """Ratio, infinite where there is nothing to compare with."""
    return over / under if under > 0.0 else math.inf
