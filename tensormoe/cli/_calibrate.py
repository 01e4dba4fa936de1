"""``tensormoe calibrate``: this machine's roofline, measured with NumPy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any

from tensormoe.cli._console import (
    format_memory,
    format_short,
    format_time,
    make_console,
    make_table,
    print_json,
)
from tensormoe.cli._extras import require
from tensormoe.cli._profile import THIS_MACHINE, save_profile
from tensormoe.planning import Roofline

__all__ = ["measure_roofline", "run_calibrate"]

# large enough to leave every cache, small enough for a machine with little memory
_STREAM_ENTRIES = 2**24
_CACHED_ENTRIES = 2**13
_MATMUL_SIZE = 1024
# other programs may run: the fastest of many short runs is what the machine can do
_SECONDS = 0.6


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Measure, show, and keep the profile unless told otherwise."""
    require("numpy", "numpy", "tensormoe calibrate")
    if not arguments.json:
        make_console()  # before seconds of work, not after
    roofline = measure_roofline()
    checks = _checks(roofline)
    path = None if arguments.dry_run else save_profile(roofline)
    if arguments.json:
        print_json(
            {
                "command": "calibrate",
                "roofline": roofline.to_dict(),
                "checks": checks,
                "path": None if path is None else str(path),
            }
        )
        return
    console = make_console()
    table = make_table("this machine, float32", "measured")
    table.add_row("matrix products", f"{format_short(roofline.matmul_rate)}FLOP/s")
    table.add_row("elementwise work in cache", f"{format_short(roofline.elementwise_rate)}FLOP/s")
    table.add_row("memory bandwidth", f"{format_memory(roofline.bandwidth)}/s")
    table.add_row("starting an operation", format_time(roofline.overhead))
    console.print()
    console.print(table)
    console.print()
    check = make_table("a layer, 768 → 768, 512 experts", "batch", "predicted", "measured")
    for each in checks:
        check.add_row(
            each["layer"],
            str(each["batch"]),
            format_time(each["predicted"]),
            format_time(each["measured"]),
        )
    console.print(check)
    console.print()
    if path is None:
        console.print("A dry run: nothing was kept.")
    else:
        console.print(f"Kept in {path}", soft_wrap=True)
        console.print("tensormoe rank and tensormoe plan now predict times for this machine.")


def measure_roofline() -> Roofline:
    """Peak rates of NumPy on this machine: the best of several runs each."""
    import numpy as np

    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype="float32")

    left, right = array(_MATMUL_SIZE, _MATMUL_SIZE), array(_MATMUL_SIZE, _MATMUL_SIZE)
    product = np.empty_like(left)
    matmul = 2 * _MATMUL_SIZE**3 / _best(lambda: np.matmul(left, right, out=product))

    small, other = array(_CACHED_ENTRIES), array(_CACHED_ENTRIES)
    result = np.empty_like(small)
    elementwise = _CACHED_ENTRIES / _best(lambda: np.multiply(small, other, out=result), 50)

    source, target = array(_STREAM_ENTRIES), np.empty(_STREAM_ENTRIES, dtype="float32")
    copied = 2 * source.nbytes / _best(lambda: np.copyto(target, source))
    return Roofline(THIS_MACHINE, matmul, elementwise, copied, _overhead())


def _overhead() -> float:
    """Seconds that a step takes whose arithmetic is next to nothing, as layers run it."""
    import numpy as np

    from tensormoe_numpy import MuMoE

    layer = MuMoE(4, 4, experts=4, factorization="tensor_ring", rank=2, gate=None, seed=0)
    x, coefficients = np.ones((1, 4), "float32"), np.full((1, 4), 0.25, "float32")
    steps = len(layer.plan(1).program.steps)
    return _best(lambda: layer(x, coefficients), 50) / steps


def _checks(roofline: Roofline) -> list[dict[str, Any]]:
    """What the profile predicts for real layers, next to what they take."""
    import numpy as np

    from tensormoe_numpy import MuMoE

    found = []
    rng = np.random.default_rng(0)
    for name, label in (("cp", "CP"), ("tensor_ring", "tensor ring")):
        layer = MuMoE(768, 768, experts=512, factorization=name, seed=0)
        for batch in (64, 1024):
            x = rng.standard_normal((batch, 768), dtype="float32")
            measured = _best(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
            predicted = roofline.time(layer.cost(batch))
            found.append(
                {"layer": label, "batch": batch, "predicted": predicted, "measured": measured}
            )
    return found


def _best(run: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of the fastest run; ``repeats`` runs are timed together if one is too short."""
    run()
    best = float("inf")
    end = perf_counter() + _SECONDS
    count = 0
    while count < 3 or perf_counter() < end:
        start = perf_counter()
        for _ in range(repeats):
            run()
        best = min(best, (perf_counter() - start) / repeats)
        count += 1
    return best
