"""The network that Debian's stockfish 15.1 carries, read from the installed program.

A layer of features, shared, and behind it eight experts of one shape, each of three layers in
integers: 1024 → 16, 30 → 32, 32 → 1. The number of pieces on the board chooses the expert.
The layout is that of Stockfish's ``src/nnue`` at version 15.1.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

__all__ = ["EXPERTS", "Layer", "Network", "NetworkError", "find_program", "read_network"]

EXPERTS = 8
FEATURES, HALF, MATERIAL = 22528, 1024, 8

# Debian's folder for games is not on everybody's PATH
DEBIAN = "/usr/games/stockfish"
INSTALL = "Install it with: apt install stockfish (version 15.1, as in Debian 12)."

# networks are named after the start of their SHA-256
DIGEST = "ad9b42354671"
_VERSION = 0x7AF32F20
# out, in as it is stored, in that is used, and what one step of the integers stands for
_SHAPES = ((16, 1024, 1024, 1 / 64), (32, 32, 30, 1 / 64), (1, 32, 32, 127 / 9600))


class NetworkError(Exception):
    """The network is not there, or is another one."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of all experts.

    Args:
        name: its sizes.
        integers: (experts, in, out), int8.
        bias: (experts, out), int32, in units of the products of integer weights and inputs.
        step: what one step of the integers stands for.
    """

    name: str
    integers: np.ndarray
    bias: np.ndarray
    step: float

    @property
    def weights(self) -> np.ndarray:
        """(experts, in, out), float32."""
        return (self.integers * self.step).astype("float32")

    @property
    def rounding(self) -> float:
        """Relative error that rounding to whole steps makes, if values fall anywhere between."""
        return float(np.sqrt(self.integers.size / 12) / np.linalg.norm(self.integers.astype("f8")))


@dataclass(frozen=True, eq=False)
class Network:
    """The shared layer of features, and the experts.

    Args:
        feature_bias: (1024,), int16.
        features: (22528, 1024), int16: what a piece on a square adds, for every square of the king.
        layers: of the experts.
    """

    feature_bias: np.ndarray
    features: np.ndarray
    layers: tuple[Layer, ...]


def find_program(name: str | None = None) -> Path:
    """Where the program is.

    Raises:
        NetworkError: it is not installed.
    """
    tried = [name] if name else [shutil.which("stockfish"), DEBIAN]
    for each in tried:
        if each and Path(each).is_file():
            return Path(each)
    raise NetworkError(f"stockfish was not found{f' at {name}' if name else ''}. {INSTALL}")


def read_network(program: Path, digest: str = DIGEST) -> Network:
    """The network in a program.

    Args:
        program: the installed file.
        digest: what the SHA-256 of the network starts with.

    Raises:
        NetworkError: there is no such network in it, or only a part of it.
    """
    content = program.read_bytes()
    mark = struct.pack("<I", _VERSION)
    start = content.find(mark)
    while start >= 0:
        reader = _Reader(content, start)
        try:
            network = _parsed(reader)
        except ValueError:
            # the same four bytes by chance, or a file that ends too early
            network = None
        if network is not None:
            found = hashlib.sha256(memoryview(content)[start : reader.place]).hexdigest()
            if found.startswith(digest):
                return network
        start = content.find(mark, start + 1)
    raise NetworkError(f"{program} does not carry the network nn-{digest}.nnue. {INSTALL}")


@dataclass
class _Reader:
    """Reads arrays one after the other."""

    content: bytes
    place: int

    def take(self, dtype: str, *shape: int) -> np.ndarray:
        found = np.frombuffer(self.content, dtype, prod(shape), self.place).reshape(shape)
        self.place += found.nbytes
        return found


def _parsed(reader: _Reader) -> Network:
    _, _, words = reader.take("<u4", 3)
    # the description, and a number that names the kind of layer, here and before every expert
    reader.take("u1", int(words) + 4)
    feature_bias, features = reader.take("<i2", HALF), reader.take("<i2", FEATURES, HALF)
    reader.take("<i4", FEATURES, MATERIAL)
    stacks: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in _SHAPES]
    for _ in range(EXPERTS):
        reader.take("u1", 4)
        for stack, (out, stored, used, _) in zip(stacks, _SHAPES, strict=True):
            bias, weights = reader.take("<i4", out), reader.take("i1", out, stored)
            stack.append((weights[:, :used].T, bias))
    layers = [
        Layer(
            f"{used} → {out}",
            np.stack([weights for weights, _ in stack]),
            np.stack([bias for _, bias in stack]),
            step,
        )
        for stack, (out, _, used, step) in zip(stacks, _SHAPES, strict=True)
    ]
    return Network(feature_bias, features, tuple(layers))
