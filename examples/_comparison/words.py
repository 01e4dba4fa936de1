"""Real text as words and parts of words, by byte pair encoding."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from shutil import which

import torch

from _comparison.text import Text, reference, split

__all__ = ["load_words", "pieces", "vocabulary"]

# a word or a number with the space before it, or any other sign by itself
_PIECE = re.compile(r" ?[^\W\d_]+| ?\d+|.", re.DOTALL)
_CHAPTER = re.compile(r"^(\w[\w ]* \d+)$", re.MULTILINE)


def load_words(size: int = 2048, *, holdout: bool = False) -> Text:
    """The King James Bible if Debian's bible-kjv is installed, else Python's language reference.

    Args:
        size: tokens in all: characters, and what the training text's most frequent pairs make.
        holdout: as for ``load_text``.
    """
    name, documents = _documents()
    parts = split(documents, holdout=holdout)
    split_up = [pieces(part) for part in parts]
    characters = sorted(set("".join(parts)))
    merges = vocabulary(split_up[0], size - len(characters))
    symbols = list(dict.fromkeys([*characters, *("".join(pair) for pair in merges)]))
    ids = {symbol: place for place, symbol in enumerate(symbols)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    every = {each for part in split_up for each in part}
    known = {each: [ids[one] for one in encoded(each, ranks)] for each in every}
    tokens = [torch.tensor([one for each in part for one in known[each]]) for part in split_up]
    return Text(name, tokens[0], tokens[1], symbols)


def pieces(text: str) -> list[str]:
    """Words with the space before them, and single signs; together they are the text.

    >>> pieces("And God said, Let there be light")
    ['And', ' God', ' said', ',', ' Let', ' there', ' be', ' light']
    """
    return _PIECE.findall(text)


def vocabulary(words: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Pairs of tokens to join, in order: the most frequent one each time (Sennrich et al. 2016).

    >>> vocabulary(["low", "low", "lower", "new"], 2)
    [('l', 'o'), ('lo', 'w')]
    """
    counts = Counter(words)
    spelled = {word: list(word) for word in counts}
    totals: Counter[tuple[str, str]] = Counter()
    users: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for word, letters in spelled.items():
        for pair in pairwise(letters):
            totals[pair] += counts[word]
            users[pair].add(word)
    # counts change all the time: an entry that is no longer right is passed over
    heap = [(-total, pair) for pair, total in totals.items()]
    heapify(heap)
    merges: list[tuple[str, str]] = []
    while len(merges) < count and heap:
        total, best = heappop(heap)
        if -total != totals[best]:
            continue
        if -total < 2:
            break
        merges.append(best)
        moved = set()
        for word in users.pop(best):
            old, new = spelled[word], joined(spelled[word], best)
            for sign, letters in ((-1, old), (1, new)):
                for pair in pairwise(letters):
                    totals[pair] += sign * counts[word]
                    moved.add(pair)
                    if sign > 0:
                        users[pair].add(word)
            spelled[word] = new
        for pair in moved:
            heappush(heap, (-totals[pair], pair))
    return merges


def encoded(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Tokens of a word, by the earliest pair that it has, again and again."""
    letters = list(word)
    while len(letters) > 1:
        pairs = pairwise(letters)
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        letters = joined(letters, best)
    return letters


def joined(letters: list[str], pair: tuple[str, str]) -> list[str]:
    """Tokens with every occurrence of a pair as one."""
    made, place = [], 0
    while place < len(letters):
        here = tuple(letters[place : place + 2]) == pair
        made.append("".join(pair) if here else letters[place])
        place += 1 + here
    return made


def _documents() -> tuple[str, Mapping[str, str]]:
    if which("bible") is None:
        return reference("pydoc_data.topics")
    command = ["bible", "gen1:1-rev22:21"]
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout
    return "the King James Bible", chapters(text)


def chapters(text: str) -> dict[str, str]:
    """Chapters by title, a verse per line, without numbers of verses and breaks of lines."""
    _, *parts = _CHAPTER.split(text)
    made = {}
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        verses = re.split(r"\n\s+\d+ ", f"\n{body.strip(chr(10))}")
        lines = (" ".join(verse.split()) for verse in verses)
        made[title] = "\n".join(line for line in lines if line)
    return made
