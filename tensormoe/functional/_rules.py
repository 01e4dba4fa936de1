"""Training of each parameter: its learning rate relative to a linear layer's, and decay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

from tensormoe._config import BlockConfig, LayerConfig
from tensormoe._names import block_names
from tensormoe._validation import brief, instance
from tensormoe.errors import SpecError
from tensormoe.factorizations import INPUT, Initializer, Response, responses

__all__ = ["DIRECTIONS", "ParameterRule", "parameter_rules"]

DIRECTIONS = 20.0
"""Independent directions of the gradients in a batch: as measured on a classifier of digits."""


@dataclass(frozen=True, order=True, slots=True)
class ParameterRule:
    """A parameter's learning rate, relative to that of linear layers, and whether it decays.

    Args:
        group: ``"experts"`` for factors that start around ones or identities, ``"factors"`` for
            all other factors, ``"bias"`` for biases of experts, ``"gate"`` for all parameters of
            gates, ``"other"`` for those of other layers.
        multiplier: of the learning rate of a linear layer, for Adam.
        decays: whether weight decay is for it.
    """

    group: Literal["experts", "factors", "bias", "gate", "other"]
    multiplier: float = 1.0
    decays: bool = True


def parameter_rules(
    config: LayerConfig | BlockConfig, *, init: str = "variance", directions: float = DIRECTIONS
) -> dict[str, ParameterRule]:
    """A rule for every parameter: learning rates with which a fresh layer moves like a linear one.

    Adam moves every entry by the learning rate η at its first step. With one rate for all, how far
    the output moves depends on the rank, and expert factors, whose entries are around one, move it
    hundreds of times less than a weight of the same width. With these multipliers each of the F
    factors moves the output by 1/√F of what ``torch.nn.Linear`` (or ``torch.nn.Embedding``) moves
    it by at rate η. This is the spectral condition of Yang et al. 2023 (arXiv 2310.17813) for
    factors of a product, with the number of directions k that gradients have. A weight of I inputs
    moves outputs by √(I(1 + I/k)) η. For CP, with experts that share half of their energy:

    - expert factors: √(6 I (1 + I/k) / (F (1 + max(1, R/O)/k)));
    - input: √(3 (1 + I/k) / (F (1 + max(I, I R/O)/k)));
    - output: √(I (1 + I/k) / (2 R F (1 + R/k))).

    :func:`tensormoe.factorizations.responses` has the same for any network. Gates have multiplier
    1: their projections have as many inputs as the linear layer.

    Factors and projections that start around zero decay. Expert factors, biases, and the tables of
    embeddings don't.

    Args:
        config: of a layer or block.
        init: the scheme of its initial values. Trained factors have other sizes, and their rules
            are not these.
        directions: k. Few in classifiers of few classes; for as many as there are features, √I
            takes the place of I.

    Returns:
        Rules by canonical name, as :meth:`LayerConfig.parameter_shapes`.

    Raises:
        SpecError: no configuration, an unknown scheme, or ``directions`` below 1.

    >>> from tensormoe import CP, Gate, LayerSpec
    >>> rules = parameter_rules(LayerConfig(LayerSpec(64, 64, 16, CP(256)), Gate()))
    >>> for name, rule in rules.items():
    ...     print(f"{name:18} {rule.group:8} {rule.multiplier:6.2f} {rule.decays}")
    factors.expert_0   experts   21.17 False
    factors.input      factors    0.55 True
    factors.output     factors    0.11 True
    factors.bias       bias       0.94 False
    gate.projection_0  gate       1.00 True
    """
    if isinstance(config, BlockConfig):
        layers = config.first, config.second
        return block_names(
            *(parameter_rules(each, init=init, directions=directions) for each in layers)
        )
    instance(config, LayerConfig, "config", "a LayerConfig or a BlockConfig", SpecError)
    number = isinstance(directions, int | float) and not isinstance(directions, bool)
    if not number or not directions >= 1:
        raise SpecError(f"directions must be a number of at least 1; got {brief(directions)}.")
    directions = float(min(directions, 1e300))
    network = config.spec.network
    starts = _starts(config, init)
    share = sqrt(len(network.factors))
    found = responses(network, starts, indexed_input=config.indexed_input)
    rules = {}
    for factor in network.all_factors:
        start, bias = starts[factor.name], factor in network.biases
        inputs = 1 if bias or config.indexed_input else config.spec.in_features
        size = Response(inputs, inputs).size(directions)
        multiplier = size / (share * found[factor.name].size(directions))
        # rounding errors would keep parameters of one rate apart
        multiplier = float(f"{multiplier:.6g}")
        centered = start.center not in ("zero", "shared")
        table = config.indexed_input and INPUT in factor.legs
        rules[f"factors.{factor.name}"] = ParameterRule(
            "bias" if bias else "experts" if centered else "factors",
            multiplier,
            not (bias or centered or table),
        )
    for name, shape in config.parameter_shapes().items():
        if name.startswith("gate."):
            rules[name] = ParameterRule("gate", 1.0, len(shape) > 1)
    return rules


def _starts(config: LayerConfig, init: str) -> dict[str, Initializer]:
    starts = dict(config.spec.initializers(init))
    if config.indexed_input:
        scale = sqrt(3.0 * config.spec.in_features)
        for term in config.spec.network.terms:
            name = term.input_factor.name
            start = starts[name]
            starts[name] = replace(
                start, std=start.std * scale, center_std=start.center_std * scale
            )
    return starts
