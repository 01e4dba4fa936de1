"""Build the sdist, the wheel from it, and import what a user would get, away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]

# Runs in the clean environment, in an empty folder, isolated from the caller's paths.
IMPORT_ALL = """
import sys, warnings
from importlib import import_module
from importlib.metadata import entry_points, version
from importlib.resources import files

warnings.simplefilter("error")
for package in sys.argv[1:]:
    module = import_module(package)
    assert "site-packages" in module.__file__, f"{package} came from {module.__file__}"
    assert files(package).joinpath("py.typed").is_file(), f"{package} ships no py.typed"
from tensormoe.analysis._explorer._page import _SCRIPTS
for name in ("page.html", "page.css", *(f"page_{part}.js" for part in _SCRIPTS)):
    assert files("tensormoe.analysis._explorer").joinpath(name).is_file(), f"no {name}"
page = files("tensormoe.choosing").joinpath("page")
for name in ("index.html", "page.css", "main.js", "worker.js", "icon.svg"):
    assert page.joinpath(name).is_file(), f"no {name}"
for point in entry_points(group="tensormoe.backends"):
    assert point.load().name == point.name, point
import tensormoe
import tensormoe_jax.equinox, tensormoe_jax.nnx
assert version("tensormoe") == tensormoe.__version__
print(f"{version('tensormoe')}: imported {', '.join(sys.argv[1:])}")
"""


def main() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    expected = {Path(package).name for package in build["targets"]["wheel"]["packages"]}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=place, quiet=True)
        [sdist], [wheel] = place.glob("*.tar.gz"), place.glob("*.whl")
        roots = {name.partition("/")[0] for name in ZipFile(wheel).namelist()}
        shipped = {root for root in roots if not root.endswith(".dist-info")}
        if shipped != expected:
            sys.exit(f"the wheel holds {sorted(shipped)}; expected {sorted(expected)}")

        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        constraints = ["-c", ROOT / "constraints.txt"]
        run(*install, *constraints, f"{wheel}[cupy,equinox,flax,numpy,torch]", cwd=place)
        neutral = place / "neutral"
        neutral.mkdir()
        run(python, "-I", "-c", IMPORT_ALL, *sorted(expected), cwd=neutral)
        print(f"{sdist.name} {sdist.stat().st_size:,} bytes")
        print(f"{wheel.name} {wheel.stat().st_size:,} bytes")


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout or f"failed: {' '.join(map(str, command[:4]))} …")


if __name__ == "__main__":
    main()
