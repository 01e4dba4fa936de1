"""JAX's primitives for the core, all of them traceable and differentiable."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from tensormoe.backend import LoopStep, State, Step
from tensormoe.errors import BackendError
from tensormoe.planning import Library


class JaxBackend:
    """Adapter of :class:`tensormoe.backend.Backend` for ``jax.Array``, concrete or traced."""

    name = "jax"
    namespace = jnp
    # XLA fuses operations on rows by itself, and a traced value steers nothing
    row_block_bytes = None
    eager = False
    # NaN propagates, as everywhere in JAX
    checks_values = False
    keeps_constants = True
    # an array is where its memory is
    devices = None
    # kernels of each image are slower than patches: XLA runs groups one by one on the CPU
    convolves: Literal["shared"] = "shared"
    channels_first = False

    def __repr__(self) -> str:
        return "JaxBackend()"

    def owns(self, array: Any, /) -> bool:
        # keys of random numbers are arrays, but not of numbers
        return isinstance(array, Array) and isinstance(array.dtype, np.dtype)

    def matmul(self, left: Array, right: Array, /) -> Array:
        if right.ndim > 2 and jax.default_backend() == "cpu":
            rows = left.shape[-2]
            # not those of an export, whose number is open
            if isinstance(rows, int) and 8 * rows <= right.shape[-1]:
                # of rows that all matrices meet XLA would make one product, and for it a transposed
                # copy of the matrices
                batch = jnp.broadcast_shapes(left.shape[:-2], right.shape[:-2])
                left = jnp.broadcast_to(left, (*batch, *left.shape[-2:]))
            if left.ndim > 2:
                # XLA would fold the transposes around a batched product into it, and then runs it
                # by a loop that is ten times slower than the copies
                left, right = jax.lax.optimization_barrier((left, right))  # type: ignore[no-untyped-call]
        return jnp.matmul(left, right)

    def matmul_stored(self, left: Array, right: Array, transposed: tuple[bool, bool], /) -> Array:
        inner = (-2 if transposed[0] else -1, -1 if transposed[1] else -2)
        if left.ndim != 2 or right.ndim != 2 or left.shape[inner[0]] == 1:
            left, right = (
                jnp.matrix_transpose(each) if turned else each
                for each, turned in zip((left, right), transposed, strict=True)
            )
            return self.matmul(left, right)
        # for a product with one row, XLA copies a transposed matrix on the CPU. A vector comes
        # first: where the matrix does, it is read column by column
        numbers = (inner[0] + 2,), (inner[1] + 2,)
        if right.shape[-3 - inner[1]] == 1:
            return jax.lax.dot_general(right, left, (numbers[::-1], ((), ()))).T
        return jax.lax.dot_general(left, right, (numbers, ((), ())))

    def reshape(self, array: Array, shape: tuple[int, ...], /) -> Array:
        return jnp.reshape(array, shape)

    def permute(self, array: Array, axes: tuple[int, ...], /) -> Array:
        return jnp.permute_dims(array, axes)

    def contiguous(self, array: Array, /) -> Array:
        # arrays are values: XLA chooses how they lie in memory
        return array

    def sum(self, array: Array, axes: tuple[int, ...], /) -> Array:
        return jnp.sum(array, axis=axes, dtype=array.dtype)

    def row_sums(self, array: Array, /) -> Array:
        return jnp.sum(array, axis=-1, keepdims=True)

    def square_sums(self, array: Array, /) -> Array:
        return jnp.sum(array * array, axis=-1, keepdims=True)

    def while_loop(self, step: Step, state: State, max_steps: int, tolerance: float, /) -> State:
        function, constants = step, ()
        if isinstance(step, LoopStep):
            function, constants = step.function, step.constants
        # a convergence test would need communication in every step: with several devices, all
        # steps are run
        last = tolerance if jax.device_count() == 1 else None
        found: State = _while_loop(function, constants, state, max_steps, last)
        return found

    def take(self, array: Array, indices: Array, axis: int, /) -> Array:
        # an index out of range that nobody could check gives NaN, not a row that happens to exist
        flat = _no_wrap(indices.reshape(-1), array.shape[axis])
        place = (slice(None),) * axis + (flat,)
        flat = array.at[place].get(mode="fill", out_sharding=_gathered(array, flat, axis))
        return flat.reshape(*array.shape[:axis], *indices.shape, *array.shape[axis + 1 :])

    def scatter_add(self, values: Array, indices: Array, axis: int, size: int, /) -> Array:
        before, after = values.shape[:axis], values.shape[axis + indices.ndim :]
        total = jnp.zeros((*before, size, *after), dtype=values.dtype)
        place = (slice(None),) * axis + (_no_wrap(indices, size),)
        return total.at[place].add(values, mode="drop")

    def grouped_matmul(self, rows: Array, matrices: Array, counts: Array, /) -> Array:
        experts = matrices.shape[0]
        made = jax.lax.ragged_dot(rows, matrices, counts[:experts].astype(jnp.int32))
        if counts.shape[0] == experts:
            return made
        # not every device writes there
        last = rows.shape[0] - counts[experts]
        return jnp.where(jnp.arange(rows.shape[0])[:, None] < last, made, 0)

    def grouped_outer(self, left: Array, right: Array, counts: Array, /) -> Array:
        numbers = jax.lax.RaggedDotDimensionNumbers(  # type: ignore[no-untyped-call]
            (((0,), (0,)), ((), ())), (0,), ()
        )
        return jax.lax.ragged_dot_general(left, right, counts.astype(jnp.int32), numbers)

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
        axes = "DHW"[-len(stride) :]
        layout = f"N{axes}C", f"{axes}IO", f"N{axes}C"
        made = jax.lax.conv_general_dilated(
            images, kernels, stride, padding, rhs_dilation=dilation, dimension_numbers=layout
        )
        return made if bias is None else made + bias

    def floats(self, array: Array, /) -> list[float]:
        listed: list[float] = array.tolist()
        return listed

    def stop_gradient(self, array: Array, /) -> Array:
        return jax.lax.stop_gradient(array)

    def to_bytes(self, array: Array, /) -> tuple[str, tuple[int, ...], bytes]:
        if not isinstance(array, jax.core.Tracer) and not array.is_fully_addressable:
            raise BackendError(
                "an array must be on devices of this process to be written; got one that is cut "
                f"over several processes, {array.sharding}. Save it by Orbax, or gather it by "
                "jax.experimental.multihost_utils.process_allgather(…, tiled=True)."
            )
        host = np.ascontiguousarray(array)
        little = host.astype(host.dtype.newbyteorder("<"), copy=False)
        return array.dtype.name, tuple(array.shape), little.tobytes()

    def from_bytes(self, dtype: str, shape: tuple[int, ...], data: bytes, /) -> Array:
        found = _dtype(dtype)
        little = np.frombuffer(data, dtype=found.newbyteorder("<"))
        return jnp.asarray(little.reshape(shape), dtype=found)

    def to_dlpack(self, array: Array, /, *, copy: bool) -> tuple[Array, bool]:
        if isinstance(array, jax.core.Tracer):
            raise BackendError(
                "an array must have values before other libraries get it; got a traced one of "
                f"{array.aval}. Convert outside of jax.jit, jax.grad and the like."
            )
        # a copy that nobody holds may be written to
        return (jnp.array(array, copy=True) if copy else array), copy

    def from_dlpack(self, array: Any, /, *, copy: bool | None) -> Array:
        # JAX itself would narrow what has 64 bits, without a word
        _dtype(str(array.dtype).rpartition(".")[2])
        return jnp.from_dlpack(array, copy=None if copy else copy)


def _gathered(array: Array, indices: Array, axis: int) -> PartitionSpec | None:
    """Sharding of a gather's result in a mesh whose axes are explicit: that of the indices."""
    kinds = [jax.typeof(each).sharding for each in (array, indices)]
    if all(AxisType.Explicit not in kind.mesh.axis_types for kind in kinds):
        return None
    whole = [*kinds[0].spec, *[None] * (array.ndim - len(kinds[0].spec))]
    whole[axis] = kinds[1].spec[0] if kinds[1].spec else None
    return PartitionSpec(*whole)  # type: ignore[no-untyped-call]


@partial(jax.jit, static_argnums=(0, 3, 4), inline=True)
def _while_loop(
    function: Step, constants: State, state: State, max_steps: int, tolerance: float | None
) -> State:
    """A loop that compiles once for equal functions."""
    busy = jnp.bool(True)
    # what starts alike on all devices does not stay so: types that know where an array varies or
    # how it is sharded take that from the rows by this, and XLA drops it
    for each in constants[:1]:
        rows = each[:, :1] == 0
        state = tuple(jnp.where(rows, start, start) for start in state)
        busy = busy | jnp.any(rows)
    found: State
    if tolerance is None:
        found = jax.lax.fori_loop(
            0, max_steps, lambda _, inner: function(*constants, *inner)[0], state
        )
        return found

    def goes_on(carried: tuple[Array, Array, State]) -> Array:
        count, busy, _ = carried
        return (count < max_steps) & busy

    def body(carried: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        count, _, inner = carried
        inner, change = function(*constants, *inner)
        return count + 1, jnp.any(change > tolerance), inner

    found = jax.lax.while_loop(goes_on, body, (jnp.int32(0), busy, state))[2]
    return found


def _dtype(name: str) -> np.dtype[Any]:
    """The dtype of that name.

    Raises:
        TypeError: one of 64 bits while that mode is off, or none at all.
    """
    found = jnp.dtype(name)
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise TypeError(
            f"{name} needs JAX's 64-bit mode, which is off; switch it on with "
            "jax.config.update('jax_enable_x64', True)"
        )
    return found


def _no_wrap(indices: Array, size: int) -> Array:
    """Negative indices out of range as well: JAX counts them from the end, as Python does."""
    return jnp.where(indices < 0, size, indices)


BACKEND = JaxBackend()
"""The adapter of JAX, which ``tensormoe.get_backend`` returns."""
LIBRARY = Library(frees_saved=True, convolves="shared")
"""Properties of JAX that costs depend on: ``config.cost(64, library=LIBRARY)``."""
