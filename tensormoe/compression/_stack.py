"""A stack of experts: read, decomposed, measured and written."""

from __future__ import annotations

import os
from typing import Any

from tensormoe._rounding import CODES, SCALES, checked_bits
from tensormoe.compression._bits import layer_bytes
from tensormoe.compression._calibrated import calibrated_group
from tensormoe.compression._folder import place_of
from tensormoe.compression._groups import Group
from tensormoe.compression._measure import GroupReport, Stored
from tensormoe.compression._outputs import EXPERTS
from tensormoe.compression._plan import compares
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import Model
from tensormoe.compression._values import read_stack, rounded, working_dtype
from tensormoe.compression._verdict import roundings
from tensormoe.compression._write import write_factors
from tensormoe.decomposition._decompose import decompose
from tensormoe.decomposition._gauge import robust
from tensormoe.decomposition._in_bits import in_bits
from tensormoe.decomposition._search import Search
from tensormoe.decomposition._watch import Callback
from tensormoe.errors import TensormoeError
from tensormoe.factorizations import Dense


def compress_stack(
    model: Model,
    group: Group,
    settings: Compression,
    budget: int | None,
    path: str,
    callback: Callback | None,
) -> GroupReport:
    """Decompose one group, and write its factors.

    Args:
        model: the files with the group's keys, at least.
        group: the experts.
        settings: of the compression.
        budget: entries that the factors may take, if that is what is given.
        path: of the file of factors.
        callback: told of every sweep.

    Raises:
        KeyboardInterrupt: the group is left as it is for another time.
    """
    stack = read_stack(model, group)
    calibrated = calibrated_group(group, settings)
    bits = checked_bits(settings.bits)
    try:
        moments = None if calibrated is None else calibrated.moments(stack)
        found = decompose(
            stack,
            settings.factorization,
            rank=settings.rank,
            budget=budget,
            tolerance=settings.tolerance,
            search=Search(seconds=settings.seconds),
            moments=moments,
            callback=callback,
            compare=compares(settings),
            judge=None if calibrated is None else calibrated.judged,
            seed=settings.seed,
            bits=bits,
        )
    except TensormoeError as reason:
        raise type(reason)(f"{group.name!r}: {reason}") from reason
    if found.report.ended == "interrupted":
        # factors of half a search would stay for good
        raise KeyboardInterrupt
    config = found.config()
    # matrices are rebuilt from factors that were never rounded
    stored = working_dtype(group.dtype) if settings.dense else group.dtype
    best = found.factors
    # those of few bits are rounded already, and keep their codes
    if bits is None and stored != working_dtype(group.dtype):
        best = robust(config.spec.network, best)
    named = {f"factors.{name}": array for name, array in best.items()}
    codes: dict[str, Any] = {}
    if bits is not None:
        for name, array in named.items():
            *coded, named[name] = in_bits(array, bits, group.dtype)
            codes |= dict(zip((f"{name}.{CODES}", f"{name}.{SCALES}"), coded, strict=True))
    factors = {name: rounded(array, stored) for name, array in named.items()}
    missing = Stored(stack, config, factors, group.dtype if settings.dense else None)
    error, errors = missing.errors()
    off = None if calibrated is None else calibrated.lost(missing.pairs())
    place = None if settings.dense else place_of(group)
    prefix = "" if place is None else place.prefix
    if bits is None or settings.dense:
        write_factors(path, config, factors, stored, prefix)
    else:
        write_factors(path, config, codes, stored, prefix, bits)
    return GroupReport(
        group.name,
        None if settings.dense else f"{EXPERTS}/{os.path.basename(path)}",
        group.experts,
        group.in_features,
        group.out_features,
        group.dtype,
        config.spec.factorization.rank,
        group.entries,
        config.spec.num_parameters,
        error,
        errors,
        () if isinstance(config.spec.factorization, Dense) else found.report.controls,
        found.report.seconds,
        found.report.ended,
        None if off is None else off.output_error,
        None if off is None else off.predicted_loss,
        config.spec.factorization.name,
        bits,
        layer_bytes(config.spec, bits, group.itemsize),
        roundings(stack, group.dtype, group.itemsize, calibrated) if compares(settings) else (),
        missing.energy() if off is None else off.energy,
    )
