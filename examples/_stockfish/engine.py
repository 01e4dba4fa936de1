"""The engine itself: games that it plays, and its own table of what each expert says."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Engine", "play", "read_table", "started"]

# a row of its table: expert, material, and what the layers say, with spaces behind signs
_ROW = re.compile(r"\|\s+(\d)\s+\|[^|]+\|\s*([+-]?\s*[\d.]+)\s*\|[^|]+\|")
# what a move may be worse than the best one, in hundredths of a pawn; nodes that tell
_SLACK, _NODES, _MOVES = 60, 100, 4
_LONGEST = 240


@dataclass
class Engine:
    """A running program that speaks UCI."""

    process: subprocess.Popen[str]

    def ask(self, commands: str, last: str) -> list[str]:
        """Lines of the answer, until one starts with ``last``.

        Raises:
            EOFError: the program has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        lines = []
        with suppress(BrokenPipeError):
            self.process.stdin.write(commands + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith(last):
                return lines
        raise EOFError(f"the engine ended before it said {last!r}")

    def table(self, fen: str) -> list[float]:
        """Evaluation of each expert, in pawns for the side to move."""
        lines = self.ask(f"position fen {fen}\neval\nisready", "readyok")
        return read_table(lines)


@contextmanager
def started(program: Path) -> Iterator[Engine]:
    """A running engine, ended at the end.

    Raises:
        OSError: the program does not run on this machine.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen([program], stdin=pipe, stdout=pipe, text=True) as process:
        engine = Engine(process)
        try:
            engine.ask("uci", "uciok")
            # one thread, and a fixed number of nodes: the same games everywhere
            options = {"Threads": 1, "Hash": 1, "MultiPV": _MOVES}
            for name, value in options.items():
                engine.ask(f"setoption name {name} value {value}\nisready", "readyok")
            yield engine
        finally:
            process.kill()


def read_table(lines: Sequence[str]) -> list[float]:
    """The column of the layers, by expert.

    Raises:
        ValueError: the table is not there.
    """
    rows = [match for match in map(_ROW.match, lines) if match]
    if [int(match[1]) for match in rows] != list(range(8)):
        raise ValueError("the engine printed no table of what its experts say")
    return [float(match[2].replace(" ", "")) for match in rows]


def play(engine: Engine, games: int, seed: int = 0) -> list[list[str]]:
    """Positions of games against itself, one list per game, without those in check.

    Of its four best moves, one is drawn that is at most 0.6 pawns worse than the best.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(games):
        engine.ask("ucinewgame\nisready", "readyok")
        position, seen = "startpos", []
        for _ in range(_LONGEST):
            lines = engine.ask(f"position {position}\nd\ngo nodes {_NODES}", "bestmove")
            (fen,) = [line[5:] for line in lines if line.startswith("Fen: ")]
            (checkers,) = [line[9:] for line in lines if line.startswith("Checkers:")]
            if not checkers.strip():
                seen.append(fen)
            moves = _moves(lines)
            if not moves:
                break
            best = max(moves.values())
            move = rng.choice([each for each, score in moves.items() if score >= best - _SLACK])
            position = f"fen {fen} moves {move}"
        found.append(seen)
    return found


def _moves(lines: Sequence[str]) -> dict[str, int]:
    """Moves with scores, of the deepest search that saw each."""
    found = {}
    for line in lines:
        words = line.split()
        if words[:1] == ["info"] and "multipv" in words and "pv" in words:
            kind, value = words[words.index("score") + 1 :][:2]
            score = int(value) if kind == "cp" else 10_000 * (1 if int(value) > 0 else -1)
            found[words[words.index("pv") + 1]] = score
    return found
