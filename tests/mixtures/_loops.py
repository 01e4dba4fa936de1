"""Sparse mixtures as loops over tokens and experts, from matrices that are built by einsum."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import erf, expit, softmax

from tensormoe.mixtures import ExpertsConfig, SparseConfig
from tensormoe.testing import reconstruct_by_einsum

ACTS: dict[str, Any] = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "silu": lambda x: x * expit(x),
    "tanh": np.tanh,
}


def expert(experts: ExpertsConfig, arrays: Any, name: str, number: int, x: np.ndarray) -> Any:
    """One expert's output for one token, from matrices that were built."""

    def layer(role: str, row: np.ndarray) -> np.ndarray:
        config = experts.layers[role].spec
        prefix = f"{name}.projections.{role}.factors."
        factors = {key.removeprefix(prefix): each for key, each in arrays.items() if prefix in key}
        matrix = reconstruct_by_einsum(config.factorization, factors)[number]
        made: np.ndarray = (np.append(row, 1.0) if config.bias else row) @ matrix
        return made

    if experts.kind == "linear":
        return layer("down_proj", x)
    assert experts.act_layer is not None
    act = ACTS[experts.act_layer]
    if experts.kind == "mlp":
        return layer("down_proj", act(layer("up_proj", x)))
    gate, up = np.split(layer("gate_up_proj", x), 2)
    return layer("down_proj", act(gate) * up)


def by_loops(config: SparseConfig, arrays: Any, x: np.ndarray) -> np.ndarray:
    outputs = []
    for token in x:
        logits = token @ arrays["router.projection"] + arrays.get("router.bias", 0.0)
        chosen = np.argsort(-logits)[: config.top_k]
        y = np.zeros(config.out_features)
        for number, weight in zip(chosen, softmax(logits[chosen]), strict=True):
            y += weight * expert(config.experts, arrays, "experts", number, token)
        if config.shared is not None:
            shares = np.ones(2)
            if config.mix_shared:
                mixed = token @ arrays["router.mixing"] + arrays["router.mixing_bias"]
                shares = softmax(mixed)
            y = shares[0] * y + shares[1] * expert(config.shared, arrays, "shared", 0, token)
        outputs.append(y)
    return np.array(outputs)
