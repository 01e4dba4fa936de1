"""Packages that only a part of the library needs."""

from __future__ import annotations

import importlib.util

from tensormoe.errors import MissingDependencyError


def missing(what: str, packages: tuple[str, ...], extra: str) -> MissingDependencyError | None:
    """The error to raise where ``what`` lacks one of ``packages``; None where it has them all.

    Args:
        what: needs the packages, e.g. ``"tensormoe_numpy"``.
        packages: names to import.
        extra: of the distribution, which installs them.

    >>> missing("this example", ("json", "os"), "numpy") is None
    True
    >>> print(missing("this example", ("json", "no_such_package"), "numpy"))
    this example needs no_such_package, which is not installed. Install it with: \
pip install 'tensormoe[numpy]'.
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    verb, pronoun = ("is", "it") if len(absent) == 1 else ("are", "them")
    return MissingDependencyError(
        f"{what} needs {' and '.join(absent)}, which {verb} not installed. "
        f"Install {pronoun} with: pip install 'tensormoe[{extra}]'."
    )


def require(what: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise the error of :func:`missing`, if there is one.

    Raises:
        MissingDependencyError: a package is not installed.
    """
    error = missing(what, packages, extra)
    if error is not None:
        raise error
