"""Sizes and settings of the tables of a GPU report, in order of importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """How numbers are stored and multiplied.

    Args:
        name: as printed.
        dtype: of parameters and inputs.
        tf32: whether products of float32 are rounded to TF32.
        tensor_cores: whether they need a device of compute capability 8.0 or more.
    """

    name: str
    dtype: str
    tf32: bool = False
    tensor_cores: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return 2 if self.dtype == "bfloat16" else 4


BFLOAT16 = Precision("bfloat16", "bfloat16")
FLOAT32 = Precision("float32, TF32 off", "float32", tensor_cores=False)
TF32 = Precision("float32, TF32 on", "float32", tf32=True)
PRECISIONS = (BFLOAT16, FLOAT32, TF32)

TOLERANCES = {BFLOAT16.name: 5e-2, FLOAT32.name: 1e-4, TF32.name: 1e-2}
"""How far two formulations may be apart, relative to the largest output."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a whole report.

    Args:
        features: of the layers' inputs and outputs.
        experts: numbers of experts, the most important first.
        batches: tokens, the most important first.
        peers: numbers of experts beside other layers.
        seconds: for each comparison.
        product: rows of the square products that measure a device.
        copied: bytes of the copy that measures its memory.
    """

    features: int
    experts: tuple[int, ...]
    batches: tuple[int, ...]
    peers: tuple[int, ...]
    seconds: float
    product: int
    copied: int


FULL = Sizes(768, (1024, 8192, 128, 16), (8192, 64), (64, 1024, 256, 16), 0.2, 8192, 2**29)
TINY = Sizes(32, (16,), (8,), (2,), 0.0, 64, 2**16)


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    factorization: str
    experts: int
    batch: int
    precision: Precision

    def __str__(self) -> str:
        name = self.factorization.replace("_", " ")
        return f"{name}, {self.experts:,} experts, {self.batch:,} tokens, {self.precision.name}"

    @property
    def cells(self) -> dict[str, object]:
        """The first cells of the row."""
        return {
            "layer": self.factorization.replace("_", " "),
            "experts": self.experts,
            "tokens": self.batch,
            "precision": self.precision.name,
        }


def settings(sizes: Sizes, precisions: tuple[Precision, ...]) -> Iterator[Setting]:
    """All rows: every precision and factorization of the first sizes comes first."""
    for batch in sizes.batches:
        for experts in sizes.experts:
            for precision in precisions:
                for factorization in ("cp", "tensor_ring"):
                    yield Setting(factorization, experts, batch, precision)
