"""What `pyproject.toml` promises against what the tree holds."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tensormoe
from tensormoe.backend import Backend, get_backend, known_backends
from tensormoe.backend._registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
BACKENDS = PROJECT["entry-points"][ENTRY_POINT_GROUP]
BUILD = PYPROJECT["tool"]["hatch"]["build"]
PACKAGES = [ROOT / name for name in BUILD["targets"]["wheel"]["packages"]]
SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
LIBRARIES = {"cupy", "jax", "numpy", "torch"}

# where the name to import differs from the name to install
DISTRIBUTIONS = {"cupy": "cupy-cuda12x", "cupyx": "cupy-cuda12x", "sklearn": "scikit-learn"}


def normalized(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def third_party(path: Path) -> set[str]:
    """Root names that the file imports, at the top or later, from outside the project."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots.add((node.module or "").partition(".")[0])
    return {root for root in roots - sys.stdlib_module_names if not root.startswith("tensormoe")}


def test_every_package_in_the_tree_is_shipped() -> None:
    in_tree = {ROOT / "tensormoe", *(path.parent for path in ROOT.glob("backends/*/__init__.py"))}
    assert set(PACKAGES) == in_tree


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_packages_are_marked_as_typed(package: Path) -> None:
    assert (package / "py.typed").is_file()


def test_no_folder_shadows_an_array_library() -> None:
    # where modules are looked for: the roots, and beside scripts; tests/torch is in none
    scripts = {path.parent for path in (ROOT / "tests").rglob("__main__.py")}
    roots = {ROOT, ROOT / "backends", ROOT / "examples", ROOT / "benchmarks", *scripts}
    assert ROOT / "tests" not in scripts
    assert not [path for root in roots for path in root.iterdir() if path.stem in LIBRARIES]


def test_registry_and_entry_points_name_the_same_backends() -> None:
    assert set(known_backends()) == set(BACKENDS)
    assert set(BACKENDS) <= set(EXTRAS)


@pytest.mark.parametrize("name", BACKENDS)
def test_entry_points_give_the_backend_of_that_name(name: str) -> None:
    module, _, attribute = BACKENDS[name].partition(":")
    backend = getattr(import_module(module), attribute)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert get_backend(name) is backend


def test_the_command_exists() -> None:
    module, _, attribute = PROJECT["scripts"]["tensormoe"].partition(":")
    assert callable(getattr(import_module(module), attribute))


def test_every_import_is_declared() -> None:
    declared = {normalized(text) for text in sum(EXTRAS.values(), PROJECT["dependencies"])}
    for path in SOURCES:
        needed = {normalized(DISTRIBUTIONS.get(root, root)) for root in third_party(path)}
        assert needed <= declared, path


def test_requirements_have_lower_bounds_only() -> None:
    for requirement in sum(EXTRAS.values(), PROJECT["dependencies"]):
        assert re.fullmatch(r"tensormoe\[[\w,]+\]|[\w-]+(\[\w+\])?>=[\d.]+", requirement)


def test_extras_that_are_named_exist() -> None:
    texts = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml"]
    for path in texts:
        for extras in re.findall(r"tensormoe\[([a-z,-]+)\]", path.read_text("utf-8")):
            assert set(extras.split(",")) <= set(EXTRAS), path


def test_changelog_has_the_version() -> None:
    release, development, _ = tensormoe.__version__.partition(".dev")
    assert re.fullmatch(r"\d+\.\d+\.\d+", release)
    heading = r"\[Unreleased\]" if development else rf"\[{release}\] - \d{{4}}-\d\d-\d\d"
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## {heading}$", changelog, flags=re.MULTILINE)
