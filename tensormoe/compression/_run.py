"""A model compressed group by group, and written shard by shard."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tensormoe import __version__
from tensormoe.compression._folder import place_of
from tensormoe.compression._limits import check_apart, check_disk, check_memory
from tensormoe.compression._measure import GroupReport, stored_errors
from tensormoe.compression._outputs import EXPERTS, factor_files, write_model
from tensormoe.compression._plan import CompressionPlan, GroupPlan, plan_compression
from tensormoe.compression._progress import CompressionCallback, Teller
from tensormoe.compression._resume import Work, open_work
from tensormoe.compression._settings import Compression
from tensormoe.compression._values import read_stack, rounded, working_dtype
from tensormoe.compression._write import write_factors
from tensormoe.decomposition._decompose import decompose
from tensormoe.decomposition._gauge import robust
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._watch import Callback
from tensormoe.errors import TensormoeError


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
        CheckpointError: a model that can't be read, experts that do not make a tensor or aren't
            finite, or an output that is the model's own folder or somebody else's, that another
            process is at work on, or that can't be written.
        RankError, BudgetError: a rank or budget that a group cannot have; the message names it.
        SpecError: a factorization that can't be fitted.
        PlanError: ``max_memory`` is too little; nothing was read then but headers.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and the same call goes on from there.
        ImportError: NumPy is not installed.
    """
    plan = plan_compression(model, settings)
    check_memory(plan, max_memory)
    check_apart(model, output)
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
            return CompressionResult(
                work.target, tuple(map(GroupReport.from_dict, work.manifest["groups"]))
            )
        check_disk(plan, work)
        try:
            reports = _made(plan, work, Teller(callback))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_resumed(plan, work)) from None
        manifest = {
            "command": command,
            "groups": [{**report.to_dict(), "seconds": None} for report in reports],
        }
        work.finish(manifest, temporary)
        return CompressionResult(work.target, reports)


def _made(plan: CompressionPlan, work: Work, tell: Teller) -> tuple[GroupReport, ...]:
    """Every group that is not there yet, then every file."""
    files = factor_files(plan)
    done = 0
    for each in plan.groups:
        tell(EXPERTS, each.group.label, done, plan.dense_entries)
        path = work.path(EXPERTS, files[each.group.name])
        if each.group.name not in work.done or not os.path.isfile(path):
            follow = tell.searching(each.group.label, done, plan.dense_entries)
            work.record(each.group.name, _compress(plan, each, path, follow).to_dict())
        done += each.group.entries
    tell(EXPERTS, "", done, plan.dense_entries)
    write_model(plan, work, files, tell)
    return tuple(GroupReport.from_dict(work.done[each.group.name]) for each in plan.groups)


def _resumed(plan: CompressionPlan, work: Work) -> str:
    """Message of a compression that was interrupted."""
    if not work.done:
        return "nothing is done yet"
    return (
        f"{len(work.done)} of {len(plan.groups)} groups are done, in {work.folder!r}; the same "
        "command goes on from there"
    )


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
