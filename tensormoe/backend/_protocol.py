"""The primitives that a backend provides, as a protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

__all__ = [
    "Array",
    "Backend",
    "Convolves",
    "Exchange",
    "Groups",
    "LoopStep",
    "Selects",
    "State",
    "Step",
]

Array: TypeAlias = Any
"""An array of any library; the core has no array type of its own."""

State: TypeAlias = tuple[Array, ...]
"""The arrays that a loop carries from one step to the next."""

Step: TypeAlias = Callable[..., tuple[State, Array]]
"""One step of a loop: from the arrays of a state to the next state, and how large the step was."""


@dataclass(frozen=True, eq=False)
class LoopStep:
    """A step as a function and constants: a library can compile a loop once for equal functions.

    Attributes:
        function: from ``constants`` and the arrays of a state to the next state and the size of
            the step. It holds no arrays and can be hashed: functions that do the same are equal.
        constants: arrays that every step reads.
    """

    function: Step
    constants: tuple[Array, ...]

    def __call__(self, *state: Array) -> tuple[State, Array]:
        """The next state, and the size of the step."""
        return self.function(*self.constants, *state)


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
        """Whether invalid values (NaN logits, ids out of range) are errors.

        Elsewhere they propagate, as users of the library expect.
        """
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

    def row_sums(self, array: Array, /) -> Array:
        """Sums of the rows of a floating-point matrix, (rows, 1), for rows of any length."""
        ...

    def square_sums(self, array: Array, /) -> Array:
        """Sums of the squares of each row of a floating-point matrix, (rows, 1)."""
        ...

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        """Apply ``step`` to ``state`` until it changes little: the root search of a gate.

        The loop may end once no entry of the step size is above ``tolerance``, and ends after
        ``max_steps``, which always suffice for a gate; a library that cannot read values, or loses
        time by it, does them all. Rows are independent, so that each may end by itself. The loop
        is never differentiated. A gate's ``step`` is a :class:`LoopStep`.
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
        """The same values, constant to differentiation: used by the root search of a gate."""
        ...

    def to_bytes(self, array: Array, /) -> tuple[str, tuple[int, ...], bytes]:
        """Canonical dtype name (``"float32"``), shape and little-endian row-major bytes."""
        ...

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Array:
        """The array that :meth:`to_bytes` described."""
        ...


@runtime_checkable
class Selects(Protocol):
    """Optional member of an eager adapter, by which gates keep k experts without a sort."""

    def kth_largest(self, array: Array, k: int, /) -> Array:
        """The k-th largest entry of each row of a floating-point matrix, (rows, 1).

        Any value will do for a row with NaN.
        """
        ...


@runtime_checkable
class Ranks(Protocol):
    """Optional member of an adapter, by which routers choose experts without a sort."""

    def largest_indices(self, array: Array, k: int, /) -> Array | None:
        """Indices (rows, k) of the k largest entries, the largest first, ties to the lower index.

        None where the library would have to sort: the caller does it then.
        """
        ...


@runtime_checkable
class StoredProducts(Protocol):
    """Optional member of an adapter: products of matrices that are given as they are stored.

    Without it a transposed view is multiplied, which costs nothing where a library has views.
    """

    def matmul_stored(self, left: Array, right: Array, transposed: tuple[bool, bool], /) -> Array:
        """Matrix product of operands of which one or both are to be transposed first."""
        ...


@runtime_checkable
class Groups(Protocol):
    """Optional members of an adapter: products of rows that are sorted by expert.

    Without them, layers gather an expert's matrix for every row.
    """

    def grouped_matmul(self, rows: Array, matrices: Array, counts: Array, /) -> Array:
        """One product per expert: (rows, in), (N, in, out), (N,) → (rows, out).

        The first ``counts[0]`` rows meet the first matrix, and so on. Counts may have one more
        entry: the number of rows behind them that meet none, and whose results are zeros.
        """
        ...

    def grouped_outer(self, left: Array, right: Array, counts: Array, /) -> Array:
        """Sums of outer products over each expert's rows.

        (rows, in), (rows, out), (N,) → (N, in, out).
        """
        ...


@runtime_checkable
class Convolves(Protocol):
    """Optional members of an adapter: convolutions of one, two or more spatial axes.

    Without them, layers multiply patches with matrices.
    """

    @property
    def convolves(self) -> Literal["shared", "each"]:
        """Whether kernels that all images share are all it has, or kernels of each image too."""
        ...

    @property
    def channels_first(self) -> bool:
        """Whether images are (images, channels, *size), instead of (images, *size, channels)."""
        ...

    def convolve(
        self,
        images: Array,
        kernels: Array,
        bias: Array | None,
        stride: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
        dilation: tuple[int, ...],
        /,
    ) -> Array:
        """Cross-correlation of images with kernels (*size, in, out), in their one dtype.

        Args:
            images: in the library's layout, as the result.
            kernels: for all images; or of each image, (images, *size, in, out).
            bias: added to each position, (out,); or of each image, (images, out).
            stride: positions between outputs, for each spatial axis.
            padding: zeros before and behind, for each spatial axis.
            dilation: positions between entries of a kernel, for each spatial axis.
        """
        ...


@runtime_checkable
class Exchange(Protocol):
    """Optional members of an adapter, for :func:`tensormoe.convert`.

    Without them, arrays lend their memory by their own ``__dlpack__``, and the namespace's
    ``from_dlpack`` takes the memory of others.
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

        Arrays from other devices are copied for such a library.
        """
        ...

    def to_dlpack(self, array: Array, /, *, copy: bool) -> tuple[Array, bool]:
        """An object with ``__dlpack__``, and whether others may write to it; a copy if wanted.

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
