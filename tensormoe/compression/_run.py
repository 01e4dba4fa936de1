"""A model compressed group by group, and written shard by shard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormoe import __version__
from tensormoe._rounding import AUTO, checked_bits
from tensormoe.compression._bits import Names, entries_for
from tensormoe.compression._calibrated import calibrated_group, calibration_identity
from tensormoe.compression._cluster import check_cluster, on_cluster
from tensormoe.compression._limits import check_apart, check_disk, check_memory
from tensormoe.compression._measure import GroupReport
from tensormoe.compression._outputs import EXPERTS, factor_files, write_model
from tensormoe.compression._plan import CompressionPlan, GroupPlan, plan_compression, settings_of
from tensormoe.compression._predicted import summed
from tensormoe.compression._progress import CompressionCallback, Teller
from tensormoe.compression._resume import Work, open_work
from tensormoe.compression._settings import Compression
from tensormoe.compression._settle import settle
from tensormoe.compression._sharing import FORMS, Form, best_part, loss_curve, shared
from tensormoe.compression._stack import compress_stack
from tensormoe.compression._values import read_stack
from tensormoe.errors import TensormoeError, located

if TYPE_CHECKING:
    from distributed import Client

Parts = Mapping[str, Mapping[str, Any]]
"""Bytes, bits and form by the name of a group."""

# in the journal beside the groups, none of which can have this name
_SHARES = "*shares*"


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

    @property
    def predicted_loss(self) -> float | None:
        """The increase of the model's loss in nats per token: the sum of those of its groups.

        None without gradients in a calibration, see :func:`predicted_loss`.
        """
        return summed(each.predicted_loss for each in self.groups)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the experts of all groups in their dtypes."""
        return sum(each.dense_bytes for each in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors of all groups as they are stored, scales included."""
        return sum(each.nbytes for each in self.groups)


def compress_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Compression,
    *,
    max_memory: int | None = None,
    callback: CompressionCallback | None = None,
    client: Client | None = None,
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
        max_memory: bytes that the process may take, the interpreter included; with a client, each
            of its workers.
        callback: called with a :class:`CompressionProgress` whenever there is some; True after a
            sweep ends the search for that group with the best factors so far. With a client, sweeps
            are not reported.
        client: a ``distributed.Client``, whose workers decompose the groups, one per thread. They
            read the model and write the factors themselves, so both must be on a file system that
            all of them share, under the same absolute paths. The files beside the factors are
            written by this process. A worker that is lost is replaced by others. For the same
            bytes as without a client, the workers' BLAS must be the same and use as many threads.

    Returns:
        Where the output is, and for each group its rank, its size and what was lost.

    Raises:
        TypeError: a path is neither a string nor a path, or a client is none of Dask's.
        CheckpointError: a model that can't be read, experts that do not make a tensor or aren't
            finite, or an output that is the model's own folder or somebody else's, that another
            process is at work on, or that can't be written.
        RankError, BudgetError: a rank or budget that a group cannot have; the message names it.
        SpecError: a factorization that can't be fitted.
        PlanError: ``max_memory``, or the memory limit of a worker, is too little; nothing was read
            then but headers.
        ClusterError: a cluster without workers, or whose workers have another version of tensormoe;
            a scheduler that was lost. What is done is kept, and the same call goes on from there.
        KeyboardInterrupt: Ctrl-C; what is done is kept, and the same call goes on from there. With
            a client, what is at work is given up.
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
        **calibration_identity(settings),
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
            reports = _made(plan, work, Teller(callback), client, max_memory)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_resumed(plan, work)) from None
        manifest = {
            "command": command,
            "groups": [{**report.to_dict(), "seconds": None} for report in reports],
        }
        work.finish(manifest, temporary)
        return CompressionResult(work.target, reports)


def _made(
    plan: CompressionPlan,
    work: Work,
    tell: Teller,
    client: Client | None,
    max_memory: int | None,
) -> tuple[GroupReport, ...]:
    """Every group that is not there yet, then every file."""
    files = factor_files(plan)
    paths = {name: work.path(EXPERTS, file) for name, file in files.items()}
    left = [
        each
        for each in plan.tried
        if each.group.name not in work.done or not os.path.isfile(paths[each.group.name])
    ]
    if plan.settings.share != "equal" or plan.settings.bits == AUTO:
        left = _shared(plan, left, _parts(plan, work, tell))
    total = sum(each.group.entries for each in plan.tried)
    done = total - sum(each.group.entries for each in left)
    if client is not None and left:
        check_cluster(client, plan, max_memory)
        tell(EXPERTS, "", done, total)
        with closing(on_cluster(client, plan, left, paths)) as found:
            for each, report in found:
                work.record(each.group.name, report.to_dict())
                done += each.group.entries
                tell(EXPERTS, each.group.label, done, total)
    else:
        for each in left:
            group = each.group
            tell(EXPERTS, group.label, done, total)
            follow = tell.searching(group.label, done, total)
            given = (plan.model, group, settings_of(plan, each), each.budget, paths[group.name])
            work.record(group.name, compress_stack(*given, follow).to_dict())
            done += group.entries
    tell(EXPERTS, "", done, total)
    reports = {
        each.group.name: GroupReport.from_dict(work.done[each.group.name]) for each in plan.tried
    }
    settled = settle(plan, reports)
    write_model(settled, work, files, tell)
    kept = {each.group.name for each in settled.groups}
    for name in reports.keys() - kept:
        os.unlink(paths[name])
    return tuple(replace(reports[each.group.name], energy=None) for each in settled.groups)


def _shared(plan: CompressionPlan, left: list[GroupPlan], parts: Parts) -> list[GroupPlan]:
    """Groups with what each gets.

    Raises:
        BudgetError: a group gets too little for its factorization.
    """
    found = []
    for each in left:
        group, part = each.group, parts[each.group.name]
        form, entries = Form(part["bits"], part["whole"]), None
        if not form.whole:
            names: Names = plan.settings.factorization
            given = group.sizes, part["bytes"], form.bits, group.itemsize
            try:
                entries = entries_for(names, *given)
            except TensormoeError as error:
                raise located(error, repr(group.name)) from None
        found.append(replace(each, budget=entries, bits=form.bits, form=form))
    return found


def _parts(plan: CompressionPlan, work: Work, tell: Teller) -> Parts:
    """Bytes and form of each group, by what the model loses; kept for when the command goes on."""
    if _SHARES not in work.done:
        settings = plan.settings
        forms = FORMS if settings.bits == AUTO else (Form(checked_bits(settings.bits)),)
        curves, sizes, limit = {}, {}, 0
        total, done = sum(each.group.entries for each in plan.tried), 0
        for each in plan.tried:
            group = each.group
            tell(EXPERTS, f"weighing {group.label}", done, total)
            found = calibrated_group(group, settings)
            assert found is not None
            stack = read_stack(plan.model, group)
            found.check(stack)
            place = found.calibration, found.layer, found.role
            curves[group.name] = loss_curve(stack, *place, forms=forms, itemsize=group.itemsize)
            sizes[group.name] = group.nbytes
            done += group.entries
            limit += 0 if each.instead else each.nbytes
        alone = {each.group.name: curves[each.group.name] for each in plan.groups}
        parts = shared(alone, sizes, limit, alike=settings.share == "equal")
        for each in plan.others:
            name = each.group.name
            size = sum(parts[part].nbytes for part in each.instead)
            parts[name] = best_part(curves[name], sizes[name], size)
        plain = {
            name: {"bytes": part.nbytes, "bits": part.form.bits, "whole": part.form.whole}
            for name, part in parts.items()
        }
        work.record(_SHARES, plain)
    return work.done[_SHARES]


def _resumed(plan: CompressionPlan, work: Work) -> str:
    """Message of a compression that was interrupted."""
    count = len(work.done.keys() - {_SHARES})
    if not count:
        return "nothing is done yet"
    return (
        f"{count} of {len(plan.tried)} groups are done, in {work.folder!r}; the same "
        "command goes on from there"
    )
