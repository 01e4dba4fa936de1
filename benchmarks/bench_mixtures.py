"""Mixtures whose experts are run one by one: ``python benchmarks/bench_mixtures.py NAME …``."""

from __future__ import annotations

import os
import sys
from importlib import import_module

NAMES = ("conv", "paper", "product", "soft", "sparse", "table")
"""Parts, each in a file ``_mixtures_<name>.py`` with a function ``run`` of the other arguments."""


# PyTorch's profiler says when it begins
os.environ.setdefault("KINETO_LOG_LEVEL", "9")


def main(arguments: list[str]) -> None:
    """Run the part that is named first."""
    if not arguments or arguments[0] not in NAMES:
        raise SystemExit(f"usage: python benchmarks/bench_mixtures.py {'|'.join(NAMES)} [options]")
    import_module(f"_mixtures_{arguments[0]}").run(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
