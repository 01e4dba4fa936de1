"""Normalization and activation of a layer's coefficients, as a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any

from tensormoe._validation import brief, flag
from tensormoe.errors import GateError
from tensormoe.gates._functions import check_alpha
from tensormoe.gates._top_k import check_k

ACTIVATIONS = ("entmax", "sparsemax", "softmax", "top_k", "relu_top_k")
"""By name; the last one has coefficients that do not sum to one."""
SPARSE = ("top_k", "relu_top_k")
"""Those that keep k experts per token."""

# fields that came later: files without them were written by gates that did as these say
_LATER = {"spread": 1.0, "noise": 0.0, "balance": 0.0}


@dataclass(frozen=True)
class Gate:
    """Normalization and activation between the projection of a token and its coefficients.

    Layer norm is the default since a token's coefficients then depend on that token alone. Batch
    norm is what the paper's vision models use (Oldfield et al. 2024, appendix H.3); in training it
    lets a token see the others. Neither has an affine part.

    Attributes:
        activation: "entmax", "sparsemax", "softmax", "top_k", or "relu_top_k", the k largest
            logits above zero as they are (Oldfield et al. 2025, arXiv 2505.21364), whose rows do
            not sum to one. Its projection starts like ``torch.nn.Linear``, as zeros would stay
            zeros; those of the others start at zero.
        alpha: the α of entmax, at least 1; 1.5 unless given. Other activations do not use it.
        normalization: "layer", "batch" or ``None``; unless given "layer", but ``None`` for
            "relu_top_k", whose coefficients have the size of its logits.
        k: experts per token for "top_k", the most of them for "relu_top_k", ``None`` for the
            others.
        bias: whether the projection has a bias. The paper's has none.
        spread: standard deviation that both normalizations give to logits, positive; ``None`` for
            :meth:`spread_of`, which depends on α and the number of experts.
        eps: added to the variance by both normalizations; positive. Unless given it is 1, or 1e-5
            for gates that keep k experts, whose projections do not start at zero.
        momentum: weight of a new batch in batch norm's running statistics, in (0, 1].
        noise: for "top_k": standard deviation of the normal noise that is added, in training, to
            the normalized logits by which experts are chosen (Shazeer et al. 2017). It picks
            experts, and does not enter their coefficients.
        balance: for "top_k": speed of balancing without a loss (Wang et al. 2024, DeepSeek-V3).
            Each expert has a bias, which is added to its normalized logits for the choice alone,
            and which each forward pass in training moves by this much: up for experts with less
            than the mean load, down for those with more. It is kept as batch norm's statistics
            are. 0 for no such bias; 0.001 is usual.

    Raises:
        GateError: a field has an unknown name or an impossible value.

    Example:
        >>> Gate()
        Gate(activation='entmax', alpha=1.5, normalization='layer', k=None, bias=False, \
spread=None, eps=1.0, momentum=0.1, noise=0.0, balance=0.0)
        >>> Gate("top_k", k=2, normalization=None).k
        2
        >>> gate = Gate("relu_top_k", k=2, bias=True)
        >>> gate.normalization, gate.sums_to_one
        (None, False)
    """

    activation: str = "entmax"
    alpha: float = 1.5
    normalization: str | None = "default"
    k: int | None = None
    bias: bool = False
    spread: float | None = None
    eps: float = None  # type: ignore[assignment]  # a number once the gate is made
    momentum: float = 0.1
    noise: float = 0.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise GateError(
                f"activation must be one of {', '.join(ACTIVATIONS)}; got "
                f"{brief(self.activation)}. Compute other coefficients yourself and pass them to "
                "the layer."
            )
        if isinstance(self.normalization, str) and self.normalization == "default":
            object.__setattr__(self, "normalization", "layer" if self.sums_to_one else None)
        named = self.normalization is None or isinstance(self.normalization, str)
        if not named or self.normalization not in ("layer", "batch", None):
            raise GateError(
                f"normalization must be 'layer', 'batch' or None; got {brief(self.normalization)}. "
                "Use 'layer' unless you reproduce a model with another."
            )
        object.__setattr__(self, "alpha", check_alpha(self.alpha))
        # a compiler takes a number that it finds for a variable, and text for a constant
        object.__setattr__(self, "_alpha", repr(self.alpha))
        if self.activation != "entmax" and self.alpha != 1.5:
            raise GateError(
                f"alpha belongs to entmax; got {self.alpha} with activation {self.activation!r}. "
                "Leave it out or use entmax."
            )
        if self.activation in SPARSE:
            if self.k is None:
                raise GateError(
                    f"{self.activation} needs the number of experts per token; got k=None. Write "
                    f"Gate({self.activation!r}, k=2), for instance."
                )
            check_k(self.k)
        elif self.k is not None:
            raise GateError(
                f"k belongs to top_k and relu_top_k; got {self.k!r} with activation "
                f"{self.activation!r}. Leave it out or use one of these."
            )
        flag(self.bias, "bias", GateError)
        if self.eps is None:
            object.__setattr__(  # type: ignore[unreachable]
                self, "eps", 1.0 if self.k is None else 1e-5
            )
        if not _is_number(self.eps) or not (self.eps > 0 and isfinite(self.eps)):
            raise GateError(f"eps must be a positive number; got {self.eps!r}. Use 1.0.")
        self._check_spread()
        if not _is_number(self.momentum) or not 0 < self.momentum <= 1:
            raise GateError(f"momentum must be in (0, 1]; got {self.momentum!r}. Use 0.1.")
        self._check_choice()
        object.__setattr__(self, "_text", json.dumps(asdict(self)))

    def _check_choice(self) -> None:
        for name in ("noise", "balance"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise GateError(
                    f"{name} must be a number that is not negative; got {brief(value)}. Use 0 for "
                    "none."
                )
            if value > 0 and self.activation != "top_k":
                raise GateError(
                    f"{name} belongs to top_k; got {value} with activation {self.activation!r}. "
                    "Leave it out or use top_k."
                )

    def _check_spread(self) -> None:
        if self.spread is None:
            return
        if not _is_number(self.spread) or not (self.spread > 0 and isfinite(self.spread)):
            raise GateError(
                f"spread must be a positive number or None; got {self.spread!r}. Leave it out for "
                "what the number of experts calls for."
            )
        if self.normalization is None:
            raise GateError(
                f"spread belongs to a normalization; got {self.spread} with normalization=None. "
                "Leave it out or use 'layer'."
            )

    @classmethod
    def paper(cls, normalization: str = "layer") -> Gate:
        """The gate of Oldfield et al. 2024: entmax-1.5 of standardized logits, at unit variance.

        Its released code has batch norm in vision models and layer norm in GPT-2, with an eps of
        1e-5. The first steps of training then decide the routing; see the guide to gates.

        >>> Gate.paper().eps, Gate.paper().spread
        (1e-05, 1.0)
        """
        return cls(normalization=normalization, spread=1.0, eps=1e-5)

    @classmethod
    def parse(cls, value: Gate | str) -> Gate:
        """A gate as it is, or one by the name of its activation.

        >>> Gate.parse("softmax").activation
        'softmax'
        """
        if isinstance(value, Gate):
            return value
        if not isinstance(value, str):
            raise GateError(
                f"gate must be a Gate or the name of an activation; got {value!r}. Write "
                "Gate('entmax', alpha=1.5), for instance."
            )
        return cls(value)

    @property
    def sums_to_one(self) -> bool:
        """Whether a token's coefficients sum to one, whatever its logits.

        >>> Gate("top_k", k=2).sums_to_one, Gate("relu_top_k", k=2).sums_to_one
        (True, False)
        """
        return self.activation != "relu_top_k"

    @property
    def effective_alpha(self) -> float:
        """The α whose derivative the activation has; 1 for softmax and those that keep k."""
        if self.activation == "entmax":
            return float(self._alpha)  # type: ignore[attr-defined]
        return 2.0 if self.activation == "sparsemax" else 1.0

    def spread_of(self, experts: int) -> float:
        """Standard deviation of the normalized logits of so many experts.

        Unless given it is (8 / N)^(α - 1), for which a change of one standard deviation changes a
        coefficient by the same factor for any N: at equal coefficients 1/N, entmax has
        ∂a/∂x = a^(2 - α), N^(α - 1) times the coefficient. For fewer than 8 experts it is 1.

        >>> Gate().spread_of(8), Gate().spread_of(512), Gate("softmax").spread_of(512)
        (1.0, 0.125, 1.0)
        """
        if self.spread is not None:
            return float(self.spread)
        return float(min(8.0 / experts, 1.0) ** (self.effective_alpha - 1.0))

    @property
    def uncut(self) -> Gate:
        """The gate without its cut: softmax over all experts, with the same normalization.

        :func:`activate` makes of it, and of the logits, the router's probabilities that the
        losses of Switch and GShard need. Make it outside of functions that PyTorch compiles, which
        cannot follow the making of a gate.

        Raises:
            GateError: the coefficients of the gate are not a softmax.

        >>> Gate("top_k", k=2, noise=1.0).uncut == Gate("softmax", eps=1e-5)
        True
        """
        if self.activation not in ("top_k", "softmax"):
            raise GateError(
                f"uncut must be of a top_k gate; got activation {self.activation!r}. Losses of "
                "other gates take their coefficients."
            )
        return replace(self, activation="softmax", alpha=1.5, k=None, noise=0.0, balance=0.0)

    @property
    def text(self) -> str:
        """The gate as JSON, made once: what operators of a compiler take for it."""
        return self._text  # type: ignore[attr-defined, no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gate:
        """The gate that :meth:`to_dict` described; every field must be there and no other.

        Descriptions from before ``noise`` and ``balance`` are of gates without them, and those
        without ``spread`` of gates whose spread was 1.

        >>> Gate.from_dict(Gate("sparsemax").to_dict()).activation
        'sparsemax'
        """
        if not isinstance(values, Mapping):
            raise GateError(
                f"a gate's description must be a mapping; got {type(values).__name__}. Pass what "
                "Gate.to_dict() returned."
            )
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in values and name not in _LATER]
        unknown = [str(name) for name in values if name not in names]
        if missing or unknown:
            raise GateError(
                f"a gate's description must have the fields {', '.join(names)}; got missing "
                f"{missing} and unknown {unknown}. Pass what Gate.to_dict() returned."
            )
        earlier = dict(_LATER, spread=None) if values["normalization"] is None else _LATER
        return cls(**{**earlier, **values})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
