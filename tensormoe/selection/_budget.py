"""Upper limits on the cost of a layer or a block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from tensormoe._validation import choice, flag, is_number, positive_int
from tensormoe.errors import BudgetError
from tensormoe.planning._cost import Cost
from tensormoe.planning._published import PUBLISHED_ROOFLINES
from tensormoe.planning._roofline import Roofline


@dataclass(frozen=True)
class Budget:
    """Upper limits on the cost of what is built: a layer, or a block, with its gate.

    All limits that are given must hold. A block's budget covers both layers together.

    Args:
        parameters: stored entries.
        flops: FLOPs of one forward call, a multiply-add being 2.
        memory: bytes live at the worst moment of a forward call, beyond input and parameters. What
            a library copies besides is not in it, so that ranks are the same in every framework;
            ``layer.cost`` counts it.
        time: predicted seconds of a forward call.
        batch: number of inputs of that call, all leading axes multiplied.
        roofline: the device that ``time`` is predicted for, as a value or the name of a published
            one; "cpu" if none is given.
        itemsize: bytes per entry: 4 for float32.
        gate: whether the limits cover the gate too, as the paper counts; with False they are for
            experts alone, and the gate comes on top.

    Raises:
        BudgetError: no limit is given, or one is not positive.

    >>> Budget(parameters=590_592)
    Budget(parameters=590592)
    >>> Budget(time=1e-3, batch=64).roofline.name
    'cpu'
    >>> Budget(parameters=590_592, gate=False)
    Budget(parameters=590592, gate=False)
    """

    parameters: int | None = None
    flops: int | None = None
    memory: int | None = None
    time: float | None = None
    batch: int = 1024
    roofline: Roofline | str | None = None
    itemsize: int = 4
    gate: bool = True

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("parameters", "flops", "memory"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, positive_int(value, f"{name} of a budget", BudgetError))
        put(self, "batch", positive_int(self.batch, "batch of a budget", BudgetError))
        put(self, "itemsize", positive_int(self.itemsize, "itemsize of a budget", BudgetError))
        if not isinstance(self.gate, bool):
            raise BudgetError(
                f"gate of a budget must be True or False, whether it is covered; got "
                f"{self.gate!r}. Which gate there is, layers and select_rank are told."
            )
        if self.time is not None:
            if not is_number(self.time) or not 0 < self.time < inf:
                raise BudgetError(
                    f"time of a budget must be a positive number of seconds; got {self.time!r}."
                )
            put(self, "roofline", _resolved(self.roofline))
        elif self.roofline is not None:
            raise BudgetError(
                f"roofline belongs to a budget of time; got roofline={self.roofline!r} without "
                "time. Give time=… in seconds, or leave the roofline out."
            )
        if not self.limits:
            raise BudgetError(
                "a budget must limit at least one of parameters, flops, memory and time; got none. "
                "Write Budget(parameters=590_592), for instance."
            )

    def __repr__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.limits.items()]
        if not self.counts_parameters_alone:
            shown.append(f"batch={self.batch}")
        if self.roofline is not None:
            shown.append(f"roofline={self.roofline!r}")
        if self.itemsize != 4:
            shown.append(f"itemsize={self.itemsize}")
        if not self.gate:
            shown.append("gate=False")
        return f"Budget({', '.join(shown)})"

    @property
    def limits(self) -> Mapping[str, float]:
        """The limits that are given, by name."""
        named = {
            "parameters": self.parameters,
            "flops": self.flops,
            "memory": self.memory,
            "time": self.time,
        }
        return {name: value for name, value in named.items() if value is not None}

    @property
    def counts_parameters_alone(self) -> bool:
        """Whether no limit depends on how a layer runs."""
        return set(self.limits) == {"parameters"}

    def spent(self, cost: Cost) -> Mapping[str, float]:
        """Amount of every given limit that ``cost`` takes.

        >>> from tensormoe import CP, LayerSpec
        >>> cost = LayerSpec(6, 5, experts=4, factorization=CP(rank=3)).cost(32)
        >>> Budget(parameters=100, memory=4096).spent(cost)
        {'parameters': 48, 'memory': 1152}
        """
        taken: dict[str, float] = {
            "parameters": cost.parameters,
            "flops": cost.flops,
            "memory": cost.peak_memory,
        }
        if isinstance(self.roofline, Roofline):
            taken["time"] = self.roofline.time(cost)
        return {name: taken[name] for name in self.limits}

    def allows(self, cost: Cost) -> bool:
        """Whether ``cost`` keeps to every limit."""
        limits = self.limits
        return all(value <= limits[name] for name, value in self.spent(cost).items())

    def with_limits(self, limits: Mapping[str, float]) -> Budget:
        """The budget with other limits, whole ones rounded down, for the same call and device.

        >>> Budget(flops=10**6, batch=64).with_limits({"flops": 1e5})
        Budget(flops=100000, batch=64)
        """
        parameters, flops, memory = (
            int(limits[name]) if name in limits else None
            for name in ("parameters", "flops", "memory")
        )
        time = limits.get("time")
        return replace(self, parameters=parameters, flops=flops, memory=memory, time=time)

    def exceeded(self, cost: Cost) -> Mapping[str, float]:
        """Amounts that ``cost`` takes of the limits that are too low for it.

        >>> from tensormoe import CP, LayerSpec
        >>> cost = LayerSpec(6, 5, experts=4, factorization=CP(rank=3)).cost(32)
        >>> Budget(parameters=40, memory=4096).exceeded(cost)
        {'parameters': 48}
        """
        limits = self.limits
        return {name: value for name, value in self.spent(cost).items() if value > limits[name]}

    @classmethod
    def like_linear(
        cls, in_features: int, out_features: int, bias: bool = True, gate: bool = True
    ) -> Budget:
        """The parameters of a linear layer: I·O, and O more with a bias.

        >>> Budget.like_linear(768, 768)
        Budget(parameters=590592)
        """
        rows = positive_int(in_features, "in_features", BudgetError)
        rows += flag(bias, "bias", BudgetError)
        columns = positive_int(out_features, "out_features", BudgetError)
        return cls(parameters=rows * columns, gate=gate)

    @classmethod
    def like_mlp(
        cls,
        in_features: int,
        hidden_features: int,
        out_features: int,
        bias: bool = True,
        gate: bool = True,
        gated: bool = False,
    ) -> Budget:
        """The parameters of two linear layers: I·H + H·O, and H + O more with a bias.

        A gated MLP has three: 2·I·H + H·O, and 2·H + O more with a bias.

        >>> Budget.like_mlp(768, 3072, 768)
        Budget(parameters=4722432)
        """
        hidden = positive_int(hidden_features, "hidden_features", BudgetError)
        first = cls.like_linear(in_features, 2 * hidden if gated else hidden, bias)
        second = cls.like_linear(hidden, out_features, bias)
        assert first.parameters is not None
        assert second.parameters is not None
        return cls(parameters=first.parameters + second.parameters, gate=gate)

    @classmethod
    def parse(
        cls,
        value: Budget | int | str | None,
        in_features: int,
        out_features: int,
        bias: bool = True,
    ) -> Budget:
        """A budget from what layers are given as one.

        Args:
            value: a budget, which stays as it is; a number of parameters; "linear", the parameters
                of the linear layer that is replaced; or None, for these with the gate on top.
            in_features: I.
            out_features: O.
            bias: whether the linear layer has a bias.

        Raises:
            BudgetError: something else.

        >>> Budget.parse("linear", 768, 768) == Budget.parse(590592, 768, 768)
        True
        >>> Budget.parse(None, 768, 768)
        Budget(parameters=590592, gate=False)
        """
        return cls._parse(value, cls.like_linear(in_features, out_features, bias))

    @classmethod
    def parse_block(
        cls,
        value: Budget | int | str,
        in_features: int,
        hidden_features: int,
        out_features: int,
        bias: bool = True,
        gated: bool = False,
    ) -> Budget:
        """The same for a block, whose "linear" is the linear layers that it replaces.

        >>> Budget.parse_block("linear", 768, 3072, 768)
        Budget(parameters=4722432)
        """
        sizes = (in_features, hidden_features, out_features)
        return cls._parse(value, cls.like_mlp(*sizes, bias, gated=gated))

    @classmethod
    def _parse(cls, value: Any, linear: Budget) -> Budget:
        if isinstance(value, Budget):
            return value
        if value is None:
            return replace(linear, gate=False)
        if isinstance(value, str):
            choice(value, ("linear",), "budget", BudgetError)
            return linear
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise BudgetError(
                f"budget must be a Budget, a number of parameters or 'linear'; got {value!r}. "
                "Write Budget(flops=…), for instance."
            )
        return cls(parameters=value)


def mlp_budgets(
    in_features: int, hidden_features: int, out_features: int, bias: bool = True
) -> tuple[Budget, Budget]:
    """One budget for each layer of an MLP: the parameters of that linear layer.

    >>> mlp_budgets(768, 3072, 768)
    (Budget(parameters=2362368), Budget(parameters=2360064))
    """
    return (
        Budget.like_linear(in_features, hidden_features, bias),
        Budget.like_linear(hidden_features, out_features, bias),
    )


def _resolved(roofline: Roofline | str | None) -> Roofline:
    if isinstance(roofline, Roofline):
        return roofline
    name = "cpu" if roofline is None else roofline
    return PUBLISHED_ROOFLINES[choice(name, PUBLISHED_ROOFLINES, "roofline", BudgetError)]
