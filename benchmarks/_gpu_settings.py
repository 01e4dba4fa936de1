"""Sizes and settings of the tables of a GPU report, in order of importance."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Format in which numbers are stored and multiplied.

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
"""Largest difference between two formulations, relative to the largest output."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a whole report.

    Args:
        features: of the layers' inputs and outputs.
        experts: numbers of experts, the most important first.
        batches: tokens, the most important first.
        peers: numbers of experts beside other layers.
        seconds: for each comparison.
        turn: seconds that a turn of one call takes at least.
        product: rows of the square products that measure a device.
        copied: bytes of the copy that measures its memory.
        every: 1 for all rows; in a trial each third, which has every precision and factorization.
    """

    features: int
    experts: tuple[int, ...]
    batches: tuple[int, ...]
    peers: tuple[int, ...]
    seconds: float
    turn: float
    product: int
    copied: int
    every: int = 1


FULL = Sizes(768, (1024, 8192, 128, 16), (8192, 64), (64, 16, 256, 1024), 0.2, 3e-3, 8192, 2**29)
TINY = Sizes(32, (16,), (8,), (2,), 0.0, 0.0, 64, 2**16, every=3)


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    factorization: str
    experts: int
    batch: int
    precision: Precision

    def distance(self, other: Setting) -> int:
        """In how many things it differs from another."""
        mine, theirs = (tuple(vars(each).values()) for each in (self, other))
        return sum(left != right for left, right in zip(mine, theirs, strict=True))

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


def settings(sizes: Sizes, precisions: tuple[Precision, ...]) -> list[Setting]:
    """All rows: those that differ in one thing from the first come before those that do in two."""
    found = [
        Setting(factorization, experts, batch, precision)
        for batch in sizes.batches
        for experts in sizes.experts
        for precision in precisions
        for factorization in ("cp", "tensor_ring")
    ]
    first = found[0]
    found.sort(key=first.distance)
    return found[:: sizes.every]


def check_rounding(precision: Precision, error: float) -> None:
    """Raise if products are not rounded as a precision says.

    Args:
        precision: of the products.
        error: of a product of 512 × 512 normal values, relative to its largest entry: around 1e-6
            in float32, 2e-4 in TF32 and 2e-3 in bfloat16.
    """
    rounded = error > 1e-5
    if rounded != (precision is not FLOAT32):
        raise ArithmeticError(
            f"products should {'not ' if rounded else ''}be rounded; their error is {error:.1e}"
        )
