"""Calibration of a model on disk, from its folder and a text file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from tensormoe._validation import flag
from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.compression import Calibration
from tensormoe.compression._identity import checkpoint_identity, tokenizer_identity
from tensormoe.compression._shards import open_model
from tensormoe.errors import CheckpointError, SpecError
from tensormoe_torch.compression._calibrate import (
    calibrate,
    calibration_memory,
    calibration_runs,
    checked_options,
    needed_tokens,
)
from tensormoe_torch.compression._gather import Kept
from tensormoe_torch.compression._text import (
    TextWindows,
    load_model,
    load_tokens,
    next_token_loss,
)


@dataclass(frozen=True)
class CalibrationProgress:
    """Progress of a calibration.

    Args:
        done: windows that the model ran.
        total: of them; those of a further run for each part of the layers, if memory is limited,
            count again, and so do those on which the response of the loss is measured.
        nbytes: that the sums of moments take at a time, in float64.
    """

    done: int
    total: int
    nbytes: int


def calibrate_checkpoint(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    windows: TextWindows | None = None,
    outputs: bool = True,
    per_expert: bool = False,
    fisher: bool = False,
    measure: bool = False,
    ridge: float | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    max_memory: int | None = None,
    callback: Callable[[CalibrationProgress], None] | None = None,
) -> Calibration:
    """Second moments of what the experts of a model of transformers get and give on a text.

    Args:
        model: its folder.
        data: a text file in UTF-8.
        tokenizer: folder of the tokenizer; the model's by default.
        windows: how the text is cut; 128 windows of 2048 tokens by default.
        outputs: as of :func:`calibrate`.
        per_expert: as of :func:`calibrate`.
        fisher: whether second moments of the gradients of the next tokens' cross-entropy are
            gathered: of the tokens of the text, the empirical Fisher information.
        measure: whether the response of that loss to errors of each layer is measured as well, as
            of :func:`calibrate`; needs ``fisher``.
        ridge: as of :func:`calibrate`.
        dtype: as of :func:`calibrate`.
        device: that the model runs on.
        max_memory: as of :func:`calibrate`.
        callback: called before the first window, and after each.

    Returns:
        The calibration, with digests of the model's files and of the tokenizer.

    Raises:
        CheckpointError: a model, tokenizer or text that can't be opened.
        SpecError, ShapeError, PlanError: as of :func:`calibrate`; a tokenizer whose vocabulary is
            not the model's; a text with too few tokens, before anything runs.
        MissingDependencyError: transformers is not installed.
    """
    # before a model is loaded, not after
    checked_options(ridge, dtype)
    if flag(measure, "measure") and not flag(fisher, "fisher"):
        raise SpecError(
            "measure needs fisher: gradients of the loss tell what to expect of an error. Give "
            "both."
        )
    folder = checkpoint_path(model)
    words = folder if tokenizer is None else checkpoint_path(tokenizer)
    identity = checkpoint_identity(open_model(folder))
    if not os.path.isdir(words):
        raise CheckpointError(f"a tokenizer must be a folder; {words!r} is none.")
    identity |= tokenizer_identity(words)
    loaded = load_model(folder, device)
    # refuses models without experts before the text is read
    wanted = needed_tokens(loaded)
    batches = (windows or TextWindows()).of(load_tokens(data, words, (loaded,)), loaded)
    count = sum(each.numel() for each in batches)
    if ridge is None and count < wanted:
        raise SpecError(
            f"second moments need at least {wanted:,} tokens for the largest of the experts' "
            f"inputs and hidden units; got {count:,}. Give more text or samples, or a ridge of "
            "your own such as 0.01."
        )
    kept = Kept(outputs, per_expert, fisher)
    nbytes = calibration_memory(
        loaded,
        outputs=outputs,
        per_expert=per_expert,
        gradients=fisher,
        max_memory=max_memory,
    )
    total = calibration_runs(
        loaded, kept, max_memory, measure=measure, batches=len(batches), tokens=count
    )

    def tell(done: int) -> None:
        if callback is not None:
            callback(CalibrationProgress(done, total, nbytes))

    tell(0)
    given = (each.to(device) for each in batches)
    return calibrate(
        loaded,
        given,
        outputs=outputs,
        per_expert=per_expert,
        loss=next_token_loss if fisher else None,
        measure=measure,
        ridge=ridge,
        dtype=dtype,
        max_memory=max_memory,
        identity=identity,
        callback=tell,
    )
