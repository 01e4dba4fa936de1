"""Which adapter serves which arrays.

Built-in adapters resolve through one table, so that a checkout that is not installed works and
nothing is scanned for the usual names; entry points are consulted for unknown names only.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tensormoe.backend import Array, Backend
from tensormoe.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["available_backends", "backend_of", "get_backend", "known_backends"]

ENTRY_POINT_GROUP = "tensormoe.backends"

# root module of an array's type -> (module of the adapter, extra that installs the library)
_BUILT_IN = {
    "numpy": ("tensormoe_numpy", "numpy"),
    "torch": ("tensormoe_torch", "torch"),
}


def known_backends() -> tuple[str, ...]:
    """Names of all adapters that are registered, whether or not their library is installed.

    >>> "numpy" in known_backends()
    True
    """
    return tuple(sorted({*_BUILT_IN, *_entry_points()}))


def available_backends() -> tuple[str, ...]:
    """Names of the adapters whose array library is installed, found without importing it."""
    return tuple(name for name in known_backends() if find_spec(name) is not None)


@cache
def get_backend(name: str) -> Backend:
    """The adapter registered under ``name``.

    Raises:
        BackendError: no adapter has that name.
        MissingDependencyError: the adapter is known but its array library is not installed.
    """
    if name in _BUILT_IN:
        module, extra = _BUILT_IN[name]
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"the {name} backend needs {name}, which is not installed. "
                f"Install it with: pip install 'tensormoe[{extra}]'."
            )
        backend: Backend = import_module(module).BACKEND
        return backend
    found = _entry_points()
    if name not in found:
        raise BackendError(
            f"backend must be one of {', '.join(known_backends())}; got {name!r}. Another library "
            f"joins through an entry point in the group {ENTRY_POINT_GROUP!r}."
        )
    loaded: Backend = found[name].load()
    return loaded


def backend_of(*arrays: Array) -> Backend:
    """The one adapter that serves all of ``arrays``.

    Raises:
        BackendError: the arrays come from an unknown library or from more than one.
    """
    names = dict.fromkeys(_root(array) for array in arrays)
    if len(names) != 1:
        listed = ", ".join(f"{_describe(array)} at {place}" for place, array in enumerate(arrays))
        raise BackendError(
            f"arrays must come from one library; got {listed or 'no arrays'}. "
            "Convert them yourself: tensormoe never does it behind your back."
        )
    return get_backend(next(iter(names)))


def _root(array: Array) -> str:
    root = type(array).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(root, root)


def _describe(array: Array) -> str:
    return f"{type(array).__module__.partition('.')[0]}.{type(array).__qualname__}"


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    # a third of the core's import time, and needed for unknown names only
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
