"""Entry points that are wrong: each one is an error that names the distribution."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensormoe import available_backends, get_backend, known_backends
from tensormoe.errors import BackendError, MissingDependencyError, TensormoeError
from tests._third_party import install_backend, installed

# a module of the standard library stands for the array library
NAME = "wave"

# what the distribution's module holds, the error, and what its message says
WRONG: dict[str, tuple[str, type[TensormoeError], str]] = {
    "a module that fails": (
        "1 / 0",
        BackendError,
        r"the wave backend of tensormoe-wave \(wave_adapter:BACKEND\) must load; got "
        r"ZeroDivisionError: division by zero\. Update or uninstall",
    ),
    "a module that needs another": (
        "import no_such_module",
        MissingDependencyError,
        r"the wave backend of tensormoe-wave .* needs no_such_module, which is not installed\. "
        r"Install it",
    ),
    "a module without the object": (
        "OTHER = 1",
        BackendError,
        r"tensormoe-wave .* must load; got AttributeError: .*BACKEND.*\. Update or uninstall",
    ),
    "no backend at all": (
        "BACKEND = None",
        BackendError,
        r"tensormoe-wave .* must have every member of tensormoe\.backend\.Backend; got NoneType "
        r"without name, namespace, .*from_bytes\. Add",
    ),
    "a backend that lacks a member": (
        "from copy import copy\n"
        "from types import SimpleNamespace\n"
        "from tensormoe_numpy import BACKEND as numpy\n"
        "names = [name for name in dir(numpy) if name[0] != '_' and name != 'take']\n"
        "BACKEND = SimpleNamespace(**{name: getattr(numpy, name) for name in names})",
        BackendError,
        r"must have every member .*; got SimpleNamespace without take\. Add what is missing",
    ),
    "a class": (
        "from tensormoe_numpy._adapter import NumpyBackend as BACKEND",
        BackendError,
        r"tensormoe-wave .* must be an object; got the class NumpyBackend\. Let",
    ),
    "another library's adapter": (
        "from tensormoe_numpy import BACKEND",
        BackendError,
        r"tensormoe-wave .* must have that name, .*; got 'numpy'\. Give",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_named(case: str, tmp_path: Path) -> None:
    module, error, message = WRONG[case]
    (tmp_path / "wave_adapter.py").write_text(module)
    install_backend(tmp_path, "tensormoe-wave", {NAME: "wave_adapter:BACKEND"})
    with installed(tmp_path):
        # a wrong adapter stops nobody who doesn't use it
        assert NAME in known_backends()
        assert get_backend("numpy").name == "numpy"
        for _ in range(2):
            with pytest.raises(error, match=message) as caught:
                get_backend(NAME)
            assert type(caught.value) is error


def test_two_adapters_for_one_library_are_refused(tmp_path: Path) -> None:
    install_backend(tmp_path, "tensormoe-wave", {NAME: "wave_adapter:BACKEND"})
    install_backend(tmp_path, "wave-experts", {NAME: "wave_experts:BACKEND"})
    with installed(tmp_path):
        with pytest.raises(BackendError, match="must come from one distribution") as caught:
            get_backend(NAME)
        assert "tensormoe-wave (wave_adapter:BACKEND)" in str(caught.value)
        assert "wave-experts (wave_experts:BACKEND)" in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_library", "no_such_library.arrays", "no such library"])
def test_an_adapter_without_its_library(name: str, tmp_path: Path) -> None:
    install_backend(tmp_path, "tensormoe-nothing", {name: "no_such_adapter:BACKEND"})
    with installed(tmp_path):
        assert name in known_backends()
        assert name not in available_backends()
        message = (
            rf"the {name} backend of tensormoe-nothing .* needs {name}, which is not installed"
        )
        with pytest.raises(MissingDependencyError, match=message):
            get_backend(name)


def test_a_built_in_backend_can_not_be_replaced(tmp_path: Path) -> None:
    install_backend(tmp_path, "tensormoe-faster", {"numpy": "faster:BACKEND"})
    with installed(tmp_path):
        assert known_backends().count("numpy") == 1
        assert get_backend("numpy").name == "numpy"
