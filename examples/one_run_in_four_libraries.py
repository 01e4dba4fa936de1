"""Train one classifier in NumPy, PyTorch, Flax NNX and Equinox: four curves that are one.

    python examples/one_run_in_four_libraries.py
    python examples/one_run_in_four_libraries.py --quick

All four start from one checkpoint of 256 experts, see the same batches of scikit-learn's digits and
take the same steps of AdamW, each with its library's own head and optimizer. In float64 the losses
agree to rounding from the first step to the last; in float32 the rounding of each library's
products grows along the way, as it does from one machine to another. Prints a table for each; the
picture goes to ``out/``. Takes half a minute, ``--quick`` some seconds.

Needs all four libraries: ``pip install 'tensormoe[demo,torch,flax,equinox]' optax``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from _four_libraries import on_equinox, on_nnx, on_numpy, on_torch
from _four_libraries.task import PIXELS, Result, Task, make_task
from _tables import make_console, make_table

from tensormoe.plotting import COLOURS, MUTED, figure, tidy
from tensormoe_numpy import MuMoE

EXPERTS = 256
RUNS: Mapping[str, Callable[[Task], Result]] = {
    "NumPy": on_numpy.run,
    "PyTorch": on_torch.run,
    "Flax NNX": on_nnx.run,
    "Equinox": on_equinox.run,
}
# how far a loss may be from NumPy's, at the first step and over the whole run
BOUNDS = {"float64": (1e-13, 1e-10), "float32": (1e-5, 5e-3)}


def train(dtype: str, epochs: int) -> dict[str, Result]:
    """The four runs in one dtype, from one file."""
    with tempfile.TemporaryDirectory() as folder, jax.enable_x64(dtype == "float64"):
        checkpoint = Path(folder, "digits.safetensors")
        layer = MuMoE(PIXELS, PIXELS, EXPERTS, "tensor_ring", rank=(2, 2, 8), dtype=dtype, seed=0)
        layer.save(checkpoint)
        task = make_task(checkpoint, epochs, dtype)
        return {name: run(task) for name, run in RUNS.items()}


def gaps(results: Mapping[str, Result]) -> dict[str, np.ndarray]:
    """How far each run's losses are from NumPy's, step by step."""
    base = np.array(results["NumPy"].losses)
    return {name: np.abs(np.array(found.losses) - base) for name, found in results.items()}


def show(dtype: str, results: Mapping[str, Result]) -> None:
    """Print one dtype's table, and check it."""
    table = make_table(
        "library", "first loss", "last loss", "test accuracy, %", "largest gap to NumPy", "seconds"
    )
    for name, gap in gaps(results).items():
        found = results[name]
        table.add_row(
            name,
            f"{found.losses[0]:.9f}",
            f"{found.losses[-1]:.9f}",
            f"{100 * found.accuracy:.2f}",
            f"{gap.max():.1e}",
            f"{found.seconds:.1f}",
        )
        at_first, ever = BOUNDS[dtype]
        if gap[0] > at_first or gap.max() > ever:
            raise SystemExit(f"{name} is another run in {dtype}: a gap of {gap.max():.1e}")
    console = make_console()
    console.print(f"\n{dtype}, {len(results['NumPy'].losses)} steps", style="bold")
    console.print(table)


def draw(path: Path, results: Mapping[str, Mapping[str, Result]]) -> None:
    """The curves, each thinner than the one below it, and their distance from NumPy's."""
    with figure(path, 9.0, 3.8) as drawn:
        left, right = drawn.subplots(1, 2)
        for place, (name, found) in enumerate(results["float32"].items()):
            losses = np.array(found.losses)
            smooth = np.convolve(losses, np.ones(16) / 16, "valid")
            width = 8.0 - 2.2 * place
            left.plot(smooth, color=COLOURS[place], linewidth=width, label=name)
        left.set(xlabel="step", ylabel="training loss, nats", title="float32", yscale="log")
        left.legend()
        for dtype, style in (("float32", "-"), ("float64", ":")):
            for place, (name, gap) in enumerate(gaps(results[dtype]).items()):
                if place:
                    label = f"{name}, {dtype}"
                    seen = np.where(gap > 0.0, gap, np.nan)
                    right.plot(seen, style, color=COLOURS[place], linewidth=0.9, label=label)
        right.set(xlabel="step", ylabel="gap to NumPy's loss", title="distance", yscale="log")
        right.set_ylim(1e-17, 10.0)
        right.legend(fontsize=7, ncols=2, loc="upper left", labelcolor=MUTED)
        tidy(left)
        tidy(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs instead of thirty")
    parser.add_argument("--out", default="out", help="folder of the picture")
    options = parser.parse_args()
    epochs = 2 if options.quick else 30
    results = {dtype: train(dtype, epochs) for dtype in ("float32", "float64")}
    for dtype, found in results.items():
        show(dtype, found)
    path = Path(options.out, "four-libraries.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, results)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
