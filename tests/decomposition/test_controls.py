"""Truncated SVDs in reports, compared with numpy.linalg.svd of the matrices themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensormoe import CP, Dense, SharedBasis, Tucker
from tensormoe.backend import backend_of
from tensormoe.decomposition import (
    Control,
    Search,
    _controls,
    control_curves,
    decompose,
    error_curves,
)
from tensormoe.decomposition._source import Source

QUICK = Search(starts=1, sweeps=2, polish=0)
NAMES = ["each expert", "N·in × out", "in × N·out", "N × in·out"]


def unfolded(stack: np.ndarray) -> dict[str, np.ndarray]:
    """The matrices of one's own, from experts (N, in, out)."""
    count, rows, columns = stack.shape
    return {
        "N·in × out": stack.reshape(count * rows, columns),
        "in × N·out": stack.transpose(1, 0, 2).reshape(rows, count * columns),
        "N × in·out": stack.reshape(count, rows * columns),
    }


def wanted(stack: np.ndarray, parameters: int) -> dict[str, tuple[int, int, float]]:
    """Rank, parameters and error of each control, by singular value decompositions."""
    stack = stack.astype("float64").reshape(-1, *stack.shape[-2:])
    values = {
        name: (np.linalg.svd(matrix, compute_uv=False), sum(matrix.shape))
        for name, matrix in unfolded(stack).items()
    }
    each = np.sort(np.linalg.svd(stack, compute_uv=False).ravel())[::-1]
    found = {}
    for name, (falling, cost) in {NAMES[0]: (each, sum(stack.shape[1:])), **values}.items():
        rank = min(parameters // cost, len(falling))
        error = np.linalg.norm(falling[rank:]) / np.linalg.norm(falling)
        found[name] = rank, rank * cost, float(error)
    return found


def check(controls: tuple[Control, ...], stack: np.ndarray, parameters: int, atol: float) -> None:
    assert [each.unfolding for each in controls] == NAMES
    for control in controls:
        rank, used, error = wanted(stack, parameters)[control.unfolding]
        assert (control.rank, control.parameters, control.exact) == (rank, used, True)
        assert control.parameters <= parameters
        assert control.error == pytest.approx(error, abs=atol)


@pytest.mark.parametrize(
    "shape", [(6, 12, 10), (6, 10, 12), (3, 2, 12, 10), (40, 5, 4), (2, 9, 30)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_errors_of_all_unfoldings(
    shape: tuple[int, ...], dtype: str, rng: np.random.Generator
) -> None:
    stack = rng.standard_normal(shape).astype(dtype) + rng.standard_normal(shape[-2:]).astype(dtype)
    for kind in (CP(1), CP(7), CP(15), Dense()):
        found = decompose(stack, kind, search=QUICK)
        check(found.report.controls, stack, found.report.parameters, 1e-7)
        assert found.report.svd_error == found.report.controls[0].error
        joint = min(found.report.controls[1:], key=lambda each: each.error)
        assert found.report.joint == joint
    assert decompose(stack, CP(7), search=QUICK, compare=False).report.controls == ()


def test_biases_are_one_more_row(rng: np.random.Generator) -> None:
    stack, bias = rng.standard_normal((5, 12, 10)), 3 * rng.standard_normal((5, 10))
    found = decompose(stack, CP(9), bias=bias, search=QUICK)
    whole = np.concatenate([stack, bias[:, None]], axis=1)
    check(found.report.controls, whole, found.report.parameters, 1e-7)
    # which is what the factors' own error is compared by
    report = found.report
    assert report.bias_error is not None
    missing = np.array(
        [report.error * np.linalg.norm(stack), report.bias_error * np.linalg.norm(bias)]
    )
    total = np.linalg.norm(missing) / np.linalg.norm(whole)
    assert report.total_error == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e18])
def test_small_errors_are_no_rounding(scale: float, rng: np.random.Generator) -> None:
    """Of a joint rank, up to 1e-6: float32's own Gram matrices would show 3e-4."""
    left, right = rng.standard_normal((6 * 20, 3)), rng.standard_normal((3, 16))
    noise = rng.standard_normal((120, 16))
    stack = left @ right
    stack += 1e-6 * np.linalg.norm(stack) / np.linalg.norm(noise) * noise
    stack = (scale * stack).reshape(6, 20, 16)
    for given in (stack, stack.astype("float32")):
        found = decompose(given, CP(12), search=QUICK)
        check(found.report.controls, given, found.report.parameters, 2e-8)
        assert found.report.controls[1].error == pytest.approx(1e-6, rel=0.2)


def test_the_verdict_says_what_is_closer(rng: np.random.Generator) -> None:
    stack = (rng.standard_normal((6 * 20, 2)) @ rng.standard_normal((2, 16))).reshape(6, 20, 16)
    stack += 0.05 * rng.standard_normal(stack.shape)
    report = decompose(stack, CP(9), search=QUICK).report
    closer = report.closer
    assert closer is not None
    assert closer.unfolding == "N·in × out"
    said = str(report).splitlines()[-1]
    assert said == (
        "a joint SVD of the (N·in × out) unfolding is closer at no more parameters: "
        f"{closer.error:.1%} against {report.error:.1%}"
    )
    line = str(report).splitlines()[-2]
    for control in report.controls:
        shown = f"{control.unfolding} {control.error:.1%} ({control.parameters:,})"
        assert (shown in line) == (control.rank > 0)
    assert report.to_dict()["controls"][1]["unfolding"] == "N·in × out"
    # one basis for all experts is a joint SVD itself: neither is closer
    same = decompose(stack, SharedBasis((1, 2))).report
    assert same.closer is None or same.closer.unfolding != "in × N·out"
    exact = decompose(stack, Dense()).report
    assert exact.closer is None
    assert "closer" not in str(exact)


def test_large_sides_are_estimated(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upper bound, within a percent, and nothing else changes."""
    stack = (rng.standard_normal((6, 24, 8)) @ rng.standard_normal((8, 60))).astype("float32")
    stack += 0.5 * rng.standard_normal(stack.shape).astype("float32")
    source = Source(stack, backend_of(stack))
    exact = _controls.spectra(source, 2000).controls(2000)
    monkeypatch.setattr(_controls, "EXACT", 50)
    found = _controls.spectra(source, 2000).controls(2000)
    turned = stack.transpose(0, 2, 1)
    other = _controls.spectra(Source(turned, backend_of(stack)), 2000).controls(2000)
    for a, b, c in zip(exact, found, (other[0], other[2], other[1], other[3]), strict=True):
        assert (a.unfolding, a.rank, a.parameters) == (b.unfolding, b.rank, b.parameters)
        assert b.exact == c.exact == (a.unfolding != "N·in × out")
        assert a.error - 1e-6 <= b.error <= 1.01 * a.error
        assert a.error - 1e-6 <= c.error <= 1.01 * a.error
    assert "at most" in str(found[1])
    monkeypatch.setattr(_controls, "EXACT", 5)
    left = _controls.spectra(source, 2000).controls(2000)
    assert [each.unfolding for each in left] == NAMES[:3]


@pytest.mark.parametrize("name", ["torch", "bfloat16"])
def test_tensors_too(name: str, rng: np.random.Generator) -> None:
    stack = torch.from_numpy(rng.standard_normal((5, 12, 10)).astype("float32"))
    stack = stack.bfloat16() if name == "bfloat16" else stack
    found = decompose(stack, Tucker((3, 5, 5)), search=QUICK)
    check(found.report.controls, stack.float().numpy(), found.report.parameters, 1e-7)


def test_curves_of_controls(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = rng.standard_normal((5, 14, 10)) + rng.standard_normal((1, 14, 10))
    calls: list[Any] = []
    spectra = _controls.spectra
    from tensormoe.decomposition import _curves

    monkeypatch.setattr(_curves, "spectra", lambda *each: calls.append(each) or spectra(*each))
    curves = error_curves(stack, ["cp", "tucker"], (0.2, 0.4, 0.6), search=QUICK)
    # singular values are computed once for all points
    assert len(calls) == 1
    for curve in curves:
        for point in curve.points:
            check(point.report.controls, stack, point.report.parameters, 1e-7)
    found = control_curves(curves)
    assert [curve.unfolding for curve in found] == NAMES
    for control in found:
        sizes = [each.parameters for each in control.points]
        errors = [each.error for each in control.points]
        assert sizes == sorted(set(sizes))
        assert errors == sorted(errors, reverse=True)
        assert control.dense_parameters == stack.size
    assert control_curves(error_curves(stack, [CP(2)], search=QUICK, compare=False)) == ()
