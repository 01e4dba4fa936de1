"""Predicted time and memory against measured ones, for every factorization and backend.

Rows are layers and blocks, float32, one thread, gate included, forward and in training. Those of
the suite ``tuned`` are where the form of the time model was chosen, those of ``held out`` have
other sizes, ranks, experts and batches; the profile is that of ``tensormoe calibrate``, whose
layers are yet others, measured once per backend. Times are the fastest of several calls: the
processor's for NumPy and PyTorch, so that other programs disturb them less, and real ones for JAX,
whose work is in threads of its own. Memory is what Python's allocator (NumPy), PyTorch's profiler
or XLA's plan of the compiled call says, and may be off by what Python's own objects take (8 KiB).

With ``--results`` profiles and rows are kept in a file, and those that are there already are not
run again: a long run can be done in turns of ``--limit`` seconds.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/bench_predictions.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before a library reads it
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # PyTorch's profiler says when it begins

from _predictions import (  # noqa: E402
    SUITES,
    Row,
    build,
    clock_of,
    cost_of,
    fastest,
    peak_memory,
    prepared,
    rows,
)

from tensormoe.cli._benches import BENCHES  # noqa: E402
from tensormoe.cli.calibration import SAMPLES, measure_samples  # noqa: E402
from tensormoe.planning import Roofline, fit_roofline  # noqa: E402

NOISE = 8 * 1024
WITHIN = 0.05
"""Share by which a prediction of memory may be off."""
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", default="numpy,torch,jax", help="with commas between")
    parser.add_argument("--suites", default=",".join(SUITES), help="with commas between")
    parser.add_argument("--seconds", type=float, default=0.08, help="time for each row")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep rows, and go on there")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop after so long")
    options = parser.parse_args()
    backends = options.backends.split(",")
    store = Store(options.results)
    begin = perf_counter()
    if "torch" in backends:
        import torch

        torch.set_num_threads(1)
    profiles = {each: store.profile(each) for each in backends}
    for suite in options.suites.split(","):
        measured, layer, of = [], None, None
        for row in rows(suite, tuple(backends)):
            found = store.rows.get(row.key)
            if found is None:
                if options.limit is not None and perf_counter() - begin > options.limit:
                    raise SystemExit("More rows are left; run the same command again.")
                if of != row.layer:
                    layer = None
                    gc.collect()
                    layer, of = build(row), row.layer
                found = store.keep(row.key, measure(row, layer, options.seconds))
            measured.append((row, compared(row, found, profiles[row.backend])))
            print(
                f"{perf_counter() - begin:4.0f} s  {row.key:76} {found['seconds'] * 1e6:10.0f} µs  "
                f"{time_ratio(measured[-1][1]):5.2f}  memory {memory_ratio(measured[-1][1]):5.2f}",
                file=sys.stderr,
                flush=True,
            )
        print(f"{datetime.now(UTC):%d %B %Y}; {', '.join(versions(backends))}; one thread; {suite}")
        print_groups(measured)


class Store:
    """Profiles and measured rows, in a file if there is one.

    Args:
        path: of the file, one JSON object per line.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.rows: dict[str, Found] = {each["row"]: each for each in map(json.loads, lines)}

    def profile(self, backend: str) -> Roofline:
        """The profile of a backend, from times that are measured if the file has none."""
        key, bench = f"profile {backend}", BENCHES[backend]()
        if key not in self.rows:
            times = [time for _, time in measure_samples(bench, SAMPLES, clock_of(backend))]
            self.keep(key, {"seconds": times})
        costs = [
            layer.cost(batch, training)
            for each in SAMPLES
            for layer in [bench.layer(*each.layer)]
            for batch in each.batches
            for training in (False, True)
        ]
        return fit_roofline(backend, list(zip(costs, self.rows[key]["seconds"], strict=True)))

    def keep(self, key: str, found: Found) -> Found:
        """Results that are kept in a file."""
        self.rows[key] = {"row": key, **found}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


def measure(row: Row, layer: Any, seconds: float) -> Found:
    """Measured time and memory of a row."""
    call = prepared(row, layer)
    return {
        "seconds": fastest(call, seconds, clock_of(row.backend)),
        "memory": peak_memory(row, call),
    }


def compared(row: Row, found: Found, roofline: Roofline) -> Found:
    """A row beside its predictions."""
    cost = cost_of(row)
    predicted = {"predicted_seconds": roofline.time(cost), "predicted_memory": cost.peak_memory}
    return found | predicted


def versions(backends: Sequence[str]) -> list[str]:
    """Versions of the libraries that ran."""
    from importlib.metadata import version

    found = [f"{name} {version(name)}" for name in backends]
    return [*found, f"Python {platform.python_version()}", platform.machine()]


def time_ratio(found: Found) -> float:
    """Measured ÷ predicted."""
    return float(found["seconds"] / found["predicted_seconds"])


def memory_ratio(found: Found) -> float:
    """Measured ÷ predicted."""
    return float(found["memory"] / found["predicted_memory"])


def memory_fits(found: Found) -> bool:
    """Whether memory is as predicted, but for Python's own objects."""
    off = abs(found["memory"] - found["predicted_memory"])
    return bool(off <= max(WITHIN * found["memory"], NOISE))


def print_groups(measured: Sequence[tuple[Row, Found]]) -> None:
    """A line for each group of rows."""
    heads = "rows  median  within 1.5 ×  within 2 ×  worst        memory"
    print(f"{'measured ÷ predicted time':34} {heads}")
    groups: dict[str, list[Found]] = {}
    for row, found in measured:
        way = "training" if row.training else "forward"
        kind = row.kind.name if len(row.sizes) == 2 else f"block, {row.kind.name}"
        for name in (
            f"{row.backend}, {way}",
            f"{row.backend}, batch {row.batch}",
            row.backend,
            kind,
        ):
            groups.setdefault(name, []).append(found)
    for name, group in sorted(groups.items()):
        ratios = [time_ratio(found) for found in group]
        close, near = (
            sum(1 / factor <= ratio <= factor for ratio in ratios) / len(ratios)
            for factor in (1.5, 2)
        )
        fits = sum(map(memory_fits, group)) / len(group)
        print(
            f"{name:34} {len(group):4} {median(ratios):7.2f} {close:13.0%} {near:11.0%}  "
            f"{min(ratios):5.2f}…{max(ratios):5.2f} {fits:8.0%}"
        )


if __name__ == "__main__":
    main()
