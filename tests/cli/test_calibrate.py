"""``tensormoe calibrate``: a profile that the other commands use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensormoe.cli import main
from tensormoe.planning import Roofline
from tests._command import ask


def test_calibrate_keeps_a_profile_that_the_other_commands_use(
    capsys: pytest.CaptureFixture[str], profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rough figures will do
    monkeypatch.setattr("tensormoe.cli.calibration._SECONDS", 0.02)
    path = profile_path
    dry = ask(capsys, "calibrate", "--dry-run")
    assert dry["path"] is None
    assert not path.exists()
    assert main(["calibrate"]) == 0
    text = capsys.readouterr().out
    assert "FLOP/s" in text
    assert str(path) in text
    kept = Roofline.from_dict(json.loads(path.read_text("utf-8")))
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    # any machine that runs this: 10⁹ to 10¹⁴ FLOP/s, 10⁸ to 10¹³ B/s, 0.1 µs to 1 ms
    assert 1e9 < kept.matmul_rate < 1e14
    assert 1e8 < kept.elementwise_rate < kept.matmul_rate * 10
    assert 1e8 < kept.bandwidth < 1e13
    assert 1e-7 < kept.overhead < 1e-3
    for words in (["rank", "64", "64", "16"], ["plan", "64", "64", "16", "--device", "this"]):
        assert Roofline.from_dict(ask(capsys, *words)["request"]["device"]) == kept
    found = ask(capsys, "rank", "64", "64", "16", "--device", "cpu")
    assert found["request"]["device"]["name"] == "cpu"


def test_a_profile_that_cannot_be_used_is_said_so(
    capsys: pytest.CaptureFixture[str], profile_path: Path
) -> None:
    assert main(["rank", "64", "64", "16", "--device", "this"]) == 2
    assert "Run: tensormoe calibrate" in capsys.readouterr().err
    path = profile_path
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"name": "x"}', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert main(["rank", "64", "64", "16"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the profile at")
        assert error.count("\n") == 1
