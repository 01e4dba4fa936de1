"""Fewer experts for a model on disk, written as a folder that transformers opens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensormoe import __version__
from tensormoe.checkpoint._files import checkpoint_path, open_regular, write_whole
from tensormoe.checkpoint._model_config import METHOD
from tensormoe.compression._config_file import CONFIG, found_config, quantization
from tensormoe.compression._folder import README, headed_readme, opened_by
from tensormoe.compression._identity import tokenizer_identity
from tensormoe.compression._limits import check_apart
from tensormoe.compression._outputs import copy_side_files
from tensormoe.compression._resume import Work, open_work
from tensormoe.compression._shards import Model, open_model
from tensormoe.errors import CheckpointError
from tensormoe_torch.compression._reduce import reduce_experts
from tensormoe_torch.compression._reduce_report import ReductionReport
from tensormoe_torch.compression._reduction import Reduction
from tensormoe_torch.compression._text import TextWindows, load_model, load_tokens, quiet

# files that save_pretrained writes, from the model as it is now
_WRITTEN = (CONFIG, "generation_config.json", README)


@dataclass(frozen=True)
class ReductionProgress:
    """Progress of a reduction.

    Args:
        done: windows that the model ran.
        total: of them; each runs twice.
    """

    done: int
    total: int


def reduce_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    keep: int | float,
    how: str = "merge",
    groups: str = "router",
    score: str = "frequency",
    uniform: bool = False,
    align: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    windows: TextWindows | None = None,
    device: str = "cpu",
    callback: Callable[[ReductionProgress], None] | None = None,
) -> ReductionReport:
    """Merge or prune the experts of a model of transformers on disk, by statistics of a text.

    The output appears under its name when all of it is written: what ``save_pretrained`` writes,
    in the dtype of the model, and the tokenizer and other files beside the model's weights.
    ``from_pretrained`` opens a pruned one with nothing else, and a merged one after
    ``import tensormoe_torch.huggingface``. ``tensormoe.json`` has the report; the same call on a
    whole output returns that.

    Args:
        model: its folder; the whole model is in memory.
        output: a folder that does not exist yet, or is empty.
        data: a text file in UTF-8.
        keep: as of :func:`reduce_experts`.
        how: as of :func:`reduce_experts`.
        groups: as of :func:`reduce_experts`.
        score: as of :func:`reduce_experts`.
        uniform: as of :func:`reduce_experts`.
        align: as of :func:`reduce_experts`.
        tokenizer: folder of the tokenizer; the model's by default.
        windows: how the text is cut; 128 windows of 2048 tokens by default.
        device: that the model runs on.
        callback: called before the first window, and after each.

    Returns:
        The report of :func:`reduce_experts`.

    Raises:
        CheckpointError: a model, tokenizer or text that can't be opened, a model that is quantized,
            or an output that is something else's or can't be written.
        SpecError, ShapeError: as of :func:`reduce_experts`; a tokenizer whose vocabulary is not the
            model's; a text with too few tokens.
        MissingDependencyError: transformers is not installed; or SciPy, which matches hidden units.
    """
    # before a model is loaded, not after
    wanted = Reduction(keep, how, groups, score, uniform, align)
    folder = checkpoint_path(model)
    words = folder if tokenizer is None else checkpoint_path(tokenizer)
    cut = windows or TextWindows()
    source = open_model(folder)
    _check_plain(source)
    check_apart(folder, output)
    command = {
        "version": __version__,
        "reduce": asdict(wanted),
        "model": source.name,
        "shards": source.identity,
        **tokenizer_identity(words),
        "data": _digest(checkpoint_path(data)),
        "windows": asdict(cut),
    }
    with open_work(output, command) as work:
        if work.manifest is not None:
            report = ReductionReport.from_dict(work.manifest["report"])
        else:
            loaded = load_model(folder, device)
            batches = cut.of(load_tokens(data, words, (loaded,)), loaded)

            def tell(done: int) -> None:
                if callback is not None:
                    callback(ReductionProgress(done, 2 * len(batches)))

            tell(0)
            report = reduce_experts(
                loaded, [each.to(device) for each in batches], **asdict(wanted), callback=tell
            )
            _write(source, loaded, report, work)
        work.finish({"command": command, "report": report.to_dict()}, None)
    return report


def _check_plain(model: Model) -> None:
    """Refuse a model that is quantized, as its weights can't be averaged.

    Raises:
        CheckpointError: it is.
    """
    if model.folder is None:
        raise CheckpointError(
            f"the model must be a folder with config.json and weights; {model.name!r} is a file."
        )
    found: Mapping[str, Any] = quantization(found_config(model))
    method = found.get("quant_method")
    if found and method != METHOD:
        raise CheckpointError(
            f"the model must not be quantized; its config.json has quant_method {method!r}. "
            "Dequantize it in transformers, or take the model that was quantized."
        )


def _digest(path: str) -> str:
    """A hash of a file.

    Raises:
        CheckpointError: it can't be read.
    """
    whole = hashlib.sha256()
    with open_regular(path) as (file, _):
        while part := file.read(2**20):
            whole.update(part)
    return whole.hexdigest()


def _write(source: Model, model: Any, report: ReductionReport, work: Work) -> None:
    """The model, and the files beside it.

    Raises:
        CheckpointError: the folder can't be written.
    """
    try:
        with quiet():
            model.save_pretrained(work.folder)
    except OSError as error:
        raise CheckpointError(
            f"{work.folder!r} could not be written: {error.strerror or error}. Free some space, or "
            "choose another output."
        ) from error
    copy_side_files(source, work, _WRITTEN)
    merged = report.how == "merge"
    before, after = report.parameters
    text = (
        f"{report.summary}: {after:,} parameters in place of {before:,}.\n\n"
        f"{opened_by(found_config(source), needs_import=merged)}\n\n"
        "`tensormoe.json` says which experts are left.\n"
    )
    title = "experts merged" if merged else "experts pruned"
    write_whole(work.path(README), (headed_readme(source, title, text).encode(),))
