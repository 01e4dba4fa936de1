"""Write the page of what works where from the tests that show it: ``python -m tests.support``."""

from __future__ import annotations

import sys
import traceback

from tests.support._rows import HEAD, TABLES
from tests.support._table import PAGE, render


def main() -> int:
    """Run every probe, and write the page if all of them pass."""
    failed = 0
    for table in TABLES:
        for name, probe in table.probes():
            try:
                probe()
            except Exception:
                failed += 1
                print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr)
    if failed:
        print(f"{PAGE.name} is as it was: {failed} of its ticks are none.", file=sys.stderr)
        return 1
    PAGE.write_text(render(HEAD, TABLES), "utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
