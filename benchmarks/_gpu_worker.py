"""One part of a GPU report, in a process of its own: a crash, or a device that hangs, ends no more.

python benchmarks/_gpu_worker.py torch-eager --device cuda --seconds 60 --folder out/gpu-report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _gpu_records import Recorder
from _gpu_roofline import Rooflines
from _gpu_settings import FULL, TINY, Sizes

from tensormoe.planning import Roofline

ROOFLINES = "rooflines.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="until nothing more is begun")
    parser.add_argument("--folder", type=Path, required=True, help="of results")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    recorder = Recorder(options.folder / f"{options.part}.jsonl", options.seconds)
    sizes = TINY if options.tiny else FULL
    try:
        run(options.part, recorder, sizes, options.device, options.folder)
    except Exception as error:
        recorder.failed(options.part, error)
        raise
    recorder.done()


def run(part: str, recorder: Recorder, sizes: Sizes, device: str, folder: Path) -> None:
    """Run a part; each imports its own library."""
    kind, _, name = part.partition("-")
    if kind == "suite":
        from _gpu_suites import suite

        suite(recorder, name, device)
    elif part == "torch-peers":
        from _gpu_peers import PeerTables

        PeerTables(recorder, sizes, device).run()
    elif kind == "torch":
        from _gpu_torch import TorchTables

        tables = TorchTables(recorder, sizes, device, _rooflines(folder))
        if name == "device":
            found = {key: each.to_dict() for key, each in tables.device_facts().items()}
            (folder / ROOFLINES).write_text(json.dumps(found), encoding="utf-8")
            return
        {"eager": tables.eager, "compiled": tables.compiled, "graphs": tables.graphs}[name]()
    else:
        from _gpu_jax import JaxTables

        JaxTables(recorder, sizes, device, _rooflines(folder)).jitted()


def _rooflines(folder: Path) -> Rooflines:
    """The roofline that the part before found; none if it failed."""
    path = folder / ROOFLINES
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: Roofline.from_dict(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
