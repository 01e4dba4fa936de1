"""Decompose real trained experts: the eight in the network of Debian's stockfish 15.1.

    python examples/decompose_stockfish.py
    python examples/decompose_stockfish.py --quick

A chess program's evaluation ends in eight experts of one shape, three layers each, of which the
number of pieces on the board chooses one. They are read from the installed program (``apt install
stockfish`` on Debian 12); where it is missing, the example says so and does nothing. First the
reading is checked: a forward pass in the engine's integers has to say what the engine's own table
says of each expert. Then each layer's experts are decomposed in every factorization, sums of a base
and deltas among them, at several budgets, next to truncated SVDs and to two controls: Gaussian
noise of the same norms, where there is nothing to find, and the same experts with their inputs
shuffled, where there is nothing to share. Errors of outputs and evaluations are those on games that
nothing was fitted to.

Prints tables; the picture goes to ``out/``. Takes about a minute, ``--quick`` a quarter of one.
Needs NumPy, rich and matplotlib (``pip install 'tensormoe[demo]'``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _stockfish.engine import Engine, play, started
from _stockfish.forward import dense, run
from _stockfish.network import EXPERTS, Network, NetworkError, find_program, read_network
from _stockfish.positions import Samples, see
from _stockfish.report import draw, show_evaluations, show_experts, show_layer
from _stockfish.study import Evaluation, Study, best, evaluate, expert_outputs, study

from tensormoe.decomposition import Search

# what the engine's table leaves out: half of its last digit, and a division that drops the rest
TABLE = 0.01


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Args:
        budgets: shares of the weights' entries.
        focus: the budget that is looked at expert by expert.
        games: that the engine plays against itself.
        search: how long to search for factors.
    """

    budgets: tuple[float, ...]
    focus: float
    games: int
    search: Search


FULL = Sizes((0.05, 0.1, 0.2, 0.3, 0.5), 0.2, 100, Search())
QUICK = Sizes((0.1, 0.3), 0.3, 12, Search(sweeps=30, polish=1))


@dataclass(frozen=True, eq=False)
class Positions:
    """Inputs of the three layers in games that are fitted to, and in others.

    Args:
        fitted: by layer.
        held_out: by layer.
    """

    fitted: tuple[Samples, ...]
    held_out: tuple[Samples, ...]


def check(network: Network, engine: Engine, fens: Sequence[str]) -> float:
    """The largest difference between our forward pass and the engine's table, in pawns."""
    products = [dense(layer) for layer in network.layers]
    worst = 0.0
    for fen in fens:
        seen = see(network, [fen])
        every = Samples(seen.inputs.repeat(EXPERTS, axis=0), np.arange(EXPERTS))
        gaps = run(network, products, every).pawns - engine.table(fen)
        worst = max(worst, float(np.abs(gaps).max()))
    return worst


def look(network: Network, games: Sequence[Sequence[str]]) -> tuple[Samples, ...]:
    """Inputs of each layer, from games."""
    seen = see(network, [fen for game in games for fen in game])
    trace = run(network, [dense(layer) for layer in network.layers], seen)
    return tuple(Samples(inputs, seen.experts) for inputs in trace.inputs)


def gather(network: Network, program: Path, sizes: Sizes) -> Positions | None:
    """Positions of games, after the reading was checked on some of them.

    Returns:
        None where the program does not run.
    """
    try:
        with started(program) as engine:
            games = play(engine, sizes.games)
            fens = [fen for game in games for fen in game]
            some = fens[:: max(1, len(fens) // 40)]
            worst = check(network, engine, some)
    except (OSError, EOFError) as error:
        print(f"weights alone are looked at, as the program does not run here: {error}")
        return None
    print(
        f"forward pass and the engine's own table, {len(some)} positions × {EXPERTS} experts: "
        f"at most {worst:.4f} pawns apart"
    )
    if worst > TABLE:
        raise SystemExit(f"The experts were read wrongly: more than {TABLE} pawns.")
    # whole games, as positions of one resemble each other
    positions = Positions(look(network, games[::2]), look(network, games[1::2]))
    counts = np.bincount(positions.held_out[0].experts, minlength=EXPERTS)
    print(
        f"{len(games)} games of the engine against itself: {len(positions.fitted[0])} positions "
        f"to fit outputs, {len(positions.held_out[0])} held out, by expert {counts.tolist()}"
    )
    return positions


def evaluations(
    network: Network, studies: Sequence[Study], positions: Positions, sizes: Sizes
) -> dict[float, list[Evaluation]]:
    """Evaluations with factors in the first layer, and in every layer that fits the budget."""
    found: dict[float, list[Evaluation]] = {}
    for budget in sizes.budgets:
        points = [best(each.trained, budget) for each in studies]
        kinds = [None if point is None else point.factorization for point in points]
        for some in ([kinds[0], None, None], kinds):
            for fitted in (None, positions.fitted):
                found.setdefault(budget, []).append(
                    evaluate(network, some, sizes.search, fitted, positions.held_out[0])
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two budgets, short searches")
    parser.add_argument("--program", help="path of the stockfish program")
    parser.add_argument("--out", default="out", help="folder of the picture")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    try:
        program = find_program(options.program)
        network = read_network(program)
    except NetworkError as error:
        # whoever names a program wants that one; else it may well not be there
        if options.program:
            parser.error(str(error))
        print(f"skipped, nothing was decomposed: {error}", file=sys.stderr)
        return
    print(f"read from {program}: {EXPERTS} experts of {', '.join(e.name for e in network.layers)}")
    positions = gather(network, program, sizes)
    studies = []
    for place, layer in enumerate(network.layers):
        fitted, held_out = (
            (None, None)
            if positions is None
            else (positions.fitted[place], positions.held_out[place])
        )
        studies.append(study(layer, sizes.budgets, sizes.search, fitted, held_out))
        show_layer(studies[-1], sizes.budgets, sizes.focus)
    outputs = {}
    if positions is not None:
        for name, fitted in (("weights", None), ("outputs", positions.fitted[0])):
            outputs[f"outputs, fitted\nto {name}"] = expert_outputs(
                studies[0], sizes.focus, sizes.search, fitted, positions.held_out[0]
            )
    show_experts(studies, sizes.focus, outputs)
    found: dict[float, list[Evaluation]] = {}
    typical = None
    if positions is not None:
        exact = run(network, [dense(e) for e in network.layers], positions.held_out[0]).pawns
        typical = float(np.median(np.abs(exact)))
        found = evaluations(network, studies, positions, sizes)
        show_evaluations(found, typical)
    path = Path(options.out, "stockfish.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, studies, sizes.budgets, sizes.focus, found, typical)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
