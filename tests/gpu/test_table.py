"""The table of ``make test-gpu``: nothing that failed, or did not run, looks fine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu._table import GROUPS, Results, read, table

RUNNER = Path(__file__).parent

REPORT = """<testsuites><testsuite>
<properties><property name="device" value="Some GPU"/>
<property name="version" value="1.0"/></properties>
<testcase classname="tests.gpu.on_torch" name="test_the_device"/>
<testcase classname="tests.gpu.on_torch.TestContract" name="test_matmul"/>
<testcase classname="tests.gpu.on_torch.TestContract" name="test_gates_equal_those_of_numpy">
{failure}</testcase>
<testcase classname="tests.gpu.on_torch.TestContract" name="test_experts_permute_together"/>
<testcase classname="tests.gpu.on_torch.TestLayers" name="test_layers[CP-float32]"/>
<testcase classname="tests.cupy.test_layers" name="test_factorized_equals_unfactorized">
<skipped message="why"/></testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize("failure", ["", '<failure message="m">text</failure>', "<error/>"])
def test_outcomes_are_counted(failure: str, tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(failure=failure))
    found = read(path, 1 if failure else 0)
    assert {name: dict(count) for name, count in found.groups.items()} == {
        "device": {"passed": 1},
        "primitives": {"passed": 1},
        "gates": {"failed": 1} if failure else {"passed": 1},
        "mixtures": {"passed": 1},
        "layers": {"passed": 1, "skipped": 1},
    }
    assert found.fine == (not failure)
    row = table({"torch": found}).splitlines()[2]
    gates = "1 ✗" if failure else "1"
    cells = [cell.strip() for cell in row.split("  ") if cell.strip()]
    assert cells == ["torch 1.0", "1", "1", gates, "1", "1, 1 ○", "Some GPU"]


def test_what_did_not_run_is_not_fine() -> None:
    assert not Results(0).fine
    assert not Results(3).fine
    assert table({"jax": Results(3)}).count("none ran") == len(GROUPS)


def test_without_a_gpu_it_fails() -> None:
    script = "import _driver; _driver.devices = lambda: ([], 'no driver')\n"
    # runs on machines with a GPU too
    program = (
        f"import sys; sys.path.insert(0, {str(RUNNER)!r})\n{script}"
        "import runpy; runpy.run_path(sys.path[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA GPU: no driver. Nothing was tested." in done.stderr


def test_libraries_have_names() -> None:
    done = subprocess.run([sys.executable, RUNNER, "mlx"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "libraries must be of torch, jax, cupy; got mlx." in done.stdout
