"""Run by ``test_parallel.py`` in a process with eight devices: every check, and its outcome."""

from __future__ import annotations

import json
import sys
import time
import traceback

import jax

from tests.jax import _eight_blocks, _eight_layers, _eight_modules
from tests.jax._eight import CHECKS, WIDE

MODULES = (_eight_blocks, _eight_layers, _eight_modules)
"""They add their checks when they are imported."""


def main(wide: bool, pattern: str = "") -> None:
    assert jax.device_count() == 8
    found = {}
    for name, run in CHECKS.items():
        if (wide or name not in WIDE) and pattern in name:
            start = time.process_time()
            try:
                run()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
            print(f"{time.process_time() - start:6.1f} s  {name}", file=sys.stderr)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main("wide" in sys.argv[1:], next((each for each in sys.argv[1:] if each != "wide"), ""))
