"""Values that are invalid for nearly every argument: 80 kinds, created for each call."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import itertools
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tensormoe import CP, Budget, Gate, LayerSpec, TopK


class Color(enum.Enum):
    """An enumeration."""

    RED = 1


class Number(enum.IntEnum):
    """Integers of another class."""

    TWO = 2


class Unindexed:
    """Claims to be an integer, and fails."""

    def __index__(self) -> int:
        raise TypeError("no integer after all")


class Untrue:
    """Has no truth value."""

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")


class Alike:
    """Equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _circular() -> list[Any]:
    listed: list[Any] = []
    listed.append(listed)
    return listed


def _nested_list() -> list[Any]:
    listed: list[Any] = [1]
    for _ in range(200):
        listed = [listed]
    return listed


def _masked() -> Any:
    return np.ma.masked_array(np.ones((3, 8), "float32"), mask=np.eye(3, 8))


def _traced() -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda x: found.append(x) or x, jnp.ones((3, 8)))
    return found[0]


JUNK: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "seven": lambda: 7,
    "a huge integer": lambda: 10**30,
    "beyond 64 bits": lambda: 2**64,
    "a half": lambda: 0.5,
    "minus zero": lambda: -0.0,
    "nan": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "minus infinity": lambda: float("-inf"),
    "a tiny float": lambda: 5e-324,
    "complex": lambda: 1 + 2j,
    "a fraction": lambda: fractions.Fraction(1, 3),
    "a decimal": lambda: decimal.Decimal("1.5"),
    "an enumeration": lambda: Color.RED,
    "an integer of an enumeration": lambda: Number.TWO,
    "no text": lambda: "",
    "text": lambda: "cp ",
    "long text": lambda: "x" * 100_000,
    "half a surrogate": lambda: "\ud800",
    "a null character": lambda: "a\0b",
    "digits": lambda: "12",
    "bytes": lambda: b"ab",
    "a byte array": lambda: bytearray(b"ab"),
    "a memory view": lambda: memoryview(b"ab"),
    "an empty tuple": lambda: (),
    "an empty list": lambda: [],
    "an empty dictionary": lambda: {},
    "an empty set": lambda: set(),
    "a list of numbers": lambda: [1, 2, 3],
    "a list of texts": lambda: ["a", "b"],
    "a list of nothing": lambda: [None, None],
    "a list of itself": _circular,
    "a nested list": _nested_list,
    "a long tuple": lambda: tuple(range(1, 2000)),
    "a mixed tuple": lambda: (1, "a", None),
    "floats": lambda: (1.0, 2.0),
    "a set": lambda: {2, 3},
    "a frozen set": lambda: frozenset({2, 3}),
    "a dictionary": lambda: {"a": 1},
    "a dictionary of numbers": lambda: {0: 0.5},
    "a dictionary of arrays": lambda: {"factors.input": np.ones((2, 2))},
    "a generator": lambda: (k for k in range(3)),
    "an endless generator": lambda: itertools.count(1),
    "a range": lambda: range(2, 5),
    "a slice": lambda: slice(0, 3),
    "the ellipsis": lambda: ...,
    "not implemented": lambda: NotImplemented,
    "an object": object,
    "a class": lambda: int,
    "a function": lambda: len,
    "a lambda": lambda: lambda *_: None,
    "a module": lambda: types.ModuleType("m"),
    "an exception": lambda: ValueError("x"),
    "a path": lambda: pathlib.Path("/nonexistent/file"),
    "a folder": lambda: pathlib.Path("/"),
    "a date": lambda: datetime.date(2020, 2, 30 - 1),
    "an integer that fails": Unindexed,
    "no truth": Untrue,
    "equal to everything": Alike,
    "a NumPy integer": lambda: np.int64(2),
    "a NumPy float": lambda: np.float32(1.5),
    "a NumPy boolean": lambda: np.True_,
    "an array without axes": lambda: np.array(3),
    "an empty array": lambda: np.ones((0, 8), "float32"),
    "an array": lambda: np.ones((3, 8)),
    "an array of one axis": lambda: np.ones(3, "float32"),
    "an array of nan": lambda: np.full((3, 8), np.nan, "float32"),
    "an integer array": lambda: np.ones((3, 8), int),
    "a boolean array": lambda: np.ones((3, 8), bool),
    "a complex array": lambda: np.ones((3, 8), complex),
    "an array of objects": lambda: np.array([None, 1, "a"], object),
    "an array of texts": lambda: np.array(["a", "b"]),
    "a structured array": lambda: np.ones(3, [("a", "f4"), ("b", "i4")]),
    "a masked array": _masked,
    "a matrix": lambda: np.ones((3, 8), "float32").view(np.matrix),
    "backward strides": lambda: np.ones((3, 8), "float32")[::-1, ::-1],
    "a tensor": lambda: torch.ones(3, 8),
    "an empty tensor": lambda: torch.ones(0, 8),
    "a tensor without axes": lambda: torch.tensor(2),
    "a sparse tensor": lambda: torch.ones(3, 8).to_sparse(),
    "a nested tensor": lambda: torch.nested.nested_tensor(
        [torch.ones(2, 8), torch.ones(1, 8)], layout=torch.jagged
    ),
    "a tensor without values": lambda: torch.ones(3, 8, device="meta"),
    "a complex tensor": lambda: torch.ones(3, 8, dtype=torch.complex64),
    "a half tensor": lambda: torch.ones(3, 8).half(),
    "an integer tensor": lambda: torch.ones(3, 8, dtype=torch.int8),
    "a tensor with a graph": lambda: torch.ones(3, 8, requires_grad=True) * 2,
    "a module of PyTorch": lambda: torch.nn.ReLU(),
    "a dtype of PyTorch": lambda: torch.int32,
    "a device": lambda: torch.device("meta"),
    "a JAX array": lambda: jnp.ones((3, 8)),
    "a JAX key": lambda: jax.random.key(0),
    "a traced array": _traced,
    "a factorization": lambda: CP(2),
    "a gate": lambda: Gate("softmax"),
    "a budget": lambda: Budget(parameters=1000),
    "a spec": lambda: LayerSpec(8, 4, 3, CP(2)),
    "coefficients by index": lambda: TopK(np.zeros((3, 1), int), np.ones((3, 1), "float32")),
}
"""Factory of each value, by name."""
