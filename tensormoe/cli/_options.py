"""Options that several commands share."""

from __future__ import annotations

import argparse

FORMATS = ("table", "json", "csv", "markdown")

_SIZES = (
    ("in_features", "IN", "size of an input; of an embedding, the number of ids"),
    ("out_features", "OUT", "size of an output"),
    ("experts", "EXPERTS", "number of experts: 128, or 16x8 for two levels"),
)


def add_switch(
    parser: argparse.ArgumentParser, name: str, text: str, default: bool | None = False
) -> None:
    """An option that is on or off: ``--name`` and ``--no-name``.

    Args:
        parser: of a command.
        name: without dashes.
        text: what it does when it is on.
        default: where neither is given.
    """
    action = parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    # afterwards, since some releases of Python would add it to the text
    action.default = default


def add_format(parser: argparse.ArgumentParser) -> None:
    """The form of what is printed."""
    parser.add_argument(
        "--format",
        metavar="FORM",
        default="table",
        help="table, json, csv or markdown (default: table)",
    )
    parser.add_argument(
        "--json", dest="format", action="store_const", const="json", help="short for --format json"
    )


def add_layer(parser: argparse.ArgumentParser, gate: str) -> None:
    """Sizes of a layer, block or embedding, its call and its device.

    Args:
        parser: of a command.
        gate: what its gate is counted in.
    """
    for name, shown, text in _SIZES:
        parser.add_argument(name, metavar=shown, help=text)
    option = parser.add_argument
    option(
        "--kind",
        metavar="KIND",
        default="layer",
        help="layer, mlp (a block of two layers), gated (a gated block, as SwiGLU) or embedding "
        "(default: layer)",
    )
    option("--hidden", metavar="N", help="hidden size, of blocks and of the MLP (default: 4 × IN)")
    option(
        "--budget",
        metavar="BUDGET",
        help="for all that is built, the gate included: linear, mlp, a number of parameters "
        "(590k), or limits on a forward call: parameters=590k,flops=2G,memory=64MiB,time=2ms "
        "(default: the layers that are replaced, with the gate on top)",
    )
    option(
        "--objective",
        metavar="NAME",
        default="capacity",
        help="capacity (expert rank × expert span, the default), expert_rank or expert_span",
    )
    option(
        "--bonds",
        action="append",
        default=[],
        metavar="[NAME=]BONDS",
        help="sizes of bonds that are fixed: tensor_ring=4,4,free",
    )
    option(
        "--gate",
        metavar="NAME",
        help="entmax (the default), sparsemax, softmax, top_k or relu_top_k, or none for a "
        f"layer that is given its coefficients: {gate}",
    )
    add_switch(parser, "gate-on-top", "the budget is for experts alone, and the gate comes on top")
    add_switch(parser, "bias", "experts have a bias (default, but for embeddings)", None)
    option("--batch", default="1024", metavar="N", help="inputs of a call (default: 1024)")
    add_switch(parser, "training", "count forward and backward")
    option(
        "--dtype",
        default="float32",
        metavar="NAME",
        help="of all arrays: float32, bfloat16, float16 or float64 (default: float32)",
    )
    option(
        "--device",
        metavar="NAME",
        help="whose times are predicted: this (see calibrate; this-torch for one of several), t4, "
        "v100, a100, l4, l40s, rtx4090, h100, h200, b200, mi300x or cpu (default: this if it was "
        "measured, else cpu)",
    )
    option("--devices", metavar="P", help="cut the layer or block over P devices")
    option("--link", metavar="BYTES", help="bytes per second between devices: 300GB")
    option("--plot", metavar="FILE", help="write a picture: .png, .svg or .pdf")
    add_format(parser)
