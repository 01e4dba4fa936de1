"""A factorization that a third party could have written, as source and as a class."""

from __future__ import annotations

from typing import Any

from tensormoe import Factorization

OWN = '''
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar
from tensormoe import Factorization
from tensormoe.factorizations import INPUT, OUTPUT, Factor, Initializer, expert_leg

@dataclass(frozen=True)
class Own(Factorization):
    """Experts in the span of P shared matrices, and written as plainly as can be."""

    rank: int
    name: ClassVar[str] = "own"

    def rank_pattern(self, levels):
        return ("P",)

    def with_rank(self, rank):
        return type(self)(*rank)

    def bonds(self, levels):
        return (self.rank,)

    def factors(self, levels):
        experts = tuple(Factor(f"expert_{e}", (expert_leg(e), "p")) for e in range(levels))
        return (*experts, Factor("basis", (INPUT, "p", OUTPUT)))

    def bond_sizes(self, experts, out_features):
        return {"p": self.rank}

    def initializers(self, experts, in_features, out_features, scheme):
        starts = {f"expert_{e}": Initializer(1.0, "normal", "one") for e in range(len(experts))}
        energy = self.rank * 2.0 ** len(experts)
        return starts | {"basis": Initializer(1.0 / sqrt(3.0 * in_features * energy))}
'''


def own_class(body: str = "", name: str = "own") -> Any:
    """The class, with lines of its body replaced or added."""
    # annotations are looked up in the module of the class
    scope: dict[str, Any] = {"__name__": __name__}
    exec(OWN.replace('"own"', repr(name)), scope)
    own = scope["Own"]
    if body:
        inner = "".join(f"    {line}\n" for line in body.splitlines())
        exec(f"@dataclass(frozen=True)\nclass Other(Own):\n{inner}", scope)
        own = scope["Other"]
    assert issubclass(own, Factorization)
    return own
