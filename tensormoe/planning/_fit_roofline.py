"""Rooflines from measured times of layers: least squares on relative errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log

from tensormoe._validation import brief, instance, is_number
from tensormoe.errors import PlanError
from tensormoe.planning._cost import Cost, StepCost
from tensormoe.planning._roofline import Roofline, faces_of

Sample = tuple[Cost, float]
"""The cost of a call, and the seconds that it took."""

# what a time is the sum of, each with a coefficient
_FACES = ("rows", "summed", "columns")
_OVERHEADS = ("step", "backward", "operation", "product", "turned", "run", "call")
_TERMS = ("matmul", *_FACES, "elementwise", "traffic", "fresh", *_OVERHEADS)
_LEAST_SAMPLES = 2 * len(_TERMS)

# bytes that a step may find in the cache; the best of them is kept
_CACHES = tuple(2.0**power for power in range(19, 27))
_ROUNDS = 12
_SWEEPS = 400
# share of a measured time that a guess counts as at least
_LEAST_GUESS = 0.2
# rates are finite, also of work that took no time at all
_SMALLEST = 1e-18


def fit_roofline(name: str, samples: Sequence[Sample], threads: int | None = None) -> Roofline:
    """The profile whose predictions are closest to measured times, by their ratios.

    A predicted time is linear in the inverse rates and the overheads, but for the slower of
    arithmetic and traffic of each step. Rounds of non-negative least squares, weighted so that they
    count ratios, alternate with a new choice of the slower one.

    Args:
        name: of the device.
        samples: costs and measured seconds of calls that differ in sizes, batches, factorizations,
            and in whether they train; at least 28.
        threads: number of threads that ran, kept in the profile.

    Returns:
        A profile of one device alone, without the speed of a link.

    Raises:
        PlanError: too few samples, or a time that is not a positive number.

    >>> from tensormoe import CP, LayerSpec
    >>> from tensormoe.planning import PUBLISHED_ROOFLINES
    >>> cpu, sizes = PUBLISHED_ROOFLINES["cpu"], [(k, n) for k in (8, 64) for n in range(1, 16)]
    >>> costs = [LayerSpec(32, 24, 8, CP(k)).cost(n * n) for k, n in sizes]
    >>> found = fit_roofline("mine", [(cost, cpu.time(cost)) for cost in costs])
    >>> 0.9 < found.time(costs[-1]) / cpu.time(costs[-1]) < 1.1
    True
    """
    _check(samples)
    seconds = [float(time) for _, time in samples]
    tried = []
    for cache in _CACHES:
        found = replace(_START, name=name, cache=cache, threads=threads)
        for _ in range(_ROUNDS):
            # relative errors of guesses that are too long and too short count alike
            weights = [
                1 / (time * max(found.time(cost), _LEAST_GUESS * time)) for cost, time in samples
            ]
            rows = [_amounts(cost, found) for cost, _ in samples]
            found = _with(found, _least_squares(rows, seconds, weights))
        loss = sum(log(time / found.time(cost)) ** 2 for cost, time in samples)
        tried.append((loss, cache, found))
    return min(tried, key=lambda each: each[:2])[2]


def _amounts(cost: Cost, roofline: Roofline) -> list[float]:
    """Amount of every term in a predicted time; of arithmetic and traffic, the slower one."""
    total = [0.0] * len(_TERMS)
    total[_TERMS.index("call")] = cost.calls
    for step in cost.steps:
        for place, amount in _of_step(step, roofline):
            total[place] += amount
    return total


def _of_step(step: StepCost, roofline: Roofline) -> list[tuple[int, float]]:
    named: dict[str, float] = {
        "fresh": step.bytes_written,
        "backward" if step.backward else "step": 1,
        # that of the step itself included: no overhead is below that of an operation
        "operation": 1 + step.operations,
        "product": step.products,
        "turned": step.turned,
        "run": step.runs,
    }
    if roofline.arithmetic(step) >= roofline.traffic(step):
        named["matmul"], named["elementwise"] = step.matmul_flops, step.elementwise_flops
        named |= zip(_FACES, (2.0 * face for face in faces_of(step)), strict=True)
    else:
        moved = step.bytes_read + step.bytes_written - (roofline.cache or 0.0)
        named["traffic"] = max(moved, 0.0)
    return [(_TERMS.index(name), amount) for name, amount in named.items()]


def _with(roofline: Roofline, coefficients: Sequence[float]) -> Roofline:
    """The roofline of coefficients, in seconds per unit of each term."""
    of = dict(zip(_TERMS, coefficients, strict=True))
    matmul = max(of["matmul"], _SMALLEST)
    rows, summed, columns = (of[face] / matmul for face in _FACES)
    return replace(
        roofline,
        matmul_rate=1 / matmul,
        elementwise_rate=1 / max(of["elementwise"], _SMALLEST),
        # no sample may have moved more than the cache holds
        bandwidth=1 / of["traffic"] if of["traffic"] else roofline.bandwidth,
        overhead=max(of["step"] + of["operation"], _SMALLEST),
        fresh_bandwidth=1 / of["fresh"] if of["fresh"] else None,
        backward_overhead=max(of["backward"] + of["operation"], _SMALLEST),
        padding=(rows, summed, columns),
        operation_overhead=of["operation"] or None,
        product_overhead=of["product"] or None,
        turn_rate=1 / of["turned"] if of["turned"] else None,
        run_overhead=of["run"] or None,
        call_overhead=of["call"] or None,
    )


def _least_squares(
    rows: Sequence[Sequence[float]], seconds: Sequence[float], weights: Sequence[float]
) -> list[float]:
    """Coefficients that are not negative, by descent along one of them at a time."""
    terms = range(len(_TERMS))
    scale = [max(row[k] for row in rows) or 1.0 for k in terms]
    scaled = [[row[k] / scale[k] for k in terms] for row in rows]
    gram = [
        [sum(w * row[k] * row[j] for w, row in zip(weights, scaled, strict=True)) for j in terms]
        for k in terms
    ]
    target = [
        sum(w * row[k] * time for w, row, time in zip(weights, scaled, seconds, strict=True))
        for k in terms
    ]
    found = [0.0] * len(_TERMS)
    for _ in range(_SWEEPS):
        for k in terms:
            if gram[k][k] > 0.0:
                others = sum(gram[k][j] * found[j] for j in terms) - gram[k][k] * found[k]
                found[k] = max((target[k] - others) / gram[k][k], 0.0)
    return [value / size for value, size in zip(found, scale, strict=True)]


def _check(samples: Sequence[Sample]) -> None:
    instance(samples, (list, tuple), "samples", "a list of pairs (cost, seconds)", PlanError)
    if len(samples) < _LEAST_SAMPLES:
        raise PlanError(
            f"samples must be at least {_LEAST_SAMPLES}, twice as many as a profile has numbers; "
            f"got {len(samples)}. Time more layers, batches and training steps."
        )
    for place, sample in enumerate(samples):
        paired = isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], Cost)
        if not paired or not is_number(sample[1]) or not 0 < sample[1] < float("inf"):
            raise PlanError(
                "a sample must be a pair of a Cost and a positive number of seconds; got "
                f"{brief(sample)} at {place}. Write (layer.cost(64), seconds)."
            )


_START = Roofline("", 1e11, 1e10, 2e10, 1e-6, cache=1.0)
