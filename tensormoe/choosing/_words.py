"""Words as values: sizes, experts, ranks, bonds and budgets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite

from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe.factorizations import FACTORIZATIONS, factorization_class
from tensormoe.planning import Roofline
from tensormoe.selection import Budget

_MOST_DIGITS = 15

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = {
    **_DECIMAL,
    "b": 1,
    **{f"{prefix}b": size for prefix, size in _DECIMAL.items() if prefix},
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}

_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "parameters": ({**_DECIMAL}, "590592, 590.6k or 1.2M"),
    "flops": ({**_DECIMAL}, "2G"),
    "memory": ({**_BYTES}, "64MiB"),
    "time": (_SECONDS, "2ms or 300us"),
}
_QUANTITY = re.compile(
    r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?\s*([a-zµμ]*)", re.I
)


def parse_size(text: str, name: str) -> int:
    """A positive integer.

    >>> parse_size("768", "in_features")
    768
    """
    size = _whole(text)
    if size is None:
        raise SpecError(f"{name} must be a positive integer; got {text!r}. Write digits: 768.")
    return size


def parse_experts(text: str) -> tuple[int, ...]:
    """One size per level.

    >>> parse_experts("128"), parse_experts("16x8")
    ((128,), (16, 8))
    """
    sizes = []
    for level, part in enumerate(re.split("[x×,]", text.lower())):
        size = _whole(part)
        if size is None:
            raise SpecError(
                f"experts must be positive integers; got {part!r} for level {level} of {text!r}. "
                "Write 128, or 16x8 for two levels."
            )
        sizes.append(size)
    return tuple(sizes)


def parse_rank(text: str | None) -> int | tuple[int, ...] | None:
    """One size for all bonds, or one per bond.

    >>> parse_rank("64"), parse_rank("4,4,97")
    (64, (4, 4, 97))
    """
    if text is None:
        return None
    sizes = []
    for index, part in enumerate(text.split(",")):
        size = _whole(part)
        if size is None:
            raise RankError(
                f"rank must be positive integers; got {part!r} for bond {index}. Write 64, or "
                "4,4,97 for one size per bond."
            )
        sizes.append(size)
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def parse_names(text: str | None) -> tuple[str, ...]:
    """Names of factorizations; all that are registered by default."""
    if text is None:
        return tuple(FACTORIZATIONS)
    names = tuple(dict.fromkeys(text.replace("-", "_").split(",")))
    for name in names:
        factorization_class(name)
    return names


def parse_bonds(
    texts: list[str], names: tuple[str, ...]
) -> dict[str, tuple[int | str | None, ...]]:
    """Fixed and free bonds by factorization.

    A bare list belongs to the only factorization that is asked for, or to the tensor ring.

    >>> parse_bonds(["4,4,free"], ("cp", "tensor_ring"))
    {'tensor_ring': (4, 4, None)}
    """
    found: dict[str, tuple[int | str | None, ...]] = {}
    for text in texts:
        name, equals, listed = text.rpartition("=")
        if not equals:
            name = names[0] if len(names) == 1 else "tensor_ring"
        name = name.replace("-", "_")
        if name not in names:
            raise SpecError(
                f"--bonds must be for one of {', '.join(names)}; got {name!r}. Write "
                "--bonds tensor_ring=4,4,free."
            )
        if name in found:
            raise SpecError(f"--bonds must be given once for {name}; got it twice. Drop one.")
        bonds: list[int | str | None] = []
        for index, part in enumerate(listed.split(",")):
            if part in ("free", "*"):
                bonds.append(None)
            elif (size := _whole(part)) is not None:
                bonds.append(size)
            elif part.isidentifier():
                bonds.append(part)
            else:
                raise RankError(
                    f"bonds must be positive integers, 'free' or letters; got {part!r} for bond "
                    f"{index}. Write --bonds 4,4,free."
                )
        found[name] = tuple(bonds)
    return found


def parse_bytes(text: str | None, name: str) -> int | None:
    """A number of bytes.

    >>> parse_bytes("64MiB", "--memory-limit")
    67108864
    """
    if text is None:
        return None
    units, example = _UNITS["memory"]
    return round(_quantity(text, name, units, example))


def parse_parameters(text: str, name: str) -> int:
    """A number of parameters.

    >>> parse_parameters("590.6k", "--budget")
    590600
    """
    return round(_quantity(text, name, *_UNITS["parameters"]))


def parse_budget(text: str, like: Mapping[str, Budget], batch: int, roofline: Roofline) -> Budget:
    """A budget from words such as ``linear``, ``590k`` or ``flops=2G,time=1ms``.

    Args:
        text: the words.
        like: budgets by name.
        batch: number of inputs of a call.
        roofline: the device of a budget of time.

    Raises:
        BudgetError: an unknown word, a quantity that can't be read, or a limit given twice.

    >>> cpu = Roofline("cpu", 1e11, 1e9, 1e10, 1e-6)
    >>> like = {"linear": Budget.like_linear(768, 768), "mlp": Budget.like_mlp(768, 3072, 768)}
    >>> parse_budget("mlp", like, 1024, cpu)
    Budget(parameters=4722432)
    >>> parse_budget("memory=64MiB", like, 1024, cpu)
    Budget(memory=67108864, batch=1024)
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        key, equals, amount = part.partition("=")
        key = key.strip().lower()
        if not equals and key in like:
            name, value = "parameters", float(like[key].limits["parameters"])
        else:
            name, amount = (key, amount) if equals else ("parameters", part)
            if name not in _UNITS or (not equals and not amount.strip()[:1].isdigit()):
                raise BudgetError(
                    "budget must be linear, mlp, a number of parameters, or limits such as "
                    f"parameters=590k, flops=2G, memory=64MiB, time=2ms; got {part!r}. Write one "
                    "of them."
                )
            value = _quantity(amount, f"{name} of a budget", *_UNITS[name])
        if name in limits:
            raise BudgetError(f"a budget must limit {name} once; got {text!r}. Drop one.")
        limits[name] = value
    counts = {name: int(value) for name, value in limits.items() if name != "time"}
    return Budget(
        parameters=counts.get("parameters"),
        flops=counts.get("flops"),
        memory=counts.get("memory"),
        time=limits.get("time"),
        batch=batch,
        roofline=roofline if "time" in limits else None,
    )


def _whole(text: str) -> int | None:
    """A positive integer in plain digits, none of them absurdly many."""
    text = text.strip()
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS:
        return None
    return int(text) or None


def _quantity(text: str, name: str, units: dict[str, float], example: str) -> float:
    match = _QUANTITY.fullmatch(text.strip())
    unit = match[3].lower() if match else ""
    value = 0.0
    if match and unit in units:
        value = float(match[1].replace("_", "") + (match[2] or "")) * units[unit]
    if not value > 0 or not isfinite(value) or (units is not _SECONDS and value < 1):
        raise BudgetError(
            f"{name} must be a quantity such as {example}; got {text!r}. Write a number above zero "
            "and its unit."
        )
    return value
