"""The example on stockfish's experts, on a made-up program of the same layout and the real one."""

from __future__ import annotations

import hashlib
import struct
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tensormoe import Dense
from tensormoe.decomposition import Search, decompose
from tensormoe.factorizations import FACTORIZATIONS
from tests.examples._folder import examples

with examples():
    import decompose_stockfish as example
    from _stockfish import engine, forward, network, positions, report, study

FENS = (
    "rnbqkbnr/pppppppp/8/8/8/8/PPPPPPPP/RNBQKBNR w KQkq - 0 1",
    "r3k2r/p1ppqpb1/bn2pnp1/3PN3/1p2P3/2N2Q1p/PPPBBPPP/R3K2R b KQkq - 0 1",
    "8/8/2k5/5q2/5n2/8/5K2/8 b - - 0 1",
    "2K5/8/1P6/8/8/8/6p1/5k2 w - - 0 1",
    "1r4k1/5ppp/8/8/2B5/7P/2K2PP1/3R4 w - - 0 1",
)


@dataclass(frozen=True)
class Program:
    """A file that carries a network, and what is in it."""

    path: Path
    digest: str
    bias: np.ndarray
    features: np.ndarray
    experts: tuple[dict[str, np.ndarray], ...]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    rng = np.random.default_rng(7)

    def draw(dtype: str, low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, shape, endpoint=True).astype(dtype)

    bias, features = draw("<i2", 0, 40, 1024), draw("<i2", -15, 20, 22528, 1024)
    mark = struct.pack("<I", 0x7AF32F20)
    text = b"made up"
    parts = [mark, struct.pack("<II", 1, len(text)), text, b"kind", bias, features]
    parts.append(np.zeros((22528, 8), "<i4"))
    experts = []
    for _ in range(8):
        expert = {
            "b0": draw("<i4", -3000, 6000, 16),
            "w0": draw("i1", -9, 9, 16, 1024),
            "b1": draw("<i4", 0, 4000, 32),
            "w1": draw("i1", -20, 20, 32, 32),
            "b2": draw("<i4", -900, 900, 1),
            "w2": draw("i1", -127, 127, 1, 32),
        }
        # padding
        expert["w1"][:, 30:] = 0
        parts += [b"also", *expert.values()]
        experts.append(expert)
    content = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)
    path = tmp_path_factory.mktemp("games") / "stockfish"
    # the mark stands in the code as well, where no network follows
    path.write_bytes(b"code " + mark + struct.pack("<II", 0, 2**31) + content + mark + b"end")
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Program(path, digest, bias, features, tuple(experts))


@pytest.fixture(scope="module")
def net(program: Program) -> network.Network:
    return network.read_network(program.path, program.digest)


def _oracle(program: Program, fen: str, expert: int) -> float:
    """The evaluation in pawns, in Python's integers, as the engine's documentation has it."""
    board, side = fen.split()[:2]
    cells = "".join("." * int(c) if c.isdigit() else c for c in board.replace("/", ""))
    # cells run from a8 to h1
    pieces = [((7 - k // 8, k % 8), c) for k, c in enumerate(cells) if c != "."]
    x: list[int] = []
    for white in (side == "w", side != "w"):
        total = [int(b) for b in program.bias]
        (home,) = [at for at, c in pieces if c == ("K" if white else "k")]
        mirrored = home[1] <= 3

        def seen(
            at: tuple[int, int], white: bool = white, mirrored: bool = mirrored
        ) -> tuple[int, int]:
            rank, file = at
            return (rank if white else 7 - rank), (7 - file if mirrored else file)

        king = seen(home)
        bucket = 4 * (7 - king[0]) + (7 - king[1])
        for at, c in pieces:
            rank, file = seen(at)
            own = c.isupper() == white
            order = ["p", "n", "b", "r", "q"]
            kind = 10 if c in "Kk" else 2 * order.index(c.lower()) + (0 if own else 1)
            row = program.features[bucket * 704 + kind * 64 + rank * 8 + file]
            total = [a + int(b) for a, b in zip(total, row, strict=True)]
        cut = [max(0, min(127, value)) for value in total]
        x += [cut[k] * cut[k + 512] >> 7 for k in range(512)]
    e = program.experts[expert]

    def layer(place: int, values: list[int]) -> list[int]:
        weights, bias = e[f"w{place}"].tolist(), e[f"b{place}"].tolist()
        rows = zip(weights, bias, strict=True)
        return [b + sum(w * v for w, v in zip(row, values, strict=True)) for row, b in rows]

    h = layer(0, x)
    z = [min(127, (value * value) >> 19) for value in h[:15]]
    z += [max(0, min(127, value >> 6)) for value in h[:15]]
    g = [max(0, min(127, value >> 6)) for value in layer(1, [*z, 0, 0])]
    (value,) = layer(2, g)
    return (value + int(h[15] * 9600 / (127 * 64))) / 16 / 361


def test_the_layers_are_read(program: Program, net: network.Network) -> None:
    names = [layer.name for layer in net.layers]
    assert names == ["1024 → 16", "30 → 32", "32 → 1"]
    np.testing.assert_array_equal(net.feature_bias, program.bias)
    np.testing.assert_array_equal(net.features, program.features)
    for place, layer in enumerate(net.layers):
        used = layer.integers.shape[1]
        for expert, given in enumerate(program.experts):
            np.testing.assert_array_equal(layer.integers[expert].T, given[f"w{place}"][:, :used])
            np.testing.assert_array_equal(layer.bias[expert], given[f"b{place}"])
        np.testing.assert_allclose(layer.weights, layer.integers * layer.step, rtol=1e-6)
        assert layer.weights.dtype == "float32"


def test_rounding_is_that_of_steps(net: network.Network, rng: np.random.Generator) -> None:
    layer = net.layers[0]
    between = rng.uniform(-9.5, 9.5, layer.integers.shape)
    off = np.linalg.norm(between - np.rint(between)) / np.linalg.norm(between)
    assert layer.rounding == pytest.approx(off, rel=0.01)


def test_another_network_is_refused(program: Program) -> None:
    with pytest.raises(network.NetworkError, match=r"does not carry .*apt install stockfish"):
        network.read_network(program.path)


def test_half_a_network_is_refused(program: Program, tmp_path: Path) -> None:
    half = tmp_path / "stockfish"
    half.write_bytes(program.path.read_bytes()[:-2000])
    with pytest.raises(network.NetworkError, match="does not carry"):
        network.read_network(half, program.digest)


@pytest.mark.parametrize("fen", FENS)
def test_the_forward_pass_is_exact(program: Program, net: network.Network, fen: str) -> None:
    seen = positions.see(net, [fen])
    every = positions.Samples(seen.inputs.repeat(8, axis=0), np.arange(8))
    trace = forward.run(net, [forward.dense(layer) for layer in net.layers], every)
    for expert in range(8):
        wanted = _oracle(program, fen, expert)
        assert trace.pawns[expert] == pytest.approx(wanted, abs=1e-12)
    # activations that are neither all cut off nor all dead
    for inputs in trace.inputs:
        assert ((inputs > 0) & (inputs < 127)).mean() > 0.05
    pieces = sum(c.isalpha() for c in fen.split()[0])
    assert seen.experts.tolist() == [(pieces - 1) // 4]


def test_factors_run_in_the_place_of_products(
    net: network.Network, rng: np.random.Generator
) -> None:
    for layer in net.layers:
        inputs = rng.integers(0, 128, (50, layer.integers.shape[1])).astype("float32")
        experts = rng.integers(0, 8, 50)
        found = decompose(layer.weights, Dense())
        product = forward.factorized(found, layer.step)
        wanted = forward.dense(layer)(inputs, experts)
        np.testing.assert_allclose(product(inputs, experts), wanted, atol=0.05)
        seen = positions.Samples(inputs, experts)
        assert study.output_error(layer, product, seen) < 1e-5
        assert seen.coefficients.argmax(axis=1).tolist() == experts.tolist()


def test_outputs_have_the_error_that_reports_say(
    net: network.Network, rng: np.random.Generator
) -> None:
    layer = net.layers[1]
    seen = positions.Samples(
        rng.integers(0, 128, (60, 30)).astype("float32"), rng.integers(0, 8, 60)
    )
    found = decompose(
        layer.weights, "cp", rank=9, inputs=seen.inputs, coefficients=seen.coefficients
    )
    product = forward.factorized(found, layer.step)
    error = study.output_error(layer, product, seen)
    assert 0.1 < error < 1.0
    assert error == pytest.approx(found.report.output_error, rel=1e-4)


def test_controls_keep_what_they_say(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((8, 20, 6)) * rng.uniform(1, 3, (8, 1, 1))
    for control in (study.noise, study.shuffled):
        found = control(weights, rng)
        norms = [np.linalg.norm(each, axis=(1, 2)) for each in (weights, found)]
        np.testing.assert_allclose(*norms)
        assert not np.isclose(found, weights).any(axis=2).all()
    spectra = [np.linalg.svd(each, compute_uv=False) for each in (weights, found)]
    np.testing.assert_allclose(*spectra)
    orders = [
        tuple(np.argmin(np.abs(old[None] - new[:, None]).sum(-1), axis=1))
        for old, new in zip(weights, found, strict=True)
    ]
    assert len(set(orders)) == 8


def _layer(weights: np.ndarray) -> network.Layer:
    integers = np.rint(weights * 30 / weights.std()).clip(-127, 127).astype("int8")
    return network.Layer("made up", integers, np.zeros((8, weights.shape[2]), "int32"), 1 / 64)


def test_experts_that_share_are_told_from_those_that_do_not(rng: np.random.Generator) -> None:
    basis, apart = rng.standard_normal((60, 4)), rng.standard_normal((8, 60, 4))
    mixed = rng.standard_normal((8, 4, 12))
    for weights, share in ((basis @ mixed, True), (apart @ mixed, False)):
        weights = weights + 0.3 * rng.standard_normal(weights.shape)
        found = study.study(_layer(weights), (0.2,), Search(sweeps=30), None, None)
        said = report.verdict(found, 0.2)
        assert ("The experts share" in said) is share
        assert ("do not compress together" in said) is not share
        # either way there is more to find than in noise
        assert "a spectrum that falls" in said or share
        assert found.weighted == ()
    tiny = study.study(_layer(mixed), (0.001, 0.2), Search(sweeps=5), None, None)
    assert report.verdict(tiny, 0.001) == "Nothing fits 0%."


def test_every_factorization_stands_beside_its_own_controls(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((1, 60, 12)) + rng.standard_normal((8, 60, 12))
    found = study.study(_layer(weights), (0.2, 0.3), Search(starts=1, sweeps=5), None, None)
    rows = {name: cells for name, *cells in report.controls(found, 0.3)}
    assert set(rows) == set(FACTORIZATIONS) - {"dense"}
    for name, cells in rows.items():
        curves = [
            next(curve for curve in each if curve.name == name)
            for each in (found.trained, found.shuffled, found.noise)
        ]
        trained, *apart = (study.best([curve], 0.3) for curve in curves)
        assert trained is not None
        own = trained.report
        assert own.joint is not None
        wanted = [f"{own.ratio:.1%}", f"{own.error:.3f}", f"{own.svd_error:.3f}"]
        wanted.append(f"{own.joint.error:.3f}")
        wanted += [f"{each.report.error:.3f}" for each in apart if each is not None]
        assert cells == wanted
    # the base alone is an eighth, and a rank is a tenth
    assert "base_delta" not in {name for name, *_ in report.controls(found, 0.2)}


def test_the_table_of_the_engine_is_read() -> None:
    lines = [
        "|  0         |     0.00   |  +  1.25 |  +  1.25 |",
        "|  1         |  -  1.00   |  - 10.17   |  - 11.17   | <-- this bucket is used",
    ]
    lines += [f"|  {k}         |     0.00   |     0.00   |  +  1.25   |" for k in range(2, 8)]
    assert engine.read_table(["before", *lines, "after"]) == [1.25, -10.17, *[0.0] * 6]
    with pytest.raises(ValueError, match="no table"):
        engine.read_table(lines[:5])


def _without_program(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(network, "DEBIAN", str(folder / "missing"))


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["decompose_stockfish.py", *words])
    example.main()


def test_without_the_program_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _without_program(monkeypatch, tmp_path)
    _run(monkeypatch, "--out", str(tmp_path / "out"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("skipped, nothing was decomposed: stockfish was not found.")
    assert "apt install stockfish" in captured.err
    assert not (tmp_path / "out").exists()
    # a program that somebody names has to be there
    with pytest.raises(SystemExit) as error:
        _run(monkeypatch, "--program", str(tmp_path / "nowhere"))
    assert error.value.code == 2


def test_a_program_that_does_not_run_still_has_weights(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    program: Program,
) -> None:
    reader: Any = partial(network.read_network, digest=program.digest)
    monkeypatch.setattr(example, "read_network", reader)
    monkeypatch.setattr(example, "QUICK", example.Sizes((0.2,), 0.2, 1, Search(sweeps=5)))
    _run(monkeypatch, "--quick", "--program", str(program.path), "--out", str(tmp_path))
    said = capsys.readouterr().out
    assert "weights alone are looked at" in said
    # random experts are what the control is
    assert said.count("do not compress together; nor alone") == 3
    assert "pawns" not in said
    # a base fits in two layers of the three, and stands in two tables of each
    assert said.count("base_delta") == said.count("shared_delta") == 4
    assert (tmp_path / "stockfish.png").stat().st_size > 20_000


def _installed() -> bool:
    try:
        network.read_network(network.find_program())
    except network.NetworkError:
        return False
    return True


@pytest.mark.skipif(not _installed(), reason="needs Debian's stockfish 15.1")
def test_the_real_experts() -> None:
    path = network.find_program()
    found = network.read_network(path)
    with engine.started(path) as running:
        games = engine.play(running, 4)
        fens = [fen for game in games for fen in game]
        assert example.check(found, running, [*FENS, *fens[::40]]) < example.TABLE
    assert len(fens) > 200
    fitted, held_out = example.look(found, games[::2]), example.look(found, games[1::2])
    layer = found.layers[0]
    search = Search(sweeps=20)
    one = study.study(layer, (0.2,), search, fitted[0], held_out[0])
    trained, shuffled, noise = (
        study.best(curves, 0.2) for curves in (one.trained, one.shuffled, one.noise)
    )
    assert trained is not None
    assert shuffled is not None
    assert noise is not None
    assert trained.report.error < 0.8 * shuffled.report.error < noise.report.error
    # fitted to other games' outputs, outputs are better
    kinds = [trained.factorization, None, None]
    plain = study.evaluate(found, kinds, search, None, held_out[0])
    better = study.evaluate(found, kinds, search, fitted, held_out[0])
    same = study.evaluate(found, [None] * 3, search, None, held_out[0])
    assert 0.0 == same.off < better.off < plain.off
    assert same.share == 1.0 > plain.share
