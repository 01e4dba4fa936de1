"""Experts grouped by average outputs, and saliencies, on arrays of several libraries."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

from tensormoe import convert
from tensormoe.compression import choice_frequencies, cluster_experts, reap_saliency
from tensormoe.errors import ShapeError, SpecError


@given(st.integers(1, 12), st.integers(0, 99), st.data())
def test_clusters_are_those_of_scipy(count: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((count, 3))
    frequencies = rng.dirichlet(np.ones(count))
    groups = cluster_experts(tuple(frequencies), outputs, keep)
    labels = np.ones(1)
    if count > 1:
        labels = fcluster(linkage(outputs, "average"), keep, "maxclust")
    wanted = {frozenset(np.flatnonzero(labels == each).tolist()) for each in {*labels}}
    assert {frozenset(each) for each in groups.members} == wanted
    assert len(groups.dominant) == keep
    assert groups.dominant == tuple(sorted(groups.dominant))
    for first, members in zip(groups.dominant, groups.members, strict=True):
        assert members[0] == first
        assert frequencies[first] == max(frequencies[list(members)])
        whole = frequencies[list(members)].sum()
        for n in members:
            assert groups.shares[n] == pytest.approx(frequencies[n] / whole)
            lengths = np.linalg.norm(outputs[n]) * np.linalg.norm(outputs[first])
            assert groups.similarity[n] == pytest.approx(outputs[n] @ outputs[first] / lengths)


def test_linkage_is_average() -> None:
    # the nearest of {10.9, 14.5} is nearer to 7 than that of {0, 3}, but on average they are not
    outputs = np.array([[0.0], [3.0], [7.0], [10.9], [14.5]])
    frequencies = (0.2,) * 5
    assert cluster_experts(frequencies, outputs, 3).members == ((0, 1), (2,), (3, 4))
    assert cluster_experts(frequencies, outputs, 2).members == ((0, 1, 2), (3, 4))


def test_unchosen_groups_and_ties() -> None:
    outputs = np.array([[0.0, 1.0], [0.0, 1.0], [5.0, 0.0], [5.0, 0.5]])
    groups = cluster_experts((0.0, 0.0, 0.5, 0.5), outputs, 2)
    assert groups.members == ((0, 1), (2, 3))
    assert groups.shares == (1.0, 0.0, 0.5, 0.5)
    same = cluster_experts((0.25,) * 4, np.zeros((4, 2)), 2)
    assert same.members == ((0, 1, 2), (3,))
    alone = cluster_experts((0.3, 0.7), outputs[:2], 2)
    assert alone.groups == (0, 1)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_libraries(library: str) -> None:
    rng = np.random.default_rng(0)
    outputs, index = rng.standard_normal((5, 3)), np.array([[0, 4], [4, 2]])
    weights, norms = rng.random((2, 2)), rng.random((2, 2))

    def theirs(array: np.ndarray) -> Any:
        return convert(array, library)

    with jax.enable_x64(True):
        frequencies = choice_frequencies(theirs(index), 5)
        found = cluster_experts(frequencies, theirs(outputs), 2)
        assert found.groups == cluster_experts(frequencies, outputs, 2).groups
        salient = reap_saliency(theirs(index), theirs(weights), theirs(norms), 5)
    assert salient == reap_saliency(index, weights, norms, 5)
    narrow = torch.tensor(outputs).bfloat16()
    assert cluster_experts(frequencies, narrow, 2).groups == found.groups


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 99))
def test_saliencies_are_means_over_the_tokens_of_an_expert(
    experts: int, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, experts, (tokens + 1, 2))
    weights, norms = rng.random((tokens + 1, 2)), rng.random((tokens + 1, 2))
    found = reap_saliency(index, weights, norms, experts)
    for n in range(experts):
        products = (weights * norms)[index == n]
        wanted = products.mean() if products.size else 0.0
        assert found[n] == pytest.approx(wanted)


def test_bad_input() -> None:
    outputs = np.eye(3)
    shares = (0.5, 0.3, 0.2)
    for keep, message in ((0, "positive integer"), (4, "at most the 3 experts; got 4")):
        with pytest.raises(SpecError, match=message):
            cluster_experts(shares, outputs, keep)
    with pytest.raises(SpecError, match="not negative; got -1"):
        cluster_experts((0.5, 0.3, -1.0), outputs, 2)
    with pytest.raises(ShapeError, match=r"matrix \(3, out\).*got shape \(2, 3\)"):
        cluster_experts(shares, outputs[:2], 2)
    for value in (np.nan, np.inf):
        wrong = outputs.copy()
        wrong[1, 2] = value
        with pytest.raises(ShapeError, match="average outputs must be finite; those of expert 1"):
            cluster_experts(shares, wrong, 2)
    index, ones = np.array([[0, 1]]), np.ones((1, 2))
    with pytest.raises(ShapeError, match=r"weights must have the shape of index, \(1, 2\)"):
        reap_saliency(index, np.ones((1, 1)), ones, 2)
    with pytest.raises(ShapeError, match=r"norms must have the shape of index, \(1, 2\)"):
        reap_saliency(index, ones, np.ones(2), 2)
    with pytest.raises(ShapeError, match="must be finite; those of expert 1 are not"):
        reap_saliency(index, ones, np.array([[1.0, np.nan]]), 2)
    with pytest.raises(ShapeError, match="0 to 1; got 2"):
        reap_saliency(np.array([[0, 2]]), ones, ones, 2)
    with pytest.raises(ShapeError, match="a choice at least"):
        reap_saliency(np.zeros((0, 2), int), np.ones((0, 2)), np.ones((0, 2)), 2)
