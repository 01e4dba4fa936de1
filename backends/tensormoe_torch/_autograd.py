"""Choice between two ways to run: gradients in closed form, or traced operations.

Where PyTorch runs eagerly, a gate and a mixture are one node of its graph each. What they save and
their backward pass then costs what the core's reverse programs say, and no operation inside is
recorded. Under ``torch.compile``, export and ``torch.func`` the same programs run as plain
operations, which those follow and differentiate by themselves; so does a second derivative. A
compiler for the CPU finds one operator among them (:mod:`tensormoe_torch._operator`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensormoe import functional
from tensormoe.functional import LayerConfig, Routed
from tensormoe.gates import Across, OneExpert, TopK
from tensormoe.planning import Reverse
from tensormoe.planning._grouping import COUNTS
from tensormoe_torch._adapter import BACKEND, TorchBackend
from tensormoe_torch._operator import activate_by_operator, direct, is_compiled
from tensormoe_torch._tracing import is_traced

__all__ = ["is_autocast", "mix", "no_autocast", "route"]


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off where it is on: the layer chooses its dtypes itself."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else nullcontext()


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device; there are types that have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def route(
    config: LayerConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    buffers: Mapping[str, Tensor],
    lead: tuple[int, ...],
    *,
    training: bool,
    across: Across | None = None,
    noise: Sequence[Tensor] | None = None,
    keep: bool = False,
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """Coefficients (*lead, N_e) per level of inputs (batch, in); buffers that training changed.

    With ``keep``, the logits follow the coefficients.
    """
    options: dict[str, Any] = {
        "buffers": buffers,
        "training": training,
        "across": across,
        "noise": noise,
        "keep": keep,
    }
    if is_traced(x):
        if is_compiled(x):
            options["activation"] = activate_by_operator
        routed = functional.route(config, parameters, x, BACKEND, **options)
        return _made(routed, lead), routed.buffers
    if torch.is_grad_enabled():
        arrays = tuple(parameters.values())
        if _any_differentiated(x, *arrays):
            names = tuple(parameters)
            call = _GateCall(
                config, direct(x), names, dict(buffers), lead, training, across, noise, keep
            )
            made = _Gate.apply(call, x, *arrays)
            return made, call.changed
    routed = functional.route(config, parameters, x, direct(x), **options)
    return _made(routed, lead), routed.buffers


def mix(
    config: LayerConfig,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    coefficients: list[Tensor | TopK | OneExpert],
    lead: tuple[int, ...],
) -> Tensor:
    """The mixture (*lead, out) for inputs (batch, in), or ids (batch,), all in one dtype."""
    if is_traced(x):
        # an exported model must not be bound to the batch sizes that one plan is the cheapest for
        any_batch = torch.compiler.is_exporting()
        if torch.compiler.is_compiling():
            # a compiler cannot follow the planning of a k that nobody knew before the call
            counts = config.spec.experts
            coefficients = [_dense(*pair) for pair in zip(coefficients, counts, strict=True)]
        made = functional.apply_experts(
            config, parameters, x, coefficients, BACKEND, any_batch=any_batch
        )
        return _led(made, lead)
    if torch.is_grad_enabled():
        named = dict(parameters)
        for level, given in enumerate(coefficients):
            if isinstance(given, OneExpert):
                named[f"indices_{level}"] = given.indices
                if given.counts is not None:
                    named[COUNTS] = given.counts
                continue
            if isinstance(given, TopK):
                named[f"indices_{level}"] = given.indices
                given = given.values
            named[f"coefficients_{level}"] = given
        if _any_differentiated(x, *named.values()):
            call = _ExpertsCall(config, direct(x), tuple(named), lead)
            result: Tensor = _Experts.apply(call, x, *named.values())
            return result
    return _led(functional.apply_experts(config, parameters, x, coefficients, direct(x)), lead)


def _made(routed: Routed, lead: tuple[int, ...]) -> list[Tensor]:
    return [_led(each, lead) for each in (*routed.coefficients, *routed.logits)]


def _led(result: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Rows of a result with the leading axes of the call."""
    return result if len(lead) == 1 else result.reshape(*lead, result.shape[-1])


def _own(result: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The same for a result that a node returns: no view, as what ``nn.Linear`` returns.

    ``fully_shard`` hangs hooks on what a module returns, and loses them where a view is changed.
    """
    return _led(result, lead).data


def _dense(given: Tensor | TopK | OneExpert, count: int) -> Tensor | OneExpert:
    """Coefficients (batch, N_e) in the place of those of a few experts."""
    if not isinstance(given, TopK):
        return given
    zeros = given.values.new_zeros((given.values.shape[0], count))
    return torch.scatter_add(zeros, 1, given.indices.to(torch.int64), given.values)


def _any_differentiated(*arrays: Tensor) -> bool:
    return any(array.requires_grad for array in arrays)


@dataclass(eq=False)
class _GateCall:
    """Values that a gate's node keeps besides tensors; ``changed`` are the call's new buffers."""

    config: LayerConfig
    backend: TorchBackend
    names: tuple[str, ...]
    buffers: dict[str, Tensor]
    lead: tuple[int, ...]
    training: bool
    across: Across | None
    noise: Sequence[Tensor] | None
    keep: bool
    changed: dict[str, Tensor] = field(default_factory=dict)


class _Gate(torch.autograd.Function):
    """From inputs to coefficients, and to logits where they are wanted, as one node."""

    @staticmethod
    def forward(ctx: Any, call: _GateCall, x: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(call.names, arrays, strict=True))
        routed = functional.route(
            call.config,
            parameters,
            x,
            call.backend,
            buffers=call.buffers,
            keep=True,
            training=call.training,
            across=call.across,
            noise=call.noise,
        )
        call.changed = routed.buffers
        kept = call.buffers
        if call.training:
            # running statistics have no part in the backward pass, and biases are about to change
            kept = {name: each.clone() for name, each in kept.items() if "choice_bias" in name}
        ctx.call, ctx.count, ctx.buffers = call, len(arrays), tuple(kept)
        call.buffers = {}
        made = [_own(each, call.lead) for each in routed.coefficients]
        logits = [_own(each, call.lead) for each in routed.logits]
        ctx.save_for_backward(x, *arrays, *kept.values(), *logits, *made)
        return (*made, *logits) if call.keep else tuple(made)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        call: _GateCall = ctx.call
        x, *rest = ctx.saved_tensors
        arrays, rest = rest[: ctx.count], rest[ctx.count :]
        parameters = dict(zip(call.names, arrays, strict=True))
        buffers = dict(zip(ctx.buffers, rest, strict=False))
        rest = rest[len(buffers) :]
        levels = len(rest) // 2
        logits, weights, cotangents = (
            [each.reshape(x.shape[0], each.shape[-1]) for each in results]
            for results in (rest[:levels], rest[levels:], given)
        )
        by_input, *by_array = ctx.needs_input_grad[1:]
        with no_autocast(x.device.type):
            if torch.is_grad_enabled():
                inputs = _views(x, *arrays)
                parameters = dict(zip(call.names, inputs[1:], strict=True))
                routed = functional.route(
                    call.config,
                    parameters,
                    inputs[0],
                    BACKEND,
                    buffers=buffers,
                    training=call.training,
                    across=call.across,
                    noise=call.noise,
                    keep=call.keep,
                )
                outputs = (*routed.coefficients, *routed.logits)
                return _again(ctx, outputs, inputs, cotangents)
            routed = Routed(weights, logits)
            total, named = functional.gate_vjp(
                call.config,
                parameters,
                x,
                routed,
                cotangents[:levels],
                call.backend,
                buffers=buffers,
                training=call.training,
                by_input=by_input,
                across=call.across,
                by_logits=cotangents[levels:] or None,
            )
        found = (
            named[name] if want else None for name, want in zip(call.names, by_array, strict=True)
        )
        return None, total, *found


@dataclass(eq=False)
class _ExpertsCall:
    """Values that a mixture's node keeps besides tensors."""

    config: LayerConfig
    backend: TorchBackend
    names: tuple[str, ...]
    lead: tuple[int, ...]


class _Experts(torch.autograd.Function):
    """The mixture for given coefficients, as one node."""

    @staticmethod
    def forward(ctx: Any, call: _ExpertsCall, x: Tensor, *arrays: Tensor) -> Tensor:
        named = dict(zip(call.names, arrays, strict=True))
        operands = ("x", *call.names)
        wanted = [
            name for name, want in zip(operands, ctx.needs_input_grad[1:], strict=True) if want
        ]
        result, residuals = functional.experts_forward(
            call.config, named, x, _coefficients(named), call.backend, wanted
        )
        # operands are among the residuals: each tensor is saved once
        given = (x, *arrays)
        places = {id(array): place for place, array in enumerate(given)}
        made = [array for array in residuals.arrays if id(array) not in places]
        places |= {id(array): len(given) + place for place, array in enumerate(made)}
        ctx.call, ctx.wanted, ctx.reverse = call, wanted, residuals.reverse
        ctx.places = [places[id(array)] for array in residuals.arrays]
        ctx.save_for_backward(*given, *made)
        return _own(result, call.lead)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        call: _ExpertsCall = ctx.call
        saved = ctx.saved_tensors
        x, *arrays = saved[: 1 + len(call.names)]
        cotangent = cotangent.reshape(x.shape[0], cotangent.shape[-1])
        with no_autocast(x.device.type):
            if torch.is_grad_enabled():
                inputs = _views(x, *arrays)
                named = dict(zip(call.names, inputs[1:], strict=True))
                result = functional.apply_experts(
                    call.config, named, inputs[0], _coefficients(named), BACKEND
                )
                return _again(ctx, [result], inputs, (cotangent,))
            reverse: Reverse = ctx.reverse
            residuals = functional.Residuals(reverse, tuple(saved[k] for k in ctx.places))
            found = functional.experts_backward(call.config, residuals, cotangent, call.backend)
        return None, *(found.get(name) for name in ("x", *call.names))


def _coefficients(named: Mapping[str, Tensor]) -> list[Tensor | TopK | OneExpert]:
    """The coefficients among a node's tensors, one entry per level."""
    found: list[Tensor | TopK | OneExpert] = []
    while True:
        values = named.get(f"coefficients_{len(found)}")
        indices = named.get(f"indices_{len(found)}")
        if values is not None:
            found.append(values if indices is None else TopK(indices, values))
        elif indices is not None:
            found.append(OneExpert(indices, named.get(COUNTS)))
        else:
            return found


def _views(*arrays: Tensor) -> tuple[Tensor, ...]:
    """The same tensors as other nodes: a gradient by one of them ends there.

    The inputs of a call may depend on one another, as coefficients do on the layer's input.
    """
    return tuple(array.view_as(array) for array in arrays)


def _again(
    ctx: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of a plain run of the same call, for a graph of the backward pass itself."""
    wanted = [array for array, want in zip(inputs, ctx.needs_input_grad[1:], strict=True) if want]
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [cotangent for _, cotangent in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return None, *(next(found) if want else None for want in ctx.needs_input_grad[1:])
