"""What the documentation says about adding a backend holds: its adapter, its package, its use."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from tensormoe import available_backends, backend_of, entmax, get_backend, known_backends
from tensormoe.backend import Backend
from tensormoe.errors import BackendError
from tensormoe.testing import BackendContract
from tests._third_party import ROOT, code_blocks, installed, write_metadata

PAGE = "docs/adding-a-backend.md"
ADAPTER, CONTRACT, LAYER, REGISTERED = code_blocks(PAGE, "python")
[PYPROJECT] = code_blocks(PAGE, "toml")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's package, installed."""
    site = tmp_path_factory.mktemp("site-packages")
    (site / "tensormoe_strict.py").write_text(ADAPTER)
    write_metadata(site, tomllib.loads(PYPROJECT)["project"])
    with installed(site):
        yield


class TestStrict(BackendContract):
    @property
    def backend(self) -> Any:
        return get_backend("array_api_strict")

    def from_numpy(self, array: np.ndarray) -> Any:
        return strict.asarray(array.copy())


@pytest.fixture(scope="module")
def small_blocks(package: None) -> Iterator[None]:
    """So few bytes that gates work on several blocks even where arrays are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_backend("array_api_strict"), "row_block_bytes", 100)
        yield


@pytest.mark.usefixtures("small_blocks")
class TestStrictInBlocks(TestStrict):
    """The same on blocks of rows."""


def test_the_page_runs_where_its_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = get_backend("array_api_strict")
    namespace = {"BACKEND": found, "xp": strict, "np": np, "Array": Any}
    for block in (CONTRACT, LAYER, REGISTERED):
        exec(compile(block, PAGE, "exec"), namespace)
    assert Path("layer.safetensors").is_file()
    # the suite that it shows is ours
    shown, suite = namespace["TestStrict"](), TestStrict()
    assert isinstance(shown, BackendContract)
    assert shown.backend is suite.backend
    array = np.arange(3.0)
    assert np.array_equal(shown.to_numpy(shown.from_numpy(array)), array)


def test_the_page_lists_the_protocol() -> None:
    rows = re.findall(
        r"^\| `(\w+)(?:\((.*)\))?` \|", (ROOT / PAGE).read_text("utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows if name not in vars(Backend)] == []
    assert {name for name, _ in rows} == {name for name in vars(Backend) if name[0] != "_"}
    for name, arguments in rows:
        code = getattr(vars(Backend)[name], "__code__", None)
        if code is not None:
            listed = [each.partition("=")[0].strip() for each in arguments.split(",")]
            assert listed == [*code.co_varnames[1 : code.co_argcount]], name


def test_arrays_find_what_is_registered() -> None:
    assert "array_api_strict" in known_backends()
    assert "array_api_strict" in available_backends()
    assert backend_of(strict.ones(2)) is get_backend("array_api_strict")
    assert isinstance(entmax(strict.ones(2)), type(strict.ones(2)))


def test_what_is_mixed_is_listed() -> None:
    with pytest.raises(BackendError, match=r"numpy\.ndarray at 0, array_api_strict\.Array at 1"):
        backend_of(np.ones(2), strict.ones(2))
