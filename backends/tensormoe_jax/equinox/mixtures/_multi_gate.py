"""The multi-gate mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from jax import Array

from tensormoe import Gate
from tensormoe.factorizations import FactorizationLike
from tensormoe.mixtures import MixtureConfig, MultiGateConfig, multi_gate_config
from tensormoe.selection import Budget
from tensormoe_jax.equinox.mixtures._base import MixtureModule

Pair = tuple[FactorizationLike, FactorizationLike]


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
        dtype: of the parameters; inputs must have it. Logits and coefficients are float32 at least.
        router_dtype: of the gates' parameters: ``dtype`` for None, or float32 beside factors of
            16 bits.
        key: of ``jax.random``.

    Raises:
        SpecError: sizes, names or options that cannot be, or groups that are no partition of tasks.
        RankError: a rank that does not fit the factorization, or both a rank and a budget.
        BudgetError: not a number of parameters, or too few; says how many are needed.
        GateError: a gate that cannot be.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> key = jax.random.key(0)
    >>> layer = MultiGateMoE(32, 16, 8, tasks=3, experts=4, task_experts=2, key=key)
    >>> eqx.filter_jit(layer)(jnp.ones((5, 32))).shape
    (5, 3, 8)
    """

    _kind: ClassVar[str] = "MultiGateMoE"
    _config_kind: ClassVar[type[MixtureConfig]] = MultiGateConfig

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
        dtype: Any = None,
        router_dtype: Any = None,
        key: Array,
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
        self._start(config, init, dtype, router_dtype, key)
