"""Similarity of experts, from their factors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tensormoe._config import LayerConfig
from tensormoe._validation import instance
from tensormoe.analysis._inputs import host
from tensormoe.backend import Array, get_backend
from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError
from tensormoe.execution import execute
from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network, Term, expert_leg
from tensormoe.planning import Operand, Program, contraction

if TYPE_CHECKING:
    from numpy.typing import NDArray


def expert_similarity(
    config: LayerConfig, arrays: Mapping[str, Array], level: int = 0
) -> NDArray[Any]:
    """Cosines (N, N) between the matrices of a level's experts, which are never built.

    The inner products of all pairs are one contraction of the network with itself over input,
    output, and the experts of other levels; it is done on the host in float64. Biases are left out.

    Args:
        config: of a layer.
        arrays: its arrays by canonical name, of any library.
        level: of the hierarchy.

    Returns:
        Cosines between -1 and 1; NaN for experts that are zero.

    Raises:
        ShapeError: a level that the layer does not have.
        SpecError: not the configuration of a layer.

    >>> from tensormoe_numpy import MuMoE
    >>> layer = MuMoE(8, 4, experts=3, rank=4, seed=0)
    >>> found = expert_similarity(layer.config, layer.parameters)
    >>> found.shape, found.diagonal().round(6).tolist()
    ((3, 3), [1.0, 1.0, 1.0])
    """
    import numpy as np

    check_config(config)
    instance(config, LayerConfig, "config", "the configuration of a layer", SpecError)
    network = config.spec.network
    if not 0 <= level < config.spec.levels:
        raise ShapeError(f"level must lie in [0, {config.spec.levels}); got {level!r}.")
    values = {each.name: host(arrays[f"factors.{each.name}"]) for each in network.factors}
    backend, count = get_backend("numpy"), network.experts[level]
    products = np.zeros((count, count))
    for first in range(len(network.terms)):
        for second in range(len(network.terms)):
            program, times, mark = _pair(network, first, second, level)
            operands = [values[each.name.removesuffix("'")] for each in program.operands]
            found = execute(program, operands, backend)[0][0] * times
            # what is the same for all experts of the level has no axis for them
            products += found.reshape(*(count if has else 1 for has in mark))
    lengths = np.sqrt(products.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products / lengths[:, None] / lengths[None, :]
    made: NDArray[Any] = np.clip(cosines, -1.0, 1.0)
    return made


@lru_cache(maxsize=256)
def _pair(
    network: Network, first: int, second: int, level: int
) -> tuple[Program, int, tuple[bool, bool]]:
    """The inner products of two terms by the experts of a level.

    Returns:
        The program; how often each product counts, for levels that neither term knows; and which
        of the two axes the result has.
    """
    leg, terms = expert_leg(level), network.terms
    shared = {*network.expert_legs, INPUT, OUTPUT} - {leg}
    sizes = {**network.sizes, **{_primed(each): size for each, size in network.sizes.items()}}
    operands = (
        *(Operand(each.name, each.legs, "factor") for each in terms[first].factors),
        *(
            Operand(
                f"{each.name}'",
                tuple(one if one in shared else _primed(one) for one in each.legs),
                "factor",
            )
            for each in terms[second].factors
        ),
    )
    mark = (leg in terms[first].legs, leg in terms[second].legs)
    output = tuple(one for one, has in zip((leg, _primed(leg)), mark, strict=True) if has)
    times = 1
    for each in shared:
        if not _knows(terms[first], each) and not _knows(terms[second], each):
            times *= network.sizes[each]
    return contraction(operands, output, sizes), times, mark


def _knows(term: Term, leg: Leg) -> bool:
    return leg in term.legs


def _primed(leg: Leg) -> Leg:
    return f"{leg}'"
