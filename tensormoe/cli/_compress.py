"""``tensormoe compress``: what it takes."""

from __future__ import annotations

import argparse

from tensormoe.cli._commands import Commands
from tensormoe.cli._options import add_switch


def add_parser(commands: Commands) -> None:
    """The options of the command."""
    parser = commands.add_parser(
        "compress",
        description="Decompose the experts of a sparse mixture on disk, a layer's projection at a "
        "time, and write the model anew. Killed, the same command goes on where it was.",
        epilog="example: tensormoe compress Mixtral-8x7B --factorization tensor_ring "
        "--budget 25% --max-memory 6GiB --output Mixtral-25",
    )
    option = parser.add_argument
    option("model", metavar="MODEL", help="a .safetensors file, an index, or a folder of them")
    option("--output", metavar="DIR", help="a folder that does not exist yet")
    option(
        "--preset",
        metavar="NAME",
        help="the model's family, such as mixtral, gpt_oss or deepseek (auto, by its config.json)",
    )
    option(
        "--experts",
        action="append",
        default=[],
        metavar="PATTERN",
        help="where they are otherwise: 'layers.*.experts.*.w1', once for each projection",
    )
    option("--layout", default="auto", metavar="NAME", help="auto, out_in or in_out (auto)")
    option(
        "--factorization",
        metavar="NAME",
        help="one, several with commas between, or auto: the one that loses least in each stack "
        "(tensor_ring, or that of --allocation)",
    )
    option("--budget", metavar="SIZE", help="25%% of the experts' parameters, or 1.5G for all")
    option("--rank", metavar="RANK", help="one size for all bonds, or one per bond: 4,4,94")
    option("--allocation", metavar="FILE", help="ranks from tensormoe allocate --output FILE")
    option("--tolerance", metavar="ERROR", help="relative error that each layer is to reach: 0.1")
    option(
        "--bits",
        metavar="N",
        help="8 or 4: factors rounded to integers with scales; auto, with a calibration: what "
        "loses least in each stack; --budget is then a share of bytes",
    )
    option(
        "--gate-up",
        default="stored",
        metavar="NAME",
        help="gate and up projection: stored, joined as one tensor, apart as two, or auto: in each "
        "layer what loses less (default: stored, as the files have them)",
    )
    add_switch(parser, "dense", "write rebuilt matrices under their old keys")
    option("--calibration", metavar="FILE", help="of calibrate-model: errors of outputs count")
    option(
        "--weighting",
        default="inputs",
        metavar="NAME",
        help="what of the calibration errors are weighted by: inputs, both, fisher or none "
        "(default: inputs)",
    )
    option(
        "--expert-weights",
        default="equal",
        metavar="NAME",
        help="what an expert counts: equal, frequency or router (default: equal)",
    )
    option(
        "--share",
        default="equal",
        metavar="NAME",
        help="the budget of a stack: equal, or by sensitivity, with a calibration (default: equal)",
    )
    option("--max-memory", metavar="BYTES", help="refuse what would take more: 6GiB")
    option(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster whose workers decompose, on a file system that all share: "
        "tcp://host:8786",
    )
    add_switch(parser, "svd", "compare with SVDs (default)", True)
    option("--seed", default="0", metavar="N", help="of the random starts (default: 0)")
    option("--seconds", metavar="S", help="a time limit for the search of each stack of experts")
    option("--dry-run", action="store_true", help="sizes, ranks and time, from headers alone")
    option("--device", metavar="NAME", help="whose time a dry run predicts, as for rank")
    option("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Compress a model, or say what that would do."""
    from tensormoe.cli._compress_run import run_compress

    run_compress(arguments)
