"""Healing of a compressed model on disk, from folders and a text file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensormoe import __version__
from tensormoe._validation import positive_int
from tensormoe.checkpoint._files import checkpoint_path, open_regular
from tensormoe.compression._identity import tokenizer_identity
from tensormoe.compression._limits import check_apart
from tensormoe.compression._resume import MANIFEST, Work
from tensormoe.compression._shards import open_model
from tensormoe.errors import SpecError, TrainingError
from tensormoe_torch.compression._evaluate import Evaluation
from tensormoe_torch.compression._healing._batches import ShuffledWindows
from tensormoe_torch.compression._healing._folder import (
    SAVED,
    Source,
    check_names,
    open_source,
    save_beside,
    write_healed,
)
from tensormoe_torch.compression._healing._heal import HealingCallback, heal
from tensormoe_torch.compression._healing._processes import Processes, joined
from tensormoe_torch.compression._healing._report import HealingReport
from tensormoe_torch.compression._healing._settings import Healing
from tensormoe_torch.compression._healing._trained import trained_parameters
from tensormoe_torch.compression._text import TextWindows, load_model, load_tokens

_STATE = "healing.safetensors"
_HELD = 128
_WINDOWS = TextWindows(None, batch=8)


@dataclass(frozen=True)
class _Job:
    """The folders, texts and settings of a healing; as of :func:`heal_checkpoint`."""

    original: str
    compressed: str
    data: str
    settings: Healing
    held: str | None
    tokenizer: str
    windows: TextWindows
    every: int
    dtype: str

    def command(self, source: Source) -> dict[str, Any]:
        """Plain values that decide what comes out."""
        cut = self.windows
        return {
            "version": __version__,
            "original": open_model(self.original).identity,
            "compressed": source.identity,
            "tokenizer": tokenizer_identity(self.tokenizer),
            "data": _digest(self.data),
            "held": None if self.held is None else _digest(self.held),
            "windows": [cut.samples, cut.context, cut.seed, cut.batch],
            "dtype": self.dtype,
            **self.settings.to_dict(),
        }

    def batches(
        self, models: Sequence[Any], processes: Processes
    ) -> tuple[ShuffledWindows, list[Tensor] | None]:
        """Batches to train on, and those that are held out.

        Raises:
            SpecError: too short texts, or tokens of another vocabulary.
        """
        cut = self.windows
        ids = load_tokens(self.data, self.tokenizer, models)
        rows = torch.cat(cut.of(ids, models[0]))
        steps, seed = self.settings.steps, cut.seed
        given = ShuffledWindows(rows, cut.batch, steps, seed, processes)
        if self.held is None:
            return given, None
        ids = load_tokens(self.held, self.tokenizer, models)
        held = TextWindows(_HELD, cut.context, seed, cut.batch).of(ids, models[0])
        return given, [each.to(processes.device) for each in held]


def heal_checkpoint(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Healing,
    *,
    held: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    windows: TextWindows = _WINDOWS,
    every: int = 100,
    dtype: str = "auto",
    device: str = "cpu",
    callback: HealingCallback | None = None,
) -> HealingReport:
    """Train a compressed folder of transformers to predict what the original predicts on a text.

    The output appears under its name when all of it is written. Killed before, the same call goes
    on from the last state. Where ``torchrun`` starts several processes, parameters are spread over
    them by ``fully_shard``, and each has its share of every batch.

    Args:
        original: folder of the original.
        compressed: folder that ``tensormoe compress`` or ``save_pretrained`` wrote.
        data: a text file in UTF-8, whose windows come in random order, over and over.
        output: a folder that does not exist yet, or is empty. It gets the files of ``compressed``,
            with the trained numbers in their dtypes and all else byte for byte.
        settings: what is trained, and how.
        held: another text file, on which both models are compared before and after.
        tokenizer: folder of the tokenizer; the original model's by default.
        windows: how texts are cut, windows per step, and the seed of their order; all windows of
            the text and 8 per step by default, at most 128 of the held-out text.
        every: steps between two writes of the state.
        dtype: that both run in; that of their files by default.
        device: that both run on.
        callback: called before the first step, and after each.

    Returns:
        Losses, and the comparisons.

    Raises:
        CheckpointError: a model, tokenizer or text that can't be opened; an output that is
            something else's, that another process is at work on, or that can't be written.
        SpecError: as of :func:`heal`; a tokenizer whose vocabulary is not the models'; too short a
            text.
        TrainingError: a loss or gradients that are not finite. The state before is kept.
        MissingDependencyError: transformers is not installed.
    """
    job = _Job(
        checkpoint_path(original),
        checkpoint_path(compressed),
        checkpoint_path(data),
        settings,
        None if held is None else checkpoint_path(held),
        checkpoint_path(original if tokenizer is None else tokenizer),
        windows,
        positive_int(every, "every"),
        dtype,
    )
    for each in (job.original, job.compressed):
        check_apart(each, output)
    source = open_source(job.compressed)
    command = job.command(source)
    with joined(device) as processes, processes.work(output, command) as work:
        if work.manifest is not None:
            return _told(work.manifest)
        try:
            return _healed(job, source, work, processes, command, callback)
        except BaseException:
            if processes.rank == 0 and not os.path.exists(_state(work)):
                # nothing that a corrected command would meet
                shutil.rmtree(os.path.join(work.folder, SAVED), ignore_errors=True)
            raise


def _healed(
    job: _Job,
    source: Source,
    work: Work,
    processes: Processes,
    command: Mapping[str, Any],
    callback: HealingCallback | None,
) -> HealingReport:
    """Load, train and write."""
    models = [
        load_model(each, processes.device, job.dtype) for each in (job.original, job.compressed)
    ]
    teacher, model = models
    _check_vocabularies(teacher, model)
    # before anything is trained, not after
    trained_parameters(model, job.settings.train)
    given, held = job.batches(models, processes)
    save_beside(model, work)
    if processes.rank == 0:
        check_names(source, work)
    teacher, model = processes.shard(teacher), processes.shard(model)
    try:
        report = heal(
            model,
            teacher,
            given,
            **job.settings.to_dict(),
            held=held,
            checkpoint=_state(work),
            every=job.every,
            callback=callback,
        )
    except (KeyboardInterrupt, TrainingError) as error:
        raise type(error)(_stopped(error, work)) from error
    save_beside(model, work)
    if processes.rank == 0:
        _finish(source, work, command, report, job)
    return report


def _stopped(error: BaseException, work: Work) -> str:
    """Message of a healing that did not reach its end."""
    kept = os.path.exists(_state(work))
    if isinstance(error, TrainingError):
        rest = f" The last state is in {work.folder!r}; remove it, or choose another output."
        return f"{error}{rest if kept else ''}"
    if not kept:
        return "no state was written yet"
    return f"the same command goes on from the last state in {work.folder!r}"


def _state(work: Work) -> str:
    return os.path.join(work.folder, _STATE)


def _finish(
    source: Source,
    work: Work,
    command: Mapping[str, Any],
    report: HealingReport,
    job: _Job,
) -> None:
    """Write every file, and give the folder its name."""
    write_healed(source, work, _note(report, job))
    os.unlink(_state(work))
    before = _manifest(source)
    done = {"settings": job.settings.to_dict(), "report": report.to_dict()}
    manifest = {
        **before,
        "healings": [*before.get("healings", []), done],
        "made_by": [*before.get("made_by", []), *filter(None, [before.get("command")])],
        "command": command,
    }
    work.finish(json.loads(json.dumps(manifest)), SAVED)


def _manifest(source: Source) -> dict[str, Any]:
    """Manifest of the compressed folder, if it has one."""
    path = os.path.join(source.folder, MANIFEST)
    if not os.path.isfile(path):
        return {}
    with open_regular(path) as (file, _):
        found = json.load(file)
    return found if isinstance(found, dict) else {}


def _told(manifest: Mapping[str, Any]) -> HealingReport:
    """The report of a healing that is done."""
    values = dict(manifest["healings"][-1]["report"])
    values.pop("recovered")
    for name in ("before", "after"):
        if values[name] is not None:
            values[name] = Evaluation.from_dict(values[name])
    return HealingReport(**{**values, "losses": tuple(values["losses"])})


def _note(report: HealingReport, job: _Job) -> str:
    """Part of the README about the healing."""
    what = {
        "factors": "factors and routers were",
        "factors only": "factors were",
        "all": "parameters were all",
    }[job.settings.train]
    original = os.path.basename(os.path.abspath(job.original))
    text = (
        "## Healed\n\n"
        f"Its {what} trained for {report.steps:,} steps to predict what `{original}` predicts. "
    )
    if report.before is not None and report.after is not None:
        text += (
            f"On a text of {report.after.tokens:,} other tokens, its loss is "
            f"{report.after.losses[1]:.4f} nats per token; it was {report.before.losses[1]:.4f} "
            f"before, and the original's is {report.before.losses[0]:.4f}. "
        )
    return text + "Errors of weights in `tensormoe.json` are those before."


def _digest(path: str | os.PathLike[str]) -> str:
    """A hash of a file."""
    whole = hashlib.sha256()
    with open_regular(checkpoint_path(path)) as (file, _):
        for part in iter(lambda: file.read(2**23), b""):
            whole.update(part)
    return whole.hexdigest()


def _check_vocabularies(teacher: Any, model: Any) -> None:
    """Refuse models that predict other things.

    Raises:
        SpecError: they do.
    """
    sizes = [int(each.config.vocab_size) for each in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise SpecError(
            f"models must have one vocabulary; the original has {sizes[0]:,} tokens, and the "
            f"compressed one {sizes[1]:,}. Name the model that it was made of."
        )
