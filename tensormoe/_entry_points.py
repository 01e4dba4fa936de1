"""Entry points of other distributions: found by name, and loaded on demand.

What an entry point brings is other people's code, so each way in which it can be wrong is an error
that names the distribution, and one that nobody asks for stops nobody.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from tensormoe.errors import MissingDependencyError, TensormoeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@cache
def entry_points_of(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """The entry points of a group by name; a name may be taken by several distributions."""
    # a third of the core's import time, and needed for unknown names only
    from importlib.metadata import entry_points

    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def the_only(points: tuple[EntryPoint, ...], kind: str, error: type[TensormoeError]) -> EntryPoint:
    """The entry point of a name, which one distribution alone may take.

    Args:
        points: all of that name, at least one.
        kind: what they bring, for the message: ``"backend"``.
        error: raised where there are several.
    """
    if len(points) > 1:
        raise error(
            f"{kind} {points[0].name!r} must come from one distribution; got "
            f"{' and '.join(origin(point) for point in points)}. Uninstall all but one."
        )
    return points[0]


def load_entry_point(point: EntryPoint, kind: str, error: type[TensormoeError]) -> Any:
    """The object that an entry point names, unchecked.

    Args:
        point: the entry point.
        kind: what it brings, for the message: ``"backend"``.
        error: raised where its code fails.

    Raises:
        MissingDependencyError: its code needs a package that is not installed.
    """
    try:
        return point.load()
    except ModuleNotFoundError as missing:
        raise MissingDependencyError(
            f"the {point.name} {kind} of {origin(point)} needs {missing.name}, which is not "
            "installed. Install it, or install the distribution anew."
        ) from missing
    except Exception as failure:  # other people's code runs when it is imported
        raise error(
            f"the {point.name} {kind} of {origin(point)} must load; got "
            f"{type(failure).__name__}: {failure}. Update or uninstall the distribution."
        ) from failure


def origin(point: EntryPoint) -> str:
    """Origin of an entry point, for messages: the distribution, and the object it names."""
    return f"{point.dist.name if point.dist else 'an unknown distribution'} ({point.value})"
