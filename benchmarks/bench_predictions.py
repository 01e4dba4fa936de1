"""Predicted time and memory against measured ones, for every factorization.

384 → 256, float32, one thread, gate included; forward calls and training steps of 32, 512 and
16 × 32 experts at batches of 1, 64 and 2048 (``Dense`` with 512 experts in batches of 64 at most).
Times are the processor's, so that other programs disturb them less, and the fastest of several
calls; the profile is measured anew before every block of layers. Memory is what Python's allocator
(NumPy) or PyTorch's profiler saw, and may be off by what Python's own objects take (8 KiB).

With ``--results`` rows are kept in a file, and those that are there already are not run again.

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
from time import perf_counter, process_time
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before a library reads it
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # PyTorch's profiler says when it begins

from _predictions import Row, build, fastest, peak_memory, prepared, rows  # noqa: E402

from tensormoe.cli.calibration import measure_roofline  # noqa: E402

NOISE = 8 * 1024
Found = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", default="numpy,torch", help="with commas between")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each row")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep rows, and go on there")
    options = parser.parse_args()
    path: Path | None = options.results
    done: dict[str, Found] = {}
    if path is not None and path.exists():
        done = {each["row"]: each for each in map(json.loads, path.read_text().splitlines())}
    versions = [f"Python {platform.python_version()}", platform.machine()]
    if "torch" in options.backends:
        import torch

        torch.set_num_threads(1)
        versions.insert(0, f"PyTorch {torch.__version__}")
    print(f"{datetime.now(UTC):%d %B %Y}; {', '.join(versions)}; one thread")
    measured, begin = [], perf_counter()
    block: object = None
    for row in rows(tuple(options.backends.split(","))):
        if row.kind.name == "dense" and row.experts != 32 and row.batch > 64:
            continue
        if row.key not in done:
            if block != (row.backend, row.kind, row.experts):
                block, layer = (row.backend, row.kind, row.experts), None
                gc.collect()
                roofline = measure_roofline(row.backend, process_time, 0.05)
                layer = build(row)
            done[row.key] = found = measure(row, layer, roofline, options.seconds)
            if path is not None:
                with path.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        measured.append((row, done[row.key]))
        found = done[row.key]
        print(
            f"{perf_counter() - begin:4.0f} s  {row.key:68} {found['seconds'] * 1e6:10.0f} µs  "
            f"{time_ratio(found):5.2f}  memory {found['memory'] / found['predicted_memory']:5.2f}",
            file=sys.stderr,
            flush=True,
        )
    print_groups(measured)


def measure(row: Row, layer: Any, roofline: Any, seconds: float) -> Found:
    """Measured and predicted time of a row."""
    call = prepared(row, layer)
    cost = layer.cost(row.batch, training=row.training)
    return {
        "row": row.key,
        "seconds": fastest(call, seconds),
        "predicted_seconds": roofline.time(cost),
        "memory": peak_memory(row, call),
        "predicted_memory": cost.peak_memory,
    }


def time_ratio(found: Found) -> float:
    """Measured ÷ predicted."""
    return float(found["seconds"] / found["predicted_seconds"])


def memory_fits(found: Found) -> bool:
    """Within 10 %, but for Python's own objects."""
    off = abs(found["memory"] - found["predicted_memory"])
    return bool(off <= max(0.1 * found["memory"], NOISE))


def print_groups(measured: Sequence[tuple[Row, Found]]) -> None:
    """A line for each group of rows, and the summary."""
    print(f"{'measured ÷ predicted time':34} rows  median  within 2 ×  worst        memory")
    groups: dict[str, list[Found]] = {}
    for row, found in measured:
        way = "training" if row.training else "forward"
        for name in (
            f"{row.backend}, {way}",
            f"batch {row.batch}",
            f"experts {row.experts}",
            row.kind.name,
            "all",
        ):
            groups.setdefault(name, []).append(found)
    for name, group in sorted(groups.items(), key=lambda item: item[0] == "all"):
        ratios = [time_ratio(found) for found in group]
        within = sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios)
        fits = sum(map(memory_fits, group)) / len(group)
        print(
            f"{name:34} {len(group):4} {median(ratios):7.2f} {within:10.0%}  "
            f"{min(ratios):5.2f}…{max(ratios):5.2f} {fits:10.0%}"
        )


if __name__ == "__main__":
    main()
