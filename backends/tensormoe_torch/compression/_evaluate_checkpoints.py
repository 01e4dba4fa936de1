"""Comparison of two models on disk on a text."""

from __future__ import annotations

import os

from tensormoe.checkpoint._files import checkpoint_path
from tensormoe_torch.compression._evaluate import Evaluation, evaluate
from tensormoe_torch.compression._text import TextWindows, load_model, load_tokens


def evaluate_checkpoints(
    model: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    windows: TextWindows | None = None,
    layers: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
) -> Evaluation:
    """Compare two folders of transformers, one of them compressed, on a text.

    Args:
        model: folder of the original.
        compressed: folder that ``tensormoe compress`` or ``save_pretrained`` wrote.
        data: a text file in UTF-8.
        tokenizer: folder of the tokenizer; the original model's by default.
        windows: how the text is cut; 128 windows of 2048 tokens by default.
        layers: as of :func:`evaluate`.
        dtype: that both run in; that of their files by default.
        device: that both run on.

    Raises:
        CheckpointError: a model, tokenizer or text that can't be opened.
        SpecError, ShapeError: as of :func:`evaluate`; a tokenizer whose vocabulary is not the
            models'.
        MissingDependencyError: transformers is not installed.
    """
    words = checkpoint_path(model) if tokenizer is None else checkpoint_path(tokenizer)
    before, after = (load_model(each, device, dtype) for each in (model, compressed))
    ids = load_tokens(data, words, (before, after))
    batches = [each.to(device) for each in (windows or TextWindows()).of(ids, before)]
    return evaluate(before, after, batches, layers=layers)
