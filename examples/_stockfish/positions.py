"""Positions as the experts see them: the output of the shared layer for a board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from _stockfish.network import EXPERTS, Network

__all__ = ["Samples", "read_board", "see"]

# what 64 squares of one kind of piece, own or other, and all kinds together take
_SQUARES, _PIECES = 64, 704
_KING = 10
# activations are integers from 0 to this
TOP = 127


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs of one of the experts' layers.

    Args:
        inputs: (samples, in), whole numbers from 0 to 127, float32.
        experts: (samples,), the expert that the number of pieces chooses.
    """

    inputs: np.ndarray
    experts: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        """(samples, experts): one for the expert that is chosen, else zero."""
        return np.eye(EXPERTS, dtype="float32")[self.experts]

    def __len__(self) -> int:
        return len(self.experts)


def read_board(fen: str) -> tuple[list[tuple[int, str]], int]:
    """Pieces as (square, letter), a1 being 0 and h8 63, and the side to move: 0 for White."""
    rows, side = fen.split()[:2]
    pieces = []
    for place, row in enumerate(rows.split("/")):
        file = 0
        for letter in row:
            if letter.isdigit():
                file += int(letter)
            else:
                pieces.append(((7 - place) * 8 + file, letter))
                file += 1
    return pieces, 0 if side == "w" else 1


def see(network: Network, fens: Sequence[str]) -> Samples:
    """Inputs of the experts for positions in Forsyth-Edwards Notation."""
    inputs = np.empty((len(fens), network.features.shape[1]), "float32")
    experts = np.empty(len(fens), "int64")
    half = inputs.shape[1] // 2
    for place, fen in enumerate(fens):
        pieces, side = read_board(fen)
        experts[place] = (len(pieces) - 1) // 4
        for k, viewer in enumerate((side, 1 - side)):
            rows = network.features[_active(pieces, viewer)]
            total = network.feature_bias + rows.sum(axis=0, dtype="int32")
            left, right = np.clip(total, 0, TOP).reshape(2, half)
            inputs[place, k * half : (k + 1) * half] = left * right // 128
    return Samples(inputs, experts)


def _active(pieces: Sequence[tuple[int, str]], viewer: int) -> list[int]:
    """Features of the pieces for one side: kind and square, by the square of its own king.

    Boards are turned so that the viewer plays up, and mirrored so that its king is on files e to h.
    """
    king = next(square for square, letter in pieces if letter == "Kk"[viewer])
    flip = (56 if viewer else 0) ^ (7 if king % 8 < 4 else 0)
    rank, file = divmod(king ^ flip, 8)
    block = (7 - rank) * 4 + (7 - file)
    found = []
    for square, letter in pieces:
        other = letter.isupper() == bool(viewer)
        kind = _KING if letter in "kK" else 2 * "pnbrq".index(letter.lower()) + other
        found.append((square ^ flip) + _SQUARES * kind + _PIECES * block)
    return found
