"""The gate's activation as one operator of PyTorch, for its compiler.

Traced, an activation is some two hundred operations and twice as many with its derivatives, most of
the time that compiling a model takes. The operator runs the core's eager kernels instead: the same
closed forms as in eager mode. Projection and batch norm stay traced, so that compilers see the
products, and no operator has to return statistics.

``torch.ops.tensormoe.activate(logits, gate, choice)`` takes logits (..., N_e), after batch norm if
the gate has one, the gate as text, since compilers take text for a constant and numbers for
variables, and what is added for the choice of experts, or None.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensormoe.backend import Backend
from tensormoe.gates import Across, Activation, Gate, Statistics, activate, activate_vjp, batch_norm
from tensormoe_torch._adapter import BACKEND, EAGER, TorchBackend

__all__ = ["activate_by_operator", "direct", "is_compiled"]


def is_compiled(x: Tensor) -> bool:
    """Whether a compiler for the CPU follows ``x``, and nothing else does.

    Exporters need operations that other programs know, transformations those that they know how to
    differentiate or map, and tensors of other classes those that they know how to distribute. On
    other devices a compiler fuses the operations into few kernels, which run faster than they would
    one by one inside of an operator.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def activate_by_operator(
    gate: Gate,
    logits: Tensor,
    *,
    statistics: Statistics | None,
    training: bool,
    backend: Backend,
    across: Across | None,
    choice: Tensor | None,
) -> Activation:
    """The same as :func:`tensormoe.gates.activate`, with one operator in the graph."""
    if gate.normalization == "batch":
        logits, statistics = batch_norm(
            gate,
            logits,
            statistics=statistics,
            training=training,
            backend=backend,
            across=across,
        )
    return Activation(_activate(logits, gate.text, choice), statistics)


def direct(x: Tensor) -> TorchBackend:
    """The adapter for tensors that nothing follows, on the device of ``x``."""
    # reading a value from another device waits for all the work that it was given
    return EAGER if x.device.type == "cpu" else BACKEND


@lru_cache(maxsize=64)
def _gate(text: str) -> Gate:
    """A gate whose batch norm, if it has one, has been applied."""
    gate = Gate.from_dict(json.loads(text))
    if gate.normalization != "batch":
        return gate
    return replace(gate, normalization=None, spread=None)


@torch.library.custom_op("tensormoe::activate", mutates_args=())
def _activate(logits: Tensor, gate: str, choice: Tensor | None = None) -> Tensor:
    backend = direct(logits)
    made: Tensor = activate(_gate(gate), logits, backend=backend, choice=choice).coefficients
    # an operator returns memory of its own, and rows of an empty batch are those it was given
    return made.contiguous() if made.numel() else torch.empty_like(made)


@torch.library.custom_op("tensormoe::activate_vjp", mutates_args=())
def _activate_vjp(logits: Tensor, coefficients: Tensor, cotangent: Tensor, gate: str) -> Tensor:
    found: Tensor = activate_vjp(
        _gate(gate), logits, coefficients, cotangent, backend=direct(logits)
    )
    return found.contiguous() if found.numel() else torch.empty_like(found)


@_activate.register_fake
def _(logits: Tensor, gate: str, choice: Tensor | None = None) -> Tensor:
    return _like(logits)


@_activate_vjp.register_fake
def _(logits: Tensor, coefficients: Tensor, cotangent: Tensor, gate: str) -> Tensor:
    return _like(logits)


def _like(logits: Tensor) -> Tensor:
    wide = torch.float32 if logits.dtype.itemsize < 4 else logits.dtype
    return logits.new_empty(logits.shape, dtype=wide)


def _save(ctx: Any, inputs: tuple[Tensor, str, Tensor | None], output: Tensor) -> None:
    logits, ctx.gate, choice = inputs
    ctx.save_for_backward(logits, output, choice)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
    logits, coefficients, choice = ctx.saved_tensors
    if not torch.is_grad_enabled():
        found = _activate_vjp(logits, coefficients, cotangent, ctx.gate).to(logits.dtype)
        return found, None, None
    # a graph of the backward pass itself: operations that can be differentiated once more
    view = logits.view_as(logits)
    made = activate(_gate(ctx.gate), view, backend=BACKEND, choice=choice).coefficients
    (found,) = torch.autograd.grad(made, view, cotangent, create_graph=True)
    return found, None, None


_activate.register_autograd(_backward, setup_context=_save)
