"""Public names that the pages of the API must show."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

FRAMEWORKS = (
    *("tensormoe_cupy", "tensormoe_numpy", "tensormoe_torch"),
    *("tensormoe_jax.equinox", "tensormoe_jax.nnx"),
)
MEMBERS = ("coefficients", "cost", "expert", "load", "materialize", "plan", "restore", "save")


def undocumented(root: Path, site: Path) -> Iterator[str]:
    """Every public name without an anchor in the site, and every member that a layer inherits.

    Args:
        root: of the source.
        site: the site that was built from it.
    """
    anchors = {
        anchor
        for page in site.glob("api/*.html")
        for anchor in re.findall(r'id="([\w.]+)"', page.read_text("utf-8"))
    }
    exported = dict(_exports(root))
    for package, names in exported.items():
        for name in names:
            # a name that a package re-exports has its place in the other one
            if not any(f"{other}.{name}" in anchors for other in (package, *exported)):
                yield f"{package}.{name} is documented nowhere"
    for framework in FRAMEWORKS:
        for layer in ("MuMoE", "MuMoEMLP"):
            for member in MEMBERS:
                if f"{framework}.{layer}.{member}" not in anchors:
                    yield f"{framework}.{layer}.{member} is documented nowhere"


def _exports(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Public packages with what they list in ``__all__``."""
    for base in (root, root / "backends"):
        for path in sorted(base.glob("tensormoe*/**/*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if any(part.startswith("_") for part in parts) or parts[:2] == ("tensormoe", "cli"):
                continue
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    yield ".".join(parts), ast.literal_eval(node.value)
