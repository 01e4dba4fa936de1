"""``tensormoe explore``: a page of experts, from a data file or from a layer and its inputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._format import format_bytes
from tensormoe.checkpoint import peek_checkpoint
from tensormoe.choosing._words import parse_size
from tensormoe.cli._console import make_console, print_json
from tensormoe.errors import SpecError

if TYPE_CHECKING:
    from tensormoe.analysis import Exploration, Images, Texts

__all__ = ["run_explore"]

_BLOCKS = ("MuMoE", "MuMoEMLP")
# options that describe a layer's inputs
_OF_LAYERS = ("inputs", "labels", "images", "texts", "class_names", "title", "top", "logits")


def run_explore(arguments: argparse.Namespace) -> None:
    """Check the words, make the exploration, and write it."""
    for package in ("rich", "numpy"):
        require("tensormoe explore", (package,), "cli,numpy")
    from tensormoe.analysis import Exploration
    from tensormoe.analysis._explorer._file import checked_path

    source = Path(arguments.source)
    output = checked_path(arguments.output or source.with_suffix(".html"))
    if source.suffix.lower() == ".json":
        given = [name for name in (*_OF_LAYERS, "coefficients") if getattr(arguments, name)]
        if given:
            raise SpecError(
                f"--{given[0].replace('_', '-')} is for checkpoints; a data file has its own. "
                "Leave it out."
            )
        found = Exploration.load(source)
    else:
        found = _of_checkpoint(source, arguments)
    found.save(output)
    size = output.stat().st_size
    if arguments.json:
        print_json(_summary(found, output, size))
        return
    console = make_console()
    console.print(repr(found), soft_wrap=True)
    console.print(f"{output}: {format_bytes(size)}", soft_wrap=True)


def _of_checkpoint(path: Path, arguments: argparse.Namespace) -> Exploration:
    """The exploration of a layer in NumPy, for arrays in files."""
    if arguments.inputs is None:
        raise SpecError("--inputs must be given with a checkpoint; got none. Pass --inputs X.npy.")
    if arguments.images and arguments.texts:
        raise SpecError("--images and --texts must not be given together. Pass one of them.")
    block = peek_checkpoint(path).block
    if block not in _BLOCKS:
        raise SpecError(
            f"a checkpoint must hold a {' or a '.join(_BLOCKS)} to be explored; got a {block}. "
            "Use tensormoe.analysis.explore_coefficients in Python."
        )
    import tensormoe_numpy
    from tensormoe.analysis import explore

    layer = getattr(tensormoe_numpy, block).load(path)
    inputs = _array(arguments.inputs, "--inputs")
    if inputs.dtype.kind not in "iuf":
        raise SpecError(
            f"--inputs must be numbers; got dtype {inputs.dtype}. Convert them to float32."
        )
    levels = [_array(name, "--coefficients") for name in arguments.coefficients]
    return explore(
        layer,
        inputs.astype(layer.dtype),
        None if arguments.labels is None else _array(arguments.labels, "--labels"),
        coefficients=levels or None,
        head="identity" if arguments.logits else None,
        examples=_examples(arguments),
        class_names=None if arguments.class_names is None else _lines(arguments.class_names),
        top=parse_size(arguments.top or "8", "--top"),
        title=arguments.title or path.stem,
    )


def _examples(arguments: argparse.Namespace) -> Images | Texts | None:
    from tensormoe.analysis import Images, Texts

    if arguments.images is not None:
        return Images(_array(arguments.images, "--images"))
    return None if arguments.texts is None else Texts(_lines(arguments.texts))


def _array(name: str, option: str) -> Any:
    import numpy as np

    try:
        found = np.load(name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(
            f"{option} must be an array in a .npy file; {name!r} is not: {error}. Write it with "
            "numpy.save."
        ) from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise SpecError(f"{option} must be one array; {name!r} holds several. Write a .npy file.")
    return found


def _lines(name: str) -> list[str]:
    try:
        return Path(name).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SpecError(f"{name!r} can't be read as lines of text: {error}.") from None


def _summary(found: Exploration, output: Path, size: int) -> dict[str, Any]:
    return {
        "command": "explore",
        "output": str(output),
        "bytes": size,
        "experts": list(found.experts),
        "inputs": found.inputs,
        "classes": len(found.class_names),
        "dead": [level.load.dead.tolist() for level in found.levels],
        "mean_specialization": [
            None if level.specialization is None else level.specialization.mean
            for level in found.levels
        ],
    }
