"""Packages that only some commands need, asked for when they are needed."""

from __future__ import annotations

from importlib import import_module

from tensormoe.errors import MissingDependencyError

__all__ = ["require"]


def require(package: str, extra: str, purpose: str) -> None:
    """Import ``package``, or say which extra brings it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs {missing}, which is not installed. "
            f"Install it with: pip install 'tensormoe[{extra}]'."
        ) from None
