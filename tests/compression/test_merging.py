"""Fewer experts: statistics, groups, permutations and averages, on arrays of several libraries."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensormoe_numpy
from tensormoe import convert
from tensormoe.compression import (
    ExpertGroups,
    allot_experts,
    choice_frequencies,
    cosine_similarity,
    group_experts,
    merge_mixture,
    merge_stacks,
    most_frequent,
    prune_mixture,
)
from tensormoe.errors import BackendError, CheckpointError, ShapeError, SpecError
from tensormoe.mixtures import sparse_config
from tensormoe.routing import Router
from tensormoe_torch import reduce_experts
from tests.mixtures._forms import drawn as drawn_arrays
from tests.mixtures._forms import torch_layer

Stacks = dict[str, np.ndarray]
KINDS = {
    "linear": ("down_proj",),
    "mlp": ("up_proj", "down_proj"),
    "gated": ("gate_proj", "up_proj", "down_proj"),
    "fused": ("gate_up_proj", "down_proj"),
}
IN, HIDDEN, OUT = 4, 5, 3


def drawn(kind: str, experts: int, seed: int = 0) -> tuple[Stacks, Stacks]:
    """Random weights and biases in float64."""
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys(("gate_proj", "up_proj"), (IN, HIDDEN))
    shapes |= {"gate_up_proj": (IN, 2 * HIDDEN), "down_proj": (HIDDEN, OUT)}
    if kind == "linear":
        shapes["down_proj"] = (IN, OUT)
    weights = {role: rng.standard_normal((experts, *shapes[role])) for role in KINDS[kind]}
    biases = {role: rng.standard_normal((experts, shapes[role][1])) for role in KINDS[kind]}
    return weights, biases


def output(weights: Stacks, biases: Stacks, n: int, x: np.ndarray) -> np.ndarray:
    """One expert's, computed from scratch."""

    def layer(role: str, rows: np.ndarray) -> np.ndarray:
        made: np.ndarray = rows @ weights[role][n] + biases[role][n]
        return made

    if len(weights) == 1:
        return layer("down_proj", x)
    if "up_proj" not in weights:
        gate, up = np.split(layer("gate_up_proj", x), 2, axis=-1)
        return layer("down_proj", np.tanh(gate) * up)
    up = layer("up_proj", x)
    return layer("down_proj", np.tanh(layer("gate_proj", x)) * up if "gate_proj" in weights else up)


def shuffled(weights: Stacks, biases: Stacks, n: int, order: np.ndarray) -> None:
    """Give expert n the units of expert 0 in another order."""
    for stacks in (weights, biases):
        for role, stack in stacks.items():
            first = stack[0]
            if role != "down_proj":
                halves = np.split(first, first.shape[-1] // HIDDEN, axis=-1)
                stack[n] = np.concatenate([half[..., order] for half in halves], axis=-1)
            else:
                stack[n] = first[order] if stacks is weights else first


@pytest.mark.parametrize("kind", ["mlp", "gated", "fused"])
def test_permuted_copies_merge_into_the_original(kind: str) -> None:
    weights, biases = drawn(kind, 3)
    rng = np.random.default_rng(1)
    for n in (1, 2):
        shuffled(weights, biases, n, rng.permutation(HIDDEN))
    x = rng.standard_normal((7, IN))
    wanted = output(weights, biases, 0, x)
    np.testing.assert_allclose(output(weights, biases, 2, x), wanted, atol=1e-12)
    groups = ExpertGroups((0, 0, 0), (0,), (0.5, 0.2, 0.3), (1.0, 0.9, 0.9))
    merged = merge_stacks(weights, groups, biases=biases)
    np.testing.assert_allclose(output(*merged, 0, x), wanted, atol=1e-10)
    for found, given_ in zip(merged, (weights, biases), strict=True):
        for role, stack in found.items():
            np.testing.assert_allclose(stack[0], given_[role][0], atol=1e-12)
    apart = merge_stacks(weights, groups, biases=biases, align=False)
    assert np.abs(output(*apart, 0, x) - wanted).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_merge_without_loss(kind: str) -> None:
    weights, biases = drawn(kind, 4)
    for stacks in (weights, biases):
        for stack in stacks.values():
            stack[:] = stack[:1]
    x = np.random.default_rng(1).standard_normal((7, IN))
    groups = group_experts((0.4, 0.3, 0.2, 0.1), np.ones((4, 4)).tolist(), 2)
    merged = merge_stacks(weights, groups, biases=biases)
    for n in range(2):
        np.testing.assert_allclose(output(*merged, n, x), output(weights, biases, 0, x), atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_expert_per_group_is_that_expert(kind: str) -> None:
    weights, biases = drawn(kind, 3)
    groups = group_experts((0.5, 0.1, 0.4), np.eye(3).tolist(), 3)
    assert groups.groups == groups.dominant == (0, 1, 2)
    for found, wanted in zip(
        merge_stacks(weights, groups, biases=biases), (weights, biases), strict=True
    ):
        assert found.keys() == wanted.keys()
        for role, stack in found.items():
            assert np.array_equal(stack, wanted[role])


@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_weighted_by_frequencies(kind: str) -> None:
    weights, biases = drawn(kind, 4)
    groups = group_experts((0.1, 0.5, 0.15, 0.25), np.ones((4, 4)).tolist(), 1)
    assert groups.members == ((1, 0, 2, 3),)
    merged = merge_stacks(weights, groups, biases=biases, align=False)
    shares = np.array([0.1, 0.5, 0.15, 0.25])
    for found, stacks in zip(merged, (weights, biases), strict=True):
        for role, stack in found.items():
            np.testing.assert_allclose(stack[0], np.tensordot(shares, stacks[role], 1), rtol=1e-12)


def test_the_permutation_is_the_closest() -> None:
    weights, _ = drawn("fused", 2)
    groups = ExpertGroups((0, 0), (0,), (0.5, 0.5), (1.0, 0.0))
    merged, _ = merge_stacks(weights, groups)

    def distance(order: tuple[int, ...]) -> float:
        columns = [*order, *(n + HIDDEN for n in order)]
        up = weights["gate_up_proj"][1][:, columns] - weights["gate_up_proj"][0]
        down = weights["down_proj"][1][list(order)] - weights["down_proj"][0]
        return float((up**2).sum() + (down**2).sum())

    best = min(permutations(range(HIDDEN)), key=distance)
    assert best != tuple(range(HIDDEN))
    wanted = (weights["down_proj"][0] + weights["down_proj"][1][list(best)]) / 2
    np.testing.assert_allclose(merged["down_proj"][0], wanted, rtol=1e-12)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries(library: str) -> None:
    weights, biases = drawn("gated", 3)
    index = np.array([[0, 1], [1, 2], [1, 0]])
    logits = np.random.default_rng(0).standard_normal((6, 3))
    groups = group_experts(choice_frequencies(index, 3), cosine_similarity(logits), 2)
    wanted = merge_stacks(weights, groups, biases=biases)

    def theirs(array: np.ndarray) -> Any:
        return convert(array, library)

    with jax.enable_x64(True):
        assert choice_frequencies(theirs(index), 3) == choice_frequencies(index, 3)
        found = cosine_similarity(theirs(logits))
        np.testing.assert_allclose(found, cosine_similarity(logits), rtol=1e-12)
        made = merge_stacks(
            {role: theirs(each) for role, each in weights.items()},
            groups,
            biases={role: theirs(each) for role, each in biases.items()},
        )
        for part, stacks in zip(made, wanted, strict=True):
            for role, stack in part.items():
                assert type(stack) is type(theirs(weights["down_proj"]))
                np.testing.assert_allclose(np.asarray(stack), stacks[role], rtol=1e-12)


def test_lists_of_matrices_and_narrow_dtypes() -> None:
    weights, _ = drawn("mlp", 2)
    groups = ExpertGroups((0, 0), (1,), (0.25, 0.75), (0.9, 1.0))
    wanted, _ = merge_stacks(weights, groups)
    narrow = {role: torch.tensor(each).bfloat16() for role, each in weights.items()}
    found, none = merge_stacks({role: list(each) for role, each in narrow.items()}, groups)
    assert none == {}
    for role, each in found.items():
        assert each.dtype == torch.bfloat16
        np.testing.assert_allclose(each.float().numpy(), wanted[role], rtol=0.03, atol=0.03)
    with pytest.raises(BackendError):
        merge_stacks({**weights, "down_proj": narrow["down_proj"]}, groups)


def test_frequencies_and_similarities() -> None:
    index = np.array([[3, 0], [3, 3], [0, 3]])
    assert choice_frequencies(index, 5) == (1 / 3, 0.0, 0.0, 2 / 3, 0.0)
    logits = np.random.default_rng(0).standard_normal((9, 4))
    logits[:, 2] = -2.0 * logits[:, 1]
    found = np.array(cosine_similarity(logits))
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(np.diag(found), 1.0)
    assert found[1, 2] == pytest.approx(-1.0)
    wanted = logits[:, 0] @ logits[:, 3] / np.sqrt((logits[:, [0, 3]] ** 2).sum(0).prod())
    assert found[0, 3] == pytest.approx(wanted)
    assert most_frequent((0.25, 0.25, 0.5, 0.25), 2) == (0, 2)


def test_groups() -> None:
    similarity = [
        [1.0, 0.2, 0.9, 0.5],
        [0.2, 1.0, 0.3, 0.5],
        [0.9, 0.3, 1.0, 0.1],
        [0.5, 0.5, 0.1, 1.0],
    ]
    groups = group_experts((0.3, 0.5, 0.2, 0.0), similarity, 2)
    assert groups.dominant == (0, 1)
    # expert 3 is as much like both: it joins the one that is chosen more often
    assert groups.groups == (0, 1, 0, 1)
    assert groups.members == ((0, 2), (1, 3))
    np.testing.assert_allclose(groups.shares, (0.6, 1.0, 0.4, 0.0))
    assert groups.similarity == (1.0, 1.0, 0.9, 0.5)
    # nobody chose the last groups: their first expert stays
    unused = group_experts((1.0, 0.0, 0.0, 0.0), similarity, 2)
    assert unused.shares == (1.0, 1.0, 0.0, 0.0)
    assert unused.groups == (0, 1, 0, 0)


@given(st.data())
def test_groups_of_any_experts(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    keep = data.draw(st.integers(1, count))
    tokens = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    frequencies = choice_frequencies(np.array([tokens]), count)
    similarity = cosine_similarity(rng.standard_normal((3, count)))
    groups = group_experts(frequencies, similarity, keep)
    assert groups.dominant == most_frequent(frequencies, keep)
    assert sorted(n for each in groups.members for n in each) == list(range(count))
    for place, members in enumerate(groups.members):
        assert sum(groups.shares[n] for n in members) == pytest.approx(1.0)
        assert members[0] == groups.dominant[place]
        for n in members[1:]:
            assert frequencies[n] <= min(frequencies[d] for d in groups.dominant)
            best = max(similarity[n][d] for d in groups.dominant)
            assert groups.similarity[n] == similarity[n][members[0]] == best


def test_allotment() -> None:
    frequencies = [(0.4, 0.3, 0.2, 0.1), (0.7, 0.1, 0.1, 0.1), (0.25, 0.25, 0.25, 0.25)]
    assert allot_experts(frequencies, 2) == (2, 2, 2)
    assert allot_experts(frequencies, 1.0) == (4, 4, 4)
    assert allot_experts(frequencies, 0.25) == (1, 1, 1)
    assert allot_experts(frequencies, 0.5) == (2, 1, 3)
    assert allot_experts(frequencies, 0.5, least=2) == (2, 2, 2)
    assert sum(allot_experts(frequencies, 0.75)) == 9
    for keep, least, message in (
        (0, 1, "keep must be a positive integer; got 0"),
        (5, 1, "keep must be 1 to 4 experts per layer; got 5"),
        (1, 2, "keep must be 2 to 4 experts per layer; got 1"),
        (True, 1, "keep must be a positive integer; got True"),
        (0.0, 1, r"keep must be a share in \(0, 1\]"),
        (1.1, 1, r"keep must be a share in \(0, 1\]"),
        (float("nan"), 1, r"keep must be a share in \(0, 1\]"),
        (0.1, 1, "keep must leave every layer 1 experts, 3 of 12; got 0.1, 1 of them"),
    ):
        with pytest.raises(SpecError, match=message):
            allot_experts(frequencies, keep, least=least)


def test_bad_input() -> None:
    weights, biases = drawn("mlp", 3)
    groups = group_experts((0.5, 0.3, 0.2), np.eye(3).tolist(), 2)

    def refused(message: str, **changed: Any) -> None:
        given_ = {"stacks": weights, "groups": groups, "biases": biases} | changed
        with pytest.raises((ShapeError, SpecError), match=message):
            merge_stacks(**given_)

    refused("stacks must be down_proj, and", stacks={"up_proj": weights["up_proj"]})
    refused("stacks must be down_proj, and", biases={"gate_proj": biases["up_proj"]})
    refused(
        "of the 3 experts that are grouped; got 2", stacks={r: w[:2] for r, w in weights.items()}
    )
    odd = [weights["up_proj"][0], weights["up_proj"][1], weights["up_proj"][2][:, :3]]
    refused(
        r"one size; up_proj of expert 0 has shape \(4, 5\), of expert 2 \(4, 3\)",
        stacks={**weights, "up_proj": odd},
    )
    refused("align must be", align=1)
    for value in (np.nan, np.inf):
        broken = {role: each.copy() for role, each in weights.items()}
        broken["down_proj"][2, 1, 1] = value
        refused("finite to be merged; the weight of down_proj of expert 2 is not", stacks=broken)
    with pytest.raises(ShapeError, match="a choice at least; got none"):
        choice_frequencies(np.zeros((0, 2), int), 3)
    with pytest.raises(ShapeError, match="0 to 2; got 3"):
        choice_frequencies(np.array([[0, 3]]), 3)
    with pytest.raises(ShapeError, match="must hold integers"):
        choice_frequencies(np.zeros((2, 2)), 3)
    with pytest.raises(ShapeError, match=r"one token at least; got shape \(0, 3\)"):
        cosine_similarity(np.zeros((0, 3)))
    with pytest.raises(ShapeError, match="finite; those of expert 1 are not"):
        cosine_similarity(np.array([[0.0, np.nan, 1.0]]))
    for keep, message in ((0, "positive integer"), (4, "at most the 3 experts; got 4")):
        with pytest.raises(SpecError, match=message):
            group_experts((0.5, 0.3, 0.2), np.eye(3).tolist(), keep)
    with pytest.raises(SpecError, match="frequencies must be finite and not negative"):
        group_experts((0.5, np.nan, 0.2), np.eye(3).tolist(), 2)
    with pytest.raises(ShapeError, match="similarity must be a matrix"):
        group_experts((0.5, 0.3, 0.2), np.eye(2).tolist(), 2)
    with pytest.raises(ShapeError, match="must not be NaN"):
        group_experts((0.5, 0.5), [[1.0, np.nan], [0.0, 1.0]], 1)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("router", [Router(), Router("sigmoid", balance=0.01, bias=True)])
def test_mixtures_of_every_library(library: str, router: Router) -> None:
    config = sparse_config(
        4, 6, None, experts=5, top_k=2, bias=True, router=router, shared_features=3, mix_shared=True
    )
    host = drawn_arrays(config)
    with jax.enable_x64(True):
        arrays = {name: convert(each, library) for name, each in host.items()}
        x = np.random.default_rng(1).standard_normal((30, 4))
        layer = tensormoe_numpy.SparseMoE.restore(config, host)
        routes = layer.route(x)
        frequencies = choice_frequencies(routes.top_k_index, 5)
        groups = group_experts(frequencies, cosine_similarity(routes.logits), 3)
        made = merge_mixture(config, arrays, groups)
        kept = most_frequent(frequencies, 3)
        left = prune_mixture(config, arrays, kept)
        merged, pruned = (
            tensormoe_numpy.SparseMoE.restore(
                found, {name: np.array(convert(each, "numpy")) for name, each in some.items()}
            )
            for found, some in (made, left)
        )
    again = merged.route(x)
    assert np.array_equal(again.top_k_index, routes.top_k_index)
    theirs = torch_layer(config, host).eval()
    for how, ours in (("merge", merged), ("prune", pruned)):
        model = torch.nn.Sequential(copy.deepcopy(theirs))
        reduce_experts(model, torch.tensor(x), keep=3, how=how)
        assert model[0].config == ours.config
        np.testing.assert_allclose(model(torch.tensor(x)).detach(), ours(x), atol=1e-10)
    chosen = pruned.route(x)
    np.testing.assert_allclose(chosen.logits, routes.logits[:, list(kept)], atol=1e-12)


def test_mixtures_that_cannot_have_fewer_experts() -> None:
    config = sparse_config(4, 6, None, experts=3, top_k=2)
    arrays = drawn_arrays(config)
    groups = ExpertGroups((0, 0, 1), (0, 2), (0.5, 0.5, 1.0), (1.0, 0.5, 1.0))
    small, merged = merge_mixture(config, arrays, groups)
    with pytest.raises(SpecError, match="must not have been merged before"):
        merge_mixture(small, merged, ExpertGroups((0, 0), (0,), (0.5, 0.5), (1.0, 1.0)))
    factorized = sparse_config(4, 6, None, experts=3, top_k=2, factorization="cp", rank=2)
    with pytest.raises(SpecError, match=r"must be dense to become fewer; got CP\(rank=2\)"):
        merge_mixture(factorized, drawn_arrays(factorized), groups)
    with pytest.raises(SpecError, match="config must be that of a SparseMoE"):
        merge_mixture(3, arrays, groups)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="missing"):
        merge_mixture(config, {}, groups)
    with pytest.raises(ShapeError, match="of the 2 experts that are grouped; got 3"):
        merge_mixture(config, arrays, ExpertGroups((0, 0), (0,), (0.5, 0.5), (1.0, 1.0)))
    for kept in ((), (0, 0), (0, 3), (-1, 0)):
        with pytest.raises(ShapeError, match="kept must be numbers of experts, 0 to 2, each once"):
            prune_mixture(config, arrays, kept)
    with pytest.raises(SpecError, match="top_k must be at most the 1 experts"):
        prune_mixture(config, arrays, (0,))
