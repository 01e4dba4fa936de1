"""What `import tensormoe` loads and costs, and that the public surface is what it says."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from types import ModuleType
from typing import get_origin

import pytest

from tensormoe.errors import MissingDependencyError
from tests._python import ROOT, run_python

SOURCES = (ROOT / "tensormoe", ROOT / "backends")
HEAVY = ("cupy", "jax", "jaxlib", "matplotlib", "numpy", "opt_einsum", "rich", "scipy", "torch")

IMPORT_AND_MEASURE = """
import json, sys, time
before = set(sys.modules)
# of the processor, which other programs do not add to
start = time.process_time()
import tensormoe
seconds = time.process_time() - start
json.dump({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}, sys.stdout)
"""


def printed(code: str) -> str:
    """Standard output of ``code`` in a new interpreter that turns warnings into errors."""
    done = run_python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def public_modules() -> list[str]:
    names = []
    for source in (SOURCES[0], *sorted(SOURCES[1].glob("tensormoe_*"))):
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source.parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                names.append(".".join(parts))
    return names


def load(name: str) -> ModuleType:
    """The module, or a skip where it needs a library that isn't installed."""
    try:
        return import_module(name)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"tensormoe", name.partition(".")[0]}:
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")


def test_import_loads_no_array_library() -> None:
    modules = json.loads(printed(IMPORT_AND_MEASURE))["modules"]
    assert not {name.partition(".")[0] for name in modules}.intersection(HEAVY)


def test_import_loads_what_is_asked_for_alone() -> None:
    code = (
        "import sys, tensormoe; {}; print(*(name for name in sys.modules if 'tensormoe.' in name))"
    )
    assert not printed(code.format("pass")).split()
    loaded = printed(code.format("tensormoe.LayerSpec(6, 5, 4, tensormoe.CP(3)).plan(2)")).split()
    assert "tensormoe.planning" in loaded
    assert "tensormoe.gates" not in loaded
    others = ("selection", "decomposition", "compression", "checkpoint", "functional", "cli")
    assert not {f"tensormoe.{name}" for name in others}.intersection(loaded)


@pytest.mark.parametrize(
    ("statement", "most"),
    [("import tensormoe", 0.4), ("from tensormoe import CP, LayerSpec", 0.65)],
)
def test_import_takes_a_share_of_numpy_s(
    statement: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numpy")
    # bytecode for both: NumPy has it from its installation
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
    # the fastest of five: the others measure what else the machine is doing
    own, numpy = (
        min(float(printed(code.format(each))) for _ in range(5))
        for each in (statement, "import numpy")
    )
    assert own < most * numpy, (own, numpy)


@pytest.mark.parametrize("name", public_modules())
def test_public_names_resolve_and_are_documented(name: str) -> None:
    module = load(name)
    assert module.__doc__, f"{name} has no docstring"
    names = getattr(module, "__all__", None)
    assert names is not None, f"{name} is public and has no __all__"
    assert len(set(names)) == len(names)
    for public in names:
        value = getattr(module, public)
        # an alias of a type is documented below its definition, where Python doesn't keep it
        if callable(value) and get_origin(value) is None:
            assert value.__doc__, f"{name}.{public} has no docstring"


def test_backends_is_never_imported_as_a_package() -> None:
    found = []
    for folder in (*SOURCES, ROOT / "tests", ROOT / "examples", ROOT / "benchmarks"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                modules = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
                if any(module.partition(".")[0] == "backends" for module in modules):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
