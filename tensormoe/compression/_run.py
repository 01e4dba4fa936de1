"""A model compressed group by group, and written shard by shard."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from tensormoe import __version__
from tensormoe.checkpoint import peek_checkpoint
from tensormoe.checkpoint._files import checkpoint_path, write_whole
from tensormoe.compression._folder import (
    CONFIG,
    README,
    config_bytes,
    place_of,
    readme,
    whole_model,
)
from tensormoe.compression._measure import GroupReport, stored_errors
from tensormoe.compression._plan import (
    CompressionPlan,
    GroupPlan,
    plan_compression,
)
from tensormoe.compression._resume import Work, open_work
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import INDEX_SUFFIX
from tensormoe.compression._values import read_stack, rounded, working_dtype
from tensormoe.compression._write import (
    Rebuilt,
    copy_index,
    kept_name,
    side_files,
    write_dense,
    write_factors,
    write_index,
    write_rest,
)
from tensormoe.decomposition._controls import Control
from tensormoe.decomposition._decompose import decompose
from tensormoe.decomposition._gauge import robust
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._watch import Callback, Progress
from tensormoe.errors import CheckpointError, PlanError, TensormoeError

__all__ = ["CompressionCallback", "CompressionProgress", "CompressionResult", "compress_checkpoint"]

EXPERTS = "experts"


@dataclass(frozen=True)
class CompressionProgress:
    """Progress of a compression.

    Args:
        stage: ``"experts"``, which are decomposed first, or ``"files"``, which are written then.
        name: of the group or the file that is next, or at work; ``""`` when the stage is over.
        done: how much of the stage is done: entries of experts, or bytes of tensors.
        total: how much there is.
        search: of the group, after each of its sweeps; else None.
    """

    stage: str
    name: str
    done: int
    total: int
    search: Progress | None = None


CompressionCallback: TypeAlias = Callable[[CompressionProgress], "bool | None"]
"""Called around every group and file, every few megabytes that are written, and after every sweep,
where True ends the search for that group. Of an output that was whole before, nothing is told."""


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model.

    Args:
        output: absolute path of its folder.
        groups: what became of each group of experts, layer by layer.
    """

    output: str
    groups: tuple[GroupReport, ...]

    @property
    def dense_parameters(self) -> int:
        """Entries of the experts of all groups."""
        return sum(each.dense_parameters for each in self.groups)

    @property
    def parameters(self) -> int:
        """Entries of the factors of all groups."""
        return sum(each.parameters for each in self.groups)


def compress_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Compression,
    *,
    max_memory: int | None = None,
    callback: CompressionCallback | None = None,
) -> CompressionResult:
    """Decompose the experts of a model, a group at a time, and write it anew.

    The output appears under its name when all of it is written. Killed before, the same call goes
    on where it was, and ends with the same bytes.

    Args:
        model: a ``.safetensors`` file, an index, or a folder with one of either kind.
        output: a folder that does not exist yet, or is empty. By default it gets ``experts/``, one
            checkpoint for each group that every framework's ``MuMoE.load`` opens; the model without
            its experts, byte for byte; an index and a ``config.json`` with which
            ``from_pretrained`` opens all of it after ``import tensormoe_torch.huggingface``;
            ``README.md``, and ``tensormoe.json``, which says what came from where. With ``dense``
            it gets the files of the model, with rebuilt experts.
        settings: what is wanted.
        max_memory: bytes that the process may take, the interpreter included.
        callback: called with a :class:`CompressionProgress` whenever there is some; True after a
            sweep ends the search for that group with the best factors so far.

    Returns:
        Where the output is, and for each group its rank, its size and what was lost.

    Raises:
        TypeError: a path is neither a string nor a path.
        CheckpointError: a model that can't be read, experts that make no tensor or aren't finite,
            or an output that is the model's own folder or somebody else's, that another process is
            at work on, or that can't be written.
        RankError, BudgetError: a rank or budget that a group cannot have; the message names it.
        SpecError: a factorization that can't be fitted.
        PlanError: ``max_memory`` is too little; nothing was read then but headers.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and the same call goes on from there.
        ImportError: NumPy is not installed.
    """
    plan = plan_compression(model, settings)
    _check_memory(plan, max_memory)
    _check_apart(model, output)
    command = {
        "version": __version__,
        "model": plan.model.name,
        "shards": plan.model.identity,
        **settings.to_dict(),
    }
    # matrices are rebuilt from factors that nobody needs afterwards
    temporary = EXPERTS if settings.dense else None
    with open_work(output, command) as work:
        if work.manifest is not None:
            work.finish(work.manifest, temporary)
            return CompressionResult(work.target, tuple(map(_report, work.manifest["groups"])))
        _check_disk(plan, work)
        try:
            reports = _made(plan, work, _Teller(callback))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_resumed(plan, work)) from None
        manifest = {
            "command": command,
            "groups": [{**_as_dict(report), "seconds": None} for report in reports],
        }
        work.finish(manifest, temporary)
        return CompressionResult(work.target, reports)


def _made(plan: CompressionPlan, work: Work, tell: _Teller) -> tuple[GroupReport, ...]:
    """Every group that is not there yet, then every file."""
    files = _files(plan)
    done = 0
    for each in plan.groups:
        tell(EXPERTS, each.group.label, done, plan.dense_entries)
        path = work.path(EXPERTS, files[each.group.name])
        if each.group.name not in work.done or not os.path.isfile(path):
            follow = tell.searching(each.group.label, done, plan.dense_entries)
            work.record(each.group.name, _as_dict(_compress(plan, each, path, follow)))
        done += each.group.entries
    tell(EXPERTS, "", done, plan.dense_entries)
    _write(plan, work, files, tell)
    return tuple(_report(work.done[each.group.name]) for each in plan.groups)


def _resumed(plan: CompressionPlan, work: Work) -> str:
    """Message of a compression that was interrupted."""
    if not work.done:
        return "nothing is done yet"
    return (
        f"{len(work.done)} of {len(plan.groups)} groups are done, in {work.folder!r}; the same "
        "command goes on from there"
    )


class _Teller:
    """Report progress to the callback."""

    def __init__(self, callback: CompressionCallback | None) -> None:
        self._callback = callback

    def __call__(self, stage: str, name: str, done: int, total: int) -> None:
        if self._callback is not None:
            self._callback(CompressionProgress(stage, name, done, total))

    def searching(self, name: str, done: int, total: int) -> Callback | None:
        """For the sweeps of a group."""
        callback = self._callback
        if callback is None:
            return None

        def told(search: Progress) -> bool | None:
            named = replace(search, name=name)
            return callback(CompressionProgress(EXPERTS, name, done, total, named))

        return told


def _compress(
    plan: CompressionPlan, each: GroupPlan, path: str, callback: Callback | None
) -> GroupReport:
    """Decompose one group, and write its factors.

    Raises:
        KeyboardInterrupt: the group is left as it is for another time.
    """
    settings, group = plan.settings, each.group
    stack = read_stack(plan.model, group)
    try:
        found = decompose(
            stack,
            settings.factorization,
            rank=settings.rank,
            budget=each.budget,
            tolerance=settings.tolerance,
            search=Search(seconds=settings.seconds),
            callback=callback,
            compare=settings.compare,
            seed=settings.seed,
        )
    except TensormoeError as reason:
        raise type(reason)(f"{group.name!r}: {reason}") from reason
    if found.report.ended == "interrupted":
        # factors of half a search would stay for good
        raise KeyboardInterrupt
    config = found.config()
    # matrices are rebuilt from factors that were never rounded
    stored = working_dtype(group.dtype) if settings.dense else group.dtype
    best = found.factors
    if stored != working_dtype(group.dtype):
        best = robust(config.spec.network, best)
    factors = {f"factors.{name}": rounded(array, stored) for name, array in best.items()}
    error, errors = stored_errors(stack, config, factors, group.dtype, settings.dense)
    place = None if settings.dense else place_of(group)
    write_factors(path, config, factors, stored, "" if place is None else place.prefix)
    return GroupReport(
        group.name,
        None if settings.dense else f"{EXPERTS}/{os.path.basename(path)}",
        group.experts,
        group.in_features,
        group.out_features,
        group.dtype,
        config.spec.factorization.rank,
        group.entries,
        config.spec.num_parameters,
        error,
        errors,
        found.report.controls,
        found.report.seconds,
        found.report.ended,
    )


def _write(plan: CompressionPlan, work: Work, files: Mapping[str, str], tell: _Teller) -> None:
    """Every shard that is not there yet, and what belongs to the model besides."""
    model, dense = plan.model, plan.settings.dense
    dropped = frozenset() if dense else plan.expert_keys
    groups = {
        key: (work.path(EXPERTS, files[each.group.name]), each.group)
        for each in plan.groups
        for key in each.group.keys
    }
    # factors are held as far as the tensor that they came from was
    rebuilt = Rebuilt(groups, 4 * max(each.group.entries for each in plan.groups))
    total = model.nbytes if dense else plan.kept_bytes
    done = 0
    for shard in model.shards:
        sizes = [k.end - k.begin for key, k in shard.entries.items() if key not in dropped]
        path = work.path(shard.name if dense else kept_name(shard.name))
        start = done

        def report(count: int, name: str = shard.name) -> None:
            nonlocal done
            done += count
            tell("files", name, done, total)

        # a shard has its name when it is whole
        if not os.path.isfile(path) and sizes:
            tell("files", shard.name, done, total)
            if dense:
                write_dense(shard, rebuilt, path, report)
            else:
                write_rest(shard, dropped, path, report)
        done = start + sum(sizes)
    tell("files", "", total, total)
    if not dense:
        _describe(plan, work, files)
    elif model.index is not None:
        copy_index(model, work.path(model.index))
    for name in side_files(model):
        assert model.folder is not None
        if dense or name not in (CONFIG, README):
            _copy(os.path.join(model.folder, name), work.path(name))


def _describe(plan: CompressionPlan, work: Work, files: Mapping[str, str]) -> None:
    """Write the files that describe a factorized model: index, config, README."""
    model = plan.model
    headers = {
        f"{EXPERTS}/{files[each.group.name]}": peek_checkpoint(
            work.path(EXPERTS, files[each.group.name])
        )
        for each in plan.groups
    }
    configs = [
        (each.group, header.config)
        for each, header in zip(plan.groups, headers.values(), strict=True)
    ]
    whole = whole_model(model, configs, plan.expert_keys)
    added = {} if whole.config is None else headers
    index = model.index or f"model{INDEX_SUFFIX}"
    write_index(model, plan.expert_keys, added, work.path(index))
    if whole.config is not None:
        write_whole(work.path(CONFIG), (config_bytes(whole.config),))
    before = plan.dense_entries
    after = sum(work.done[each.group.name]["parameters"] for each in plan.groups)
    summary = (
        f"Its experts are stored as factors ({plan.settings.factorization}): {after:,} parameters "
        f"in place of {before:,}."
    )
    write_whole(work.path(README), (readme(model, whole, summary).encode(),))


def _copy(source: str, target: str) -> None:
    try:
        with open(source, "rb") as file:
            write_whole(target, iter(lambda: file.read(2**23), b""))
    except OSError as error:
        raise CheckpointError(f"{source!r} can't be read: {error.strerror or error}.") from error


def _files(plan: CompressionPlan) -> dict[str, str]:
    """A file name for the factors of each group, whatever its key."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for place, each in enumerate(plan.groups):
        name = each.group.name.removesuffix(".weight").replace(".*", "")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:120].strip(".") or "experts"
        if name.lower() in taken:
            name = f"{name}-{place}"
        taken.add(name.lower())
        found[each.group.name] = f"{name}.safetensors"
    return found


def _check_memory(plan: CompressionPlan, max_memory: int | None) -> None:
    if max_memory is None or plan.memory <= max_memory:
        return
    worst = max(plan.groups, key=lambda each: each.memory)
    raise PlanError(
        f"max_memory must be at least {plan.memory:,} bytes, for {worst.group.name!r} "
        f"({worst.group.experts} × {worst.group.in_features} × {worst.group.out_features}); got "
        f"{max_memory:,}. Raise it, lower the budget or the rank, or leave out the comparison."
    )


def _check_apart(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """That the output is not the model."""
    source, target = (os.path.realpath(checkpoint_path(path)) for path in (model, output))
    if target in (source, os.path.dirname(source) if os.path.isfile(source) else source):
        raise CheckpointError(
            f"the output must be another folder than the model's; got {target!r} for both."
        )


def _check_disk(plan: CompressionPlan, work: Work) -> None:
    """That what is still to be written fits on the disk."""
    needed = plan.output_bytes
    if plan.settings.dense:
        needed += sum(4 * each.parameters for each in plan.groups)
    if plan.settings.tolerance is not None:
        needed -= sum(4 * each.parameters for each in plan.groups)
    there = sum(
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(work.folder)
        for name in names
    )
    free = shutil.disk_usage(work.folder).free
    if needed - there > free:
        raise CheckpointError(
            f"the disk of {work.target!r} must have room for {needed - there:,} bytes; it has "
            f"{free:,}. Make room or choose another output."
        )


def _as_dict(report: GroupReport) -> dict[str, Any]:
    values = asdict(report)
    rank = report.rank
    return values | {
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "expert_errors": list(report.expert_errors),
    }


def _report(values: Mapping[str, Any]) -> GroupReport:
    rank = values["rank"]
    return GroupReport(
        **{
            **values,
            "rank": tuple(rank) if isinstance(rank, list) else rank,
            "expert_errors": tuple(values["expert_errors"]),
            "controls": tuple(Control(**each) for each in values["controls"]),
        }
    )
