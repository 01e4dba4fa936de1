"""Selection of modules of a model: by pattern, by class, or by a function of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

from torch import nn

from tensormoe._validation import brief
from tensormoe.errors import SpecError

Select: TypeAlias = "str | Iterable[str] | type[nn.Module] | Callable[[str, nn.Module], bool]"
"""Patterns on the names of modules, a class of modules, or a function of name and module."""


def select_modules(model: nn.Module, select: Select) -> dict[str, nn.Module]:
    """The modules that are meant, by name; a module in several places by each of its names.

    Raises:
        SpecError: no selection, one that matches nothing, or one that holds the model itself, a
            part of another selected module, or only some of the places of one module.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    chosen = _chosen(named, select)
    if "" in chosen:
        raise SpecError(
            "the model itself can't be replaced in place; select holds it. Use from_linear or "
            "from_mlp, or leave it out: lambda name, module: name and …"
        )
    for name in chosen:
        outer = next((each for each in chosen if name.startswith(f"{each}.")), None)
        if outer is not None:
            raise SpecError(
                f"selected modules must not lie inside one another; {name!r} is a part of "
                f"{outer!r}. Select the block or the layers in it."
            )
    places: dict[int, list[str]] = {}
    for name, module in named.items():
        places.setdefault(id(module), []).append(name)
    for name, module in chosen.items():
        left = [place for place in places[id(module)] if place not in chosen]
        if left:
            raise SpecError(
                f"{name!r} is also used as {left[0]!r}, which is not selected. Select all places "
                "of a shared module, or none."
            )
    return chosen


def nearby(name: str, names: Iterable[str]) -> str:
    """The names most like one, for a message."""
    close = get_close_matches(name, [each for each in names if each], n=3, cutoff=0.4)
    return f" Nearest: {', '.join(map(repr, close))}." if close else ""


def _chosen(named: Mapping[str, nn.Module], select: Any) -> dict[str, nn.Module]:
    if isinstance(select, str):
        return _matching(named, [select])
    if isinstance(select, type) and issubclass(select, nn.Module):
        found = {name: module for name, module in named.items() if isinstance(module, select)}
        what = f"of class {select.__name__}"
    elif isinstance(select, (list, tuple, set, frozenset)):
        for index, pattern in enumerate(select):
            if not isinstance(pattern, str):
                raise SpecError(
                    f"patterns of select must be strings; got {brief(pattern)} at place {index}."
                )
        return _matching(named, list(select))
    elif callable(select) and not isinstance(select, (type, nn.Module)):
        try:
            found = {name: module for name, module in named.items() if select(name, module)}
        except TypeError as error:
            raise SpecError(
                f"select must be called with a name and a module; {brief(select)}: {error}."
            ) from error
        what = "for which select is true"
    else:
        raise SpecError(
            "select must be a pattern on names, patterns, a class of modules, or a function of "
            f"name and module; got {brief(select)}. Write '**.mlp', for instance."
        )
    if not found:
        kinds = sorted({type(module).__name__ for name, module in named.items() if name})
        raise SpecError(
            f"the model has no module {what}. It holds {', '.join(kinds) or 'no modules'}."
        )
    return found


def _matching(named: Mapping[str, nn.Module], patterns: list[str]) -> dict[str, nn.Module]:
    """The modules whose names match a pattern, in the model's order; every pattern must match."""
    wanted: set[str] = set()
    for pattern in patterns:
        found = _names(named, pattern)
        if not found:
            deeper = _names(named, f"**.{pattern}")
            hint = f" Did you mean '**.{pattern}'?" if deeper else nearby(pattern, named)
            raise SpecError(
                f"every pattern of select must match a module; {pattern!r} matches none.{hint} In "
                "patterns, * stands for one part of a name and ** for any number of parts."
            )
        wanted |= found
    if not wanted:
        raise SpecError("select must hold at least one pattern; got none.")
    return {name: module for name, module in named.items() if name in wanted}


def _names(named: Mapping[str, nn.Module], pattern: str) -> set[str]:
    expression = _expression(pattern)
    return {name for name in named if name and expression.fullmatch(f"{name}.")}


def _expression(pattern: str) -> re.Pattern[str]:
    """A regular expression for a dotted name with a dot behind it.

    >>> [bool(_expression("h.*.mlp").fullmatch(name)) for name in ("h.0.mlp.", "h.0.1.mlp.")]
    [True, False]
    >>> [bool(_expression("**.mlp").fullmatch(name)) for name in ("mlp.", "h.0.mlp.", "h.mlps.")]
    [True, True, False]
    """
    parts = []
    for part in pattern.split("."):
        if part == "**":
            parts.append(r"(?:[^.]+\.)*")
        else:
            pieces = (re.escape(piece).replace(r"\?", "[^.]") for piece in part.split("*"))
            parts.append("[^.]*".join(pieces) + r"\.")
    return re.compile("".join(parts))
