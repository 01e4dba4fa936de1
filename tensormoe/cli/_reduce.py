"""``tensormoe reduce``: the experts of a model on disk, merged or pruned to fewer."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tensormoe.cli._calibrate_model import add_windows, torch_compression, windows
from tensormoe.cli._commands import Commands
from tensormoe.cli._console import make_console, print_json
from tensormoe.cli._options import add_switch
from tensormoe.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "reduce",
        description="Merge or prune the experts of a sparse model on disk, by what its router and "
        "its experts do on a text, and write the model anew.",
        epilog="example: tensormoe reduce Mixtral-8x7B --keep 50%% --how prune --score reap "
        "--data wiki.txt --output Mixtral-4x7B",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="the folder of a model of transformers")
    option("--output", metavar="DIR", required=True, help="a folder that does not exist yet")
    option("--data", metavar="TEXT", required=True, help="a text file in UTF-8")
    option(
        "--keep", metavar="N", required=True, help="experts per layer: 8, or 50%% of each layer's"
    )
    option("--how", default="merge", metavar="NAME", help="merge or prune (default: merge)")
    option(
        "--groups",
        default="router",
        metavar="NAME",
        help="what experts are merged by: router (M-SMoE) or outputs (HC-SMoE) (default: router)",
    )
    option(
        "--score",
        default="frequency",
        metavar="NAME",
        help="what is not pruned: frequency, or reap (default: frequency)",
    )
    add_switch(
        parser,
        "allot",
        "a percentage of all experts, of which layers may keep different numbers (merge alone)",
    )
    add_switch(parser, "align", "permute hidden units before they are averaged", default=True)
    option("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: MODEL)")
    add_windows(parser)
    option("--device", default="cpu", metavar="NAME", help="that the model runs on: cuda (cpu)")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Merge or prune, and print what is left."""
    keep = _keep(arguments.keep)
    if arguments.allot and not isinstance(keep, float):
        raise SpecError(
            f"--allot needs a share of all experts; got --keep {arguments.keep}. Write 50%."
        )
    cut = windows(arguments)
    console = None if arguments.json else make_console()
    with _bar(console) as callback:
        report = torch_compression().reduce_checkpoint(
            arguments.model,
            arguments.output,
            arguments.data,
            keep=keep,
            how=arguments.how,
            groups=arguments.groups,
            score=arguments.score,
            uniform=not arguments.allot,
            align=arguments.align,
            tokenizer=arguments.tokenizer,
            windows=cut,
            device=arguments.device,
            callback=callback,
        )
    if console is None:
        print_json({"command": "reduce", "output": arguments.output, **report.to_dict()})
        return
    print(report)
    after = "after import tensormoe_torch.huggingface, " if report.how == "merge" else ""
    print(f"{arguments.output}: {after}from_pretrained opens it")


@contextmanager
def _bar(console: Console | None) -> Iterator[Callable[[Any], None] | None]:
    """A bar of windows, on a terminal."""
    if console is None or not console.is_terminal:
        yield None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        tasks: list[Any] = []

        def report(now: Any) -> None:
            if not tasks:
                tasks.append(bar.add_task("windows", total=now.total))
            bar.update(tasks[0], completed=now.done)

        yield report


def _keep(text: str) -> int | float:
    """Experts per layer, or a share of them as a float."""
    if re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text)
    if share is None:
        raise SpecError(
            f"--keep must be a number of experts per layer or a percentage; got {text!r}. Write 8 "
            "or 50%."
        )
    return float(share[1]) / 100.0
