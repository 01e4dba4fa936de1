"""A layer as a frozen value: sizes, how 𝒲 is stored, bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from tensormoe._format import format_experts, format_parameters
from tensormoe._validation import flag, non_negative_int, positive_int, positive_ints
from tensormoe.errors import PlanError, RankError, SpecError
from tensormoe.factorizations import (
    FACTORIZATIONS,
    INPUT,
    Factorization,
    FactorizationLike,
    Initializer,
    Leg,
    Network,
    Slice,
    factorization_class,
    rank_pattern,
    resized,
    resolve_factorization,
)

if TYPE_CHECKING:
    from tensormoe._drawing import Drawing
    from tensormoe.gates import Gate
    from tensormoe.planning import Cost, Plan

MAX_LEVELS = 32
"""Levels of experts that a layer may have; arrays of some libraries have 64 axes at most."""


@dataclass(frozen=True, init=False)
class LayerSpec:
    """A mixture of N linear experts before any array exists.

    Args:
        in_features: I, the size of an input.
        out_features: O, the size of an output.
        experts: N, or one size per level of hierarchy, (N₁, …, N_E), of 32 levels at most; stored
            as a tuple.
        factorization: a value such as ``CP(rank=64)``, or a name or class that needs no rank.
        bias: whether every expert has a bias, stored as one small array over the bonds.

    Raises:
        SpecError: a size is not a positive integer, or a name is unknown.
        RankError: the rank does not fit the number of levels.

    >>> from tensormoe import CP
    >>> spec = LayerSpec(768, 768, experts=(16, 8), factorization=CP(rank=256))
    >>> spec.num_experts, spec.num_parameters, spec.expert_rank, spec.expert_span
    (128, 399616, 256, 128)
    """

    in_features: int
    out_features: int
    experts: tuple[int, ...]
    factorization: Factorization
    bias: bool = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | tuple[int, ...],
        factorization: FactorizationLike,
        bias: bool = True,
    ) -> None:
        flag(bias, "bias")
        put = object.__setattr__
        put(self, "in_features", positive_int(in_features, "in_features"))
        put(self, "out_features", positive_int(out_features, "out_features"))
        put(self, "experts", positive_ints(experts, "experts", "level"))
        if self.levels > MAX_LEVELS:
            raise SpecError(
                f"experts must have at most {MAX_LEVELS} levels; got {self.levels}. Give fewer and "
                "larger levels."
            )
        put(self, "factorization", resolve_factorization(factorization))
        put(self, "bias", bias)
        _check_bonds(self.factorization, self.levels)
        fields = (self.in_features, self.out_features, self.experts, self.factorization, self.bias)
        put(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        # computed once: specs key the plan cache, which is read on every call of a layer
        cached: int = self._hash  # type: ignore[attr-defined]
        return cached

    def __reduce__(self) -> tuple[type[LayerSpec], tuple[Any, ...]]:
        # rebuilt rather than restored: hashes of strings differ from one process to the next
        fields = (self.in_features, self.out_features, self.experts, self.factorization, self.bias)
        return LayerSpec, fields

    @cached_property
    def levels(self) -> int:
        """E, the number of levels of the expert hierarchy."""
        return len(self.experts)

    @cached_property
    def num_experts(self) -> int:
        """N, the number of experts: the product of the levels."""
        return prod(self.experts)

    @cached_property
    def network(self) -> Network:
        """The tensor network that stores 𝒲 and the bias."""
        return self.factorization.network(
            self.experts, self.in_features, self.out_features, self.bias
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every factor by name, the bias included."""
        return self.network.shapes

    @property
    def num_parameters(self) -> int:
        """Stored entries of the factors and the bias; the gate is not part of the spec."""
        return self.network.num_parameters

    @property
    def expert_rank(self) -> int:
        """The rank that a single expert's matrix (in, out) has for almost all factor values."""
        return self.network.expert_rank

    @property
    def expert_span(self) -> int:
        """The dimension of the space that all experts' matrices span, for almost all factors.

        It is the rank of the unfolding experts × (in·out): how different experts can be.
        """
        return self.network.expert_span

    def initializers(self, init: str = "variance") -> Mapping[str, Initializer]:
        """Initial values of each factor, the bias included, as recipes.

        Args:
            init: ``"variance"`` gives every entry of 𝒲 and of the experts' biases the variance
                1/(3·in) of a ``torch.nn.Linear`` weight, about half of it shared by all experts;
                ``"paper"`` is the scheme of Oldfield et al. 2024, appendix F.2.

        Raises:
            SpecError: an unknown scheme.
        """
        starts = dict(
            self.factorization.initializers(self.experts, self.in_features, self.out_features, init)
        )
        for term in self.network.terms:
            if term.bias is None:
                continue
            # a bias is one more row of the input mode, and starts like the others
            carrier = term.input_factor
            start, place = starts[carrier.name], carrier.legs.index(INPUT)
            axes = tuple(axis - (axis > place) for axis in start.expert_axes)
            starts[term.bias.name] = replace(start, expert_axes=axes)
        return starts

    def plan(
        self,
        batch: int,
        *,
        top_k: int | None = None,
        indexed_input: bool = False,
        prepared: bool = False,
        memory_limit: int | None = None,
    ) -> Plan:
        """Plan of the layer for ``batch`` inputs: a look-up once it has been planned.

        Args:
            batch: number of inputs, all leading axes multiplied.
            top_k: experts kept per level, if coefficients come as values and indices.
            indexed_input: whether inputs are integer ids (an embedding).
            prepared: plan for weight-only steps that have run beforehand.
            memory_limit: bytes a call may take beyond input and parameters; the batch is cut into
                chunks that keep to it.

        Raises:
            PlanError: the options do not fit the layer, or no chunk keeps to the limit.
        """
        # here, as importing it takes as long as all the rest; `from` would look names up each time
        import tensormoe.planning as planning

        # checked here, since the cache below takes 1.0 and True for 1
        batch = non_negative_int(batch, "batch", PlanError)
        flag(prepared, "prepared", PlanError)
        flag(indexed_input, "indexed_input", PlanError)
        if memory_limit is not None:
            memory_limit = positive_int(memory_limit, "memory_limit", PlanError)
        routing = planning.Routing(top_k, indexed_input)
        return planning.plan_layer(
            self.network,
            batch,
            routing,
            prepared=prepared,
            memory_limit=memory_limit,
            title=self._title,
        )

    @cached_property
    def _title(self) -> str:
        # made once: a plan is a look-up
        return repr(self.factorization)

    def cost(
        self,
        batch: int,
        *,
        gate: Gate | str | None = None,
        training: bool = False,
        itemsize: int = 4,
    ) -> Cost:
        """Cost of the layer for ``batch`` inputs; see :class:`tensormoe.planning.Cost`.

        Args:
            batch: number of inputs, all leading axes multiplied.
            gate: included in the count if given.
            training: forward and backward with all gradients, instead of forward alone.
            itemsize: bytes per entry: 4 for float32.

        >>> from tensormoe import CP
        >>> spec = LayerSpec(768, 768, experts=512, factorization=CP(rank=512), bias=False)
        >>> spec.cost(1).matmul_flops == 2 * 512 * (512 + 768 + 768)
        True
        """
        return self.plan(batch).cost(gate, training=training, itemsize=itemsize)

    def shard(self, leg: Leg, devices: int) -> LayerSpec:
        """One device's part of the layer, cut along a leg: the same layer with a smaller leg.

        Factors that have the leg are slices, the others whole. The part's result is a slice for the
        output leg ``"o"``, and for all others a term of a sum over the devices. Its plan and cost
        are those of one device, communication included; see
        :func:`tensormoe.planning.compare_legs` for the best leg.

        Args:
            leg: one of ``network.shardable_legs``: a bond that every term has, ``"i"``, ``"o"``,
                or the experts of a level, ``"n0"``.
            devices: P, the number of slices; it must divide the leg's size.

        Raises:
            SpecError: no such leg, one that does not divide, or a layer that is a part already.

        >>> from tensormoe import CP
        >>> part = LayerSpec(768, 768, experts=512, factorization=CP(rank=256)).shard("r", 8)
        >>> part.shapes["output"], part.cost(1024).collectives[0].bytes
        ((768, 32), 3145728)
        """
        self.network.slice(leg, devices)  # refuses what cannot be cut
        experts, in_features, out_features = resized(
            self.experts, self.in_features, self.out_features, leg, lambda size: size // devices
        )
        part = Slice(self.factorization, leg, devices)
        return LayerSpec(in_features, out_features, experts, part, self.bias)

    def draw(self) -> Drawing:
        """A picture of the network that stores 𝒲, as SVG; notebooks show it.

        >>> from tensormoe import TensorRing
        >>> LayerSpec(768, 768, experts=512, factorization=TensorRing((4, 4, 94))).draw()
        Drawing('TensorRing(rank=(4, 4, 94))', ...)
        """
        from tensormoe._drawing import draw_network

        sizes = (
            f"{format_experts(self.experts)} experts of {self.in_features} → {self.out_features}"
        )
        entries = f"{format_parameters(self.num_parameters)} parameters"
        return draw_network(self.network, repr(self.factorization), f"{sizes}; {entries}")

    def _repr_html_(self) -> str:
        from tensormoe._html import spec_html

        return spec_html(self)

    def to_dict(self) -> dict[str, Any]:
        """The spec in plain values, as checkpoints store it.

        Raises:
            SpecError: the factorization's name and rank do not tell it: the name is another
                class's, or it has options besides; or the layer is one device's part.
        """
        factorization = self.factorization
        if isinstance(factorization, Slice):
            raise SpecError(
                f"a layer must be whole to be saved; got one device's part, cut along leg "
                f"{factorization.leg!r} over {factorization.devices}. Save the whole layer."
            )
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "experts": list(self.experts),
            "factorization": factorization.name,
            "rank": _saved_rank(factorization),
            "bias": self.bias,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerSpec:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        expected = {"in_features", "out_features", "experts", "factorization", "rank", "bias"}
        if not isinstance(values, Mapping) or set(values) != expected:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise SpecError(f"a layer spec must have exactly {sorted(expected)}; got {found!r}.")
        rank = values["rank"]
        factorization = resolve_factorization(
            values["factorization"], tuple(rank) if isinstance(rank, list) else rank
        )
        return cls(
            values["in_features"],
            values["out_features"],
            tuple(values["experts"]) if isinstance(values["experts"], list) else values["experts"],
            factorization,
            values["bias"],
        )


def _check_bonds(factorization: Factorization, levels: int) -> None:
    """Refuse a rank of the wrong length, or with values that the class did not check."""
    bonds = factorization.bonds(levels)
    pattern = rank_pattern(factorization, levels)
    if bonds:
        positive_ints(bonds, "rank", "bond", RankError)
    if len(bonds) != len(pattern):
        raise RankError(
            f"rank must have {len(pattern)} bonds for {factorization.name} at {levels} expert "
            f"level(s); got {len(bonds)}: {factorization.rank!r}."
        )


def _saved_rank(factorization: Factorization) -> int | list[int] | None:
    """The rank in plain values, if name and rank determine the factorization."""
    given, name = factorization.rank, factorization.name
    rank = None
    if given is not None:
        sizes = positive_ints(given, "rank", "bond", RankError)
        rank = list(sizes) if isinstance(given, Iterable) else sizes[0]
    kind: type[Factorization] = type(factorization)
    if name in FACTORIZATIONS and factorization_class(name) is not kind:
        raise SpecError(
            f"a name must stand for one factorization; got {name!r} for "
            f"{kind.__module__}.{kind.__qualname__}, and it is another class's. Give the class "
            "another name, and register it."
        )
    again = resolve_factorization(kind, tuple(rank) if isinstance(rank, list) else rank)
    if again != factorization:
        raise SpecError(
            f"a factorization must be told by its name and rank to be saved; got "
            f"{factorization!r}, which they make {again!r}. Make a class of its own of every "
            "other option."
        )
    return rank
