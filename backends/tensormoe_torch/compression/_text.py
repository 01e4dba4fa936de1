"""Models of Hugging Face transformers and plain text, as windows of tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormoe._extras import require
from tensormoe._validation import choice, non_negative_int, positive_int
from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.errors import CheckpointError, SpecError

# what a vocabulary may have more than its tokenizer: rows that round it up
_PADDED, _PADDED_SHARE = 1024, 0.05
_CONTEXT = 2048
_DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TextWindows:
    """Batches of a text: windows of tokens side by side, of which some are drawn.

    Args:
        samples: windows at most; None for all that there are.
        context: tokens of a window; None for 2048, or fewer where the model takes fewer.
        seed: of the draw.
        batch: windows per batch.

    Raises:
        SpecError: numbers that cannot be.
    """

    samples: int | None = 128
    context: int | None = None
    seed: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        if self.samples is not None:
            positive_int(self.samples, "samples")
        if self.context is not None:
            positive_int(self.context, "context")
        non_negative_int(self.seed, "seed")
        positive_int(self.batch, "batch")

    def of(self, ids: Tensor, model: nn.Module) -> list[Tensor]:
        """Batches (batch, context) of token ids, in the order of the text.

        The last batch may be smaller.

        Raises:
            SpecError: windows longer than what the model takes, or not one whole window.
        """
        most = getattr(model.config, "max_position_embeddings", None)
        context = min(_CONTEXT, most or _CONTEXT) if self.context is None else self.context
        if most is not None and context > most:
            raise SpecError(
                f"context must be at most the {most:,} positions of the model; got {context:,}."
            )
        count = len(ids) // context
        if not count:
            raise SpecError(
                f"the text must have at least one window of {context:,} tokens; it has "
                f"{len(ids):,}. Give more text, or a smaller context."
            )
        chosen = torch.arange(count)
        if self.samples is not None and self.samples < count:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(count, generator=generator)
            chosen = order[: self.samples].sort().values
        rows = torch.stack([ids[k * context : (k + 1) * context] for k in chosen.tolist()])
        return list(rows.split(self.batch))


def load_model(folder: str | os.PathLike[str], device: str = "cpu", dtype: str = "auto") -> Any:
    """A language model of transformers from a folder on disk, in evaluation mode.

    It is of the class that its ``config.json`` names, or the causal language model of its family.

    Args:
        folder: that ``save_pretrained`` or ``tensormoe compress`` wrote.
        device: where it goes.
        dtype: of its weights; that of the files by default.

    Raises:
        CheckpointError: transformers can't open it.
        SpecError: an unknown dtype, or a device that is none or not there.
    """
    require("models of transformers", ("transformers",), "huggingface")
    import transformers

    # folders with factors
    import tensormoe_torch.huggingface  # noqa: F401

    choice(dtype, _DTYPES, "dtype", SpecError)
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise SpecError(
            f"device must be one of PyTorch's, such as cuda; got {device!r}."
        ) from error
    path = checkpoint_path(folder)
    if not os.path.isdir(path):
        raise CheckpointError(
            f"the model must be a folder with config.json and weights; there is none at {path!r}."
        )
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            kind = model_class(config, transformers.AutoModelForCausalLM)
            model = kind.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers can't open {path!r}: {error}") from error
    try:
        return model.to(place).eval()
    except (RuntimeError, AssertionError) as error:
        # not there, or too small
        raise SpecError(f"the model does not run on {device!r}: {error}") from error


def model_class(config: Any, default: Any) -> Any:
    """The class of transformers that a configuration names, or the default's for its family.

    Raises:
        KeyError: the default has none for the family.
    """
    import transformers

    listed = getattr(config, "architectures", None)
    named = getattr(transformers, listed[0], None) if listed else None
    return default._model_mapping[type(config)] if named is None else named


def load_tokens(
    data: str | os.PathLike[str], tokenizer: str | os.PathLike[str], models: Sequence[Any]
) -> Tensor:
    """The tokens of a text file, (count,).

    Args:
        data: a file in UTF-8.
        tokenizer: folder of a tokenizer.
        models: that the tokens are for.

    Raises:
        CheckpointError: files that can't be read.
        SpecError: a tokenizer whose vocabulary is not that of a model.
    """
    require("tokenizers", ("transformers",), "huggingface")
    import transformers

    folder, path = checkpoint_path(tokenizer), checkpoint_path(data)
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise CheckpointError(
            f"a tokenizer must be in {folder!r}; transformers finds none: {error}. Name the "
            "folder of one."
        ) from error
    for model in models:
        _check_vocabulary(len(found), int(model.config.vocab_size), folder)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path!r} must be a text file in UTF-8: {error}.") from error
    # a whole text is longer than what a model takes, which is cut afterwards
    ids = found(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def next_token_loss(output: Any, batch: Tensor) -> Tensor:
    """Cross-entropy of the next tokens, in nats, summed."""
    logits = output.logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(
        logits, batch[:, 1:].flatten().to(logits.device), reduction="sum"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars where nobody watches them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_vocabulary(tokens: int, rows: int, folder: str) -> None:
    """Refuse a tokenizer with more tokens than the model, or far fewer.

    Raises:
        SpecError: it has.
    """
    if tokens > rows or rows - tokens > max(_PADDED, _PADDED_SHARE * rows):
        raise SpecError(
            f"the tokenizer must have the model's vocabulary of {rows:,} tokens, a few rows that "
            f"round it up aside; that in {folder!r} has {tokens:,}. Name the model's own."
        )
