"""The primitives that a backend provides, as a protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

__all__ = ["Array", "Backend", "Exchange", "Round", "State", "Step"]

Array: TypeAlias = Any
"""An array of any library; the core has no array type of its own."""

State: TypeAlias = tuple[Array, ...]
"""What a loop carries from one round to the next."""

Step: TypeAlias = Callable[..., tuple[State, Array]]
"""One round: from the arrays of a state to the next state, and how far it went, at least 0."""


@dataclass(frozen=True, eq=False)
class Round:
    """A step of a gate's search as what it does and what it does it to; called, it is a step.

    Attributes:
        rule: from ``given`` and the arrays of a state to the next state and how far it went. It
            holds no arrays and can be hashed: rules are equal where they do the same.
        given: arrays that every round reads.
    """

    rule: Step
    given: tuple[Array, ...]

    def __call__(self, *state: Array) -> tuple[State, Array]:
        """The next state, and how far it went."""
        return self.rule(*self.given, *state)


@runtime_checkable
class Backend(Protocol):
    """The primitives an adapter provides; each stays inside its own library, dtype and device.

    ``*`` and ``+`` between arrays of the library need no primitive. A new adapter proves itself
    with :mod:`tensormoe.testing`.
    """

    @property
    def name(self) -> str:
        """The library's root module, e.g. ``"numpy"``."""
        ...

    @property
    def namespace(self) -> Any:
        """The library's Array-API namespace: gates are written against the standard."""
        ...

    @property
    def row_block_bytes(self) -> int | None:
        """Largest slice, in bytes, that elementwise work on rows should touch at once.

        Libraries that run each operation on its own profit from slices that stay in cache;
        compilers that fuse operations want ``None``.
        """
        ...

    @property
    def eager(self) -> bool:
        """Whether array values can steer Python control flow (an early exit) at no great cost.

        Such a library runs operation by operation, and what was just made may be written into.
        """
        ...

    @property
    def checks_values(self) -> bool:
        """Whether values that make no sense (NaN logits, ids out of range) are looked for.

        They are errors then. Elsewhere they propagate, as users of the library expect.
        """
        ...

    @property
    def picks_entries(self) -> bool:
        """Whether gathering a few scattered entries is cheaper than a few passes over all."""
        ...

    def owns(self, array: Array, /) -> bool:
        """Whether ``array`` is a plain, dense array of this library.

        Mixing libraries is an error, and so are arrays that mean something else than their
        entries: masked, sparse and nested ones, and NumPy's matrices.
        """
        ...

    def matmul(self, left: Array, right: Array, /) -> Array:
        """Matrix product over the last two axes, broadcasting the others: all the heavy work."""
        ...

    def reshape(self, array: Array, shape: tuple[int, ...], /) -> Array:
        """Row-major reshape with at most one -1; a view where the library has views."""
        ...

    def permute(self, array: Array, axes: tuple[int, ...], /) -> Array:
        """Reorder axes; a view where the library has views."""
        ...

    def contiguous(self, array: Array, /) -> Array:
        """A copy in row-major order: what an unavoidable permutation costs."""
        ...

    def sum(self, array: Array, axes: tuple[int, ...], /) -> Array:
        """Sum over ``axes`` and drop them, in the array's own dtype."""
        ...

    def excess(self, array: Array, threshold: Array, /, out: Array | None = None) -> Array:
        """max(array - threshold, 0): with the two sums below, the work of a gate's root search.

        Written to ``out``, an array that nobody needs any more, where the library can do so.
        """
        ...

    def row_sums(self, array: Array, /) -> Array:
        """Sums of the rows of a floating-point matrix, (rows, 1), for rows of any length."""
        ...

    def square_sums(self, array: Array, /) -> Array:
        """Sums of the squares of each row of a floating-point matrix, (rows, 1)."""
        ...

    def repeat(self, step: Step, state: State, rounds: int, enough: float, /) -> State:
        """Apply ``step`` to ``state``, ``rounds`` times at most: the root search of a gate.

        It may end once no entry of what ``step`` says of its way is above ``enough``; a library
        that cannot look at values, or loses time by it, does all the rounds. Rows know nothing of
        one another, so that each may end for itself. Nobody differentiates through it. A gate's
        ``step`` is a :class:`Round`, which lets a library compile the loop once.
        """
        ...

    def take(self, array: Array, indices: Array, axis: int, /) -> Array:
        """Gather: replace ``axis`` by the axes of ``indices`` (embedding, top-k experts)."""
        ...

    def scatter_add(self, values: Array, indices: Array, axis: int, size: int, /) -> Array:
        """Transpose of :meth:`take`: add ``values`` into zeros of length ``size`` at ``axis``."""
        ...

    def floats(self, array: Array, /) -> list[float]:
        """The entries of a vector as Python's numbers; needed of eager libraries only."""
        ...

    def stop_gradient(self, array: Array, /) -> Array:
        """The same values, constant to differentiation: the root search inside a gate."""
        ...

    def to_bytes(self, array: Array, /) -> tuple[str, tuple[int, ...], bytes]:
        """Canonical dtype name (``"float32"``), shape and little-endian row-major bytes."""
        ...

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Array:
        """The array that :meth:`to_bytes` described."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """What an adapter may have besides, for :func:`tensormoe.convert`.

    Without it, arrays lend their memory by their own ``__dlpack__``, and the namespace's
    ``from_dlpack`` takes what others lend. Here belongs what a library does otherwise.
    """

    @property
    def keeps_constants(self) -> bool:
        """Whether its arrays can be read-only: memory that another library holds constant.

        Other libraries get a copy of such memory.
        """
        ...

    @property
    def devices(self) -> frozenset[int] | None:
        """DLPack's numbers of the only kinds of device that its arrays are on; None for many.

        For such a library an array from elsewhere is brought over.
        """
        ...

    def to_dlpack(self, array: Array, /, *, copy: bool) -> tuple[Array, bool]:
        """What has ``__dlpack__``, and whether others may write to it; a copy if one is wanted.

        Raises:
            BackendError: an array that cannot be lent, since it is traced or differentiated.
            BufferError: one that cannot be lent as it is, whereas a copy can.
        """
        ...

    def from_dlpack(self, array: Array, /, *, copy: bool | None) -> Array:
        """An array of the library in the memory of ``array``.

        ``copy`` is True where the memory is a copy already, and nobody else's; None where the
        library may copy if it has to; False where it must not.
        """
        ...
