"""Similarity of experts, from their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._validation import choice, instance
from tensormoe.analysis._inputs import host
from tensormoe.backend import Array, get_backend
from tensormoe.checkpoint import check_config
from tensormoe.errors import ShapeError, SpecError
from tensormoe.execution import execute
from tensormoe.factorizations import INPUT, OUTPUT, Leg, Network, expert_leg
from tensormoe.planning import Operand, Program, contraction

if TYPE_CHECKING:
    from numpy.typing import NDArray

HIDDEN = "hidden"


def expert_similarity(
    config: LayerConfig | BlockConfig,
    arrays: Mapping[str, Array],
    level: int = 0,
    *,
    how: str = "matrices",
) -> NDArray[Any]:
    """Cosines (N, N) between the matrices of a level's experts, which are never built.

    The inner products of all pairs are one contraction of the network with itself over input,
    output, and the experts of other levels; it is done on the host in float64. Biases are left out.

    The experts of a block have two matrices each, A_n (in, hidden) and B_n (hidden, out):

    - ``"matrices"`` compares the pairs, as if all entries stood in one row: ⟨A_n, A_m⟩ + ⟨B_n, B_m⟩
      over the lengths. Experts with other hidden units in the same places are alike.
    - ``"composed"`` compares the products A_n B_n, which are the experts without the activation.
      Hidden units may be in another order, and scaled in A against B.

    Args:
        config: of a layer or block.
        arrays: its arrays by canonical name, of any library.
        level: of the hierarchy.
        how: of a block, ``"matrices"`` or ``"composed"``.

    Returns:
        Cosines between -1 and 1; NaN for experts that are zero.

    Raises:
        ShapeError: a level that the layer does not have.
        SpecError: not the configuration of a layer or block; ``"composed"`` for a layer, or for a
            gated block, whose experts are no product of two matrices.

    >>> from tensormoe_numpy import MuMoE, MuMoEMLP
    >>> layer = MuMoE(8, 4, experts=3, rank=4, seed=0)
    >>> found = expert_similarity(layer.config, layer.parameters)
    >>> found.shape, found.diagonal().round(6).tolist()
    ((3, 3), [1.0, 1.0, 1.0])
    >>> block = MuMoEMLP(8, 16, experts=3, rank=4, seed=0)
    >>> expert_similarity(block.config, block.parameters, how="composed").shape
    (3, 3)
    """
    check_config(config)
    kinds, what = (LayerConfig, BlockConfig), "the configuration of a layer or block"
    instance(config, kinds, "config", what, SpecError)
    choice(how, ("matrices", "composed"), "how", SpecError)
    layers = _layers(config)
    if how == "composed" and (isinstance(config, LayerConfig) or config.gated):
        raise SpecError(
            "how must be 'matrices' for a layer or a gated block, whose experts are no product of "
            f"two matrices; got 'composed' for {'a layer' if len(layers) == 1 else 'gated ones'}."
        )
    levels = next(iter(layers.values())).spec.levels
    if not 0 <= level < levels:
        raise ShapeError(f"level must lie in [0, {levels}); got {level!r}.")
    parts = [
        (
            layer.spec.network,
            {
                each.name: host(arrays[f"{prefix}factors.{each.name}"])
                for each in layer.spec.network.factors
            },
        )
        for prefix, layer in layers.items()
    ]
    if how == "composed":
        return _cosines(_products(parts, level))
    return _cosines(sum(_products([each], level) for each in parts))  # type: ignore[arg-type]


def _layers(config: LayerConfig | BlockConfig) -> dict[str, LayerConfig]:
    """The layers by what stands before the names of their arrays."""
    if isinstance(config, BlockConfig):
        return {"first.": config.first, "second.": config.second}
    return {"": config}


Part = tuple[Network, Mapping[str, "NDArray[Any]"]]
"""A network, and the values of its factors."""


def _cosines(products: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    lengths = np.sqrt(products.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = products / lengths[:, None] / lengths[None, :]
    made: NDArray[Any] = np.clip(cosines, -1.0, 1.0)
    return made


def _products(parts: Sequence[Part], level: int) -> NDArray[Any]:
    """Inner products (N, N) of a level's experts, which are products of one matrix per part."""
    import numpy as np

    networks = tuple(network for network, _ in parts)
    backend, count = get_backend("numpy"), networks[0].experts[level]
    products = np.zeros((count, count))
    terms = [range(len(each.terms)) for each in networks]
    for first, second in product(product(*terms), repeat=2):
        program, times, mark = _pair(networks, (first, second), level)
        operands = []
        for each in program.operands:
            place, _, name = each.name.rstrip("'").partition(":")
            operands.append(parts[int(place)][1][name])
        found = execute(program, operands, backend)[0][0] * times
        # what is the same for all experts of the level has no axis for them
        products += found.reshape(*(count if has else 1 for has in mark))
    return products


@lru_cache(maxsize=256)
def _pair(
    networks: tuple[Network, ...], terms: tuple[tuple[int, ...], tuple[int, ...]], level: int
) -> tuple[Program, int, tuple[bool, bool]]:
    """The inner products of two experts' terms, one of each network, by the experts of a level.

    Returns:
        The program; how often each product counts, for legs that no term knows; and which of the
        two axes the result has.
    """
    leg = expert_leg(level)
    operands: list[Operand] = []
    sizes: dict[Leg, int] = {}
    for side, chosen in enumerate(terms):
        for place, (network, term) in enumerate(zip(networks, chosen, strict=True)):
            names = _names(network, place, len(networks), side, leg)
            sizes |= {names[each]: size for each, size in network.sizes.items()}
            operands += [
                Operand(
                    f"{place}:{each.name}" + "'" * side,
                    tuple(names[one] for one in each.legs),
                    "factor",
                )
                for each in network.terms[term].factors
            ]
    known = {each for operand in operands for each in operand.legs}
    ends = (leg, f"{leg}'")
    mark = (ends[0] in known, ends[1] in known)
    output = tuple(one for one, has in zip(ends, mark, strict=True) if has)
    bonds = {one for one in sizes if ":" in one}
    times = 1
    for one in sizes.keys() - known - bonds - {*ends}:
        times *= sizes[one]
    return contraction(tuple(operands), output, sizes), times, mark


def _names(network: Network, place: int, count: int, side: int, leg: Leg) -> dict[Leg, Leg]:
    """Legs of a network by their names among all: what both experts share has the same."""
    prime = "'" * side
    names = {each: f"{place}:{each}{prime}" for each in network.sizes}
    names |= {each: each for each in network.expert_legs}
    names[leg] = leg + prime
    names[INPUT] = INPUT if place == 0 else HIDDEN + prime
    names[OUTPUT] = OUTPUT if place == count - 1 else HIDDEN + prime
    return names
