"""The rank explorer of the documentation: whole with Pyodide, and honest without."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from tensormoe.choosing import explore

ROOT = Path(__file__).resolve().parents[2]
QUESTION = {"in_features": 96, "out_features": 64, "experts": [8, 4], "parts": ["rows"]}


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook of mkdocs, which finds no npm."""
    spec = spec_from_file_location("explorer_build", ROOT / "docs" / "explorer" / "_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.delenv("EXPLORER_REQUIRED", raising=False)
    return module


@pytest.fixture
def pyodide(hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the files of the pinned Pyodide, as far as the hook looks at them."""
    folder = tmp_path / "pyodide"
    folder.mkdir()
    for name in hook.PARTS:
        (folder / name).write_text(name)
    (folder / "package.json").write_text(json.dumps({"version": hook.pinned()}))
    monkeypatch.setattr(hook, "PYODIDE", folder)
    return folder


def test_without_npm_the_page_says_so(
    hook: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hook, "PYODIDE", tmp_path / "missing")
    hook.on_post_build({"site_dir": str(tmp_path / "site")})
    site = tmp_path / "site" / "explorer"
    engine = json.loads((site / "engine.json").read_text())
    assert engine["engine"] == "none"
    assert "npm is missing" in engine["reason"]
    assert "apt install npm" in capsys.readouterr().err
    assert (site / "index.html").read_bytes() == (hook.PAGE / "index.html").read_bytes()
    monkeypatch.setenv("EXPLORER_REQUIRED", "1")
    with pytest.raises(SystemExit, match="npm is missing"):
        hook.build(site)


def test_another_version_is_not_taken(hook: ModuleType, pyodide: Path) -> None:
    assert hook.install() is None
    (pyodide / "package.json").write_text('{"version": "0.1.0"}')
    assert "npm is missing" in hook.install()
    (pyodide / "package.json").write_text(json.dumps({"version": hook.pinned()}))
    (pyodide / "pyodide.asm.wasm").unlink()
    assert "npm is missing" in hook.install()


def test_everything_that_is_served_is_kept_offline(
    hook: ModuleType, pyodide: Path, tmp_path: Path
) -> None:
    site = tmp_path / "explorer"
    hook.build(site)
    engine = json.loads((site / "engine.json").read_text())
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {*engine["files"]} == files | {"./"}
    assert {f"pyodide/{name}" for name in hook.PARTS} <= files
    core = site / engine["core"]
    assert sha256(core.read_bytes()).hexdigest().startswith(core.stem.removeprefix("core-"))
    before = engine["version"]
    hook.build(site)
    assert json.loads((site / "engine.json").read_text())["version"] == before
    (pyodide / "python_stdlib.zip").write_text("another")
    hook.build(site)
    assert json.loads((site / "engine.json").read_text())["version"] != before


def test_the_archive_holds_all_that_answers_need(hook: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "core.zip"
    archive.write_bytes(hook.core_archive())
    program = f"""
import json, sys
sys.path.insert(0, {str(archive)!r})
from tensormoe.choosing import Session
assert sys.modules["tensormoe.choosing"].__file__.startswith({str(archive)!r})
print(json.dumps(Session().explore(json.loads({json.dumps(QUESTION)!r}))))
"""
    # no installed package is in reach
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(explore(QUESTION)))


def test_what_is_pinned() -> None:
    folder = ROOT / "docs" / "explorer"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all(each.get("integrity") for key, each in locked.items() if key)
