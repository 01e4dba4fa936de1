"""The threshold of an entmax by Newton's method, on rows whose largest entry is 0.

With z = (α-1)(x - max x) and p = 1/(α-1), the entmax of x is max(z - τ, 0)^p, where τ in [-1, 0)
solves h(τ) = Σ max(z - τ, 0)^p = 1 (Peters, Niculae & Martins 2019, "Sparse sequence-to-sequence
models", eq. 10). Three facts carry this module.

- For α ≤ 2, φ(τ) = h(τ)^(1/p) - 1 is a norm of a non-negative convex function, minus 1: convex and
  decreasing. Newton's step from *any* point therefore lands left of the root, and from there on
  the steps are monotone. With φ instead of h - 1 the steps are up to p times longer, and one step
  suffices where all entries tie.
- The root depends on the logits, but its derivative needs no derivative of the search: one more
  Newton step δ = (h - 1) / (-h'), on live values with τ held constant, has exactly the derivative
  of the implicit function at the root, and a second one has its second derivative.
- z - τ is computed first and δ subtracted after, so the rounding of τ itself never reaches the
  coefficients: they are exact to a few ulp, and so is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log, log2
from typing import Any

from tensormoe.backend import Array, Backend, LoopStep, State

LIVE_STEPS = 2
"""Newton steps on differentiated values: each makes one more order of derivatives exact."""

OUTSIDE = -2.0
"""A shifted logit that no threshold in [-1, 0) reaches: what masked experts get."""


def newton_steps(experts: int, epsilon: float, power: float) -> int:
    """Newton steps that suffice from τ = -1, for libraries that cannot test whether they do.

    For a convex decreasing φ, Newton's iterates from the left obey φₖ₊₁ φ'ₖ₊₁ ≤ φₖ φ'ₖ / 4: with
    s = φₖ₊₁/φₖ and r = φ'ₖ₊₁/φ'ₖ, convexity gives s + r ≤ 1, hence s·r ≤ 1/4. As φ starts at most
    at N^(1/p) - 1 and |φ'| lies between 1 and N^(1/p), ⌈log₄(φ₀ |φ'₀| / tolerance)⌉ steps bring φ
    below the tolerance.
    """
    largest = experts ** (1.0 / power)
    area = max(largest * (largest - 1.0), 1e-30)
    return max(1, ceil(log(area / step_tolerance(experts, epsilon, power), 4.0)))


def step_tolerance(experts: int, epsilon: float, power: float) -> float:
    """The largest last step, in units of τ, whose error is lost in rounding."""
    # A last step δ leaves an error in h of about (p δ)² N for p ≥ 2. Below that, an expert which
    # leaves the support may cost its whole share of the step, pδ.
    return float((epsilon / experts) ** (0.5 if power >= 2.0 else 1.0) / power)


def bracket_steps(experts: int, epsilon: float, power: float) -> int:
    """Halvings, in the logarithm of -τ, that take its range [N^(-1/p), 1] down to rounding."""
    return ceil(log2(max(log(max(experts, 2)) / power, 1.0) / epsilon)) + 1


def _entmax15(backend: Backend, z: Array) -> Array:
    """Coefficients for α = 1.5, the square of max(z - τ, 0)."""
    xp = backend.namespace
    experts = z.shape[-1]
    epsilon = float(xp.finfo(z.dtype).eps)
    constant = backend.stop_gradient(z)
    lowest = xp.full_like(constant[:, :1], -1.0)
    # the sums at the last τ but one serve the last step too
    state = (lowest, lowest, lowest, lowest)
    step = LoopStep(_NormStep(backend), (constant,))
    most, tolerance = newton_steps(experts, epsilon, 2.0), step_tolerance(experts, epsilon, 2.0)
    _, tau, total, square = backend.while_loop(step, state, most + 1, tolerance)
    zero = xp.zeros_like(lowest)
    excess = z - tau
    if constant is z:
        excess = excess - (square - 1.0) / (2.0 * total)
    else:
        for _ in range(LIVE_STEPS):
            square = backend.square_sums(xp.maximum(excess, zero))
            excess = excess - (square - 1.0) / (2.0 * total)
    excess = xp.maximum(excess, zero)
    return excess * excess


@dataclass(frozen=True)
class _NormStep:
    """Newton's step on √h - 1 for α = 1.5.

    Steps hold no arrays, and equal each other where they do the same: a library compiles the loop
    once.
    """

    backend: Backend

    def __call__(self, z: Array, tau: Array, *_: Array) -> tuple[State, Array]:
        xp = self.backend.namespace
        excess = xp.maximum(z, tau)
        excess -= tau
        total = self.backend.row_sums(excess)
        square = self.backend.square_sums(excess)
        # (√h - 1) √h / Σ, the step on the norm
        move = (square - xp.sqrt(square)) / total
        return (tau + move, tau, total, square), xp.abs(move)


def _sparsemax(backend: Backend, z: Array) -> Array:
    """Coefficients for α = 2, max(z - τ, 0): p = 1, where Newton's method ends by itself."""
    xp = backend.namespace
    experts = z.shape[-1]
    epsilon = float(xp.finfo(z.dtype).eps)
    constant = backend.stop_gradient(z)
    lowest = xp.full_like(constant[:, :1], -1.0)
    zero = xp.zeros_like(lowest)
    most = newton_steps(experts, epsilon, 1.0)
    step = LoopStep(_SumStep(backend), (constant,))
    (tau,) = backend.while_loop(step, (lowest,), most, epsilon)
    margin = z - tau
    inside = margin > 0.0
    support = backend.row_sums(xp.astype(inside, z.dtype))
    margin = xp.where(inside, margin, zero)
    margin = margin - (backend.row_sums(margin) - 1.0) / support
    return xp.where(inside & (margin > 0.0), margin, zero)


@dataclass(frozen=True)
class _SumStep:
    """Newton's step on h - 1 for α = 2."""

    backend: Backend

    def __call__(self, z: Array, tau: Array) -> tuple[State, Array]:
        xp = self.backend.namespace
        zero = xp.zeros_like(tau)
        margin = z - tau
        support = self.backend.row_sums(xp.astype(margin > 0.0, z.dtype))
        move = (self.backend.row_sums(xp.maximum(margin, zero)) - 1.0) / support
        # rounding must not decrease τ, or the search cycles
        move = xp.maximum(move, zero)
        return (tau + move,), move


def entmax(backend: Backend, z: Array, alpha: float) -> Array:
    """Coefficients for any α > 1.

    For α < 2 the search is for σ = τ + 1 and t = 1 + (z - σ), whose logarithm is taken with
    log1p: that keeps its precision as α tends to 1, where p is large and all t are near 1. For
    α > 2 the precision of τ near 0 counts, and t = z - τ.
    """
    if alpha == 1.5:
        return _entmax15(backend, z)
    if alpha == 2.0:
        return _sparsemax(backend, z)
    xp = backend.namespace
    power = 1.0 / (alpha - 1.0)
    constant = backend.stop_gradient(z)
    near_one = alpha < 2.0
    shift = (_newton if near_one else _bracket)(backend, constant, power)
    margin = z - shift
    for _ in range(1 if constant is z else LIVE_STEPS):
        mass, slope, _ = _moments(backend, margin, power, near_one)
        margin = margin - (mass - 1.0) / backend.stop_gradient(power * slope)
    _, inside = _log(xp, constant - shift, near_one)
    logarithm, still = _log(xp, margin, near_one)
    raised = xp.where(inside & still, xp.exp(power * logarithm), xp.zeros_like(margin))
    # powers round: the sum is 1 up to that, and its derivative is 0 already
    return raised / backend.stop_gradient(backend.row_sums(raised))


def _log(xp: Any, margin: Array, near_one: bool) -> tuple[Array, Array]:
    """Log t where t > 0 and 0 elsewhere, and where t > 0."""
    inside = margin > (-1.0 if near_one else 0.0)
    if near_one:
        return xp.log1p(xp.where(inside, margin, xp.zeros_like(margin))), inside
    return xp.log(xp.where(inside, margin, xp.ones_like(margin))), inside


def _moments(
    backend: Backend, margin: Array, power: float, near_one: bool
) -> tuple[Array, Array, Array]:
    """H = Σ t^p, Σ t^(p-1) and Newton's step on h^(1/p) - 1, each (rows, 1)."""
    xp = backend.namespace
    logarithm, inside = _log(xp, margin, near_one)
    nothing = xp.zeros_like(margin)
    mass = backend.row_sums(xp.where(inside, xp.exp(power * logarithm), nothing))
    slope = backend.row_sums(xp.where(inside, xp.exp((power - 1.0) * logarithm), nothing))
    # (h^(1/p) - 1) / (h^(1/p - 1) Σ t^(p-1)), without its cancellation at large p
    return mass, slope, -xp.expm1(-xp.log(mass) / power) * mass / slope


def _newton(backend: Backend, z: Array, power: float) -> Array:
    """σ for α < 2, from the left."""
    xp = backend.namespace
    experts = z.shape[-1]
    epsilon = float(xp.finfo(z.dtype).eps)
    sigma = xp.zeros_like(z[:, :1])
    # for p < 2 the tolerance that bounds the number of steps is below rounding
    tolerance = step_tolerance(experts, epsilon, power) if power >= 2.0 else epsilon
    most = newton_steps(experts, epsilon, power)
    step = LoopStep(_PowerStep(backend, power), (z,))
    return backend.while_loop(step, (sigma,), most, tolerance)[0]


@dataclass(frozen=True)
class _PowerStep:
    """Newton's step on h^(1/p) - 1 for α < 2, whose σ is τ + 1."""

    backend: Backend
    power: float

    def __call__(self, z: Array, sigma: Array) -> tuple[State, Array]:
        xp = self.backend.namespace
        _, _, move = _moments(self.backend, z - sigma, self.power, True)
        move = xp.maximum(move, xp.zeros_like(move))
        return (sigma + move,), move


def _bracket(backend: Backend, z: Array, power: float) -> Array:
    """τ for α > 2, where t^p has an infinite slope at the edge of the support.

    Newton's step is taken where it stays inside the bracket, and every other step halves the
    bracket in the logarithm of -τ, which bounds the number of steps.
    """
    xp = backend.namespace
    experts = z.shape[-1]
    info = xp.finfo(z.dtype)
    epsilon = float(info.eps)
    low = xp.full_like(z[:, :1], -1.0)
    # the largest t^p is at least 1/N
    high = xp.full_like(low, -max(float(experts) ** (-1.0 / power), float(info.smallest_normal)))
    most = bracket_steps(experts, epsilon, power)
    step = LoopStep(_BracketStep(backend, power, epsilon), (z,))
    return backend.while_loop(step, (low, high, low), most, 0.0)[0]


@dataclass(frozen=True)
class _BracketStep:
    """Newton's step and a halving for α > 2."""

    backend: Backend
    power: float
    epsilon: float

    def __call__(self, z: Array, low: Array, high: Array, tau: Array) -> tuple[State, Array]:
        xp = self.backend.namespace
        state, _ = self._turn(z, low, high, tau, halve=False)
        state, done = self._turn(z, *state, halve=True)
        return state, xp.where(done, xp.zeros_like(low), xp.ones_like(low))

    def _turn(
        self, z: Array, low: Array, high: Array, tau: Array, *, halve: bool
    ) -> tuple[State, Array]:
        xp = self.backend.namespace
        mass, _, move = _moments(self.backend, z - tau, self.power, False)
        left = mass >= 1.0
        low = xp.where(left, tau, low)
        high = xp.where(left, high, tau)
        following = middle = -xp.sqrt(low * high)
        if not halve:
            newton = tau + move
            following = xp.where((newton > low) & (newton < high), newton, middle)
        done = (high - low <= -self.epsilon * low) | (move == 0.0)
        return (low, high, xp.where(done, low, following)), done
