"""Speed and memory of decomposition next to TensorLy's, as ratios taken in one run.

- CP at rank 256 against ``tensorly.decomposition.parafac`` (random start, 50 iterations) on tensors
  of a planted rank with 15 % noise, in float32. Ours is given sweeps until its error is no larger.
- A tensor ring against ``tensorly.decomposition.tensor_ring_als`` (random start, 50 iterations).
- PyTorch and JAX arrays against NumPy's: median ratio of runs that are taken in turn.
- With ``--large``: an (8, 4096, 14336) bfloat16 stack with a decaying spectrum to 25 % of its
  entries, with the peak of the process (needs PyTorch, 6 GiB and minutes). With ``--calibrated``
  also weighted by second moments of inputs, as a ratio of CPU times, or with ``--alone`` without
  the run to compare with.

*extra* is the most that was allocated at once beyond the tensor, in units of it.

    python benchmarks/bench_decomposition.py
"""

from __future__ import annotations

import argparse
import resource
import tracemalloc
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from _shared import settings

from tensormoe import CP, LowRank, TensorRing, TensorTrain, Tucker
from tensormoe.decomposition import Decomposition, Moments, Search, decompose
from tensormoe.factorizations import Factorization

Array = Any


def planted(shape: tuple[int, int, int], rank: int, noise: float = 0.15) -> Array:
    """A tensor of CP rank ``rank`` and noise of a share of its norm, float32."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((size, rank), dtype="float32") for size in shape)
    whole = np.matmul(a[:, None, :] * b, c.T)
    loud = rng.standard_normal(shape, dtype="float32")
    loud *= noise * np.linalg.norm(whole) / np.linalg.norm(loud)
    return whole + loud


def planted_ring(shape: tuple[int, int, int], rank: tuple[int, int, int], noise: float) -> Array:
    """A tensor ring of ``rank`` and noise, float32."""
    rng = np.random.default_rng(0)
    bonds = (*rank, rank[0])
    cores = [
        rng.standard_normal((bonds[k], size, bonds[k + 1]), dtype="float32")
        for k, size in enumerate(shape)
    ]
    whole = np.einsum("anb,bic,coa->nio", *cores, optimize=True)
    loud = rng.standard_normal(shape, dtype="float32")
    loud *= noise * np.linalg.norm(whole) / np.linalg.norm(loud)
    return whole + loud


def relative(tensor: Array, other: Array) -> float:
    return float(np.linalg.norm(tensor - other) / np.linalg.norm(tensor))


def by_parafac(tensor: Array, rank: int) -> Array:
    import tensorly
    from tensorly.decomposition import parafac

    found = parafac(tensor, rank, n_iter_max=50, init="random", tol=0, random_state=0)
    return tensorly.cp_to_tensor(found)


def by_ring_als(tensor: Array, rank: tuple[int, int, int]) -> Array:
    from tensorly.decomposition import tensor_ring_als

    full = [*rank, rank[0]]
    found = tensor_ring_als(tensor, full, n_iter_max=50, tol=0, random_state=0)
    return found.to_tensor()


def extra(call: Callable[[], object], tensor: Array) -> float:
    """Most memory at once, in units of the tensor."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(peak / tensor.nbytes)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    found = call()
    return perf_counter() - start, found


def compare(name: str, tensor: Array, kind: Factorization, theirs: Callable[[], Array]) -> None:
    """One line: theirs against ours."""

    def ours(search: Search | None = None) -> Decomposition:
        return decompose(tensor, kind, search=search, compare=False)

    ours()  # plans, and wakes the processor
    mine, found = timed(ours)
    slow, other = timed(theirs)
    error, theirs_error = found.report.error, relative(tensor, other)
    print(
        f"{name:>12} {tensor.shape!s:>18} {mine:7.2f} {slow:8.2f} {slow / mine:6.1f} "
        f"{error:8.5f} {theirs_error:8.5f} {found.report.sweeps:6} {extra(ours, tensor):6.2f}",
        flush=True,
    )
    if error > theirs_error:
        print(f"{'':12} the error is larger than TensorLy's")


def libraries(shape: tuple[int, int, int], kind: Factorization, pairs: int = 15) -> None:
    """One line: arrays of PyTorch and JAX in float32 and bfloat16 against NumPy's in float32."""
    import jax.numpy as jnp
    import torch

    array = planted(shape, 32)
    tensor, jaxes = torch.from_numpy(array), jnp.asarray(array)
    given = [array, tensor, tensor.bfloat16(), jaxes, jaxes.astype(jnp.bfloat16)]

    def once(each: Array) -> float:
        return timed(lambda: decompose(each, kind, compare=False))[0]

    times = [[once(each) for each in given] for _ in range(pairs + 1)][1:]
    ratios = [median(row[k] / row[0] for row in times) for k in range(1, len(given))]
    numpy = median(row[0] for row in times)
    shown = "  ".join(f"{each:6.2f}" for each in ratios)
    print(f"{kind!s:>30} {shape!s:>18} {numpy:7.3f} {shown}", flush=True)


def decaying(shape: tuple[int, int, int]) -> Any:
    """Experts in bfloat16 with singular values falling like k^-0.7, half of them in common."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(shape, dtype=torch.bfloat16)
    count = shape[1] // 8
    common = torch.randn(count, shape[2], generator=generator)
    for expert in weights:
        scale = torch.arange(1, count + 1) ** -0.7
        left = torch.randn(shape[1], count, generator=generator) * scale
        own = torch.randn(count, shape[2], generator=generator)
        expert.copy_(left @ (common + own) + 0.05 * torch.randn(shape[1:], generator=generator))
    return weights


def moments_of(size: int) -> Moments:
    """Second moments of inputs whose variances fall like 1/k in directions of their own."""
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((2 * size, size), dtype="float32")
    samples *= np.arange(1, size + 1, dtype="float32") ** -0.5
    samples += 0.2 * samples[:, ::-1]
    return Moments(samples.T @ samples / len(samples))


def peak() -> float:
    """Most memory of the process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def large(name: str, shape: tuple[int, int, int], calibrated: bool, plain: bool) -> None:
    """A stack in bfloat16, by default of Mixtral's size, to a quarter of its entries."""
    weights = decaying(shape)
    moments = moments_of(shape[1]) if calibrated else None
    experts, rows, columns = shape
    entries = experts * rows * columns // 4
    kind: Factorization = LowRank(entries // (experts * (rows + columns)))
    if name == "tensor_train":
        kind = TensorTrain((experts, (entries - experts**2) // (experts * rows + columns)))
    search = Search(starts=1, sweeps=10, polish=1)
    print(f"{shape} bfloat16; the process has {peak():.2f} GiB", flush=True)
    first = 0.0
    for given in (None,) if moments is None else (None, moments) if plain else (moments,):
        start = process_time()
        found = decompose(weights, kind, search=search, moments=given, compare=False)
        seconds = process_time() - start
        report = found.report
        error = report.error if given is None else report.weighted_error
        share = "" if not first else f", {seconds / first:.2f} times the one without moments"
        first = first or seconds
        print(
            f"{'weights' if given is None else 'calibrated'} to {report.ratio:.1%} as {kind}: "
            f"{seconds:.0f} s of the CPU{share}, error {error:.4f}, "
            f"peak of the process {peak():.2f} GiB",
            flush=True,
        )


def compare_libraries(pairs: int) -> None:
    """Arrays of PyTorch and JAX against NumPy's."""
    heads = "  ".join(("torch", "bfloat16", "jax", "bfloat16"))
    print(f"{'':>30} {'shape':>18} {'numpy s':>7} ÷ numpy: {heads}", flush=True)
    for shape in ((16, 192, 256), (8, 256, 512)):
        for kind in (CP(64), TensorRing((4, 4, 16)), Tucker((8, 48, 48)), LowRank(16)):
            libraries(shape, kind, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="only the stack of Mixtral's size")
    parser.add_argument("--calibrated", action="store_true", help="weighted by moments as well")
    parser.add_argument("--alone", action="store_true", help="weighted by moments alone")
    parser.add_argument("--kind", choices=("low_rank", "tensor_train"), default="tensor_train")
    parser.add_argument("--shape", type=int, nargs=3, default=(8, 4096, 14336))
    parser.add_argument(
        "--libraries", action="store_true", help="only PyTorch and JAX against NumPy"
    )
    parser.add_argument("--pairs", type=int, default=15, help="runs of each library")
    options = parser.parse_args()
    print(f"decomposition; {settings()}")
    if options.libraries:
        compare_libraries(options.pairs)
        return
    if options.large:
        calibrated = options.calibrated or options.alone
        large(options.kind, tuple(options.shape), calibrated, not options.alone)
        return
    head = f"{'':>12} {'shape':>18} {'ours s':>7} {'theirs s':>8} {'ratio':>6}"
    print(f"{head} {'error':>8} {'theirs':>8} sweeps  extra", flush=True)
    tensor = planted((16, 384, 512), 64)
    compare("cp", tensor, CP(256), lambda: by_parafac(tensor, 256))
    wide = planted((8, 1024, 3584), 256)
    compare("cp", wide, CP(256), lambda: by_parafac(wide, 256))
    ring = planted_ring((16, 192, 256), (4, 4, 16), 0.15)
    compare("tensor ring", ring, TensorRing((4, 4, 16)), lambda: by_ring_als(ring, (4, 4, 16)))
    compare_libraries(options.pairs)


if __name__ == "__main__":
    main()
