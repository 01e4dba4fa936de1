"""Explorations of tokens as the batches that Neuronpedia's dashboards are made of."""

from __future__ import annotations

from typing import Any

from tensormoe._validation import instance, non_negative_int, positive_int
from tensormoe.analysis._explorer._value import Exploration
from tensormoe.errors import SpecError


def neuronpedia_batches(
    found: Exploration,
    *,
    model_id: str,
    layer: int,
    source_set: str,
    level: int = 0,
    dataset: str = "",
    batch: int = 128,
) -> list[dict[str, Any]]:
    """Experts of a level as features of Neuronpedia, in the batches that SAEDashboard writes.

    Each is what SAEDashboard's ``NeuronpediaDashboardBatch.to_dict`` returns (release 0.8), to be
    written as ``batch-0.json`` and so on. An expert's activations are its coefficients for the
    tokens around each top input. Fields that an expert has no values for, such as tokens that a
    direction promotes, are empty lists. Nothing is sent anywhere.

    Args:
        found: an exploration of :class:`Tokens`.
        model_id: as Neuronpedia names the model, such as ``"gpt2-small"``.
        layer: of the model.
        source_set: the name of the experts, as that of a set of autoencoders.
        level: whose experts are exported.
        dataset: the name of the texts' dataset.
        batch: features per batch.

    Raises:
        SpecError: an exploration of other inputs, or values that cannot be.

    >>> import numpy as np
    >>> from tensormoe.analysis import Tokens, explore_coefficients
    >>> found = explore_coefficients(np.eye(2)[[0, 1, 0]], examples=Tokens([["a", "b", "c"]]))
    >>> (made,) = neuronpedia_batches(found, model_id="m", layer=3, source_set="experts")
    >>> first = made["features"][0]["activations"][0]
    >>> first["tokens"], first["values"], first["qualifying_token_index"]
    (['a', 'b', 'c'], [1.0, 0.0, 1.0], 0)
    """
    instance(found, Exploration, "found", "an exploration", SpecError)
    for name, value in (("model_id", model_id), ("source_set", source_set), ("dataset", dataset)):
        instance(value, str, name, "a string", SpecError)
    layer, size = non_negative_int(layer, "layer"), positive_int(batch, "batch")
    level = non_negative_int(level, "level")
    if level >= len(found.levels):
        raise SpecError(f"level must lie in [0, {len(found.levels)}); got {level}.")
    if found.levels[level].top.marks is None:
        raise SpecError("found must be an exploration of tokens. Pass examples=Tokens(…).")
    features = [_feature(found, level, expert, dataset) for expert in range(found.experts[level])]
    return [
        {
            "model_id": model_id,
            "layer": layer,
            "sae_set": source_set,
            "sae_id_suffix": None,
            "features": features[start : start + size],
        }
        for start in range(0, len(features), size)
    ]


_LISTS = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("decoder_weights_dist", "vector"),
)


def _feature(found: Exploration, level: int, expert: int, dataset: str) -> dict[str, Any]:
    explored = found.levels[level]
    top, marks = explored.top, explored.top.marks
    assert marks is not None
    window = marks.shape[2] // 2
    most = float(top.values[expert].max(initial=0.0))
    activations = []
    for place, number in enumerate(top.numbers[expert].tolist()):
        if number < 0:
            continue
        content = found.recorded[number].content
        tokens, first = list(content["tokens"]), int(content["first"])
        start = window + first
        activations.append(
            {
                # what marks the largest ones there
                "bin_min": -1,
                "bin_max": most,
                "bin_contains": -1,
                "tokens": tokens,
                "values": marks[expert, place, start : start + len(tokens)].tolist(),
                "qualifying_token_index": -first,
            }
        )
    made: dict[str, Any] = {"feature_index": expert, **{name: [] for name in _LISTS}}
    return made | {
        "frac_nonzero": float(explored.load.frequency[expert]),
        "n_prompts_total": found.inputs,
        "n_tokens_in_prompt": 2 * window + 1,
        "dataset": dataset,
        "activations": activations,
    }
