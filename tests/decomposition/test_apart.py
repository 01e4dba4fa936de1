"""Low-rank products of each expert, and roots of moments, against singular value decompositions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, LowRank, Tucker
from tensormoe.backend import get_backend
from tensormoe.decomposition import Moments, Search, decompose
from tensormoe.decomposition._compress import compress, expand, falls_apart
from tensormoe.decomposition._contractions import plan_node, plan_update, structures
from tensormoe.decomposition._matrices import turned
from tensormoe.decomposition._source import Source
from tensormoe.decomposition._weighted import solved
from tensormoe.factorizations import Factorization

backend = get_backend("numpy")


def experts(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Matrices with singular values that fall."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal(shape)
    left, values, right = np.linalg.svd(found, full_matrices=False)
    return (left * (values * np.arange(1, values.shape[-1] + 1) ** -1.0)[..., None, :]) @ right


def moments_of(size: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size))
    x *= np.logspace(0, -1, size)
    return x.T @ x / len(x)


def structure_of(kind: Factorization, shape: tuple[int, ...]) -> Any:
    from tensormoe import LayerSpec
    from tensormoe.factorizations import INPUT, OUTPUT

    network = LayerSpec(shape[-2], shape[-1], shape[:-2], kind, bias=False).network
    (found,) = structures(network, (*network.expert_legs, INPUT, OUTPUT), network.sizes)
    return found


@pytest.mark.parametrize("shape", [(3, 60, 90), (2, 3, 90, 40), (4, 30, 400)])
def test_each_expert_has_a_core_of_its_own(shape: tuple[int, ...]) -> None:
    weights, rank = experts(shape), 5
    structure = structure_of(LowRank(rank), shape)
    source = Source(weights, backend)
    core = compress(structure, source, source.squared_norm(), np.random.default_rng(0))
    count = int(np.prod(shape[:-2]))
    assert falls_apart(structure)
    assert not falls_apart(structure_of(CP(3), shape))
    # the factors and eight directions more
    assert {leg: each.shape[0] for leg, each in core.bases.items()} == dict.fromkeys(
        core.bases, count
    )
    assert all(each.shape[2] == rank + 8 for each in core.bases.values())
    for basis in core.bases.values():
        eye = np.swapaxes(basis, 1, 2) @ basis
        np.testing.assert_allclose(eye, np.broadcast_to(np.eye(rank + 8), eye.shape), atol=1e-10)
    # factors of the core are those of the tensor in these directions
    drawn = np.random.default_rng(1)
    small = {f.name: drawn.standard_normal(core.structure.shape(f)) for f in structure.factors}
    grown = expand(core, small)
    levels = "ab"[: len(shape) - 2]
    product = f"i{levels}r,o{levels}r->{levels}io"
    inner = np.einsum(product, small["input"], small["output"]).reshape(
        count, *core.source.shape[-2:]
    )
    outer = np.einsum(product, grown["input"], grown["output"]).reshape(count, *shape[-2:])
    left = core.bases.get("i", np.broadcast_to(np.eye(shape[-2]), (count, *(shape[-2],) * 2)))
    right = core.bases.get("o", np.broadcast_to(np.eye(shape[-1]), (count, *(shape[-1],) * 2)))
    np.testing.assert_allclose(outer, left @ inner @ np.swapaxes(right, 1, 2), atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 60, 90), (3, 90, 60), (2, 40, 500)])
@pytest.mark.parametrize("weighted", ["", "inputs", "outputs", "both"])
def test_they_are_the_best_of_their_rank(shape: tuple[int, int, int], weighted: str) -> None:
    """Eckart and Young, in the coordinates in which errors are what the moments measure."""
    weights, rank = experts(shape), 6
    rows, columns = shape[1:]
    inputs = moments_of(rows, 1) if weighted in ("inputs", "both") else None
    outputs = moments_of(columns, 2) if weighted in ("outputs", "both") else None
    moments = Moments(inputs, outputs, ridge=1e-12) if weighted else None
    found = decompose(weights, LowRank(rank), moments=moments)
    left = np.eye(rows) if inputs is None else np.linalg.cholesky(inputs)
    right = np.eye(columns) if outputs is None else np.linalg.cholesky(outputs)
    values = np.linalg.svd(left.T @ weights @ right, compute_uv=False)
    wanted = np.sqrt((values[:, rank:] ** 2).sum() / (values**2).sum())
    report = found.report
    error = report.weighted_error if weighted else report.error
    assert error == pytest.approx(wanted, rel=1e-3)


def test_roots_go_to_factors_or_to_the_result_and_nothing_changes() -> None:
    shape = (3, 70, 80)
    weights = experts(shape)
    roots = [np.linalg.cholesky(moments_of(size, 3)) for size in shape[1:]]
    source = Source(weights, backend, inputs=roots[0], outputs=roots[1])
    plain = Source(roots[0].T @ weights @ roots[1], backend)
    for kind in (CP(4), Tucker((2, 5, 6)), LowRank(4)):
        structure = structure_of(kind, shape)
        rng = np.random.default_rng(0)
        factors = {f.name: rng.standard_normal(structure.shape(f)) for f in structure.factors}
        for each in structure.factors:

            def mttkrp(s: Any, name: str = each.name) -> Any:
                update = plan_update(s, name)
                return update.mttkrp, update.legs

            def node(s: Any, name: str = each.name) -> Any:
                return plan_node(s, name)

            for plan in (mttkrp, node):
                got = source.contract(structure, plan, factors)
                np.testing.assert_allclose(got, plain.contract(structure, plan, factors), rtol=1e-9)
        for one, two in zip(source.operators(), plain.operators(), strict=True):
            x = rng.standard_normal((80, 3))
            np.testing.assert_allclose(one.times(x), two.times(x), rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(
                one.transposed.after(x.T), two.transposed.after(x.T), rtol=1e-8, atol=1e-8
            )


def test_roots_of_every_expert_go_to_what_has_the_experts() -> None:
    shape = (3, 70, 80)
    weights, rng = experts(shape), np.random.default_rng(0)
    roots = np.stack([np.linalg.cholesky(moments_of(70, seed)) for seed in range(3)])
    source = Source(weights, backend, inputs=roots)
    plain = Source(np.swapaxes(roots, 1, 2) @ weights, backend)
    for kind in (Tucker((2, 5, 6)), LowRank(4)):
        structure = structure_of(kind, shape)
        factors = {f.name: rng.standard_normal(structure.shape(f)) for f in structure.factors}
        for each in structure.factors:

            def mttkrp(s: Any, name: str = each.name) -> Any:
                update = plan_update(s, name)
                return update.mttkrp, update.legs

            wanted = plain.contract(structure, mttkrp, factors)
            got = source.contract(structure, mttkrp, factors)
            np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8)
    for one, two in zip(source.operators(), plain.operators(), strict=True):
        x = rng.standard_normal((80, 3))
        np.testing.assert_allclose(one.times(x), two.times(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kept", [True, False])
def test_no_whole_matrix_is_weighted_by_contractions(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root times a whole expert takes longer than all that is done with factors."""
    from tensormoe.decomposition import _source, _spectral, _weighted

    called: list[int] = []

    def counted(array: Any, inputs: Any, outputs: Any, given: Any) -> Any:
        if inputs is not None or outputs is not None:
            called.append(array.shape[0])
        return turned(array, inputs, outputs, given)

    monkeypatch.setattr(_source, "turned", counted)
    # as of a matrix that is too large to be decomposed as a whole
    monkeypatch.setattr(_spectral, "_SMALL", 1)
    if not kept:
        monkeypatch.setattr(_weighted, "KEPT", 0)
    weights = experts((2, 60, 600)).astype("float32")
    moments = Moments(moments_of(60, 1), moments_of(600, 2))
    decompose(weights, LowRank(4), moments=moments, search=Search(1, 5, 1), compare=False)
    # once; or for the norm, and the error after the last sweep
    assert sum(called) == (1 if kept else 2) * len(weights)


@pytest.mark.parametrize("size", [5, 700])
def test_strips_of_triangular_matrices(size: int) -> None:
    rng = np.random.default_rng(0)
    root = np.tril(rng.standard_normal((size, size))) + size**0.5 * np.eye(size)
    array = rng.standard_normal((2, size, 9))
    np.testing.assert_allclose(turned(array, root, None, backend), root.T @ array, rtol=1e-9)
    other = np.swapaxes(array, 1, 2)
    np.testing.assert_allclose(turned(other, None, root, backend), other @ root, rtol=1e-9)
    np.testing.assert_allclose(solved(root.T, root.T @ array[0]), array[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_energies_of_matrices_strip_by_strip(
    large: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.decomposition import _moments

    monkeypatch.setattr(_moments, "LARGE", 10 if large else 2**22)
    weights = experts((1300, 40)).astype(dtype)
    inputs, outputs = moments_of(1300, 1), moments_of(40, 2)
    rel = 1e-9 if dtype == "float64" or not large else 1e-4
    for left, right in ((inputs, None), (None, outputs), (inputs, outputs), (None, None)):
        one = weights.astype("float64") if left is None else left @ weights.astype("float64")
        two = one if right is None else one @ right
        wanted = float((weights * two).sum())
        assert _moments.energy(weights, left, right) == pytest.approx(wanted, rel=rel)


def test_other_libraries_do_the_same() -> None:
    weights = experts((2, 70, 90)).astype("float32")
    moments = Moments(moments_of(70, 1), moments_of(90, 2))
    ours = decompose(weights, LowRank(5), moments=moments)
    theirs = decompose(torch.from_numpy(weights), LowRank(5), moments=moments)
    assert isinstance(theirs.factors["input"], torch.Tensor)
    assert theirs.report.weighted_error == pytest.approx(ours.report.weighted_error, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", ["full", "twin", "none"])
def test_orthonormal_columns_of_a_large_matrix(
    dtype: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensormoe.decomposition import _solve

    monkeypatch.setattr(_solve, "_LARGE", 10)
    monkeypatch.setattr(_solve, "_ROWS", 100)
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((1111, 30)) * np.logspace(0, -4, 30)).astype(dtype)
    if rank != "full":
        matrix[:, 3] = matrix[:, 4] if rank == "twin" else 0.0
    whole: list[int] = []
    qr = np.linalg.qr

    def counted(array: Any, *mode: str) -> Any:
        whole.append(len(array))
        return qr(array, *mode)

    monkeypatch.setattr(np.linalg, "qr", counted)
    columns, rest = _solve.orthonormal_columns(matrix)
    # LAPACK gets it as a whole only where it does not determine all columns
    assert (max(whole) == len(matrix)) == (rank != "full")
    assert columns.dtype == rest.dtype == matrix.dtype
    close = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(columns.T @ columns, np.eye(30), atol=close)
    np.testing.assert_allclose(columns @ rest, matrix, atol=close)
