"""The multi-gate mixture as a module."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe import Gate
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import GateStage, Inputs, MultiGateConfig, multi_gate_config, record_of
from tensormoe.routing import TaskRoutes
from tensormoe.selection import Budget
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import no_autocast
from tensormoe_torch._checks import check_input
from tensormoe_torch._sharded import Copied
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.mixtures._base import MixtureModule, make_experts, reset_all, reset_own

Pair = tuple[FactorizationLike, FactorizationLike]

torch.export.register_dataclass(
    TaskRoutes, serialized_type_name=f"tensormoe.routing.{TaskRoutes.__name__}"
)


class MultiGateMoE(MixtureModule[MultiGateConfig]):
    """A multi-gate mixture of experts for several tasks (MMoE; Ma et al. 2018).

    ``y_t = Σ_n g_tn(x) E_n(x)``: every expert runs once per token, and the gate of each task t
    mixes those that it reads, ``experts`` that all tasks share and ``task_experts`` of its own
    (CGC; Tang et al. 2020). Outputs of all tasks are stacked, (..., tasks, out).

    With ``groups`` of tasks there are two stages (HoME; Wang et al. 2024): the first one makes a
    representation per group and a shared one, of which the experts and gates of the second are
    made.

    Args:
        in_features: size of a token.
        hidden_features: size between the layers of an expert; None for ``kind="linear"``.
        out_features: size of an output; ``in_features`` by default.
        tasks: number of tasks, or their names.
        experts: experts that all tasks share.
        task_experts: experts of each task alone; 0 for none (MMoE).
        groups: tuples of tasks, by name or place, for a hierarchy of two stages (HoME).
        group_experts: experts of each group alone, in both stages; ``experts`` by default.
        group_features: size of what the first stage makes; ``in_features`` by default.
        kind: "mlp" (``D act(U x)``), "swiglu" (``D(act(G x) · U x)``) or "linear".
        act_layer: name of the activation; "gelu" for "mlp" and "silu" for "swiglu" by default.
        bias: whether experts have biases.
        factorization: "dense", or a value or name for both layers of the experts, or a pair, or a
            tuple of them for each stage.
        rank: bond sizes of both, with a name. Without one, a named factorization gets the rank
            whose factors have the parameters of one expert's linear layer.
        budget: parameters of all that is built instead of a rank, experts and gates: a number, or a
            ``Budget(parameters=…)``, whose ``gate=False`` leaves the gates out.
        gate: a :class:`tensormoe.Gate`, or the name of its activation, then without normalization,
            as in the papers.
        init: ``"variance"`` or ``"paper"``, of every layer.
        device: of the parameters.
        dtype: of the parameters; inputs must have it, unless autocast is on. Logits and
            coefficients are float32 at least.

    Attributes:
        experts: the experts of one stage.
        router: the :class:`TaskRouter`, the gates of all tasks; called with tokens, it gives their
            routing record.
        first: the :class:`GatedExperts` of the first of two stages, with ``experts`` and
            ``router``; ``second`` are those of the second.
        config: all of it as a frozen value.

    Raises:
        SpecError: sizes, names or options that cannot be, or groups that are no partition of tasks.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a gate that cannot be.

    >>> import torch
    >>> layer = MultiGateMoE(32, 16, 8, tasks=("click", "like"), experts=4, task_experts=2)
    >>> click, like = layer(torch.randn(5, 7, 32)).unbind(-2)
    >>> click.shape
    torch.Size([5, 7, 8])
    """

    _kind = "MultiGateMoE"
    _config_kind = MultiGateConfig

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        tasks: int | Sequence[str],
        experts: int,
        task_experts: int = 0,
        groups: Sequence[Sequence[str | int]] | None = None,
        group_experts: int | None = None,
        group_features: int | None = None,
        kind: str = "mlp",
        act_layer: str | None = None,
        bias: bool = False,
        factorization: FactorizationLike | Pair | Sequence[Pair] = "dense",
        rank: int | tuple[int, ...] | None = None,
        budget: Budget | int | None = None,
        gate: Gate | str = "softmax",
        init: str = "variance",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = multi_gate_config(
            in_features,
            hidden_features,
            out_features,
            tasks=tasks,
            experts=experts,
            task_experts=task_experts,
            groups=groups,
            group_experts=group_experts,
            group_features=group_features,
            kind=kind,
            act_layer=act_layer,
            bias=bias,
            factorization=factorization,
            rank=rank,
            budget=budget,
            gate=gate,
        )
        self._build(config, init, device, dtype)

    def _fill(self, init: str, device: Any, dtype: torch.dtype) -> None:
        for name, stage in self.config.stages.items():
            if name:
                self.add_module(name, GatedExperts(stage, init, device, dtype))
            else:
                self.experts = make_experts(stage.experts, init, device, dtype)
                self.router = TaskRouter(stage, device, dtype)

    def route(self, x: Tensor) -> TaskRoutes:
        """The routing record of tokens (..., in): the coefficients of every task.

        With two stages it runs the first, of whose outputs the gates of the second are made.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        batch_shape, rows = self._rows(x)
        _, routes = self.config.compose(rows, self._route, self._outputs, BACKEND, runs=False)
        return routes.reshaped(batch_shape, BACKEND)

    def forward(self, x: Tensor, routes: TaskRoutes | None = None) -> Tensor:
        """Run the mixture: (..., in) → (..., tasks, out).

        Args:
            x: (..., in), in the mixture's dtype; under autocast, in any dtype that it narrows.
            routes: the record that :meth:`route` returned for these tokens; made anew otherwise.

        Raises:
            BackendError: not a tensor, or one on another device.
            ShapeError: input or record do not fit.
        """
        batch_shape, rows = self._rows(x)
        route = self._route
        if routes is not None:
            self.config.check_routes(routes, batch_shape)
            merged = routes.reshaped(rows.shape[:-1], BACKEND)

            def route(stage: str, inputs: Inputs) -> TaskRoutes:
                found: TaskRoutes = record_of(merged, stage)
                return found

        y, _ = self.config.compose(rows, route, self._outputs, BACKEND)
        return y.reshape(self.config.output_shape(batch_shape))

    def _route(self, stage: str, inputs: Inputs) -> TaskRoutes:
        routes: TaskRoutes = self._stage(stage).router(inputs)
        return routes

    def _outputs(self, stage: str, rows: Tensor) -> Tensor:
        return self._stage(stage).experts.every(rows)

    def _stage(self, name: str) -> Any:
        return self.get_submodule(name) if name else self


class GatedExperts(nn.Module):
    """One of two stages: experts, and the gates that mix them.

    Args:
        stage: the stage.
        init: of every layer.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        experts: the experts.
        router: the gates.
    """

    experts: FactorizedExperts
    router: TaskRouter

    def __init__(self, stage: GateStage, init: str, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts = make_experts(stage.experts, init, device, dtype)
        self.router = TaskRouter(stage, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for child in self.children():
            reset_all(child)


class TaskRouter(Copied):
    """Gates of all tasks, or of all groups: (..., in) to the routing record.

    Its parameters are ``projection``, of all gates side by side, and, if the gate has one,
    ``bias``. Logits and coefficients are float32 at least. A forward hook on this module sees the
    record of every call.

    Args:
        stage: the stage.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        stage: the stage.
    """

    def __init__(self, stage: GateStage, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.stage = stage
        self._own = {name.removeprefix("router."): array for name, array in stage.own.items()}
        for name, array in self._own.items():
            empty = torch.empty(array.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: zeros, or as ``nn.Linear`` for a gate that keeps k experts."""
        reset_own(self, self._own)

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        return f"{self.stage.features}, {self.stage.widths}, {self.stage.gate!r}"

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> TaskRoutes:
        """The coefficients of all gates.

        Args:
            inputs: (..., in), in the mixture's dtype; rows for each gate in a second stage.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        held = {f"router.{name}": self._whole(getattr(self, name)) for name in self._own}
        weight = held["router.projection"]
        if isinstance(inputs, tuple):
            with no_autocast(weight.device.type):
                return self.stage.route(held, inputs, BACKEND)
        inputs = self._whole(inputs)
        batch_shape = check_input(inputs, self.stage.features, weight, narrower=True)
        rows = inputs.reshape(prod(batch_shape), self.stage.features)
        with no_autocast(weight.device.type):
            routes = self.stage.route(held, rows, BACKEND)
        return routes if len(batch_shape) == 1 else routes.reshaped(batch_shape, BACKEND)
