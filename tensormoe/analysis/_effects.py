"""Effects of experts on outputs: contrasts between sets of inputs, and attribution of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormoe._config import LayerConfig
from tensormoe.analysis._inputs import dense_rows, host
from tensormoe.analysis._interventions import rows_per_step
from tensormoe.analysis._use import ExpertLoad
from tensormoe.backend import Array, backend_of
from tensormoe.errors import ShapeError
from tensormoe.functional import level_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray


def risk_difference(first: ExpertLoad, second: ExpertLoad) -> NDArray[Any]:
    """Difference (N,) of the rates at which two sets of inputs use each expert.

    A rate is the share of a set's inputs whose coefficient is above the loads' threshold; experts
    of large differences are those to steer (SteerMoE, arXiv 2509.09660).

    Args:
        first: use by inputs that show something.
        second: use by inputs that do not.

    Raises:
        ShapeError: loads of different experts or thresholds.

    >>> import numpy as np
    >>> from tensormoe.analysis import expert_load
    >>> with_it, without = np.eye(3)[[0, 0, 1]], np.eye(3)[[1, 2, 2]]
    >>> risk_difference(expert_load(with_it), expert_load(without)).round(2).tolist()
    [0.67, 0.0, -0.67]
    """
    _ = first + second  # refuses loads that do not belong together
    made: NDArray[Any] = first.frequency - second.frequency
    return made


def logit_attribution(
    config: LayerConfig,
    arrays: Mapping[str, Array],
    x: Array,
    coefficients: Sequence[Any],
    directions: Array,
    *,
    level: int = 0,
) -> NDArray[Any]:
    """Contribution (rows, N) of every expert of a level to one logit per row.

    It is a_n ⟨E_n(x), d⟩ with d what a unit of output adds to the logit: the token's row of the
    output embedding, times the scale of the last norm at this row where there is one (frozen, as
    direct logit attribution has it; "Expert Strikes Back", arXiv 2604.02178). The sum over the
    experts is the layer's whole contribution.

    Args:
        config: of a layer.
        arrays: its arrays by canonical name, of any library.
        x: (rows, in), the layer's inputs.
        coefficients: one entry per level, (rows, N_e).
        directions: (rows, out), or (out,) for all rows.
        level: of the hierarchy.

    Raises:
        ShapeError: directions or coefficients that do not fit.

    >>> from tensormoe_numpy import MuMoE
    >>> import numpy as np
    >>> layer, x = MuMoE(8, 4, experts=3, rank=4, seed=0), np.ones((2, 8), "float32")
    >>> direction = np.array([0, 0, 1, 0], "float32")
    >>> found = logit_attribution(
    ...     layer.config, layer.parameters, x, layer.coefficients(x), direction
    ... )
    >>> bool(np.allclose(found.sum(axis=1), layer(x)[:, 2], atol=1e-6))
    True
    """
    import numpy as np

    backend, features = backend_of(x), config.spec.out_features
    rows = int(x.shape[0])
    if tuple(directions.shape) not in ((features,), (rows, features)):
        raise ShapeError(
            f"directions must be {(features,)} or {(rows, features)}; got "
            f"{tuple(directions.shape)}."
        )
    given = [
        dense_rows(each, size)[0]
        for each, size in zip(coefficients, config.spec.experts, strict=True)
    ]
    if not 0 <= level < len(given) or any(each.shape[0] != rows for each in given):
        raise ShapeError(
            f"coefficients must be those of the {rows} inputs, with level {level} among them; got "
            f"{[tuple(each.shape) for each in given]}."
        )
    along = host(directions, backend)
    found, step = [], rows_per_step(config, level)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mixed = [each[part] for each in given]
        terms = level_outputs(config, arrays, x[part], mixed, level, backend)
        shares = (host(terms, backend) * (along if along.ndim == 1 else along[part])).sum(axis=-1)
        found.append(host(mixed[level], backend) * shares.T)
    return np.concatenate(found) if found else np.zeros((0, config.spec.experts[level]))
