"""The study of mixtures of decoders, in its quick form."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import _mxd_model
import study_mxd

QUICK = replace(study_mxd.QUICK, steps=8, seeds=1, inputs=2048, scored=2048)


def _run(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    monkeypatch.setattr(study_mxd, "QUICK", QUICK)
    monkeypatch.setattr(sys, "argv", ["study_mxd.py", "--quick", "--out", str(out)])
    threads = torch.get_num_threads()
    try:
        study_mxd.main()
    finally:
        torch.set_num_threads(threads)


def test_it_prints_a_table_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(monkeypatch, tmp_path)
    first = capsys.readouterr().out
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "transcoder",
        "skip transcoder",
        "mixture of decoders",
        "transcoder, MLP's first layer",
        "mixture of decoders, MLP's first layer",
    ] * len(QUICK.ks)
    assert [int(row[3]) for row in rows[::5]] == list(QUICK.ks)
    assert max(int(row[1].replace(",", "")) for row in rows) == 65 * QUICK.width + 32
    assert all(float(row[7]) <= int(row[3]) for row in rows)
    runs = (tmp_path / "mxd.jsonl").read_text("utf-8").splitlines()
    rates, kinds = len(study_mxd.RATES), len(study_mxd.KINDS)
    assert len(runs) == kinds * (rates + QUICK.seeds * len(QUICK.ks))
    # a run that was lost is made again, and is the same
    (tmp_path / "mxd.jsonl").write_text("\n".join(runs[:-1]) + "\n", "utf-8")
    _run(monkeypatch, tmp_path)
    assert capsys.readouterr().out == first
    assert (tmp_path / "mxd.jsonl").read_text("utf-8").splitlines() == runs


def test_transcoders_keep_the_largest_and_count_alike() -> None:
    torch.manual_seed(0)
    features, width, k = 6, 40, 3
    plain, skipping, decoders = (kind.build(features, width, k) for kind in study_mxd.KINDS[:3])
    sizes = [sum(p.numel() for p in each.parameters()) for each in (plain, skipping, decoders)]
    assert sizes[0] == sizes[2] == 13 * width + features
    assert 0 <= sizes[0] - sizes[1] < 13
    x = torch.randn(9, features)
    for each in (plain, skipping):
        assert isinstance(each, study_mxd.Transcoder)
        for parameter in each.parameters():
            torch.nn.init.normal_(parameter)
        hidden = each.encoder(x).relu()
        lowest = hidden.sort(-1).values[:, -k : hidden.shape[1] - k + 1]
        kept = hidden * (hidden >= lowest)
        torch.testing.assert_close(each.coefficients(x)[0], kept)
        want = kept @ each.decoder.weight.T + each.decoder.bias
        if each.skip is not None:
            want = want + x @ each.skip.weight.T
        torch.testing.assert_close(each(x), want)


def test_the_text_is_cut_into_parts_and_spelled_whole() -> None:
    parts = _mxd_model.load_parts()
    counts = [len(each) for each in (parts.train, parts.held, parts.test)]
    assert min(counts) > 2048
    assert counts[0] > 10 * counts[1]
    assert parts.pieces <= _mxd_model.PIECES
    assert max(int(each.max()) for each in (parts.train, parts.held, parts.test)) < parts.pieces
