"""Patterns against the keys of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensormoe.compression._patterns import AUTO, PRESETS, Pattern, Preset, closest, fitting
from tensormoe.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """Keys of the experts of one layer and one projection.

    Args:
        name: their key, with a ``*`` for the expert's number; a stack's own key.
        projection: which of the patterns it was.
        keys: by the expert's number; None for a stack.
    """

    name: str
    projection: int
    keys: Mapping[int, str] | None


def find_matches(
    shapes: Shapes, experts: tuple[str, ...], preset: str | None, model_types: tuple[str, ...] = ()
) -> list[Match]:
    """Find the keys that patterns, or those of a preset, match.

    Args:
        shapes: of all tensors of a model by key.
        experts: patterns; none with a preset.
        preset: name of a known family; ``"auto"`` for that of the model.
        model_types: of the model and its parts, as its configuration names them.

    Raises:
        CheckpointError: a pattern matches nothing, or what another one does; no preset or several
            fit the model.
    """
    if preset == AUTO:
        return _automatic(shapes, model_types)
    if preset is None:
        found = _matched(experts, shapes, None)
        missing = _unmatched(experts, found)
        if not missing:
            return found
        raise _nothing(missing, "", shapes)
    known = PRESETS[preset]
    matches = _of_preset(known, shapes)
    if matches is not None:
        return matches
    wanted = [text for texts in known.alternatives for text in texts]
    raise _nothing(wanted, f" of the preset {preset!r}", shapes)


def _of_preset(known: Preset, shapes: Shapes) -> list[Match] | None:
    """Keys of the first way of writing that matches; None if none does."""
    for texts in known.alternatives:
        found = _matched(texts, shapes, known.stacked)
        if not _unmatched(texts, found):
            return found
    return None


def _automatic(shapes: Shapes, model_types: tuple[str, ...]) -> list[Match]:
    """Keys of the preset for the model's type; of the only one that fits where that does not."""
    for known in PRESETS.values():
        if {*known.model_types} & {*model_types}:
            found = _of_preset(known, shapes)
            if found is not None:
                return found
    fits: dict[frozenset[str], tuple[str, list[Match]]] = {}
    for name in fitting(shapes):
        matches = _of_preset(PRESETS[name], shapes)
        if matches is not None:
            fits.setdefault(frozenset(each.name for each in matches), (name, matches))
    if len(fits) == 1:
        ((_, matches),) = fits.values()
        return matches
    shown = f"the model type {model_types[0]!r}" if model_types else "a model without config.json"
    if fits:
        names = ", ".join(repr(name) for name, _ in fits.values())
        raise CheckpointError(
            f"one preset must fit the keys of a model; for {shown} {names} do. Name one of them "
            "with --preset, or give patterns with --experts."
        )
    raise CheckpointError(
        f"a preset must match matrices of experts; for {shown} none matches any of "
        f"{len(shapes):,} keys. {_remedies([], shapes)}"
    )


def _matched(texts: tuple[str, ...], shapes: Shapes, stacked: bool | None) -> list[Match]:
    """Keys that each pattern matches; of matrices alone, or of stacks alone, or of both."""
    owners: dict[str, str] = {}
    keys: dict[tuple[int, str], dict[int, str]] = {}
    stacks: list[Match] = []
    for place, text in enumerate(texts):
        pattern = Pattern(text)
        for key, shape in shapes.items():
            numbered = None if stacked else pattern.number(key)
            if numbered is not None and len(shape) != 3:
                name, number = numbered
                keys.setdefault((place, name), {})[number] = key
            elif stacked is not False and len(shape) == 3 and pattern.matches(key):
                stacks.append(Match(key, place, None))
            else:
                continue
            if key in owners:
                raise CheckpointError(
                    f"patterns must match a key once; {key!r} is matched by {owners[key]!r} and "
                    f"{text!r}. Make them narrower."
                )
            owners[key] = text
    numbered_ones = (Match(name, place, found) for (place, name), found in keys.items())
    return [*numbered_ones, *stacks]


def _unmatched(texts: tuple[str, ...], found: list[Match]) -> list[str]:
    there = {match.projection for match in found}
    return [text for index, text in enumerate(texts) if index not in there]


def _nothing(missing: list[str], of: str, shapes: Shapes) -> CheckpointError:
    """The error for patterns that match no key, with keys that are close."""
    return CheckpointError(
        f"a pattern must match matrices of experts; {missing[0]!r}{of} matches none of "
        f"{len(shapes):,} keys. {_remedies(missing, shapes)}"
    )


def _remedies(missing: list[str], shapes: Shapes) -> str:
    """Presets that fit, and patterns that are close."""
    remedies = []
    if presets := fitting(shapes):
        remedies.append(f"What does: the preset {presets[0]!r}.")
    if near := closest(missing, shapes):
        remedies.append(f"Close to it: {', '.join(map(repr, near))}.")
    return " ".join(remedies) or "Look at the keys of the model, and give a pattern with --experts."
