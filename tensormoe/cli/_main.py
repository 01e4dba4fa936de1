"""The parser, the dispatch, and what every error becomes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from tensormoe.cli._console import print_error
from tensormoe.errors import SpecError, TensormoeError

__all__ = ["main"]

_FAILED, _INTERRUPTED = 2, 130

_DESCRIPTION = """\
Factorized mixtures of linear experts: choose, plan and try them out.

commands:
  rank        what a budget buys: ranks of every factorization, next to the
              layers that they replace
  plan        how a layer runs: its tensor network, and the steps of its
              contraction with their cost
  choose      the same as a page in the browser: fields, tables, plots, code
  calibrate   measure this machine, for predicted times
  demo        factorized experts on real images, from budget to picture
  compress    the experts of a model's checkpoint, decomposed
  explore     a page that shows what every expert of a layer does
"""

_SIZES = (
    ("in_features", "IN", "size of an input"),
    ("out_features", "OUT", "size of an output"),
    ("experts", "EXPERTS", "number of experts: 128, or 16x8 for two levels"),
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the library's."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}. Run: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``tensormoe``; those of the process by default.

    Returns:
        The exit status: 0, 2 for an error that was reported on standard error, 130 when
        interrupted, 1 when the reader of a pipe went away.
    """
    # names and rules beyond ASCII never stop a result from being shown
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            arguments = _parser().parse_args(argv)
            run: Callable[[argparse.Namespace], None] = _command(arguments.command)
            run(arguments)
            return 0
        finally:
            sys.stdout.flush()
    except TensormoeError as error:
        print_error(str(error))
        return _FAILED
    except KeyboardInterrupt as reason:
        print_error(f"interrupted: {reason}." if str(reason) else "interrupted.")
        return _INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes once more at exit: give it somewhere to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command(name: str) -> Callable[[argparse.Namespace], None]:
    # imported when asked for, so that --help answers at once
    if name == "rank":
        from tensormoe.cli._rank import run_rank

        return run_rank
    if name == "plan":
        from tensormoe.cli._plan import run_plan

        return run_plan
    if name == "choose":
        from tensormoe.cli._choose import run_choose

        return run_choose
    if name == "calibrate":
        from tensormoe.cli.calibration import run_calibrate

        return run_calibrate
    if name == "compress":
        from tensormoe.cli._compress import run_compress

        return run_compress
    if name == "explore":
        from tensormoe.cli._explore import run_explore

        return run_explore
    from tensormoe.cli._demo import run_demo

    return run_demo


def _parser() -> _Parser:
    from tensormoe import __version__

    parser = _Parser(
        prog="tensormoe",
        usage="tensormoe [-h] [--version] COMMAND ...",
        description=_DESCRIPTION,
        epilog="A command's own options: tensormoe COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tensormoe {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        required=True,
        help=argparse.SUPPRESS,
        prog="tensormoe",
    )
    _add_rank(commands)
    _add_plan(commands)
    _add_choose(commands)
    _add_calibrate(commands)
    _add_demo(commands)
    _add_compress(commands)
    _add_explore(commands)
    return parser


def _add_rank(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "rank",
        description="The rank with the most capacity that a budget allows, for every "
        "factorization, with its cost next to that of the layers it replaces.",
        epilog="example: tensormoe rank 768 768 512 --budget linear --plot front.png",
    )
    _add_sizes(parser)
    option = parser.add_argument
    option(
        "--budget",
        metavar="BUDGET",
        help="for the layer with its gate: linear, mlp, a number of parameters (590k), or limits "
        "on a forward call: parameters=590k,flops=2G,memory=64MiB,time=2ms (default: linear, with "
        "the gate on top)",
    )
    option("--factorization", metavar="NAMES", help="only these, with commas between")
    option(
        "--bonds",
        action="append",
        default=[],
        metavar="[NAME=]BONDS",
        help="sizes of bonds that are fixed: tensor_ring=4,4,free",
    )
    option(
        "--objective",
        default="capacity",
        metavar="NAME",
        help="capacity (expert rank × expert span, the default), expert_rank or expert_span",
    )
    option("--hidden", metavar="N", help="hidden size of the MLP (default: 4 × IN)")
    option("--top-k", metavar="K", default="2", help="experts per token of the sparse MoE (2)")
    _add_gate(parser, "counted in every figure")
    _add_common(parser)


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "plan",
        description="The contraction plan of a layer with the cost of every step, and a drawing "
        "of its tensor network.",
        epilog="example: tensormoe plan 768 768 512 --factorization tensor_ring --rank 4,4,94",
    )
    _add_sizes(parser)
    option = parser.add_argument
    option("--factorization", default="cp", metavar="NAME", help="how 𝒲 is stored (default: cp)")
    option("--rank", metavar="RANK", help="one size for all bonds, or one a bond: 4,4,94")
    option("--budget", metavar="BUDGET", help="what to choose the rank by instead, as for rank")
    option("--training", action="store_true", help="forward and backward")
    option("--top-k", metavar="K", help="coefficients come as K values and indices a level")
    option("--prepared", action="store_true", help="weight-only steps have run beforehand")
    option("--memory-limit", metavar="BYTES", help="cut the batch into chunks that keep to 64MiB")
    option("--devices", metavar="P", help="cut the layer over P devices, and plan one of them")
    option("--leg", metavar="LEG", help="cut this leg: r, o, n0, … (default: the fastest)")
    option("--link", metavar="BYTES", help="bytes per second between devices: 300GB")
    _add_gate(parser, "counted in every figure; with --top-k, none is")
    _add_common(parser)


def _add_choose(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "choose",
        description="A page in the browser that answers what rank and plan answer, as fields and "
        "sliders move. It is served to this machine alone.",
    )
    option = parser.add_argument
    option("--port", default="8765", metavar="N", help="where (default: 8765; 0: any free one)")
    option("--no-browser", dest="browser", action="store_false", help="print the address alone")


def _add_calibrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        description="Measure this machine's roofline with a library and keep it in the user's "
        "config folder, where rank and plan find it.",
    )
    parser.add_argument(
        "--backend", default="numpy", metavar="NAME", help="numpy or torch (default: numpy)"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print, keep nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "demo",
        description="Choose ranks by the budget of a linear layer, train on scikit-learn's "
        "digits with NumPy alone, prove that factorized is unfactorized, and draw what the "
        "experts do.",
    )
    option = parser.add_argument
    option("--out", default="out", metavar="DIR", help="where files go (default: ./out)")
    option("--experts", default="32", metavar="EXPERTS", help="number of experts (default: 32)")
    option("--epochs", default="60", metavar="N", help="passes over the images (default: 60)")
    option("--seed", default="0", metavar="N", help="of initial values and batches (default: 0)")
    option("--json", action="store_true", help="print one JSON object")


def _add_compress(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "compress",
        description="Decompose the experts of a sparse mixture on disk, a layer's projection at a "
        "time, and write the model anew. Killed, the same command goes on where it was.",
        epilog="example: tensormoe compress Mixtral-8x7B --preset mixtral --factorization "
        "tensor_ring --budget 25% --max-memory 6GiB --output Mixtral-25",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="a .safetensors file, an index, or a folder of them")
    option("--output", metavar="DIR", help="a folder that does not exist yet")
    option(
        "--preset",
        metavar="NAME",
        help="where the experts are: mixtral, qwen_moe, olmoe, deepseek, or fused for stacks",
    )
    option(
        "--experts",
        action="append",
        default=[],
        metavar="PATTERN",
        help="where they are otherwise: 'layers.*.experts.*.w1', once for each projection",
    )
    option("--layout", default="auto", metavar="NAME", help="auto, out_in or in_out (auto)")
    option("--factorization", default="tensor_ring", metavar="NAME", help="(tensor_ring)")
    option("--budget", metavar="SIZE", help="25%% of the experts' parameters, or 1.5G for all")
    option("--rank", metavar="RANK", help="one size for all bonds, or one a bond: 4,4,94")
    option("--tolerance", metavar="ERROR", help="relative error that each layer is to reach: 0.1")
    option("--dense", action="store_true", help="write rebuilt matrices under their old keys")
    option("--max-memory", metavar="BYTES", help="refuse what would take more: 6GiB")
    option(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster whose workers decompose, on a file system that all share: "
        "tcp://host:8786",
    )
    option("--no-svd", dest="compare", action="store_false", help="do not compare with SVDs")
    option("--seed", default="0", metavar="N", help="of the random starts (default: 0)")
    option("--seconds", metavar="S", help="a time limit for the search of each stack of experts")
    option("--dry-run", action="store_true", help="sizes, ranks and time, from headers alone")
    option("--device", metavar="NAME", help="whose time a dry run predicts, as for rank")
    option("--json", action="store_true", help="print one JSON object")


def _add_explore(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "explore",
        description="One HTML page, which needs no network, with what every expert does: of a data "
        "file that Exploration.save wrote, or of a layer's checkpoint, which runs in NumPy.",
        epilog="example: tensormoe explore head.safetensors --inputs x.npy --labels y.npy --logits "
        "--images pictures.npy --output experts.html",
    )
    option = parser.add_argument
    option("source", metavar="SOURCE", help="a .json data file, or a .safetensors checkpoint")
    option("--output", metavar="FILE", help=".html or .json (default: SOURCE with .html)")
    option("--inputs", metavar="FILE", help="the layer's inputs, an array in a .npy file")
    option("--labels", metavar="FILE", help="one class per input, in a .npy file")
    option(
        "--coefficients",
        action="append",
        default=[],
        metavar="FILE",
        help="of a layer without a gate, in .npy files: once for each level",
    )
    option("--logits", action="store_true", help="the layer's outputs are logits of the classes")
    option("--images", metavar="FILE", help="the inputs as images, in a .npy file")
    option("--texts", metavar="FILE", help="the inputs as texts, one per line")
    option("--class-names", metavar="FILE", help="names of the classes, one per line")
    option("--top", metavar="K", help="inputs that are shown per expert (default: 8)")
    option("--title", metavar="TEXT", help="of the page (default: the checkpoint's name)")
    option("--json", action="store_true", help="print one JSON object")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    for name, shown, text in _SIZES:
        parser.add_argument(name, metavar=shown, help=text)


def _add_gate(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--gate",
        metavar="NAME",
        help="entmax (the default), sparsemax, softmax, top_k or relu_top_k, or none for a "
        f"layer that is given its coefficients: {text}",
    )
    parser.add_argument(
        "--gate-on-top",
        action="store_true",
        help="the budget is for experts alone, and the gate comes on top",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--batch", default="1024", metavar="N", help="inputs of a call (default: 1024)")
    option("--no-bias", dest="bias", action="store_false", help="experts without a bias")
    option(
        "--device",
        metavar="NAME",
        help="whose times are predicted: this (see calibrate), t4, v100, a100, l4, h100, h200 or "
        "cpu (default: this if it was measured, else cpu)",
    )
    option("--json", action="store_true", help="print one JSON object")
    option("--plot", metavar="FILE", help="write a picture: .png, .svg or .pdf")
