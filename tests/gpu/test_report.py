"""``make gpu-report``: what fails or takes too long is reported, and the rest goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu_report
from _driver import devices
from _gpu_markdown import report
from _gpu_parts import SCHEDULE, Outcome, Part, run_all
from _gpu_records import MOST_FAILURES, NO_MEMORY, Found, Recorder, read
from _gpu_settings import BFLOAT16, FLOAT32
from _gpu_suites import _module

ROOT = Path(__file__).parents[2]
# two of the suites take longer than all the rest
TRIED = [
    tuple(part for part in group if part.name not in ("suite-torch", "suite-jax"))
    for group in SCHEDULE
]


def script(name: str, text: str, seconds: float = 20.0) -> Part:
    return Part(name, f"part {name}", seconds, (sys.executable, "-c", text))


def writes(folder: Path, name: str, *lines: object) -> str:
    """A program that leaves results as a worker does."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return f"open({str(folder / f'{name}.jsonl')!r}, 'a').write({text!r})\n"


def run(folder: Path, *schedule: tuple[Part, ...], seconds: float = 60.0) -> list[Outcome]:
    return run_all(schedule, seconds, folder, [], os.environ, lambda line: None)


def check_markdown(text: str) -> dict[str, list[dict[str, str]]]:
    """The tables by heading; every row has the cells of its head, and every fence is closed."""
    assert text.startswith("# ")
    assert sum(line.startswith("````") for line in text.splitlines()) % 2 == 0
    tables: dict[str, list[dict[str, str]]] = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("|")]
        cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
        assert len({len(row) for row in cells}) <= 1, title
        if cells:
            assert all(set(each.strip()) <= set("-:") for each in cells[1]), title
            head = [each.strip() for each in cells[0]]
            assert len(set(head)) == len(head), title
            tables[title] = [
                dict(zip(head, (each.strip() for each in row), strict=True)) for row in cells[2:]
            ]
    return tables


def test_a_trial_run_has_every_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "report.md"
    code = gpu_report.main(["--tiny", "--device", "cpu", "--out", str(out)], TRIED)
    text = out.read_text("utf-8")
    assert code == 0, text
    tables = check_markdown(text)
    assert tables["Contract suites"][0]["result"] == "passed"
    for title in ("PyTorch, eager", "PyTorch, compiled", "JAX, jitted"):
        rows = tables[title]
        assert {row["layer"] for row in rows} == {"cp", "tensor ring"}, title
        assert {row["precision"] for row in rows} == {BFLOAT16.name, FLOAT32.name}, title
        assert all(all(row.values()) for row in rows), title
    peers = [title for title in tables if "experts, 768" in title]
    assert len(peers) == 2
    values = {row[""]: row["value"] for row in tables["Machine and settings"]}
    assert values["roofline"] == "measured, as below"
    assert float(values[f"error of a product on PyTorch, {FLOAT32.name}"]) < 1e-5
    assert float(values[f"error of a product on JAX, {BFLOAT16.name}"]) > 1e-5
    assert "## Failed\n\nNothing." in text
    assert "they need a GPU: CUDA graphs" in text
    assert "trial run, not on a GPU" in text.splitlines()[0]
    assert str(out) in capsys.readouterr().out


def test_a_part_that_raises_ends_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    good = writes(folder, "good", ("row", "Table", {"a|b": 1.5}), ("done",))
    schedule = [
        (script("bad", "raise RuntimeError('out | of luck')"),),
        (script("silent", "pass"),),
        (script("killed", "import os; os.kill(os.getpid(), 11)"),),
        (script("good", good),),
    ]
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "report.md")]
    assert gpu_report.main(arguments, schedule) == 1
    text = (tmp_path / "report.md").read_text("utf-8")
    tables = check_markdown(text)
    assert [row["result"] for row in tables["Parts"]] == [
        "ended with exit status 1",
        "ended without results",
        "ended with SIGSEGV",
        "done",
    ]
    assert tables["Table"] == [{"a\\|b": "1.5"}]
    assert "RuntimeError: out | of luck" in text
    assert "- part bad: ended with exit status 1" in text
    assert "part bad: ended with exit status 1" in capsys.readouterr().err


def test_a_worker_that_raises_says_why(tmp_path: Path) -> None:
    part = Part("torch-nothing", "a part that there is not", 60)
    options = ["--device=cpu", "--tiny"]
    (found,) = run_all([(part,)], 60, tmp_path, options, os.environ, lambda line: None)
    assert found.problem == "ended with exit status 1"
    assert found.found.failed == [("torch-nothing", "KeyError: 'nothing'")]


def test_a_part_over_its_deadline_is_stopped(tmp_path: Path) -> None:
    marker = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(marker)!r}).touch()"
    slow = writes(
        tmp_path, "slow", ("planned", ["a", "b", "c"]), ("row", "T", {"x": 1}), ("ended", "a")
    )
    slow += f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
    slow += "time.sleep(60)"
    good = script("good", writes(tmp_path, "good", ("done",)), 30)
    begin = time.monotonic()
    late, other = run(tmp_path, (script("slow", slow, 2),), (good,), seconds=32.5)
    assert late.problem == "stopped after its 2 s"
    assert late.found.tables == {"T": [{"x": 1}]}
    assert late.found.left_out == [(name, "its part had stopped") for name in "bc"]
    assert not other.problem
    assert time.monotonic() - begin < 30
    time.sleep(max(0.0, begin + 8 - time.monotonic()))
    assert not marker.exists(), "what a part started goes on without it"
    text = report("t", {}, [late, other], 1.0)
    assert "- part slow: stopped after its 2 s" in text
    assert "- its part had stopped: b; c" in text


def test_parts_of_a_group_run_at_once(tmp_path: Path) -> None:
    """Each waits for the file of the other."""
    texts = [
        writes(tmp_path, mine, ("done",)) + "import pathlib, time\n"
        f"while not pathlib.Path({str(tmp_path / f'{other}.jsonl')!r}).exists(): time.sleep(0.05)"
        for mine, other in ("ab", "ba")
    ]
    found = run(tmp_path, tuple(script(name, text) for name, text in zip("ab", texts, strict=True)))
    assert sorted(each.part.name for each in found) == ["a", "b"]
    assert not any(each.problem for each in found)


def test_time_that_is_left_goes_to_the_next_part(tmp_path: Path) -> None:
    said: list[str] = []
    parts = [script("a", "pass", 20), script("b", "pass", 40), script("c", "pass", 40)]
    run_all([(part,) for part in parts], 110, tmp_path, [], os.environ, said.append)
    limits = [float(line.split(": ")[1].split()[0]) for line in said if line.startswith("== ")]
    assert limits[0] == pytest.approx(30, abs=1)
    assert 60 < limits[1] <= 70
    assert 90 < limits[2] <= 110
    said.clear()
    # less than the shares: all are cut alike
    run_all([(part,) for part in parts], 10, tmp_path, [], os.environ, said.append)
    assert said[0] == "== part a: 2 s at most"


def test_the_shares_fit_into_eight_minutes() -> None:
    shares = sum(max(part.seconds for part in group) for group in SCHEDULE)
    assert shares <= gpu_report.SECONDS <= 470
    names = [part.name for group in SCHEDULE for part in group]
    assert len(set(names)) == len(names)


def test_a_recorder_leaves_out_and_goes_on(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.jsonl", 60)
    errors: list[Exception | None] = [
        # too little memory for a few is no reason to stop
        *[MemoryError("CUDA out of memory. Tried to allocate")] * (MOST_FAILURES + 1),
        None,
        *[RuntimeError("an illegal\nmemory access")] * MOST_FAILURES,
        None,
    ]

    def row(place: int) -> None:
        error = errors[place]
        if error is not None:
            raise error
        recorder.row("T", {"place": place})

    cleaned: list[int] = []
    recorder.each(range(len(errors)), row, lambda: cleaned.append(1))
    found = read(tmp_path / "x.jsonl")
    assert found.tables == {"T": [{"place": 4}]}
    failure = "RuntimeError: an illegal memory access"
    assert found.failed == [(str(place), failure) for place in (5, 6, 7)]
    assert found.left_out == [
        *[(str(place), NO_MEMORY) for place in range(4)],
        ("8", f"3 in succession had failed: {failure}"),
    ]
    assert len(cleaned) == 8
    assert not found.done


def test_a_recorder_begins_nothing_without_time(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "x.jsonl", 0.3)
    recorder.each("abc", lambda item: time.sleep(0.2), lambda: None)
    recorder.done()
    found = read(tmp_path / "x.jsonl")
    assert found.left_out == [("b", "no time left"), ("c", "no time left")]
    assert found.done


def test_results_that_end_in_the_middle_of_a_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('["fact", "a", 1]\n["row", "T", {"b"')
    assert read(path) == Found(facts={"a": 1})
    assert read(tmp_path / "none.jsonl") == Found()


def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "devices", lambda: ([], "no driver"))
    assert gpu_report.main(["--out", str(tmp_path / "report.md")]) == 2
    assert capsys.readouterr().err == "no NVIDIA GPU: no driver. Nothing was run.\n"
    assert not list(tmp_path.iterdir())


def test_the_cpu_takes_tiny_sizes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_report.main(["--device", "cpu"])
    assert "it needs --tiny" in capsys.readouterr().err


@pytest.mark.skipif(bool(devices()[0]), reason="this machine has a GPU")
@pytest.mark.parametrize("target", ["gpu-report", "test-gpu"])
def test_make_installs_nothing_without_a_gpu(target: str, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    done = subprocess.run(
        ["make", target, f"GPU_VENV={environment}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"== {target}" in done.stdout
    assert "need a machine with an NVIDIA GPU and its driver; got " in done.stderr
    assert not environment.exists()


def test_environment_has_no_rounding_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    found = gpu_report._environment("cuda", False, "cache")
    assert not {"NVIDIA_TF32_OVERRIDE", "JAX_ENABLE_X64", "PYTEST_ADDOPTS"} & set(found)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    assert gpu_report._environment("cuda", False, "cache")["TENSORMOE_TEST_JAX_EXAMPLES"] == "6"
    assert found["JAX_PLATFORMS"] == found["TENSORMOE_TEST_DEVICE"] == "cuda"


def test_facts_of_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    line = "NVIDIA H200, 580.65.06, 700.00 W, 1980 MHz, 12 MiB, 3 %"
    program.write_text(f'#!/bin/sh\necho "{line}"\necho "{line}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    environment = gpu_report._environment("cuda", False, "cache")
    found = gpu_report._facts("cuda", ["NVIDIA H200"] * 2, environment)
    assert found["nvidia-smi, 1"] == (
        "NVIDIA H200, driver 580.65.06, power limit 700.00 W, clock up to 1980 MHz, "
        "in use before 12 MiB, busy before 3 %"
    )
    program.write_text("#!/bin/sh\nexit 9\n")
    found = gpu_report._facts("cuda", ["NVIDIA H200"], environment)
    assert found["nvidia-smi"] == "gave no answer: the driver's version is not known"


SUITE = """
import pathlib, time

def test_quick(): pass

def test_wrong(): assert False

def test_slow():
    pathlib.Path({marker!r}).touch()
    time.sleep(60)
"""


def test_a_suite_that_takes_too_long_says_what_had_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _module("__main__")
    marker, path = tmp_path / "marker", tmp_path / "test_some.py"
    path.write_text(SUITE.format(marker=str(marker)))
    monkeypatch.setitem(runner.FILES, "torch", (path,))
    ended = runner._ended

    def wait(tests: subprocess.Popen[bytes], seconds: float) -> bool:
        if seconds == runner.SECONDS_TO_REPORT:
            return bool(ended(tests, 60))
        while not marker.exists() and tests.poll() is None:
            time.sleep(0.05)
        return False

    monkeypatch.setattr(runner, "_ended", wait)
    results = runner.run("torch", "cpu", 1.0)
    assert results.unfinished
    assert not results.fine
    # not the one that was interrupted, which pytest reports as one that has no failure
    assert dict(results.groups["layers"]) == {"passed": 1, "failed": 1}
    assert [name.rpartition("::")[2] for name in results.failures] == ["test_wrong"]
    assert "torch: stopped at its time limit" in _module("_table").table({"torch": results})


def test_a_suite_that_did_not_pass_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _gpu_suites

    results = _module("_table").Results(5)
    runner = SimpleNamespace(run=lambda library, device, seconds: results)
    table = _module("_table")
    monkeypatch.setattr(
        _gpu_suites, "_module", lambda name: runner if name == "__main__" else table
    )
    recorder = Recorder(tmp_path / "x.jsonl", 60)
    _gpu_suites.suite(recorder, "jax", "cpu")
    found = read(tmp_path / "x.jsonl")
    assert found.failed == [
        ("jax: the suite", "no test failed, but pytest ended with 5; see the log")
    ]
    assert found.tables["Contract suites"][0]["result"] == "failed"


def test_text_of_others_stays_in_its_place() -> None:
    found = Found(failed=[("a <b> | c", "line\n# heading\n| d |")], facts={"x": "1\n2"})
    outcome = Outcome(Part("p", "p", 1), found, "stopped", 2.0, "```\nlast")
    text = report("title", {"y": None}, [outcome], 3.0)
    check_markdown(text)
    assert "\n- a &lt;b> \\| c: line # heading \\| d \\|\n" in text
    assert "````text\n```\nlast\n````" in text
    assert "| x | 1 2 |" in text
