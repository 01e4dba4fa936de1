"""Adapters by the arrays that they serve.

Built-in adapters resolve through one table, so that a checkout that is not installed works and
nothing is scanned for the usual names; entry points are consulted for unknown names only.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tensormoe._entry_points import entry_points_of, load_entry_point, origin, the_only
from tensormoe._validation import instance
from tensormoe.backend._protocol import Array, Backend
from tensormoe.errors import BackendError, MissingDependencyError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "tensormoe.backends"

# root module of an array's type -> (module of the adapter, extra that installs the library)
_BUILT_IN = {
    "cupy": ("tensormoe_cupy", "cupy"),
    "jax": ("tensormoe_jax", "jax"),
    "numpy": ("tensormoe_numpy", "numpy"),
    "torch": ("tensormoe_torch", "torch"),
}


def known_backends() -> tuple[str, ...]:
    """Names of all adapters that are registered, whether or not their library is installed.

    >>> "numpy" in known_backends()
    True
    """
    return tuple(sorted({*_BUILT_IN, *entry_points_of(ENTRY_POINT_GROUP)}))


def available_backends() -> tuple[str, ...]:
    """Names of the adapters whose array library is installed, found without importing it."""
    return tuple(name for name in known_backends() if _installed(name))


def get_backend(name: str) -> Backend:
    """The adapter registered under ``name``.

    Raises:
        BackendError: no adapter has that name, or more than one; or the one that has it can't be
            loaded, or isn't what :mod:`tensormoe.backend` describes.
        MissingDependencyError: the adapter is known but its array library, or something else that
            it needs, is not installed.
    """
    instance(name, str, "backend", "the name of a library", BackendError)
    return loaded_backend(name)


@cache
def loaded_backend(name: str) -> Backend:
    """The adapter of a name, loaded once."""
    if name in _BUILT_IN:
        module, extra = _BUILT_IN[name]
        if not _installed(name):
            raise MissingDependencyError(
                f"the {name} backend needs {name}, which is not installed. "
                f"Install it with: pip install 'tensormoe[{extra}]'."
            )
        backend: Backend = import_module(module).BACKEND
        return backend
    found = entry_points_of(ENTRY_POINT_GROUP).get(name, ())
    if not found:
        raise BackendError(
            f"backend must be one of {', '.join(known_backends())}; got {name!r}. Another library "
            f"joins through an entry point in the group {ENTRY_POINT_GROUP!r}."
        )
    return _load(the_only(found, "backend", BackendError))


def backend_of(*arrays: Array) -> Backend:
    """The one adapter that serves all of ``arrays``.

    Raises:
        BackendError: the arrays come from an unknown library or from more than one, or are not
            plain, dense ones.
    """
    names = dict.fromkeys(_root(array) for array in arrays)
    if len(names) != 1:
        listed = ", ".join(f"{kind_of(array)} at {index}" for index, array in enumerate(arrays))
        raise BackendError(
            f"arrays must come from one library; got {listed or 'no arrays'}. "
            "Convert them yourself: tensormoe never does it behind your back."
        )
    (name,) = names
    if name not in _BUILT_IN and name not in known_backends():
        raise BackendError(
            f"arrays must come from one of {', '.join(known_backends())}; got "
            f"{kind_of(arrays[0])}. Convert it to an array."
        )
    backend = _ready(name) or get_backend(name)
    for index, array in enumerate(arrays):
        if not backend.owns(array):
            raise BackendError(
                f"arrays must be plain and dense; got {kind_of(array)} at {index}. Convert it to "
                "a plain array: neither masked, sparse nor nested, and not a matrix."
            )
    return backend


def _ready(name: str) -> Backend | None:
    """A built-in adapter that was imported before: compilers follow no more than this."""
    module, _ = _BUILT_IN.get(name, ("", ""))
    return getattr(sys.modules.get(module), "BACKEND", None)


def check_array(array: Array, backend: Backend, name: str) -> None:
    """Refuse what is not a plain, dense array of the backend's library.

    Args:
        array: what was given.
        backend: of the library.
        name: names the array in the message.

    Raises:
        BackendError: an array of another library, not an array, or not a plain one.
    """
    if backend.owns(array):
        return
    if _root(array) == backend.name:
        raise BackendError(
            f"{name} must be a plain, dense array; got {kind_of(array)} that is not. Convert it: "
            "it must be neither masked, sparse nor nested, and not a matrix."
        )
    raise BackendError(
        f"{name} must be an array of {backend.name}; got {kind_of(array)}. "
        "Convert it yourself: tensormoe never does it behind your back."
    )


def kind_of(array: Array) -> str:
    """Library and class of an array, for messages.

    >>> kind_of([1.0])
    'builtins.list'
    """
    return f"{type(array).__module__.partition('.')[0]}.{type(array).__qualname__}"


def _root(array: Array) -> str:
    root = type(array).__module__.partition(".")[0]
    return {"jaxlib": "jax"}.get(root, root)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        # a dotted name whose package is missing, or no name of a module at all
        return False


def _load(point: EntryPoint) -> Backend:
    """The adapter that an entry point names, checked."""
    if not _installed(point.name):
        raise MissingDependencyError(
            f"the {point.name} backend of {origin(point)} needs {point.name}, which is not "
            "installed. Install that library."
        )
    loaded: Backend = load_entry_point(point, "backend", BackendError)
    _check(loaded, point.name, origin(point))
    return loaded


def _check(loaded: Backend, name: str, source: str) -> None:
    if isinstance(loaded, type):
        raise BackendError(
            f"the {name} backend of {source} must be an object; got the class "
            f"{loaded.__qualname__}. Let the entry point name an instance of it."
        )
    missing = [each for each in _MEMBERS if not hasattr(loaded, each)]
    if missing:
        raise BackendError(
            f"the {name} backend of {source} must have every member of tensormoe.backend.Backend; "
            f"got {type(loaded).__qualname__} without {', '.join(missing)}. Add what is missing."
        )
    if loaded.name != name:
        raise BackendError(
            f"the {name} backend of {source} must have that name, the root module of its arrays; "
            f"got {loaded.name!r}. Give the entry point and the adapter one name."
        )


_MEMBERS = tuple(member for member in vars(Backend) if not member.startswith("_"))
