"""Speed of ``compress_checkpoint`` on a Dask cluster, as a ratio taken in one run.

A model of equal stacks of experts is compressed by one worker and by two, each a process with one
thread on this machine, by turns; the shortest time of each counts. Times are those of whole calls:
the stacks read, decomposed and written, and all other files. Workers are started and warm before.
Two workers need two idle cores. *busy* is the share of the workers' time in which they decompose,
which a busy machine does not change much.

    python benchmarks/bench_cluster.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from _shared import settings
from distributed import Client, LocalCluster
from safetensors.numpy import save_file

from tensormoe.compression import Compression, compress_checkpoint

SHAPE = (8, 256, 384)
WANTED = Compression("tensor_ring", rank=(4, 8, 32), experts=("layers.*.experts.*.w1",))


def write_model(path: Path, stacks: int) -> None:
    """Stacks of experts with falling singular values, float32."""
    rng = np.random.default_rng(0)
    experts, rows, columns = SHAPE
    tensors = {}
    for layer in range(stacks):
        common = rng.standard_normal((128, columns), dtype="float32")
        scale = np.arange(1, 129, dtype="float32") ** -0.7
        for expert in range(experts):
            left = rng.standard_normal((rows, 128), dtype="float32") * scale
            own = rng.standard_normal((128, columns), dtype="float32")
            tensors[f"layers.{layer}.experts.{expert}.w1"] = left @ (common + own)
    save_file(tensors, path)


def timed(model: Path, client: Client) -> tuple[float, float]:
    """Seconds of a call, and the share of them in which workers decompose."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        start = perf_counter()
        found = compress_checkpoint(model, Path(folder, "out"), WANTED, client=client)
        taken = perf_counter() - start
    work = sum(each.seconds or 0.0 for each in found.groups)
    return taken, work / taken / sum(client.nthreads().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stacks", type=int, default=8, help="of experts (8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as one,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as two,
        Client(one) as first,
        Client(two) as second,
    ):
        model, small = Path(folder, "model.safetensors"), Path(folder, "small.safetensors")
        write_model(model, options.stacks)
        write_model(small, 2)
        times: dict[Client, list[tuple[float, float]]] = {first: [], second: []}
        for client in times:
            timed(small, client)
        for _ in range(options.repeats):
            for client, found in times.items():
                found.append(timed(model, client))
        alone, both = (min(found) for found in times.values())
    print(
        f"{options.stacks} stacks {SHAPE} float32 to {WANTED.rank}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; {settings()}"
    )
    for name, (seconds, busy) in (("one worker", alone), ("two workers", both)):
        print(f"{name:>11}: {seconds:6.2f} s, busy {busy:.0%}")
    print(f"      ratio: {both[0] / alone[0]:6.2f}")


if __name__ == "__main__":
    main()
