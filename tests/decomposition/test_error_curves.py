"""Error against parameters: curves of decompositions, and their picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from tensormoe import CP, LayerSpec, Tucker
from tensormoe.decomposition import (
    Control,
    ErrorCurve,
    ErrorPoint,
    Report,
    Search,
    _curves,
    decompose,
    error_curves,
)
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe.factorizations import FACTORIZATIONS
from tensormoe.plotting import figure, plot_errors


def _report(parameters: int, error: float, output_error: float | None = None) -> Report:
    """A report beside SVDs of fewer parameters."""
    controls = (
        Control("each expert", 1, parameters - 2, 0.9),
        Control("N·in × out", 1, parameters - 5, 0.8),
        # nothing of this one is kept
        Control("N × in·out", 0, 0, 1.0),
    )
    sizes = (parameters, 1000)
    ended = "converged"
    return Report(
        error, (error,), controls, None, output_error, *sizes, 1, (error,), 0.0, ended, error
    )


def _point(parameters: int, error: float, output_error: float | None = None) -> ErrorPoint:
    return ErrorPoint(CP(parameters), _report(parameters, error, output_error))


def test_points_are_what_decompose_finds(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((5, 12, 9)).astype("float32")
    inputs = rng.standard_normal((40, 12)).astype("float32")
    coefficients = rng.dirichlet(np.full(5, 0.3), 40).astype("float32")
    search = Search(sweeps=20)
    options: Any = {
        "inputs": inputs,
        "coefficients": coefficients,
        "weighted": True,
        "search": search,
        "seed": 3,
    }
    curves = error_curves(weights, ["tucker", "cp"], (0.2, 100, 0.6), **options)
    assert [curve.name for curve in curves] == ["tucker", "cp"]
    for curve in curves:
        sizes = [point.report.parameters for point in curve.points]
        assert sizes == sorted(sizes)
        assert len(sizes) == 3
        for point, budget in zip(curve.points, (100, 0.2 * weights.size, 324), strict=True):
            assert point.report.parameters <= budget
            again = decompose(weights, point.factorization, **options)
            assert again.report.error == pytest.approx(point.report.error, abs=1e-6)
            assert again.report.output_error == pytest.approx(point.report.output_error, abs=1e-6)
            assert again.report.parameters == point.report.parameters


def test_every_name_that_can_be_decomposed_is_taken(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((4, 10, 10))
    curves = error_curves(weights, budgets=(0.6,), search=Search(sweeps=3, polish=0))
    assert {curve.name for curve in curves} == set(FACTORIZATIONS) - {"dense"}


def test_a_planted_rank_ends_the_curve(rng: np.random.Generator) -> None:
    factors = [rng.standard_normal((size, 3)) for size in (6, 20, 15)]
    weights = np.einsum("nr,ir,or->nio", *factors)
    (curve,) = error_curves(weights, [CP(1), CP(2), CP(3)])
    errors = [point.report.error for point in curve.points]
    assert errors[0] > errors[1] > 0.05
    assert errors[2] < 1e-5


def test_values_join_the_curve_of_their_name(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((4, 16, 6))
    (curve,) = error_curves(weights, [Tucker((4, 9, 6)), "tucker"], (0.3,))
    kinds = [point.factorization for point in curve.points]
    assert Tucker((4, 9, 6)) in kinds
    assert len(kinds) == 2
    assert [point.report.parameters for point in curve.points] == sorted(
        LayerSpec(16, 6, 4, kind, bias=False).num_parameters for kind in kinds
    )


def test_what_has_no_rank_is_decomposed_once(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counting(weights: Any, kind: Any, **options: Any) -> Any:
        asked.append(options["budget"])
        return decompose(weights, kind, **options)

    monkeypatch.setattr(_curves, "decompose", counting)
    weights = rng.standard_normal((4, 10, 10))
    # the smallest budget is refused: nothing is known from it
    (curve,) = error_curves(weights, ["hadamard"], (0.1, 0.5, 0.8, 0.9))
    assert asked == [0.1, 0.5]
    assert len(curve.points) == 1


def test_names_that_fit_nothing_are_left_out(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((4, 10, 10))
    (curve,) = error_curves(weights, ["hadamard", "cp"], (0.2,))
    assert curve.name == "cp"
    with pytest.raises(BudgetError, match="at least 140 for hadamard"):
        error_curves(weights, ["hadamard"], (0.1, 0.2))


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan")])
def test_shares_that_are_none(budget: float) -> None:
    with pytest.raises(BudgetError, match=r"share of the weights' entries, in \(0, 1\]"):
        error_curves(np.ones((4, 10, 10)), ["cp"], (0.5, budget))


def test_other_errors_are_those_of_decompose() -> None:
    weights = np.ones((4, 10, 10))
    with pytest.raises(SpecError, match="parafac"):
        error_curves(weights, ["parafac"])
    with pytest.raises(RankError):
        error_curves(weights, [CP(0)])


def test_every_point_can_be_decomposed_again(rng: np.random.Generator) -> None:
    # more inputs than outputs and experts can tell apart
    weights = rng.standard_normal((4, 60, 5))
    quick = Search(starts=1, sweeps=5, polish=0)
    for curve in error_curves(weights, budgets=(0.2, 0.5, 0.9), search=quick):
        for point in curve.points:
            again = decompose(weights, point.factorization, search=quick)
            assert again.report.error == pytest.approx(point.report.error, rel=1e-6)


def test_the_front_holds_what_no_smaller_point_beats() -> None:
    points = (_point(10, 0.8), _point(20, 0.9), _point(30, float("nan")), _point(40, 0.5, 0.7))
    points += (_point(50, 0.5, 0.8), _point(60, 0.4, 0.6))
    curve = ErrorCurve("cp", points)
    assert [each.report.parameters for each in curve.front()] == [10, 40, 60]
    assert [each.report.parameters for each in curve.front(outputs=True)] == [40, 60]
    assert ErrorCurve("cp", ()).front() == ()


def test_lines_are_fronts_and_svds() -> None:
    first = ErrorCurve("cp", (_point(10, 0.8), _point(20, 0.9), _point(40, 0.5, 0.7)))
    second = ErrorCurve("my own", (_point(30, 2.0),))
    axes = Figure().add_subplot()
    plot_errors(axes, [first, second])
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["cp"] == [[0.01, 0.8], [0.04, 0.5]]
    assert lines["my own"] == [[0.03, 2.0]]
    # each at its own number of parameters
    assert lines["SVD of each expert"] == [[x / 1000, 0.9] for x in (8, 18, 28, 38)]
    assert lines["SVD of N·in × out"] == [[x / 1000, 0.8] for x in (5, 15, 25, 35)]
    styles = [line.get_linestyle() for line in axes.lines if str(line.get_label())[:3] == "SVD"]
    assert len(set(styles)) == len(styles) == 2
    assert "SVD of N × in·out" not in lines
    assert [[0.02, 0.9]] in [line.get_xydata().tolist() for line in axes.lines]
    assert axes.get_ylim() == (0.0, 1.05)
    low, high = axes.get_xlim()
    assert 0.004 < low < 0.005
    assert 0.04 < high < 0.05

    outputs = Figure().add_subplot()
    plot_errors(outputs, [first], outputs=True)
    drawn = [line.get_xydata().tolist() for line in outputs.lines if len(line.get_xydata())]
    assert drawn == [[[0.04, 0.7]]]
    assert "outputs" in outputs.get_ylabel()


def test_a_factorization_looks_the_same_in_every_picture() -> None:
    colours = []
    for names in (["cp", "tucker"], ["tucker"]):
        axes = Figure().add_subplot()
        plot_errors(axes, [ErrorCurve(name, (_point(10, 0.8),)) for name in names])
        colours += [line.get_color() for line in axes.lines if line.get_label() == "tucker"]
    assert len(colours) == 2
    assert len(set(colours)) == 1


def test_no_two_factorizations_look_alike() -> None:
    axes = Figure().add_subplot()
    names = [*FACTORIZATIONS, "my own"]
    plot_errors(axes, [ErrorCurve(name, (_point(10, 0.8),)) for name in names])
    lines = {line.get_label(): line for line in axes.lines}
    looks = [(lines[name].get_color(), lines[name].get_marker()) for name in names]
    assert len(set(looks)) == len(names)
    colours = {colour for name, (colour, _) in zip(names, looks, strict=True) if name != "my own"}
    # a dense layer loses nothing: its curve is not asked for
    assert len(colours) == len(FACTORIZATIONS) - 1


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures_are_written(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    curves = error_curves(rng.standard_normal((4, 12, 10)), ["cp", "tensor_ring"], (0.2, 0.5))
    path = tmp_path / f"picture{suffix}"
    with figure(path) as drawn:
        plot_errors(drawn.add_subplot(), curves)
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


def test_pictures_of_nothing() -> None:
    # neither curves nor errors of outputs
    curve = ErrorCurve("cp", (_point(10, 0.8),))
    for curves, outputs in (([], False), ([curve], True)):
        axes = Figure().add_subplot()
        plot_errors(axes, curves, outputs=outputs)
        assert [text.get_text() for text in axes.texts] == ["nothing to show"]


def test_pictures_that_cannot_be(tmp_path: Path) -> None:
    for name, said in (
        ("picture.txt", "path must end in one of"),
        ("missing/picture.png", "the folder of path must exist"),
        ("a" * 300 + ".png", "could not be written"),
    ):
        with pytest.raises(SpecError, match=said), figure(tmp_path / name):
            pass
    assert not list(tmp_path.iterdir())
