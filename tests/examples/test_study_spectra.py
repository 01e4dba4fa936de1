"""The study of spectra: what is truncated, and its quick form."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

from matplotlib.figure import Figure  # noqa: E402

from tensormoe import Gate  # noqa: E402
from tensormoe.analysis import RankCurve  # noqa: E402
from tensormoe.errors import ShapeError  # noqa: E402
from tensormoe.plotting import plot_rank_curves  # noqa: E402
from tests.examples._folder import examples  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))
with examples():
    import study_spectra as study
    from _comparison.training import Score


def model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = study.Residual(6, 8, 5, study.MODELS[name], 4)
    if name == study.FULL:
        study.expanded(made)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    return made.eval()


@pytest.mark.parametrize("name", study.MODELS)
def test_matrices_of_all_blocks_are_truncated_and_nothing_else(name: str) -> None:
    found = model(name)
    x = torch.randn(20, 6)
    seen: list[tuple[torch.Tensor, dict[str, int]]] = []

    def score(copy: torch.nn.Module) -> Score:
        with torch.no_grad():
            ranks = {
                each: int(torch.linalg.matrix_rank(matrix, rtol=1e-4))
                for each, matrix in study.matrices(copy).items()
            }
            seen.append((copy(x), ranks))
        return Score(0.0, 0.5)

    kept = {key: each.clone() for key, each in found.state_dict().items()}
    assert study.curve(found, score).scores == (0.5,) * len(study.SHARES)
    assert all(torch.equal(each, kept[key]) for key, each in found.state_dict().items())
    # a block of two matrices, or of two for each expert
    experts = {"MLP": 1, "μMoE, CP": 4, study.FULL: study.EXPERTS}[name]
    for share, (_, ranks) in zip(study.SHARES, seen, strict=True):
        assert len(ranks) == 2 * experts
        assert max(ranks.values()) <= -(-share * 6 // 1)
    # all values give what the model gives, and none the biases and the gate alone
    torch.testing.assert_close(seen[-1][0], found(x).detach(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(seen[0][0], seen[-1][0], atol=0.1)


def test_dense_experts_keep_the_gates_of_the_tasks() -> None:
    gates = []
    for task in (study.mixer.Mixer(study.mixer.QUICK, 8, 4, study.DENSE), model("MLP")):
        study.expanded(task)
        gates += [each.gate.gate for each in task.modules() if isinstance(each, study.MuMoEMLP)]
    assert set(gates) == {study.mixer.GATE, Gate()}


def test_the_share_that_is_enough() -> None:
    count = len(study.SHARES)
    falls = [[50.0] * 3 + [69.5] + [70.0] * (count - 4)]
    assert study.enough(falls, 1.0) == study.SHARES[3]
    dips = [[70.0] * 4 + [60.0] + [70.0] * (count - 5)]
    assert study.enough(dips, 1.0) == study.SHARES[5]
    assert study.enough([[70.0] * count], 1.0) == 0.0


def test_it_trains_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    study.quick()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| quick")]
    assert [row.split(" | ")[1] for row in rows] == [*study.MODELS]
    assert all(len(row.split(" | ")) == len(study.SHARES) + 3 for row in rows)


def test_the_page_has_the_rows_that_are_complete() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    (part,) = re.findall(r"## How much of their spectra.*?(?=\n## )", page, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    head, _, *body = rows
    shares = [f"{100 * share:g} %" for share in study.SHARES[:-1]]
    assert head == ["task", "blocks", "all values", *shares, "enough"]
    models = [[task, name] for task in study.TASKS for name in study.MODELS]
    assert [row[:2] for row in body] == models[: len(body)]
    assert len(body) >= 7
    assert ("**Not run:**" in part) == (len(body) < len(models))
    for row in body:
        means = [*map(float, row[3:-1]), float(row[2].split(" ± ")[0])]
        # the page has rounded numbers
        near = {f"{100 * study.enough([means], within):g} %" for within in (0.9, 1.0, 1.1)}
        assert row[-1] in near


def test_curves_are_means_between_the_lowest_and_the_highest() -> None:
    axes = Figure().add_subplot()
    seeds = [RankCurve((0.1, 1.0), scores) for scores in ((0.5, 0.9), (0.7, 0.8))]
    plot_rank_curves(axes, {"dense": seeds, "experts": seeds[:1]})
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["dense"] == [[10.0, pytest.approx(0.6)], [100.0, pytest.approx(0.85)]]
    assert lines["experts"] == [[10.0, 0.5], [100.0, 0.9]]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 0.9)
    assert len({line.get_color() for line in axes.lines}) == 2
    for curves in ([], [*seeds, RankCurve((0.2, 1.0), (0.5, 0.5))]):
        with pytest.raises(ShapeError, match="must have the same shares"):
            plot_rank_curves(axes, {"dense": curves})
