"""Groups: the experts of one layer and one projection, checked against one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from tensormoe.checkpoint._safetensors import ArrayInfo, Placed
from tensormoe.compression._config_file import found_config, model_types
from tensormoe.compression._match import Match, find_matches
from tensormoe.compression._patterns import AUTO, PRESETS
from tensormoe.compression._quantized import (
    REMEDY,
    Quantized,
    check_formats,
    described,
    find_quantized,
    plain_tensors,
    stored_keys,
)
from tensormoe.compression._shards import Model
from tensormoe.errors import CheckpointError

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_LISTED = 5


@dataclass(frozen=True)
class Pair:
    """Gate and up projection of a group, where files have them in another way.

    Args:
        role: ``"gate_up_proj"`` of both side by side, which files have apart; ``"gate_proj"`` or
            ``"up_proj"`` of one of them, of a stack of both.
        key: in the files: of the gate projections, with a ``*`` for the expert's number; a stack's
            own key.
        interleaved: whether the outputs of both take turns in the stack; else they are halves.
    """

    role: str
    key: str
    interleaved: bool = False


@dataclass(frozen=True)
class Group:
    """The experts of one layer and one projection, decomposed as one tensor (experts, in, out).

    Args:
        name: their key, with a ``*`` for the expert's number; a stack's own key.
        keys: of the tensors: one per expert in the order of their numbers, or the stack's; of
            quantized ones those that they have once they are not.
        stacked: whether one tensor holds all experts, with their axis first.
        experts: how many.
        in_features: size of an input.
        out_features: size of an output.
        transposed: whether a matrix is stored as (out, in), as PyTorch's linear layers do.
        dtype: that the experts are stored in: ``"bfloat16"``, ``"float16"``, ``"float32"`` or
            ``"float64"``; bfloat16 for quantized ones.
        quantized: the tensors among them that are dequantized on the way.
        pair: of gate and up projection, where the group has them in another way than the files: the
            keys are then those of all gate and then of all up projections, or that of a stack of
            both.
    """

    name: str
    keys: tuple[str, ...]
    stacked: bool
    experts: int
    in_features: int
    out_features: int
    transposed: bool
    dtype: str
    quantized: tuple[Quantized, ...] = ()
    pair: Pair | None = None

    @property
    def width(self) -> int:
        """Outputs of a matrix in the files."""
        if self.pair is None:
            return self.out_features
        return self.out_features * 2 if self.stacked else self.out_features // 2

    @property
    def taken(self) -> slice:
        """Outputs of a matrix in the files that are the group's."""
        if self.pair is None or not self.stacked:
            return slice(0, self.width, 1)
        second = self.pair.role == "up_proj"
        if self.pair.interleaved:
            return slice(int(second), self.width, 2)
        half = self.out_features
        return slice(half * second, half * second + half, 1)

    def sources(self, number: int) -> tuple[tuple[str, slice], ...]:
        """Keys of an expert's matrices, each with the outputs of the group that come from it."""
        if self.stacked:
            return ((self.keys[0], slice(0, self.out_features)),)
        starts = range(0, self.out_features, self.width)
        return tuple(
            (self.keys[part * self.experts + number], slice(start, start + self.width))
            for part, start in enumerate(starts)
        )

    @property
    def stored_keys(self) -> frozenset[str]:
        """Keys of the tensors on disk."""
        names = {each.name for each in self.quantized}
        return stored_keys(self.quantized) | (frozenset(self.keys) - names)

    @property
    def entries(self) -> int:
        """Entries of all experts together."""
        return self.experts * self.in_features * self.out_features

    @property
    def sizes(self) -> tuple[int, int, tuple[int, ...]]:
        """In, out, and the experts."""
        return self.in_features, self.out_features, (self.experts,)

    @property
    def itemsize(self) -> int:
        """Bytes of an entry in the dtype."""
        return ArrayInfo(self.dtype, ()).nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all experts in the dtype."""
        return self.entries * self.itemsize

    @property
    def label(self) -> str:
        """The name, as far as a reader needs it."""
        return self.name.removesuffix(".weight").removeprefix("model.")


def find_groups(
    model: Model, experts: tuple[str, ...], preset: str | None, layout: str
) -> tuple[tuple[Group, ...], Mapping[str, Quantized]]:
    """The groups of a model, layer by layer.

    Args:
        model: its headers.
        experts: patterns, or none with a preset.
        preset: name of a known family.
        layout: how a matrix is stored: ``"out_in"``, ``"in_out"``, or ``"auto"``, which is as
            PyTorch's linear layers do, and for stacks what the sizes of two projections say.

    Returns:
        The groups, and the quantized tensors of the model, also of what are not experts.

    Raises:
        CheckpointError: a pattern that matches nothing, or what another one does; experts that are
            missing, or that differ in shape or dtype; tensors that are not matrices of
            floating-point numbers, nor of a format that is dequantized.
    """
    config = found_config(model)
    check_formats(model, config, _texts(experts, preset))
    quantized = find_quantized(model, config)
    plain = plain_tensors(model, quantized)
    shapes = {key: each.shape for key, each in plain.items()}
    matches = find_matches(shapes, experts, preset, model_types(config))
    _check_floats(matches, plain, config)
    groups = [_group(match, plain, quantized, layout != "in_out") for match in matches]
    if layout == "auto":
        groups = _oriented(groups, matches)
    _check_counts(groups)
    return tuple(sorted(groups, key=lambda group: _natural(group.name))), quantized


def _texts(experts: tuple[str, ...], preset: str | None) -> Sequence[str]:
    """Patterns that are looked for."""
    if preset is None:
        return experts
    known = PRESETS.values() if preset == AUTO else [PRESETS[preset]]
    return [text for each in known for texts in each.alternatives for text in texts]


def _check_floats(
    matches: list[Match], plain: Mapping[str, Placed], config: Mapping[str, Any]
) -> None:
    """Refuse experts of a dtype that is not one of their values.

    Raises:
        CheckpointError: some are; the message names the format.
    """
    for match in matches:
        for key in [match.name] if match.keys is None else match.keys.values():
            each = plain[key]
            if each.info is None or each.info.dtype not in _FLOATS:
                found = each.code if each.info is None else each.info.dtype
                raise CheckpointError(
                    f"experts must be one of {', '.join(_FLOATS)}, FP8 with weight_scale_inv, or "
                    f"MXFP4; got {found} for {key!r}, of {described(config, 'no known format')}. "
                    f"{REMEDY}"
                )


def _group(
    match: Match,
    plain: Mapping[str, Placed],
    quantized: Mapping[str, Quantized],
    transposed: bool,
) -> Group:
    keys: tuple[str, ...] = (match.name,)
    if match.keys is not None:
        count = max(match.keys) + 1
        missing = [number for number in range(min(count, 2**20)) if number not in match.keys]
        if missing:
            raise CheckpointError(
                f"experts must be numbered from 0 without gaps; of {match.name!r}, "
                f"{_some(missing)} of {count} are missing. Complete the checkpoint, or narrow the "
                "pattern."
            )
        keys = tuple(match.keys[number] for number in range(count))
    placed = [plain[key] for key in keys]
    shape = _agreed(match.name, placed)
    *leading, rows, columns = shape
    sizes = (columns, rows) if transposed else (rows, columns)
    experts = leading[0] if match.keys is None else len(keys)
    info = placed[0].info
    assert info is not None
    kept = tuple(quantized[key] for key in keys if key in quantized)
    stacked = match.keys is None
    return Group(match.name, keys, stacked, experts, *sizes, transposed, info.dtype, kept)


def _agreed(name: str, placed: list[Placed]) -> tuple[int, ...]:
    """The shape of all experts.

    Raises:
        CheckpointError: they differ, or there is nothing to decompose.
    """
    kinds = Counter((each.shape, each.code) for each in placed)
    (shape, code), _ = kinds.most_common(1)[0]
    if len(kinds) > 1:
        others = [each for each in placed if (each.shape, each.code) != (shape, code)]
        listed = _some([f"{each.name!r} {each.shape} {each.code}" for each in others])
        raise CheckpointError(
            f"experts must have one shape and dtype; of {name!r}, {len(placed) - len(others)} are "
            f"{shape} {code}, and these are not: {listed}. Decompose them apart, with patterns of "
            "their own."
        )
    if len(shape) not in (2, 3) or 0 in shape:
        raise CheckpointError(
            f"experts must be matrices, or a stack of them, none of their sizes 0; got {shape} for "
            f"{placed[0].name!r}. Narrow the pattern."
        )
    return shape


def _oriented(groups: list[Group], matches: list[Match]) -> list[Group]:
    """Stacks turned the way in which two projections of a layer fit.

    The first projection makes gate and up together, 2·H of them, from I inputs; the second makes I
    of H. So stored as (experts, in, out) they have the shapes (I, 2H) and (H, I), and as (experts,
    out, in) (2H, I) and (I, H); no sizes are both.
    """
    layers: dict[str, list[Group]] = {}
    for _, group in sorted(zip(matches, groups, strict=True), key=lambda k: k[0].projection):
        if group.stacked:
            layers.setdefault(_layer(group), []).append(group)
    found: set[str] = set()
    for layer, pair in layers.items():
        # as read: (out, in)
        shapes = [(each.out_features, each.in_features) for each in pair]
        if len(shapes) == 2 and shapes[0] == (2 * shapes[1][1], shapes[1][0]):
            continue
        if len(shapes) != 2 or shapes[0] != (shapes[1][1], 2 * shapes[1][0]):
            raise CheckpointError(
                f"the sizes of the stacks in {layer!r} must tell inputs from outputs; got "
                f"{_some(shapes)}. Say --layout out_in or --layout in_out."
            )
        found |= {each.name for each in pair}
    return [_turned(group) if group.name in found else group for group in groups]


def _turned(group: Group) -> Group:
    return replace(
        group,
        in_features=group.out_features,
        out_features=group.in_features,
        transposed=False,
    )


def _check_counts(groups: list[Group]) -> None:
    """Refuse projections of a layer with unequal numbers of experts: the last may be missing."""
    for layer, listed in groupby(sorted(groups, key=_layer), key=_layer):
        counts = {group.name: group.experts for group in listed}
        if len(set(counts.values())) > 1:
            raise CheckpointError(
                f"the projections of a layer must have equally many experts; in {layer!r} there "
                f"are {', '.join(f'{count} of {name!r}' for name, count in counts.items())}. "
                "Complete the checkpoint, or narrow the patterns."
            )


def _layer(group: Group) -> str:
    if not group.stacked:
        return group.name[: group.name.rindex("*")]
    return group.name.removesuffix(".weight").rpartition(".")[0]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _some(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:_LISTED]))
    return shown if len(values) <= _LISTED else f"{shown} and {len(values) - _LISTED} more"
