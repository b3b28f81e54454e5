"""Passes through a live model that leave it, its buffers and the random state as they were.

Parameters are replaced for the duration by aliases (`torch.func.functional_call`), never by copies; buffers are
replaced by copies, so that running statistics are not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from kronfac._typing import NamedTensors
from kronfac.eager import eagerly
from kronfac.forwards import pick_outputs
from kronfac.measuring import apart_from_training, couples_examples, kept_modes, refuse_inference_mode
from kronfac.operators.kernels import plain_kernels

Pick = Callable[[Any], Tensor] | None
_WHAT = "A product with the curvature"


def run(model: nn.Module, parameters: NamedTensors, inputs: Any, pick: Pick) -> Tensor:
    """Call a model with other tensors in place of its parameters.

    Args:
        model: The model.
        parameters: Tensors to use, by parameter name; the rest are the model's own.
        inputs: A tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or a pair
            ``(tuple, dict)`` of both.
        pick: Takes the output tensor out of what the model returns.

    Returns:
        The outputs.
    """
    arguments: tuple[Any, ...] = (inputs,)
    keywords: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        arguments, keywords = (), dict(inputs)
    elif (
        isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict)
    ):
        arguments, keywords = inputs
    elif isinstance(inputs, tuple | list):
        arguments = tuple(inputs)
    replaced = dict(parameters) | {name: buffer.clone() for name, buffer in model.named_buffers()}
    with apart_from_training(), eagerly():
        found = functional_call(model, replaced, arguments, keywords)
    return pick_outputs(found, pick)


def leaves(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Aliases of parameters to differentiate in.

    Args:
        model: The model.
        names: Names of the parameters.

    Returns:
        Leaves that share memory with the parameters, by name.
    """
    refuse_inference_mode(_WHAT)
    known = dict(model.named_parameters())
    return {name: known[name].detach().requires_grad_() for name in names}


def push_forward(model: nn.Module, inputs: Any, vector: NamedTensors, pick: Pick) -> tuple[Tensor, Tensor]:
    """Outputs and their derivative in a direction, ``J v``.

    One forward pass with dual numbers, at the cost of three forwards (a forward and a backward). Operations without a
    forward derivative make it fall back to differentiating the backward pass in its cotangent, for up to twice that
    and with gradients enabled, as hooks on the model may see. Batch norm in train mode is differentiated
    through the batch.

    Args:
        model: The model.
        inputs: As for `run`.
        vector: The direction, by parameter name; parameters that are left out stay fixed.
        pick: As for `run`.

    Returns:
        Outputs and ``J v`` of the same shape, detached.

    Raises:
        NotImplementedError: Torch knows neither derivative of an operation of the model.
    """
    refuse_inference_mode(_WHAT)
    known = dict(model.named_parameters())
    vector = {name: tangent.detach().to(known[name].dtype) for name, tangent in vector.items()}
    _load_forward_rules()
    try:
        with (
            same_random_state(model),
            torch.no_grad(),
            plain_kernels(model),
            forward_ad._set_fwd_grad_enabled(True),  # off within the forward of an autograd.Function
            forward_ad.dual_level(),
        ):
            duals = {name: forward_ad.make_dual(known[name].detach(), tangent) for name, tangent in vector.items()}
            value, tangent = forward_ad.unpack_dual(run(model, duals, inputs, pick))
            return value, torch.zeros_like(value) if tangent is None else tangent
    except (NotImplementedError, RuntimeError):
        pass  # an operation without a forward rule, or not for these strides; what is wrong otherwise shows below
    try:
        return _push_twice_backward(model, inputs, vector, pick)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{_WHAT} needs a forward or a second derivative, of which torch has none here: {error} An optimiser does "
            "without it if made with kl_clip=None."
        ) from error


def push_forward_each(
    model: nn.Module, inputs: Any, vectors: Sequence[NamedTensors], pick: Pick
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and their derivatives in several directions, ``J v₁, J v₂, …``, in one pass where the model allows it.

    The directions ride as a batch on one forward pass (`torch.func.vmap` over `torch.func.jvp`).  Models that cannot be
    batched over (batch norm in train mode writes its running statistics, for one) take a pass for each direction.

    Args:
        model: The model.
        inputs: As for `run`.
        vectors: Directions over the same parameters.
        pick: As for `run`.

    Returns:
        Outputs, and one derivative for each direction, detached.
    """
    refuse_inference_mode(_WHAT)
    if len(vectors) > 1 and not couples_examples(model):
        known = dict(model.named_parameters())
        names = list(vectors[0])
        primal = {name: known[name].detach() for name in names}
        stacked = {name: torch.stack([v[name].detach().to(primal[name].dtype) for v in vectors]) for name in names}
        _load_forward_rules()

        def push(direction: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            value, tangent = torch.func.jvp(lambda p: run(model, p, inputs, pick), (primal,), (direction,))[:2]
            return value, tangent

        try:
            with same_random_state(model), torch.no_grad(), plain_kernels(model):
                value, tangents = torch.func.vmap(push, out_dims=(None, 0), randomness="same")(stacked)  # type: ignore[arg-type]
                return value, list(tangents.unbind())
        except (NotImplementedError, RuntimeError):
            pass  # an operation without a batching or forward rule: what is wrong with it otherwise shows below
    pairs = [push_forward(model, inputs, vector, pick) for vector in vectors]
    return pairs[0][0], [tangent for _, tangent in pairs]


def _push_twice_backward(model: nn.Module, inputs: Any, vector: NamedTensors, pick: Pick) -> tuple[Tensor, Tensor]:
    """``J v`` as the derivative of ``J^T u`` in ``u``."""
    with same_random_state(model), torch.enable_grad(), plain_kernels(model):
        parameters = leaves(model, tuple(vector))
        outputs = run(model, parameters, inputs, pick)
        if not outputs.requires_grad:
            return outputs, torch.zeros_like(outputs)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, list(parameters.values()), dummy, create_graph=True, materialize_grads=True
        )
        total = torch.stack([(g * v).sum() for g, v in zip(pulled, vector.values(), strict=True)]).sum()
        (tangent,) = torch.autograd.grad(total, dummy, materialize_grads=True)
    return outputs.detach(), tangent


@contextmanager
def same_random_state(model: nn.Module, state: tuple[Tensor, ...] | None = None) -> Iterator[None]:
    """Put the random state back at the end, so that passes neither disturb a training run nor differ in dropout masks.

    Args:
        model: The model, whose devices are looked at.
        state: Random state to start from, as `random_state` returns it; None for the present one.

    Yields:
        Nothing.
    """
    with torch.random.fork_rng(_devices(model)):
        if state is not None:
            set_random_state(model, state)
        yield


class RandomStream:
    """What a model draws in its forwards, dropout's masks, as a function of a seed; torch's own state is left alone.

    Args:
        model: The model, whose devices are looked at.
        seed: The seed; labels that are drawn by a generator of the same seed are independent of it.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model, self._seed = model, (seed + 0xD1B54A32D192ED03) % 2**63
        self._state: tuple[Tensor, ...] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from the stream within the block, from where the last one ended.

        Yields:
            Nothing.
        """
        with same_random_state(self._model, self._state):
            if self._state is None:
                torch.default_generator.manual_seed(self._seed)
                for device in _devices(self._model):
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(self._seed)
            yield
            self._state = random_state(self._model)


def random_state(model: nn.Module) -> tuple[Tensor, ...]:
    """The present random state on the CPU and the model's devices.

    Args:
        model: The model.

    Returns:
        One state for each.
    """
    return torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(model))


def set_random_state(model: nn.Module, state: tuple[Tensor, ...]) -> None:
    """Go back to a random state on the CPU and the model's devices.

    Args:
        model: The model.
        state: As `random_state` returns it.
    """
    torch.set_rng_state(state[0])
    for device, own in zip(_devices(model), state[1:], strict=True):
        torch.cuda.set_rng_state(own, device)


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients, and without what eval mode leaves out: coupled examples, dropout.

    Args:
        model: The model; its modes and the random state are put back at the end.

    Yields:
        Nothing.
    """
    with same_random_state(model), kept_modes(model), plain_kernels(model), torch.no_grad():
        for module in model.modules():
            module.training = False  # not eval(), which may do more
        yield


@cache
def _load_forward_rules() -> None:
    """Let torch register its forward derivatives, whose import warns of torch's own use of TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
