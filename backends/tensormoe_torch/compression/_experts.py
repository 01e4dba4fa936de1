"""Experts in factors behind a router of other code: what takes the place of dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import index as as_index
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional import CutAxis, EachExpert
from tensormoe.gates import OneExpert
from tensormoe.mixtures import run_expert, run_sent, send
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import no_autocast
from tensormoe_torch._checks import check_ids, check_input
from tensormoe_torch._factors import narrowed
from tensormoe_torch._layer import MuMoE
from tensormoe_torch._operator import direct
from tensormoe_torch._sharded import Loads
from tensormoe_torch._tracing import is_traced
from tensormoe_torch.compression._calls import check_choices, is_plain

if TYPE_CHECKING:
    from tensormoe_torch._exchange import Exchange
    from tensormoe_torch._parts import Boundary

PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Roles of an expert's layers: gate and up projection are one layer or two."""

Activation = Callable[[Tensor], Tensor]
"""The activation between the projections: a module without parameters, or a function."""


class FactorizedExperts(Loads):
    """Experts of a sparse model, every projection one tensor network; the router is the model's.

    ``y = Σ_k w_k · (act(x G_n) · (x U_n)) D_n`` over the k experts n that the router chose, with
    all G_n stored as factors, and so all U_n and all D_n. Every choice is a row of its own, since
    what lies between the projections is not linear: of the factors, its expert's entries are taken,
    and no expert's matrix is built.

    It stands where a model calls its experts together, ``experts(x, indices, weights)``, or
    ``experts(x)`` with a block of rows for each, and where it calls them one by one,
    ``experts[n](x)``.

    Args:
        layers: :class:`MuMoE` layers without gates by role: ``"up_proj"``, ``"down_proj"`` and, of
            gated experts, ``"gate_proj"``; or ``"gate_up_proj"``, which makes both at once, and
            ``"down_proj"``.
        act: the activation: a module without parameters, or a function; behind ``"gate_up_proj"``
            the function of both, (..., 2 · hidden) → (..., hidden).
        biases: (experts, out) by role, added to a projection's outputs, for layers without a bias
            of their own.
        groups: where experts were merged, (N,) the number among the layers' experts behind each of
            the router's N; two choices of one expert count with the sum of their weights.

    Attributes:
        projections: the layers by role; their parameters are ``projections.<role>.factors.<name>``.
        act_fn: the activation.
        groups: as given, a buffer; None where every expert of the router has its own.
        boundary: of the experts, where they are cut or spread over devices; None elsewhere.
        shares_work: whether what a token's experts have in common may be multiplied once for all of
            them; true but for experts of this library's mixtures, which every framework runs by
            rows and whose costs count these.

    >>> layers = {
    ...     role: MuMoE(i, o, experts=4, rank=2, bias=False, gate=None)
    ...     for role, i, o in [("gate_proj", 6, 8), ("up_proj", 6, 8), ("down_proj", 8, 6)]
    ... }
    >>> experts = FactorizedExperts(layers, nn.functional.silu)
    >>> chosen, weights = torch.tensor([[0, 3], [2, 1], [3, 1]]), torch.rand(3, 2)
    >>> experts(torch.randn(3, 6), chosen, weights).shape, experts[3](torch.randn(5, 6)).shape
    (torch.Size([3, 6]), torch.Size([5, 6]))
    """

    def __init__(
        self,
        layers: Mapping[str, MuMoE],
        act: Activation,
        biases: Mapping[str, Tensor] | None = None,
        groups: Tensor | None = None,
    ) -> None:
        super().__init__()
        # in a folder of their own: whatever transformers finds at `experts.down_proj`, it splits
        # and renames as if it were a stack of matrices when it saves a model
        self.projections = nn.ModuleDict(
            {role: layers[role] for role in PROJECTIONS if role in layers}
        )
        for role, bias in (biases or {}).items():
            self.register_parameter(f"{role}_bias", nn.Parameter(bias))
        self.act_fn = act
        self.boundary: Boundary | None = None
        self.shares_work = True
        self.cut_biases: Mapping[str, CutAxis | None] = {}
        self.groups: Tensor | None
        # kept in state dicts, as other groups would fit the same factors
        self.register_buffer("groups", groups)
        self._count: int = layers["down_proj"].spec.experts[0]
        self.plan_ahead()

    def plan_ahead(self) -> None:
        """Plan the layers; to be called when projections are replaced or cut."""
        inside = (each for each in self.projections.modules() if isinstance(each, MuMoE))
        self._layers = tuple(
            each.config if each._part is None else each._part.config for each in inside
        )
        for each in self._layers:
            # no compiler has to follow the planner
            _ = each.sent_stages

    @property
    def num_experts(self) -> int:
        """N, the experts that the router chooses from."""
        if self.groups is not None:
            return int(self.groups.shape[0])
        return self._count

    @property
    def gate_proj(self) -> MuMoE | None:
        """The layer (in → hidden) whose outputs the activation takes; None without one."""
        return self._layer("gate_proj")

    @property
    def up_proj(self) -> MuMoE | None:
        """The layer (in → hidden) whose outputs are gated; None where one makes both."""
        return self._layer("up_proj")

    @property
    def gate_up_proj(self) -> MuMoE | None:
        """The layer (in → 2 · hidden) that makes gates and what they gate; None where two do."""
        return self._layer("gate_up_proj")

    @property
    def down_proj(self) -> MuMoE:
        """The layer (hidden → out)."""
        layer: MuMoE = self.projections["down_proj"]  # type: ignore[assignment]
        return layer

    @property
    def bits(self) -> int | None:
        """8 or 4 where the factors of all layers are rounded to so many bits; None elsewhere."""
        found = {each.bits for each in self._own_layers()}
        return found.pop() if len(found) == 1 else None

    def quantize(self, bits: int) -> Self:
        """Round the layers' factors to 8 or 4 bits, in place, as :meth:`MuMoE.quantize`.

        Returns:
            The experts themselves.

        Raises:
            SpecError: other bits, or factors that are rounded, computed or cut over devices.
            ShapeError: factors that are not finite.
        """
        for each in self._own_layers():
            each.quantize(bits)
        return self

    def dequantize(self) -> Self:
        """Turn rounded factors into parameters of their values, in place, to be trained or edited.

        Returns:
            The experts themselves; as they were where no factors are rounded.
        """
        for each in self._own_layers():
            each.dequantize()
        return self

    def _own_layers(self) -> list[MuMoE]:
        """The layers of factors, also those in adapters, without the adapters' own."""
        held: list[Any] = [getattr(each, "base", each) for each in self.projections.children()]
        return [each for each in held if isinstance(each, MuMoE)]

    def _layer(self, role: str) -> MuMoE | None:
        found: MuMoE | None = dict(self.projections.items()).get(role)  # type: ignore[assignment]
        return found

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """The experts' outputs, weighted by the router.

        Without indices and weights every expert gets a block of rows, as Llama 4 calls its experts:
        the first one the first ``rows``, and so on, each row with a weight of 1.

        Where experts are spread over devices, every process calls them, with its own tokens.

        Args:
            hidden_states: (tokens, in), in the layers' dtype; (N · rows, in) without indices.
            top_k_index: (tokens, k) numbers of the experts that the router chose.
            top_k_weights: (tokens, k) their weights, in any floating-point dtype.

        Returns:
            (tokens, out), or (N · rows, out), in the dtype of the input.

        Raises:
            ShapeError: indices or weights that do not fit the input; rows that are no equal blocks.
        """
        if top_k_index is None or top_k_weights is None:
            if top_k_index is not top_k_weights:
                raise ShapeError(
                    "top_k_index and top_k_weights must be given both, or neither; got one of "
                    "them. Give what the router gives."
                )
            return self._blocks(hidden_states)
        batch_shape, k = check_choices(hidden_states, top_k_index, top_k_weights)
        if self._shares_work(hidden_states, top_k_weights):
            return self._sent(hidden_states, top_k_index, top_k_weights)
        rows, weights = self._entered(hidden_states), self._entered(top_k_weights)
        index = self._grouped(top_k_index.reshape(-1, k))
        exchange = self._exchange
        made = send(
            self._run if exchange is None else partial(self._exchanged, exchange),
            rows.reshape(-1, rows.shape[-1]),
            index,
            weights.reshape(-1, k),
            self._count,
            BACKEND,
            sort=exchange is not None or self._sorts(rows, index.numel()),
        )
        return self._left(made.reshape(*batch_shape, made.shape[-1]), hidden_states)

    def _shares_work(self, *given: Tensor) -> bool:
        """Whether what a token's experts have in common can be multiplied once for all of them.

        That goes around the calls of layers, so that nothing may hang on them; and gradients of
        eager calls are those of a layer.
        """
        layers = [*self.projections.values()]
        if (
            not self.shares_work
            or self.boundary is not None
            or len(layers) == 1
            or not all(map(is_plain, layers))
        ):
            return False
        if is_traced(given[0]) or not torch.is_grad_enabled():
            return True
        return not any(each.requires_grad for each in (*given, *self.parameters()))

    def _sent(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The experts' outputs, with what they share multiplied once per token."""
        layers: dict[str, MuMoE] = dict(self.projections.items())  # type: ignore[arg-type]
        for role in layers:
            if role != "down_proj":
                check_input(x, layers[role].in_features, layers[role]._weight)
        lead, k = x.shape[:-1], index.shape[-1]
        index = check_ids(self._grouped(index), self._count, layers["down_proj"]._weight)
        narrow = {role: narrowed(each.factors.by_name()) for role, each in layers.items()}
        dtype = narrow["down_proj"][0]
        biases = {role: self._bias(role) for role in layers}
        with no_autocast(x.device.type):
            made: Tensor = run_sent(
                {role: each.config for role, each in layers.items()},
                {role: parameters for role, (_, parameters) in narrow.items()},
                self.act_fn,
                x.reshape(-1, x.shape[-1]).to(dtype),
                index.reshape(-1, k),
                weights.reshape(-1, k),
                self._count,
                BACKEND if is_traced(x) or torch.is_grad_enabled() else direct(x),
                biases={role: bias.to(dtype) for role, bias in biases.items() if bias is not None},
                sort=self._sorts(x, index.numel()),
                any_batch=torch.compiler.is_exporting(),
            )
        return made.reshape(*lead, made.shape[-1])

    def _blocks(self, hidden_states: Tensor) -> Tensor:
        """Outputs (N · rows, out) for an equal block of rows (N · rows, in) per expert."""
        count = self.num_experts
        if hidden_states.ndim != 2 or hidden_states.shape[0] % count:
            raise ShapeError(
                f"without indices, hidden_states must have shape ({count} · rows, in), a block per "
                f"expert; got {tuple(hidden_states.shape)}. Give top_k_index and top_k_weights."
            )
        rows = hidden_states.shape[0] // count
        if self.groups is None and self._exchange is None:
            # sizes as they are: an empty array has no size that could be left open
            made = self.every(hidden_states.reshape(count, rows, hidden_states.shape[1]))
            return made.reshape(count * rows, made.shape[-1])
        index = torch.arange(count, device=hidden_states.device).repeat_interleave(rows)[:, None]
        return self(hidden_states, index, torch.ones_like(hidden_states[:, :1]))

    def routed(self, x: Tensor, index: Tensor) -> Tensor:
        """The output of one expert per row.

        Args:
            x: (..., in).
            index: (...,) the number of each row's expert, as the router has it.

        Returns:
            (..., out).
        """
        return self._called(x, OneExpert(self._grouped(index)))

    def _grouped(self, index: Tensor) -> Tensor:
        """Numbers among the layers' experts, from the router's."""
        return index if self.groups is None else self.groups[index]

    def sized(self, x: Tensor, given: OneExpert) -> Tensor:
        """The output (rows, out) of one expert per row, for rows (rows, in) that were sent here."""
        return self._called(x, given)

    def every(self, x: Tensor) -> Tensor:
        """The outputs (N, rows, out) of all experts, for rows (rows, in) or (N, rows, in)."""
        return self._called(x, EachExpert())

    def everywhere(self, x: Tensor) -> Tensor:
        """The output (..., out) of the only expert that there is, for rows (..., in)."""
        rows = self._entered(x)
        ones = torch.ones_like(rows[..., :1].detach(), dtype=self.down_proj.dtype)
        return self._left(self._run(rows, ones), x)

    def project(self, role: str, x: Tensor, given: Tensor | OneExpert | EachExpert) -> Tensor:
        """The output of one projection; between them, hidden features may be a device's own.

        Args:
            role: of the projection.
            x: its rows.
            given: their experts.
        """
        first = role != "down_proj" or len(self.projections) == 1
        rows = self._entered(x) if first else x
        made = self._project(role, rows, given)
        return self._left(made, x) if role == "down_proj" else made

    def _project(self, role: str, x: Tensor, given: Tensor | OneExpert | EachExpert) -> Tensor:
        found: Tensor = self.projections[role](x, given)
        bias = self._bias(role)
        if bias is None:
            return found
        if isinstance(given, EachExpert):
            return found + bias[:, None]
        return found + (bias[given.indices] if isinstance(given, OneExpert) else bias[0])

    def _bias(self, role: str) -> Tensor | None:
        name = f"{role}_bias"
        bias: Tensor | None = self._parameters.get(name)
        if bias is None or self.boundary is None:
            return bias
        axis = self.cut_biases.get(name)
        bias = self.boundary.parameter(bias, axis)
        # where outputs are summed over the devices, each adds its share
        shared = role == "down_proj" and axis is None
        return bias / self.boundary.devices if shared else bias

    def _run(self, x: Tensor, given: Tensor | OneExpert | EachExpert) -> Tensor:
        def project(role: str, rows: Tensor) -> Tensor:
            return self._project(role, rows, given)

        made: Tensor = run_expert(dict(self.projections.items()), project, self.act_fn, x)
        return made

    @property
    def _exchange(self) -> Exchange | None:
        """The exchange of rows with the devices of their experts, where these are spread."""
        boundary = self.boundary
        if boundary is None or not boundary.apart:
            return None
        from tensormoe_torch._exchange import Exchange

        assert isinstance(boundary, Exchange)
        return boundary

    def _exchanged(self, exchange: Exchange, rows: Tensor, given: OneExpert) -> Tensor:
        for role, layer in self.projections.items():
            # another module would take a device's numbers of experts for those of all
            if not isinstance(layer, MuMoE) or layer._part is None:
                raise SpecError(
                    "experts that are spread over devices must have the layers that were spread; "
                    f"got a {type(layer).__name__} for {role!r}. Take adapters off first."
                )
        made: Tensor = exchange.run(
            self._run, rows, given, lambda arrived: self._sorts(arrived, len(arrived))
        )
        return made

    def _called(self, x: Tensor, given: OneExpert | EachExpert) -> Tensor:
        return self._left(self._run(self._entered(x), given), x)

    def _entered(self, array: Tensor) -> Tensor:
        """An input or weights, for use in a device's part of the experts."""
        return array if self.boundary is None else self.boundary.enter(array)

    def _left(self, made: Tensor, like: Tensor) -> Tensor:
        """Outputs of all devices' parts."""
        if self.boundary is None:
            return made
        return self.boundary.leave(made, like, -1 if self.down_proj._makes_slices else None)

    def _sorts(self, x: Tensor, rows: int) -> bool:
        """Whether to sort rows by expert."""
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        # exported models stay with operations that every runtime knows, and transformations with
        # those that they know how to map
        if is_traced(x) and not (compiled and type(x) is Tensor):
            return False
        return any(layer.sorts(rows) for layer in self._layers)

    def __len__(self) -> int:
        """N, as a list of experts has it."""
        return self.num_experts

    def __getitem__(self, place: int) -> _Expert:
        """One expert, to be called with rows (..., in).

        Raises:
            IndexError: no such expert.
        """
        place = as_index(place)
        if not -self.num_experts <= place < self.num_experts:
            raise IndexError(f"expert must be in [0, {self.num_experts}); got {place}.")
        return _Expert(self, place % self.num_experts)

    def __iter__(self) -> Iterator[_Expert]:
        """Every expert in turn."""
        return (self[index] for index in range(self.num_experts))

    def extra_repr(self) -> str:
        """The part of ``repr`` besides the layers."""
        named = "" if isinstance(self.act_fn, nn.Module) else f", act_fn={_name(self.act_fn)}"
        merged = "" if self.groups is None else f", groups={self._count}"
        return f"num_experts={self.num_experts}{merged}{named}"


class _Expert:
    """One of the experts, called as its module was."""

    def __init__(self, experts: FactorizedExperts, place: int) -> None:
        self._experts = experts
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        index = torch.full(x.shape[:-1], self._place, device=x.device, dtype=torch.long)
        return self._experts.routed(x, index)

    __call__ = forward


def _name(function: Activation) -> str:
    return getattr(function, "__name__", type(function).__name__)
