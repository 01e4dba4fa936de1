"""``tensormoe heal``: a compressed model trained to predict what the original predicts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from tensormoe.cli._calibrate_model import add_windows, integer, number, torch_compression, windows
from tensormoe.cli._commands import Commands
from tensormoe.cli._console import make_console, print_json

if TYPE_CHECKING:
    from rich.console import Console

# lines of progress where no bar is seen
_LINES = 10


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "heal",
        description="Train the factors and routers of a compressed model, on a text, to predict "
        "what the original predicts. Killed, the same command goes on.",
        epilog="example: tensormoe heal Mixtral-8x7B Mixtral-25 --data wiki.txt --held other.txt "
        "--device cuda --output Mixtral-25-healed",
    )
    option = parser.add_argument
    option("original", metavar="ORIGINAL", help="the folder of a model of transformers")
    option("compressed", metavar="COMPRESSED", help="the folder of the compressed one")
    option("--data", metavar="TEXT", required=True, help="a text file in UTF-8 to train on")
    option("--output", metavar="DIR", required=True, help="a folder that does not exist yet")
    option("--held", metavar="TEXT", help="another text, scored before and after")
    option("--steps", default="1000", metavar="N", help="batches trained on (default: 1000)")
    option("--batch", default="8", metavar="N", help="windows per batch (default: 8)")
    option("--rate", default="0.001", metavar="R", help="highest learning rate (default: 0.001)")
    option(
        "--train",
        default="factors",
        metavar="NAME",
        help="factors (and routers), factors-only or all (default: factors)",
    )
    option("--warmup", default="0.1", metavar="S", help="share of steps at rising rates (0.1)")
    option("--labels", default="0", metavar="S", help="share of the text's own tokens (0)")
    option("--weight-decay", default="0", metavar="W", help="of factors without experts (0)")
    option("--clip", default="1", metavar="N", help="norm of gradients at most (1)")
    option("--every", default="100", metavar="N", help="steps between saved states (100)")
    option("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: ORIGINAL)")
    add_windows(parser, "all")
    option("--dtype", default="auto", metavar="NAME", help="that both run in (that of the files)")
    option("--device", default="cpu", metavar="NAME", help="that both run on: cuda (cpu)")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Heal a model, and print what became of it."""
    models = torch_compression()
    cut = windows(arguments, integer(arguments.batch, "--batch"))
    settings = models.Healing(
        integer(arguments.steps, "--steps"),
        arguments.train.replace("-", " "),
        number(arguments.rate, "--rate"),
        number(arguments.warmup, "--warmup"),
        number(arguments.labels, "--labels"),
        number(arguments.weight_decay, "--weight-decay"),
        number(arguments.clip, "--clip"),
    )
    # of several processes the first one speaks
    first = os.environ.get("RANK", "0") == "0"
    console = make_console() if first and not arguments.json else None
    with _bar(console) as callback:
        found = models.heal_checkpoint(
            arguments.original,
            arguments.compressed,
            arguments.data,
            arguments.output,
            settings,
            held=arguments.held,
            tokenizer=arguments.tokenizer,
            windows=cut,
            every=integer(arguments.every, "--every"),
            dtype=arguments.dtype,
            device=arguments.device,
            callback=callback,
        )
    if console is not None:
        console.print()
        console.print(str(found), soft_wrap=True)
    elif first:
        print_json({"command": "heal", "output": arguments.output, **found.to_dict()})


@contextmanager
def _bar(console: Console | None) -> Iterator[Callable[[Any], None] | None]:
    """A bar of steps with the loss; some lines where nobody watches."""
    if console is None:
        yield None
        return
    from rich.progress import Progress

    with ExitStack() as stack:
        bar = Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=console)
        tasks: list[Any] = []

        def report(now: Any) -> None:
            loss = "" if now.loss is None else f"loss {now.loss:.4f}"
            if not console.is_terminal:
                if now.loss is not None and now.done * _LINES // now.total > (
                    (now.done - 1) * _LINES // now.total
                ):
                    console.print(f"step {now.done:,} of {now.total:,}: {loss}", soft_wrap=True)
                return
            if not tasks:
                # not before there is something to show: errors come alone
                stack.enter_context(bar)
                tasks.append(bar.add_task("steps", total=now.total, loss=loss))
            bar.update(tasks[0], completed=now.done, loss=loss)

        yield report
