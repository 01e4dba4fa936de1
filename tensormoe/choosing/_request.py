"""A question, checked field by field: sizes, budget, gate, call and device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

from tensormoe._validation import brief, choice, flag, positive_int, positive_ints
from tensormoe.choosing._words import (
    parse_bonds,
    parse_budget,
    parse_experts,
    parse_names,
    parse_rank,
    parse_size,
)
from tensormoe.errors import BudgetError, RankError, RequestError, SpecError, TensormoeError
from tensormoe.factorizations import resolve_factorization
from tensormoe.gates import Gate
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline, published_roofline
from tensormoe.selection import OBJECTIVES, Budget

KINDS = ("layer", "mlp", "gated", "embedding")
"""A layer, a block of two, a gated block, and a layer whose inputs are ids."""

ITEMSIZES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes per entry by dtype."""

PARTS = ("rows", "others", "fronts", "baselines", "selected")
"""Parts of a response, which can be asked for one by one; ``others`` is what other objectives
recommend."""

LIMITS = ("parameters", "flops", "memory", "time")
_CPU_DTYPES = ("float32", "float64", "")
_NO_DEVICE = PUBLISHED_ROOFLINES["cpu"]

Bonds = tuple[int | str | None, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A question, checked: see :func:`parse_request` for the values that it is made of.

    Args:
        kind: one of ``KINDS``.
        in_features: size of an input; of an embedding, the number of ids.
        hidden_features: size between two layers, of blocks and of the MLP to compare with.
        out_features: size of an output.
        experts: one size per level.
        names: of the factorizations that are compared.
        bonds: sizes that are fixed, by factorization.
        budget: upper limits on a forward call of all that is built.
        objective: of rank selection, and of the choice among factorizations.
        gate: None for a layer that is given its coefficients.
        top_k: experts per token of the routed mixtures to compare with.
        bias: whether every expert has one.
        batch: inputs of a call.
        training: whether costs are of forward and backward.
        dtype: of all arrays.
        devices: that one layer is cut over.
        device: whose times are predicted.
        selected: the factorization that is shown in full; the best one if there is none.
        rank: of that factorization, instead of what the budget buys.
        parts: of the response.
    """

    kind: str
    in_features: int
    hidden_features: int
    out_features: int
    experts: tuple[int, ...]
    names: tuple[str, ...]
    bonds: Mapping[str, Bonds]
    budget: Budget
    objective: str
    gate: Gate | None
    top_k: int
    bias: bool
    batch: int
    training: bool
    dtype: str
    devices: int
    device: Roofline
    selected: str | None
    rank: int | tuple[int, ...] | None
    parts: tuple[str, ...] = field(default=PARTS)

    @property
    def sizes(self) -> tuple[int, int, tuple[int, ...]]:
        """Sizes of a single layer."""
        return self.in_features, self.out_features, self.experts

    @property
    def is_block(self) -> bool:
        """Whether two layers are asked for."""
        return self.kind in ("mlp", "gated")

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return ITEMSIZES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """The request in plain values, nothing left to be filled in.

        :func:`parse_request` makes an equal request of it.
        """
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "experts": list(self.experts),
            "factorizations": list(self.names),
            "bonds": {name: list(bonds) for name, bonds in self.bonds.items()},
            "budget": dict(self.budget.limits),
            "gate_in_budget": self.budget.gate,
            "objective": self.objective,
            "gate": None if self.gate is None else self.gate.to_dict(),
            "top_k": self.top_k,
            "bias": self.bias,
            "batch": self.batch,
            "training": self.training,
            "dtype": self.dtype,
            "devices": self.devices,
            "device": self.device.to_dict(),
            "selected": self.selected,
            "rank": list(self.rank) if isinstance(self.rank, tuple) else self.rank,
            "parts": list(self.parts),
        }


def parse_request(values: Mapping[str, Any]) -> Request:
    """Check a request.

    Every value may be a number or the words that the command line takes: ``"16x8"`` for experts,
    ``"590k"`` or ``"flops=2G,time=1ms"`` for a budget.

    Args:
        values: ``in_features``, ``out_features`` and ``experts``, and any other field of
            :func:`request_schema`.

    Raises:
        RequestError: fields that are missing, unknown or impossible; its ``fields`` has a message
            for each of them.

    >>> request = parse_request({"in_features": 768, "out_features": 768, "experts": "16x8"})
    >>> request.experts, request.budget
    ((16, 8), Budget(parameters=590592, gate=False))
    >>> parse_request({"in_features": 0, "out_features": 768, "experts": "16x"})
    Traceback (most recent call last):
        ...
    tensormoe.errors.RequestError: in_features must be a positive integer; got 0. experts must be \
positive integers; got '' for level 1 of '16x'. Write 128, or 16x8 for two levels.
    """
    if not isinstance(values, Mapping):
        raise RequestError({"": SpecError(f"a request must be an object; got {brief(values)}.")})
    return _Reader(values).request()


class _Reader:
    """Values that are read one after another, with the errors of each."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._read: set[str] = set()
        self._errors: dict[str, TensormoeError] = {}

    def request(self) -> Request:
        """The request, if every value could be read."""
        one = self._one
        kind = one("kind", "layer", lambda it: choice(it, KINDS, "kind", SpecError), "layer")
        block, embedding = kind in ("mlp", "gated"), kind == "embedding"
        rows = one("in_features", None, lambda it: _size(it, "in_features"), 1)
        columns = one("out_features", rows, lambda it: _size(it, "out_features"), 1)
        hidden = one("hidden_features", 4 * rows, lambda it: _size(it, "hidden_features"), 1)
        experts = one("experts", None, _experts, (1,))
        bias = one("bias", not embedding, lambda it: flag(it, "bias"), False)
        top_k = one("top_k", 2, lambda it: _size(it, "top_k"), 1)
        gate = one(
            "gate", None if embedding else "entmax", lambda it: _gate(it, top_k, experts), None
        )
        for name, value in (("bias", bias), ("gate", gate)):
            if embedding and value:
                self._errors[name] = SpecError(
                    f"{name} must be left out for embeddings, which have none; got {value!r}."
                )
        batch = one("batch", 1024, lambda it: _size(it, "batch"), 1)
        training = one("training", False, lambda it: flag(it, "training"), False)
        dtype = one("dtype", "float32", lambda it: choice(it, ITEMSIZES, "dtype", SpecError), "")
        devices = one("devices", 1, lambda it: _size(it, "devices"), 1)
        usual = "cpu" if dtype in _CPU_DTYPES else "a100"
        device = one("device", usual, lambda it: _device(it, dtype or "float32"), _NO_DEVICE)
        names = one("factorizations", "", _names, ("cp",))
        bonds = one("bonds", {}, lambda it: _bonds(it, names, block), {})
        objective = one(
            "objective", "capacity", lambda it: choice(it, OBJECTIVES, "objective", BudgetError), ""
        )
        covered = one("gate_in_budget", True, lambda it: flag(it, "gate_in_budget"), True)
        like = _replaced(kind, rows, hidden, columns, bias)
        call = batch, ITEMSIZES.get(dtype, 4)
        budget = one(
            "budget", "", lambda it: _budget(it, like, call, covered, device), like["linear"]
        )
        selected = one("selected", "", lambda it: _selected(it, names), None)
        shown = selected or (names[0] if len(names) == 1 else None)
        unknown = {"factorizations", "selected"} & {*self._errors}
        rank = one("rank", "", lambda it: None if unknown else _rank(it, shown), None)
        parts = one("parts", PARTS, _parts, PARTS)
        for name in sorted({*map(str, self._values)} - self._read):
            self._errors[name] = SpecError(
                f"a request must have no fields but those of its schema; got {brief(name)}. Drop "
                "it."
            )
        if self._errors:
            raise RequestError(self._errors)
        return Request(
            kind=kind,
            in_features=rows,
            hidden_features=hidden,
            out_features=columns,
            experts=experts,
            names=names,
            bonds=bonds,
            budget=budget,
            objective=objective,
            gate=gate,
            top_k=min(top_k, prod(experts)),
            bias=bias,
            batch=batch,
            training=training,
            dtype=dtype,
            devices=devices,
            device=device,
            selected=shown if rank is not None else selected,
            rank=rank,
            parts=parts,
        )

    def _one(self, name: str, default: Any, read: Callable[[Any], T], instead: Any) -> T:
        """A value or its default; ``instead`` where it cannot be read, so that others can."""
        self._read.add(name)
        value = self._values.get(name, default)
        # a layer may be without a gate; of other fields, null is the default
        if value is None and name != "gate":
            value = default
        try:
            return read(value)
        except TensormoeError as error:
            self._errors[name] = error
            found: T = instead
            return found


def _size(value: Any, name: str) -> int:
    return parse_size(value, name) if isinstance(value, str) else positive_int(value, name)


def _experts(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return parse_experts(value)
    return positive_ints(value, "experts", "level")


def _gate(value: Any, top_k: int, experts: tuple[int, ...]) -> Gate | None:
    if value is None or value == "none":
        return None
    if isinstance(value, Mapping):
        gate = Gate.from_dict(value)
    elif isinstance(value, str):
        name = value.replace("-", "_")
        gate = Gate(name, k=min(top_k, *experts) if name in ("top_k", "relu_top_k") else None)
    else:
        gate = Gate.parse(value)
    for level, count in enumerate(experts):
        if gate.k is not None and gate.k > count:
            raise SpecError(
                f"k of a top-k gate must be at most the experts of each level; got {gate.k} for "
                f"level {level} of {count}. Lower k."
            )
    return gate


def _device(value: Any, dtype: str) -> Roofline:
    if isinstance(value, Roofline):
        return value
    if isinstance(value, Mapping):
        return Roofline.from_dict(value)
    return published_roofline(choice(value, PUBLISHED_ROOFLINES, "device", SpecError), dtype)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return parse_names(value or None)
    if not isinstance(value, (list, tuple)) or not value:
        raise SpecError(f"factorizations must be a list of names; got {brief(value)}.")
    return parse_names(",".join(map(str, value)))


def _bonds(value: Any, names: tuple[str, ...], block: bool) -> dict[str, Bonds]:
    if block and value:
        raise SpecError("bonds must be left out for blocks of two layers; got some. Drop them.")
    if isinstance(value, str):
        return parse_bonds([value] if value else [], names)
    if isinstance(value, (list, tuple)):
        return parse_bonds([str(each) for each in value], names)
    if not isinstance(value, Mapping):
        raise SpecError(
            f"bonds must be an object of lists by factorization; got {brief(value)}. Write "
            '{"tensor_ring": [4, 4, null]}.'
        )
    words = []
    for name, listed in value.items():
        if not isinstance(listed, (list, tuple)):
            raise SpecError(f"bonds of {name} must be a list; got {brief(listed)}.")
        entries = ("free" if each is None else str(each) for each in listed)
        words.append(f"{name}={','.join(entries)}")
    return parse_bonds(words, names)


def _replaced(kind: str, rows: int, hidden: int, columns: int, bias: bool) -> Mapping[str, Budget]:
    """The parameters of the layers that ``linear`` and ``mlp`` stand for; of a block, its own."""
    gated = kind == "gated"
    mlp = Budget.like_mlp(rows, hidden, columns, bias, gated=gated)
    linear = mlp if kind in ("mlp", "gated") else Budget.like_linear(rows, columns, bias)
    return {"linear": linear, "mlp": mlp}


def _budget(
    value: Any,
    like: Mapping[str, Budget],
    call: tuple[int, int],
    covered: bool,
    device: Roofline,
) -> Budget:
    """The limits; without any, the parameters of what is replaced, with the gate on top."""
    batch, itemsize = call
    if value in ("", {}):
        return replace(like["linear"], gate=False, batch=batch, itemsize=itemsize)
    if isinstance(value, Mapping):
        value = _limits(value)
    elif not isinstance(value, str):
        value = f"parameters={positive_int(value, 'budget', BudgetError)}"
    return replace(parse_budget(value, like, batch, device), gate=covered, itemsize=itemsize)


def _limits(value: Mapping[str, Any]) -> str:
    """Limits by name in words, so that they are read in one place."""
    words = []
    for name, amount in value.items():
        if name not in LIMITS:
            raise BudgetError(
                f"a budget must limit {', '.join(LIMITS)}; got {brief(name)}. Drop it."
            )
        if not isinstance(amount, str):
            if isinstance(amount, bool) or not isinstance(amount, (int, float)):
                raise BudgetError(f"{name} of a budget must be a number; got {brief(amount)}.")
            amount = f"{amount!r}s" if name == "time" else repr(amount)
        words.append(f"{name}={amount}")
    return ",".join(words)


def _selected(value: Any, names: tuple[str, ...]) -> str | None:
    return None if value == "" else choice(value, names, "selected", SpecError)


def _rank(value: Any, selected: str | None) -> int | tuple[int, ...] | None:
    if value == "":
        return None
    if selected is None:
        raise RankError(
            f"rank must come with a selected factorization; got {brief(value)}. Select one."
        )
    rank = parse_rank(value) if isinstance(value, str) else value
    if not isinstance(rank, int) or isinstance(rank, bool):
        rank = positive_ints(rank, "rank", "bond", RankError)
    else:
        rank = positive_int(rank, "rank", RankError)
    resolve_factorization(selected, rank)
    return rank


def _parts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise SpecError(f"parts must be a list; got {brief(value)}.")
    return tuple(choice(each, PARTS, "parts", SpecError) for each in value)
