"""Gate and up projection of experts as one tensor or as two, as is wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tensormoe.compression._folder import place_of
from tensormoe.compression._groups import Group, Pair
from tensormoe.errors import CheckpointError, SpecError

GATE_UP = ("stored", "joined", "apart", "auto")
"""Ways to take gate and up projection: as they are stored; as one tensor, (experts, in, 2 ·
hidden); as two; or in each layer as the one of both ways that loses less."""

_BOTH, _GATE, _UP = "gate_up_proj", "gate_proj", "up_proj"
_AS_STORED = "Leave gate_up as 'stored' (--gate-up stored)."

Others = tuple[tuple[Group, tuple[str, str]], ...]
"""Groups of both projections, each with the names of the two groups that it may replace."""


def arranged(
    groups: tuple[Group, ...],
    gate_up: str,
    *,
    interleaved: bool,
    dense: bool,
    keys: Collection[str],
) -> tuple[tuple[Group, ...], Others]:
    """Groups with gate and up projection as wanted.

    Args:
        groups: as the files have them.
        gate_up: one of :data:`GATE_UP`.
        interleaved: whether both take turns in stacks of the model, which gates in a way of its own
            that takes both at once.
        dense: whether matrices are written, so that no loader has to gate.
        keys: of all tensors of the model.

    Returns:
        The groups, and with ``"auto"`` those of both projections, which may replace two of them.

    Raises:
        CheckpointError: names that do not tell projections, experts without a gate, one projection
            without the other, or two that differ in size or dtype.
        SpecError: gate and up projection that must stay as they are.
    """
    if gate_up == "stored":
        return groups, ()
    found: list[Group] = []
    others: list[tuple[Group, tuple[str, str]]] = []
    pairs = 0
    layers = _layers(groups)
    for group in groups:
        module, role = _placed(group)
        both = layers[module]
        if role == _BOTH:
            pairs += 1
            if gate_up == "joined":
                found.append(group)
                continue
            _check_apart(group, gate_up, interleaved, dense, keys)
            parts = _split(group, interleaved)
            found.extend(parts)
            if gate_up == "auto":
                others.append((group, (parts[0].name, parts[1].name)))
        elif role == _GATE:
            pairs += 1
            if gate_up == "apart":
                found.append(group)
                continue
            if interleaved and not dense:
                raise SpecError(_own_gate(group, gate_up))
            joined = _joined(group, both[_UP])
            found.extend([joined] if gate_up == "joined" else [group])
            if gate_up == "auto":
                others.append((joined, (group.name, both[_UP].name)))
        elif role != _UP or gate_up != "joined":
            found.append(group)
    if not pairs:
        raise CheckpointError(
            f"gate_up={gate_up!r} needs experts with a gate; none of the {len(groups)} groups is a "
            f"gate or up projection. {_AS_STORED}"
        )
    return tuple(found), tuple(others)


def _layers(groups: Sequence[Group]) -> Mapping[str, Mapping[str, Group]]:
    """Groups by module and role.

    Raises:
        CheckpointError: a gate without an up projection, or the other way round.
    """
    layers: dict[str, dict[str, Group]] = {}
    for group in groups:
        module, role = _placed(group)
        layers.setdefault(module, {})[role] = group
    for module, roles in layers.items():
        there = [role for role in (_GATE, _UP) if role in roles]
        if len(there) == 1:
            lacking = _UP if there == [_GATE] else _GATE
            raise CheckpointError(
                f"gate and up projection must both be among the groups to be joined or taken "
                f"apart; {module!r} has {roles[there[0]].name!r} and no {lacking}. Give patterns "
                f"of both; for experts without a gate, leave gate_up as 'stored' (--gate-up "
                "stored)."
            )
    return layers


def _placed(group: Group) -> tuple[str, str]:
    """Module and role of a group.

    Raises:
        CheckpointError: its name does not tell them.
    """
    place = place_of(group)
    if place is None:
        raise CheckpointError(
            f"gate and up projection must be told by names to be joined or taken apart; "
            f"{group.name!r} does not tell which projection it is. {_AS_STORED}"
        )
    return place.module, place.role


def _joined(gate: Group, up: Group) -> Group:
    """Both projections of files that have a tensor per expert.

    Raises:
        CheckpointError: they differ in size or dtype.
    """
    if _described(gate) != _described(up):
        raise CheckpointError(
            f"gate and up projection must have the same sizes and dtype to be joined; "
            f"{gate.name!r} is {_described(gate)}, {up.name!r} is {_described(up)}. {_AS_STORED}"
        )
    stem = gate.name.removesuffix(".weight")
    ending = gate.name[len(stem) :]
    last = up.name.removesuffix(".weight").rpartition(".")[2]
    return replace(
        gate,
        name=f"{stem}+{last}{ending}",
        keys=gate.keys + up.keys,
        out_features=2 * gate.out_features,
        quantized=gate.quantized + up.quantized,
        pair=Pair(_BOTH, gate.name),
    )


def _described(group: Group) -> str:
    sizes = (group.experts, group.in_features, group.out_features)
    return f"{' × '.join(map(str, sizes))} {group.dtype}"


def _split(stack: Group, interleaved: bool) -> tuple[Group, Group]:
    """The projections of a stack of both.

    Raises:
        CheckpointError: an odd number of outputs.
    """
    if stack.out_features % 2:
        raise CheckpointError(
            f"a stack of gate and up projection must have an even number of outputs; got "
            f"{stack.out_features} for {stack.name!r}. {_AS_STORED}"
        )
    stem = stack.name.removesuffix(".weight")
    gate, up = (
        replace(
            stack,
            name=f"{stem}:{role.removesuffix('_proj')}{stack.name[len(stem) :]}",
            out_features=stack.out_features // 2,
            pair=Pair(role, stack.name, interleaved),
        )
        for role in (_GATE, _UP)
    )
    return gate, up


def _check_apart(
    stack: Group, gate_up: str, interleaved: bool, dense: bool, keys: Collection[str]
) -> None:
    """Refuse to take apart what a loader could not put together.

    Raises:
        SpecError: a gate of the experts' own, or biases of both projections in one tensor.
    """
    if dense:
        return
    if interleaved:
        raise SpecError(_own_gate(stack, gate_up))
    bias = f"{stack.name.removesuffix('.weight')}_bias"
    if bias in keys:
        raise SpecError(
            f"gate and up projection must stay one where their biases are; got gate_up={gate_up!r} "
            f"with {bias!r}. Leave gate_up as 'stored', or write matrices (--dense)."
        )


def _own_gate(group: Group, gate_up: str) -> str:
    return (
        "experts that gate in a way of their own take both projections as one layer, in turns; got "
        f"gate_up={gate_up!r} for {group.name!r}. Leave gate_up as 'stored', or write matrices "
        "(--dense)."
    )
