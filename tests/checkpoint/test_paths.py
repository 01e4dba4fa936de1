"""Where checkpoints can be saved and found, and where not."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.checkpoint import PARTIAL_SUFFIX, peek_checkpoint, read_checkpoint, save_checkpoint
from tensormoe.errors import CheckpointError
from tensormoe_numpy import BACKEND
from tests._checkpoint_files import equal, posix, some_arrays


@pytest.mark.parametrize("name", ["μMoE – 专家.safetensors", "a b", "x" * 250])
def test_unusual_names(tmp_path: Path, name: str) -> None:
    save_checkpoint(str(tmp_path / name), "MuMoE", {}, some_arrays())
    assert equal(read_checkpoint(tmp_path / name, BACKEND).arrays, some_arrays())
    assert os.listdir(tmp_path) == [name]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a", "MuMoE", {}, some_arrays())
    assert equal(read_checkpoint("a", BACKEND).arrays, some_arrays())


@posix
def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    save_checkpoint(link, "MuMoE", {}, {"x": np.zeros(2)})
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    target.chmod(0o640)
    save_checkpoint(link, "MuMoE", {}, {"x": np.ones(2)})
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert read_checkpoint(target, BACKEND).arrays["x"].sum() == 2


@pytest.mark.parametrize("path", [None, 3, b"bytes", ["a"]], ids=repr)
def test_no_path(path: Any) -> None:
    for call in (
        lambda: save_checkpoint(path, "MuMoE", {}, {}),
        lambda: read_checkpoint(path, BACKEND),
        lambda: peek_checkpoint(path),
    ):
        with pytest.raises(TypeError, match=r"path must be a str or an os\.PathLike of str; got"):
            call()


def make_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


@posix
@pytest.mark.parametrize(
    ("place", "rule"),
    [
        (lambda folder: str(folder), "is a folder"),
        (lambda folder: "", "is a folder|there is none"),
        (lambda folder: os.devnull, "is a device"),
        (make_pipe, "is a device, pipe or socket"),
        (lambda folder: str(folder / f"a{PARTIAL_SUFFIX}"), "must not end in"),
        (lambda folder: "a\0b", "null character"),
        (lambda folder: str(folder / "no" / "a"), "must exist|there is none"),
        (lambda folder: str(folder / ("x" * 300)), "too long"),
    ],
)
def test_places_where_no_checkpoint_is(
    tmp_path: Path, place: Callable[[Path], str], rule: str
) -> None:
    path = place(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=rule):
        save_checkpoint(path, "MuMoE", {}, some_arrays())
    with pytest.raises(CheckpointError, match=rule):
        read_checkpoint(path, BACKEND)
    assert sorted(os.listdir(tmp_path)) == before


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must name an existing checkpoint; there is none"):
        read_checkpoint(tmp_path / "a", BACKEND)
