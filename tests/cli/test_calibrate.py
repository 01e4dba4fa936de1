"""``tensormoe calibrate``: profiles that the other commands use, one for each library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tensormoe import CP, LayerSpec
from tensormoe.cli import calibration, main
from tensormoe.cli._benches import BENCHES, threads_now
from tensormoe.cli._profile import resolve_device, save_profile
from tensormoe.cli.calibration import Samples, measure_roofline, measure_samples
from tensormoe.errors import PlanError, SpecError
from tensormoe.factorizations import Dense, SharedBasis
from tensormoe.planning import PUBLISHED_ROOFLINES, Cost, Roofline
from tests._command import ask

FEW = tuple(
    Samples(size, 24, experts, kind, (1, 3, 20))
    for size in (8, 32)
    for experts, kind in ((4, CP(5)), ((2, 3), SharedBasis((2, 3))), (4, Dense()))
)
OLD = {
    "name": "this machine",
    "matmul_rate": 1e11,
    "elementwise_rate": 1e10,
    "bandwidth": 2e10,
    "overhead": 1e-6,
    "fresh_bandwidth": 3e9,
    "backward_overhead": 2e-6,
}


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


def _profile(library: str, threads: int | None = 1, overhead: float = 1e-6) -> Roofline:
    return Roofline(f"mine, {library}", 1e11, 1e10, 1e10, overhead, threads=threads)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_calibrate_keeps_a_profile_that_the_other_commands_use(
    library: str,
    capsys: pytest.CaptureFixture[str],
    profile_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # rough figures will do
    monkeypatch.setattr(calibration, "_SECONDS", 0.001)
    monkeypatch.setattr(calibration, "SAMPLES", FEW)
    monkeypatch.setattr(calibration, "_CHECKED", FEW[:1])
    bench = BENCHES[library]()
    monkeypatch.setenv("OMP_NUM_THREADS", str(bench.threads))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(bench.threads))
    words = ("calibrate", "--backend", library)
    dry = ask(capsys, *words, "--dry-run")
    assert dry["path"] is None
    assert not profile_path.exists()
    assert dry["samples"] == 36
    assert 0 < dry["within_1.5"] <= 1
    assert [each["batch"] for each in dry["checks"]] == [1, 1, 3, 3, 20, 20]
    assert main(list(words)) == 0
    text = capsys.readouterr().out
    assert "FLOP/s" in text
    assert "starting a step" in text
    assert "of the 36 times" in " ".join(text.split())
    assert str(profile_path) in text
    kept = Roofline.from_dict(json.loads(profile_path.read_text("utf-8"))["profiles"][library])
    assert [each.name for each in profile_path.parent.iterdir()] == [profile_path.name]
    assert kept.threads == bench.threads
    assert kept.name.startswith(f"this machine, {library}, {bench.threads} thread")
    # any machine that runs this: 0.1 µs to 10 ms
    assert 1e-7 < kept.overhead + (kept.call_overhead or 0) < 1e-2
    for device in ("this", f"this-{library}"):
        found = ask(capsys, "plan", "64", "64", "16", "--device", device)
        assert Roofline.from_dict(found["request"]["device"]) == kept
    assert Roofline.from_dict(ask(capsys, "rank", "64", "64", "16")["request"]["device"]) == kept
    found = ask(capsys, "rank", "64", "64", "16", "--device", "cpu")
    assert found["request"]["device"]["name"] == "cpu"


class _FakeLayer:
    """A layer whose calls take the time that a profile predicts, by a clock of its own."""

    def __init__(self, bench: _FakeBench, spec: LayerSpec) -> None:
        self.bench, self.spec = bench, spec

    def cost(self, batch: int, training: bool) -> Cost:
        return self.spec.cost(batch, gate="entmax", training=training)

    def call(self, batch: int, training: bool) -> Callable[[], object]:
        seconds = self.bench.truth.time(self.cost(batch, training))

        def call() -> None:
            self.bench.calls += 1
            # every third call is disturbed, and the first one is slower
            late = 1 + (self.bench.calls % 3 == 1)
            self.bench.now += seconds * late

        return call


class _FakeBench:
    threads = 3
    now = 0.0
    calls = 0
    truth = Roofline("truth", 5e10, 6e9, 1e10, 2e-6, None, 5e-6, call_overhead=3e-5)

    def layer(self, in_features: int, out_features: int, experts: Any, kind: Any) -> _FakeLayer:
        return _FakeLayer(self, LayerSpec(in_features, out_features, experts, kind))


def test_a_known_machine_is_found_by_a_clock_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _FakeBench()
    monkeypatch.setitem(BENCHES, "numpy", lambda: bench)
    found = measure_roofline("numpy", lambda: bench.now, 0.0)
    assert (found.threads, found.name) == (3, "this machine, numpy, 3 threads")
    for cost, seconds in measure_samples(bench, FEW, lambda: bench.now, 0.0):
        # the fastest of the calls, none of which was disturbed
        assert seconds == pytest.approx(bench.truth.time(cost))
        assert found.time(cost) == pytest.approx(seconds, rel=0.25)


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BENCHES, "numpy", _FakeBench)
    with pytest.raises(PlanError, match="a positive number of seconds"):
        measure_roofline("numpy", lambda: 0.0, 0.0, FEW)


@pytest.mark.parametrize("library", list(BENCHES))
def test_every_library_is_timed_on_what_its_cost_counts(library: str) -> None:
    bench = BENCHES[library]()
    layer = bench.layer(8, 6, (2, 3), CP(4))
    for training in (False, True):
        layer.call(5, training)()
        cost = layer.cost(5, training)
        assert cost.calls == 1
        assert any(step.backward for step in cost.steps) == training
    assert bench.threads >= 1


def test_a_library_that_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--backend", "cupy"]) == 2
    error = capsys.readouterr().err
    assert "--backend must be one of 'numpy', 'torch', 'jax'; got 'cupy'." in error


def test_profiles_of_several_libraries(profile_path: Path) -> None:
    save_profile("torch", _profile("torch"))
    assert resolve_device("this").name == resolve_device(None).name == "mine, torch"
    save_profile("numpy", _profile("numpy"))
    assert resolve_device("this-numpy").name == resolve_device(None).name == "mine, numpy"
    assert resolve_device("this-torch").name == "mine, torch"
    with pytest.raises(SpecError, match=r"got those of numpy, torch\. Pass --device this-numpy or"):
        resolve_device("this")
    with pytest.raises(SpecError, match=r"Run: tensormoe calibrate --backend jax"):
        resolve_device("this-jax")
    save_profile("torch", _profile("torch", overhead=9e-6))
    assert resolve_device("this-torch").overhead == 9e-6
    assert resolve_device("this-numpy").overhead == 1e-6
    assert list(json.loads(profile_path.read_text())["profiles"]) == ["numpy", "torch"]


def test_the_old_form_of_a_file_is_read(profile_path: Path) -> None:
    """One profile of any library: it is this machine's until there is another."""
    profile_path.parent.mkdir(parents=True)
    profile_path.write_text(json.dumps(OLD))
    found = resolve_device("this")
    assert (found.name, found.overhead, found.threads) == ("this machine", 1e-6, None)
    assert resolve_device(None) == found
    with pytest.raises(SpecError, match="must have been measured; got profiles of unnamed alone"):
        resolve_device("this-numpy")
    save_profile("jax", _profile("jax", threads_now("jax")))
    assert resolve_device("this").name == "mine, jax"


def test_other_numbers_of_threads(
    profile_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_profile("torch", _profile("torch", threads=4))
    with pytest.raises(SpecError, match=r"as torch now has, 1; got a profile of 4\. Run tensormoe"):
        resolve_device("this")
    # nobody asked for it
    assert resolve_device(None) == PUBLISHED_ROOFLINES["cpu"]
    assert main(["plan", "8", "8", "4", "--device", "this-torch"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert resolve_device("this").threads == 4
    # PyTorch decides by itself
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    assert resolve_device("this").threads == 4
    save_profile("numpy", _profile("numpy", threads=4))
    with pytest.raises(SpecError, match="as numpy now has, 1"):
        resolve_device("this-numpy")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    assert resolve_device("this-numpy").threads == 4


@pytest.mark.parametrize("junk", ["", "x", "0", "-3", "2.5"])
def test_numbers_of_threads_that_are_none(junk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", junk)
    assert threads_now("numpy") == 1  # the next variable
    assert threads_now("jax") == BENCHES["jax"]().threads


def test_a_profile_that_cannot_be_used_is_said_so(
    capsys: pytest.CaptureFixture[str], profile_path: Path
) -> None:
    assert main(["rank", "64", "64", "16", "--device", "this"]) == 2
    assert "Run: tensormoe calibrate" in capsys.readouterr().err
    profile_path.parent.mkdir(parents=True)
    broken = ("{", "[]", '{"name": "x"}', "\udcff", '{"profiles": 3}', '{"profiles": {"cupy": {}}}')
    for text in (*broken, '{"profiles": {"numpy": {"name": "x"}}}', '{"profiles": {"numpy": 3}}'):
        profile_path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert main(["rank", "64", "64", "16"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the profile at")
        assert error.count("\n") == 1
        # and a new one takes its place
        assert save_profile("numpy", _profile("numpy")) == profile_path
        assert resolve_device("this").name == "mine, numpy"
