"""``python -m tensormoe.cli``."""

from __future__ import annotations

import sys

from tensormoe.cli._main import main

if __name__ == "__main__":
    sys.exit(main())
