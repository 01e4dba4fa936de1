"""``tensormoe calibrate-model``: second moments of a model's experts on a text."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._format import format_bytes
from tensormoe.cli._commands import Commands
from tensormoe.cli._console import make_console, make_table, print_json
from tensormoe.errors import CheckpointError, SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from tensormoe.compression import Calibration


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "calibrate-model",
        description="Run a sparse model over a text, and keep second moments of what its experts "
        "get and give, which tensormoe compress weighs errors by.",
        epilog="example: tensormoe calibrate-model Mixtral-8x7B --data wiki.txt --output "
        "calibration.safetensors",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="the folder of a model of transformers")
    option("--data", metavar="TEXT", required=True, help="a text file in UTF-8")
    option("--output", metavar="FILE", required=True, help="the calibration: a .safetensors file")
    option("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: MODEL)")
    add_windows(parser)
    option("--no-outputs", dest="outputs", action="store_false", help="moments of inputs alone")
    option("--per-expert", action="store_true", help="moments of each expert too: N times as much")
    option("--fisher", action="store_true", help="moments of the loss's gradients too")
    option(
        "--measure",
        action="store_true",
        help="with --fisher: measure what errors of each layer do to the loss, for better "
        "predictions of it; six more runs of some windows per layer",
    )
    option(
        "--ridge",
        metavar="R",
        help="share of the mean second moment that is added to all; with one, fewer tokens than "
        "inputs are taken (default: 0.001, and they are refused)",
    )
    option("--dtype", default="float32", metavar="NAME", help="of moments: float32 or float64")
    option("--device", default="cpu", metavar="NAME", help="that the model runs on: cuda (cpu)")
    option("--max-memory", metavar="BYTES", help="for sums at a time: 6GiB; more runs if more")
    option("--json", action="store_true", help="print one JSON object")


def add_windows(parser: argparse.ArgumentParser, samples: str = "128") -> None:
    """Windows of tokens that a text is cut into."""
    option = parser.add_argument
    most = f"windows at most, or all (default: {samples})"
    option("--samples", default=samples, metavar="N", help=most)
    option("--context", metavar="N", help="tokens of a window (default: 2048, or the model's most)")
    option("--seed", default="0", metavar="N", help="of the draw of windows (default: 0)")


def windows(arguments: argparse.Namespace, batch: int = 1) -> Any:
    """The words of :func:`add_windows`, checked, with as many windows per batch."""
    samples = arguments.samples
    return torch_compression().TextWindows(
        None if samples == "all" else integer(samples, "--samples"),
        None if arguments.context is None else integer(arguments.context, "--context"),
        integer(arguments.seed, "--seed"),
        batch,
    )


def torch_compression() -> Any:
    """The part of the command that runs models, of the distribution's package for PyTorch."""
    require("models of transformers", ("torch", "transformers"), "huggingface")
    import tensormoe_torch.compression

    return tensormoe_torch.compression


def run(arguments: argparse.Namespace) -> None:
    """Gather moments, and write them."""
    from tensormoe.choosing._words import parse_bytes

    limit = parse_bytes(arguments.max_memory, "--max-memory")
    folder = os.path.dirname(os.path.abspath(arguments.output))
    # before the model runs, not after
    if not os.path.isdir(folder):
        raise CheckpointError(f"the folder of --output must exist; {folder!r} does not.")
    cut, ridge = windows(arguments), None
    if arguments.ridge is not None:
        ridge = number(arguments.ridge, "--ridge")
    console = None if arguments.json else make_console()
    with _bar(console) as callback:
        found = torch_compression().calibrate_checkpoint(
            arguments.model,
            arguments.data,
            tokenizer=arguments.tokenizer,
            windows=cut,
            outputs=arguments.outputs,
            per_expert=arguments.per_expert,
            fisher=arguments.fisher,
            measure=arguments.measure,
            ridge=ridge,
            dtype=arguments.dtype,
            device=arguments.device,
            max_memory=limit,
            callback=callback,
        )
    found.save(arguments.output)
    if console is None:
        print_json({"command": "calibrate-model", "output": arguments.output, **_plain(found)})
    else:
        _show(console, found, arguments.output)


@contextmanager
def _bar(console: Console | None) -> Iterator[Callable[[Any], None] | None]:
    """A bar of windows, behind a line that says how much memory the sums take."""
    if console is None:
        yield None
        return
    from rich.progress import Progress

    with ExitStack() as stack:
        bar = Progress(console=console)
        tasks: list[Any] = []

        def report(now: Any) -> None:
            if not tasks:
                # not before there is something to show: errors come alone
                console.print(f"sums of moments take {format_bytes(now.nbytes)}", soft_wrap=True)
                stack.enter_context(bar)
                tasks.append(bar.add_task("windows", total=now.total))
            bar.update(tasks[0], completed=now.done)

        yield report


def _plain(found: Calibration) -> dict[str, Any]:
    layers = [
        {
            "name": layer,
            "tokens": found.tokens[layer],
            "rows": found.rows(layer),
            "frequencies": found.frequencies(layer).tolist(),
            "mean_weights": found.mean_weights(layer).tolist(),
        }
        for layer in found.layers
    ]
    return {
        "model": dict(found.model),
        "ridge": found.ridge,
        "measured": found.measured,
        "bytes": found.nbytes,
        "layers": layers,
    }


def _show(console: Console, found: Calibration, path: str) -> None:
    table = make_table("experts", "tokens", "rows", "least used", "most used", "unused")
    for layer in found.layers:
        shares = found.frequencies(layer)
        table.add_row(
            layer.removeprefix("model."),
            f"{found.tokens[layer]:,}",
            f"{found.rows(layer):,}",
            f"{shares.min():.2%}",
            f"{shares.max():.2%}",
            f"{int((shares == 0).sum())}",
        )
    console.print()
    console.print(table)
    console.print()
    if found.measured:
        console.print(_responses(found), soft_wrap=True)
    console.print(
        f"{path}: {format_bytes(found.nbytes)}, ridge {found.ridge:g}; compress with "
        f"--calibration {path}",
        soft_wrap=True,
    )


def _responses(found: Calibration) -> str:
    """A line on what was measured, and on how much of it noise or an untrained model spoils."""
    pairs = [
        pair
        for layer in found.layers
        for role in found.roles(layer)
        for pair in found.arrays[f"{layer}.{role}.response"].tolist()
    ]
    less = sum(measured < predicted for predicted, measured in pairs)
    if not less:
        return "responses of the loss: predicted losses hold for large errors too"
    return (
        f"responses of the loss: {less} of {len(pairs)} measured increases are below the predicted "
        "ones, which stand for them; more text, or a model trained on such, tells more"
    )


def integer(text: str, name: str) -> int:
    """The value of an option that takes an integer.

    Raises:
        SpecError: something else, or a negative one.
    """
    if not re.fullmatch("[0-9]{1,18}", text):
        raise SpecError(f"{name} must be an integer that is not negative; got {text!r}.")
    return int(text)


def number(text: str, name: str) -> float:
    """The value of an option that takes a number.

    Raises:
        SpecError: something else.
    """
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{name} must be a number such as 0.01; got {text!r}.") from None
