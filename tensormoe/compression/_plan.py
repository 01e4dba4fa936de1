"""Plan of a compression: sizes, ranks, memory and time, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heapreplace
from math import prod

from tensormoe._rounding import AUTO, BITS, checked_bits
from tensormoe._spec import LayerSpec
from tensormoe._validation import positive_int
from tensormoe.checkpoint._safetensors import ArrayInfo, Placed
from tensormoe.compression._allocated import allocated_kinds
from tensormoe.compression._bits import Names, entries_for, full_bytes, layer_bytes
from tensormoe.compression._calibrated import calibrated_group, check_calibration
from tensormoe.compression._config_file import found_config, model_types
from tensormoe.compression._effort import memory_needed, moments_needed, seconds_needed
from tensormoe.compression._gate_up import arranged
from tensormoe.compression._groups import Group, find_groups
from tensormoe.compression._patterns import takes_turns
from tensormoe.compression._quantized import Quantized, plain_tensors
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import Model, open_model
from tensormoe.compression._sharing import MOST, Form
from tensormoe.compression._values import working_dtype
from tensormoe.decomposition._choose import Sizes, candidates
from tensormoe.decomposition._runs import LARGE, tried
from tensormoe.decomposition._several import several
from tensormoe.errors import BudgetError, RankError, SpecError, TensormoeError, located
from tensormoe.factorizations import Dense, Factorization, resolve_factorization
from tensormoe.planning import PUBLISHED_ROOFLINES, Roofline


@dataclass(frozen=True)
class GroupPlan:
    """Plan for a group of experts.

    Args:
        group: the experts.
        specs: layers whose ranks are tried, the first one most likely; the largest that fits where
            a tolerance is asked for.
        budget: entries that the factors may take; None where the rank is given or found.
        memory: bytes that a process takes for it, at most, the interpreter included.
        seconds: that its decomposition takes, about.
        rows: of the calibration that its outputs are weighted by; None without one.
        bits: 8 or 4 of the factors' entries; None for entries of the group's dtype.
        form: that was chosen for it when the work began; None where none was to choose.
        limit: bytes of its share where forms are chosen, or shares are found, when work begins.
        instead: names of the groups of gate and up projection that it takes the place of if it
            loses less than both together.
    """

    group: Group
    specs: tuple[LayerSpec, ...]
    budget: int | None
    memory: int
    seconds: float
    rows: int | None = None
    bits: int | None = None
    form: Form | None = None
    limit: int | None = None
    instead: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the factors as they are stored, at most."""
        if self.limit is not None:
            return self.limit
        itemsize = self.group.itemsize
        return max(layer_bytes(spec, self.bits, itemsize) for spec in self.specs)

    @property
    def parameters(self) -> int:
        """Entries of the factors, at most."""
        return max(spec.num_parameters for spec in self.specs)


@dataclass(frozen=True)
class CompressionPlan:
    """Plan of a compression.

    Args:
        model: what the headers of its files say.
        settings: what is wanted.
        groups: in the order in which they are decomposed: layer by layer.
        quantized: tensors that are dequantized on the way, experts and others, by their name in
            what is written.
        others: groups of gate and up projection together that are tried as well, and take the place
            of two where they lose less.
    """

    model: Model
    settings: Compression
    groups: tuple[GroupPlan, ...]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    others: tuple[GroupPlan, ...] = ()

    @property
    def tried(self) -> tuple[GroupPlan, ...]:
        """All groups that are decomposed, those that may be dropped included."""
        return (*self.groups, *self.others)

    @property
    def memory(self) -> int:
        """Bytes that a process takes, at most: for the group that takes most."""
        return max(each.memory for each in self.tried)

    @property
    def seconds(self) -> float:
        """Seconds that the decompositions take, about; those of the files come on top."""
        return sum(each.seconds for each in self.tried)

    def seconds_on(self, machines: int) -> float:
        """Seconds that the decompositions take on several machines like the one of the plan.

        Each works on one group at a time, and takes the longest of those that are left: list
        scheduling, at most 4/3 of the shortest time that there is (Graham, 1969). No number of
        machines is faster than the longest group.

        Args:
            machines: how many.

        Raises:
            SpecError: ``machines`` is not a positive integer.
        """
        loads = [0.0] * min(positive_int(machines, "machines"), len(self.tried))
        for each in longest_first(self.tried):
            # the machine that is free first
            heapreplace(loads, loads[0] + each.seconds)
        return max(loads)

    @property
    def dense_entries(self) -> int:
        """Entries of the experts."""
        return sum(each.group.entries for each in self.groups)

    @property
    def parameters(self) -> int:
        """Entries of the factors, at most."""
        return self._most(lambda each: each.parameters)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the experts in the dtypes of their groups."""
        return sum(each.group.nbytes for each in self.groups)

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors as they are stored, at most."""
        return self._most(lambda each: each.nbytes)

    def _most(self, size: Callable[[GroupPlan], int]) -> int:
        """The sum of a size of the groups, whichever of the ways that are tried is the larger."""
        sizes = {each.group.name: size(each) for each in self.groups}
        apart = (sum(sizes[name] for name in each.instead) for each in self.others)
        more = (max(0, size(each) - both) for each, both in zip(self.others, apart, strict=True))
        return sum(sizes.values()) + sum(more)

    @property
    def expert_keys(self) -> frozenset[str]:
        """Keys of the experts' tensors, as they are written with ``dense``."""
        return frozenset(key for each in self.groups for key in each.group.keys)

    @property
    def plain(self) -> Mapping[str, Placed]:
        """Tensors of the model with nothing quantized; of those that were, only sizes are told."""
        return plain_tensors(self.model, self.quantized)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors that are written and are not experts."""
        keys = self.expert_keys
        return sum(each.nbytes for key, each in self.plain.items() if key not in keys)

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors that are written, at most."""
        if self.settings.dense:
            return sum(each.nbytes for each in self.plain.values())
        return self.kept_bytes + self.factor_bytes


def settings_of(plan: CompressionPlan, each: GroupPlan) -> Compression:
    """The settings of one group: its own rank or form, where each has one."""
    if each.form is not None:
        chosen = replace(plan.settings, bits=each.form.bits, share="equal", gate_up="stored")
        return replace(chosen, factorization=Dense.name, budget=None) if each.form.whole else chosen
    if plan.settings.allocation is None:
        return plan.settings
    rank = each.specs[0].factorization.rank
    return replace(plan.settings, rank=rank, allocation=None)


def longest_first(groups: Iterable[GroupPlan]) -> list[GroupPlan]:
    """Groups in the order in which several machines take them."""
    return sorted(groups, key=lambda each: -each.seconds)


def plan_compression(
    model: str | os.PathLike[str],
    settings: Compression,
    *,
    roofline: Roofline = PUBLISHED_ROOFLINES["cpu"],
) -> CompressionPlan:
    """Plan the compression of a model; reads its headers alone.

    Args:
        model: a ``.safetensors`` file, an index, or a folder with one of either kind.
        settings: what is wanted.
        roofline: the machine that times are predicted for.

    Returns:
        Every group with its shape and ranks, and what it takes in parameters, bytes and seconds.

    Raises:
        TypeError: ``model`` is neither a string nor a path.
        CheckpointError: not a model, or without experts, or with some that do not make a tensor;
            a calibration of another model.
        RankError, BudgetError: a rank or budget that a group cannot have; the message names it.
        SpecError: a factorization that can't be fitted, moments that were not gathered, or gate and
            up projection that must stay as they are stored.
    """
    opened = open_model(model)
    groups, quantized = find_groups(opened, settings.experts, settings.preset, settings.layout)
    wanted = arranged(
        groups,
        settings.gate_up,
        interleaved=takes_turns(settings.preset, model_types(found_config(opened))),
        dense=settings.dense,
        keys=opened.places,
    )
    groups, others = wanted
    check_calibration(opened, (*groups, *(each for each, _ in others)), settings)
    shares = dict(zip((each.name for each in groups), _shares(groups, settings), strict=True))
    given: Mapping[str, Factorization] = {}
    if settings.allocation is not None:
        given = allocated_kinds(groups, settings.allocation)
    return CompressionPlan(
        opened,
        settings,
        tuple(
            _planned(each, settings, shares[each.name], given.get(each.name), roofline)
            for each in groups
        ),
        quantized,
        tuple(
            replace(
                _planned(both, settings, _together(both, parts, shares, settings), None, roofline),
                instead=parts,
            )
            for both, parts in others
        ),
    )


def _together(
    both: Group,
    parts: Sequence[str],
    shares: Mapping[str, int | None],
    settings: Compression,
) -> int | None:
    """Entries of the factors of a group that may take the place of two: what these have."""
    if isinstance(settings.budget, float):
        return _shares([both], settings)[0]
    return sum(shares[name] or 0 for name in parts)


def _shares(groups: Sequence[Group], settings: Compression) -> list[int | None]:
    """Entries that the factors of each group may take."""
    budget = settings.budget
    if budget is None:
        return [None] * len(groups)
    if isinstance(budget, float):
        bits = planned_bits(settings)
        if bits is not None:
            return [_entries(group, settings, int(budget * group.nbytes), bits) for group in groups]
        return [int(budget * group.entries) for group in groups]
    whole = sum(group.entries for group in groups)
    return [budget * group.entries // whole for group in groups]


def _entries(group: Group, settings: Compression, size: int, bits: int) -> int:
    """Entries of few bits that fit in bytes.

    Raises:
        BudgetError: none do.
    """
    try:
        names: Names = settings.factorization
        return entries_for(names, group.sizes, size, bits, group.itemsize)
    except TensormoeError as error:
        raise located(error, repr(group.name)) from None


def _planned(
    group: Group,
    settings: Compression,
    share: int | None,
    given: Factorization | None,
    roofline: Roofline,
) -> GroupPlan:
    sizes, bits = group.sizes, _checked_bits(group, settings)
    name = settings.factorization
    try:
        kinds: tuple[Factorization, ...]
        if given is not None:
            kinds = (given,)
        elif settings.tolerance is not None or share is not None:
            most = group.entries - 1 if share is None else share
            if most < 1:
                raise BudgetError("a budget must leave every group an entry; got none.")
            if settings.share != "equal":
                # what a group may get; the likeliest first
                largest = min(int(MOST * most), group.entries - 1)
                kinds = (*_within(name, sizes, most), *_within(name, sizes, largest))
            else:
                kinds = _within(name, sizes, most)
        else:
            assert isinstance(name, str)
            kinds = (resolve_factorization(name, settings.rank),)
        specs = tuple(LayerSpec(*sizes, kind, bias=False) for kind in kinds)
        _check_smaller(specs[0], group, bits)
    except TensormoeError as error:
        raise located(error, repr(group.name)) from None
    itemsize = ArrayInfo(working_dtype(group.dtype), ()).nbytes
    compare = compares(settings)
    memory = max(memory_needed(spec, itemsize, compare) for spec in specs)
    calibrated = calibrated_group(group, settings)
    if calibrated is not None:
        memory += moments_needed(specs[0], itemsize, calibrated.apart)
    seconds = seconds_needed(specs, itemsize, compare, roofline)
    rows = None if calibrated is None else calibrated.rows
    limit = None
    if settings.share != "equal" or settings.bits == AUTO:
        whole = settings.budget
        limit = full_bytes(share or 0, bits, group.itemsize)
        limit = int(whole * group.nbytes) if isinstance(whole, float) else limit
    return GroupPlan(group, specs, share, memory, seconds, rows, bits, limit=limit)


def compares(settings: Compression) -> bool:
    """Whether truncated singular value decompositions are compared with.

    Of as many entries as the experts have, they are the experts themselves.
    """
    return settings.compare and settings.factorization != Dense.name


def _checked_bits(group: Group, settings: Compression) -> int | None:
    """Bits of the factors; None for entries of the group's dtype.

    Raises:
        SpecError: 16 bits of wider numbers.
    """
    if settings.bits == 16 and group.itemsize != 2:
        raise SpecError(
            f"{group.name!r}: 16 bits are of models in bfloat16 or float16; got {group.dtype}. "
            "Convert the model first, or take 8 bits."
        )
    return planned_bits(settings)


def planned_bits(settings: Compression) -> int | None:
    """Bits that a plan counts with: where they are chosen, those that leave the most entries."""
    return min(BITS) if settings.bits == AUTO else checked_bits(settings.bits)


@lru_cache(maxsize=256)
def _within(name: str | tuple[str, ...], sizes: Sizes, budget: int) -> tuple[Factorization, ...]:
    """Factorizations within a budget; the layers of a model mostly have the same sizes."""
    rows, columns, experts = sizes
    large = rows * columns * prod(experts) > LARGE
    choice = several(name, None)
    if choice is None:
        found = candidates(name, sizes, budget, False)  # type: ignore[arg-type]
        return tuple(found[:1] if large else found)
    names = choice.within(sizes, budget, False, large)
    listed = [candidates(each, sizes, budget, False) for each in names]
    return tuple(kind for each in listed for kind in (each[:1] if large else tried(each)))


def _check_smaller(spec: LayerSpec, group: Group, bits: int | None) -> None:
    """Refuse factors that are not smaller than what they stand for."""
    if bits is not None:
        size = layer_bytes(spec, bits, group.itemsize)
        if size >= group.nbytes:
            raise RankError(
                f"factors must have fewer bytes than the experts' {group.nbytes:,}; got {size:,} "
                f"for {spec.factorization!r} of {bits} bits. Lower the rank."
            )
    elif spec.num_parameters >= group.entries:
        raise RankError(
            f"factors must have fewer entries than the experts' {group.entries:,}; got "
            f"{spec.num_parameters:,} for {spec.factorization!r}. Lower the rank."
        )
