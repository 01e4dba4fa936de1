"""Distributions of third parties, installed as pip does it: files on the path, and metadata."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensormoe import _entry_points
from tensormoe.backend import _registry, loaded_backend
from tensormoe.factorizations import _named

ROOT = Path(__file__).resolve().parents[1]
THIRD_PARTY = ROOT / "tests" / "third_party"


def code_blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document of ours in one language."""
    text = (ROOT / document).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def write_metadata(site: Path, project: Mapping[str, object]) -> None:
    """The ``.dist-info`` folder of a distribution, from its ``[project]`` table."""
    name, version = str(project["name"]), str(project["version"])
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"]
    assert isinstance(groups, Mapping)
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_backend(site: Path, name: str, points: Mapping[str, str]) -> None:
    """The metadata of a distribution that registers backends."""
    groups = {_registry.ENTRY_POINT_GROUP: points}
    write_metadata(site, {"name": name, "version": "1.0", "entry-points": groups})


@contextmanager
def installed(*places: Path) -> Iterator[None]:
    """Folders on the path, and off it again with all that was imported from them."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            for place in places:
                patch.syspath_prepend(str(place))
            _forget_what_is_installed()
            yield
    finally:
        # after a failure too, or tests that follow fail with it
        _forget_what_is_installed()
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and any(Path(file).is_relative_to(place) for place in places):
                del sys.modules[name]


@contextmanager
def installed_package(folder: str, site: Path) -> Iterator[None]:
    """A package of ``third_party/``, registered as its ``pyproject.toml`` says."""
    source = THIRD_PARTY / folder
    project = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]
    write_metadata(site, project)
    with installed(site, source):
        yield


def _forget_what_is_installed() -> None:
    _entry_points.entry_points_of.cache_clear()
    loaded_backend.cache_clear()
    _named._from_entry_point.cache_clear()
