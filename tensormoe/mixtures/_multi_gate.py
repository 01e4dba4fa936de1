"""Multi-gate mixture of experts: several tasks, each with a gate over one pool of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from tensormoe._config import LayerConfig
from tensormoe._mixture import MixtureConfig, OwnArray, checked_fields
from tensormoe._validation import brief, non_negative_int
from tensormoe.backend import Array, Backend
from tensormoe.errors import PlanError, ShapeError, SpecError
from tensormoe.gates import Across, Gate
from tensormoe.mixtures._experts import ExpertsConfig
from tensormoe.mixtures._gate_stage import GateStage, Inputs, mix_tasks
from tensormoe.mixtures._parts import Parts
from tensormoe.mixtures._tasks import Tasks, as_tuple, check_groups, record_of
from tensormoe.planning import Cost, Library
from tensormoe.planning._library import DEFAULT
from tensormoe.routing import TaskRoutes


@dataclass(frozen=True)
class MultiGateConfig(MixtureConfig):
    """A multi-gate mixture without its arrays.

    Args:
        experts: the pool: experts that all tasks share, those of each group, and those of each
            task, in this order.
        tasks: names of the tasks.
        task_experts: experts of each task alone.
        gate: from logits to coefficients, the same for all tasks.
        first: the pool of the first stage of a hierarchy: shared experts, and those of each group;
            None for one stage.
        groups: the tasks of each group, of a hierarchy.
        group_experts: experts of each group alone, in both stages.

    Raises:
        SpecError: pools that do not have these experts or do not fit, or groups that are not a
            partition of the tasks.
        GateError: a gate that cannot be.
    """

    experts: ExpertsConfig
    tasks: Tasks
    task_experts: int
    gate: Gate
    first: ExpertsConfig | None = None
    groups: tuple[Tasks, ...] | None = None
    group_experts: int = 0

    block: ClassVar[str] = "MultiGateMoE"

    def __post_init__(self) -> None:
        named = isinstance(self.tasks, tuple) and all(
            isinstance(task, str) and task for task in self.tasks
        )
        if not named or not self.tasks or len({*self.tasks}) < len(self.tasks):
            raise SpecError(
                f"tasks must be names that differ, at least one; got {brief(self.tasks)}."
            )
        for name in ("task_experts", "group_experts"):
            object.__setattr__(self, name, non_negative_int(getattr(self, name), name))
        check_groups(self.groups, self.tasks)
        if (self.groups is None) != (self.first is None) or bool(self.group_experts) != bool(
            self.groups
        ):
            raise SpecError(
                "groups, their experts and a first stage must be given together; got "
                f"groups={brief(self.groups)} and group_experts={self.group_experts}. Leave all "
                "out for one stage."
            )
        if self.shared_experts < 1:
            raise SpecError(
                "experts must hold at least one that all tasks share; got "
                f"{self.experts.num_experts}, of which "
                f"{self.experts.num_experts - self.shared_experts} are of single tasks or groups."
            )
        if self.first is not None:
            count = self.shared_experts + self.group_experts * len(self.groups or ())
            sizes = self.first.num_experts, self.first.out_features
            if sizes != (count, self.experts.in_features):
                raise SpecError(
                    f"first must be {count} experts with {self.experts.in_features} outputs, which "
                    f"the second stage takes; got {sizes[0]} with {sizes[1]}."
                )
        _ = self.stages

    @property
    def in_features(self) -> int:
        return (self.first or self.experts).in_features

    @property
    def out_features(self) -> int:
        return self.experts.out_features

    @property
    def shared_experts(self) -> int:
        """Experts of a pool that all tasks share."""
        of_groups = self.group_experts * len(self.groups or ())
        return self.experts.num_experts - of_groups - self.task_experts * len(self.tasks)

    def output_shape(self, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*batch_shape, len(self.tasks), self.out_features)

    @cached_property
    def stages(self) -> Mapping[str, GateStage]:
        """The stages by name: one without a name, or ``first`` and ``second``."""
        if self.first is None:
            reads = tuple(
                self._own(task, self.task_experts, self.shared_experts)
                for task in range(len(self.tasks))
            )
            reads = tuple(((0, self.shared_experts), *own) for own in reads)
            return {"": GateStage(self.experts, reads, self.in_features, self.gate)}
        shared, groups = (0, self.shared_experts), self.groups or ()
        of_groups = [
            self._own(group, self.group_experts, self.shared_experts)
            for group in range(len(groups))
        ]
        # the last gate makes what all groups share, of all experts
        first = (*((shared, *own) for own in of_groups), ((0, self.first.num_experts),))
        behind = self.shared_experts + self.group_experts * len(groups)
        second = tuple(
            (shared, *of_groups[group], *self._own(task, self.task_experts, behind))
            for task, group in enumerate(self.group_of)
        )
        features = 2 * self.experts.in_features
        return {
            "first": GateStage(self.first, first, self.in_features, self.gate),
            "second": GateStage(self.experts, second, features, self.gate, apart=True),
        }

    @staticmethod
    def _own(place: int, count: int, start: int) -> tuple[tuple[int, int], ...]:
        return ((start + place * count, start + (place + 1) * count),) if count else ()

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """The group of each task, of a hierarchy."""
        return tuple(
            next(place for place, group in enumerate(self.groups or ()) if task in group)
            for task in self.tasks
        )

    def experts_of(self, task: str | int) -> tuple[int, ...]:
        """Numbers of the experts that a task reads, in the last stage.

        Args:
            task: its name, or its place.

        Raises:
            SpecError: no such task.

        >>> from tensormoe.mixtures import multi_gate_config
        >>> config = multi_gate_config(8, 4, tasks=("click", "like"), experts=2, task_experts=1)
        >>> config.experts_of("like")
        (0, 1, 3)
        """
        known = dict(zip(self.tasks, range(len(self.tasks)), strict=True))
        place = known.get(task) if isinstance(task, str) else task
        if place is None or not 0 <= place < len(self.tasks):
            raise SpecError(f"task must be one of {self.tasks}, or its place; got {task!r}.")
        ranges = [*self.stages.values()][-1].reads[place]
        return tuple(number for pair in ranges for number in range(*pair))

    @cached_property
    def layers(self) -> Mapping[str, LayerConfig]:
        return self._of_stages(lambda stage: stage.layers)

    @cached_property
    def own(self) -> Mapping[str, OwnArray]:
        return self._of_stages(lambda stage: stage.own)

    def _of_stages(self, values: Callable[[GateStage], Mapping[str, Any]]) -> dict[str, Any]:
        return {
            f"{stage}.{name}" if stage else name: value
            for stage, found in self.stages.items()
            for name, value in values(found).items()
        }

    def plan_ahead(self) -> None:
        super().plan_ahead()
        for stage in self.stages.values():
            for place, layer in enumerate(stage.experts.layers.values()):
                _ = layer.each_regimes if place or stage.apart else layer.every_regimes

    def compose(
        self,
        x: Array,
        route: Callable[[str, Inputs], TaskRoutes],
        outputs: Callable[[str, Array], Array],
        backend: Backend,
        *,
        runs: bool = True,
    ) -> tuple[Array, TaskRoutes]:
        """Outputs (tokens, tasks, out), None unless they are made, and the record.

        Args:
            x: (tokens, in).
            route: coefficients of the gates of a stage, by its name, for their inputs.
            outputs: outputs of all experts of a stage, by its name, for their inputs.
            backend: the adapter of the arrays' library.
            runs: whether the last stage runs its experts.
        """
        if self.first is None:
            routes = route("", x)
            return (mix_tasks(outputs("", x), routes, backend) if runs else None), routes
        groups = route("first", x)
        made = mix_tasks(outputs("first", x), groups, backend)
        meant = [made[:, place, :] for place in range(made.shape[1])]
        xp, shared = backend.namespace, meant[-1]
        joined = [xp.concat([each, shared], axis=1) for each in meant[:-1]]
        found = route("second", tuple(joined[group] for group in self.group_of))
        routes = TaskRoutes(found.coefficients, found.logits, groups)
        if not runs:
            return None, routes
        ((_, count), *_), *_ = self.stages["second"].reads
        counts = [(shared, count)]
        counts += [(each, self.group_experts) for each in meant[:-1]]
        counts += [(meant[group], self.task_experts) for group in self.group_of]
        each = xp.concat(
            [xp.broadcast_to(rows[None], (count, *rows.shape)) for rows, count in counts if count],
            axis=0,
        )
        return mix_tasks(outputs("second", each), routes, backend), routes

    def route(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[TaskRoutes, dict[str, Array]]:
        return self._composed(parts, x, None, runs=False)[1], {}

    def run(self, parts: Parts, x: Array, routes: TaskRoutes) -> Array:
        return self._composed(parts, x, routes)[0]

    def forward(
        self,
        parts: Parts,
        x: Array,
        *,
        training: bool = False,
        noise: Array | None = None,
        across: Across | None = None,
    ) -> tuple[Array, TaskRoutes, dict[str, Array]]:
        return (*self._composed(parts, x, None), {})

    def _composed(
        self, parts: Parts, x: Array, routes: TaskRoutes | None, *, runs: bool = True
    ) -> tuple[Array, TaskRoutes]:
        def inner(stage: str) -> Parts:
            return parts.under(stage) if stage else parts

        def route(stage: str, inputs: Inputs) -> TaskRoutes:
            if routes is not None:
                found: TaskRoutes = record_of(routes, stage)
                return found
            return self.stages[stage].route(inner(stage).arrays, inputs, parts.backend)

        def outputs(stage: str, rows: Array) -> Array:
            return self.stages[stage].outputs(inner(stage), rows)

        return self.compose(x, route, outputs, parts.backend, runs=runs)

    def check_routes(self, routes: Any, batch_shape: tuple[int, ...]) -> None:
        for name, stage in self.stages.items():
            found = record_of(routes, name)
            wanted = (*batch_shape, len(stage.reads), stage.experts.num_experts)
            for array in ("coefficients", "logits"):
                shape = getattr(getattr(found, array, None), "shape", None)
                if shape is None or tuple(shape) != wanted:
                    raise ShapeError(
                        "routes must be the record of these tokens and this layer, with "
                        f"{array} of shape {wanted} for each stage; got "
                        f"{None if shape is None else tuple(shape)}. Pass what route(x) returned."
                    )

    def cost(
        self,
        batch: int,
        *,
        itemsize: int = 4,
        library: Library = DEFAULT,
        training: bool = False,
    ) -> Cost:
        batch = non_negative_int(batch, "batch", PlanError)
        options: Any = {"itemsize": itemsize, "library": library, "training": training}
        first, *others = (stage.cost(batch, **options) for stage in self.stages.values())
        for other in others:
            # what the first stage keeps is there while the second one runs
            peak = max(first.peak_memory, first.saved_memory + other.peak_memory)
            first = replace(first.then(other), peak_memory=peak)
        return first

    def arguments(self) -> str:
        last, first = self.experts, self.first
        sizes = self.in_features, last.hidden_features, last.out_features
        options: dict[str, Any] = {
            "tasks": self.tasks,
            "experts": self.shared_experts,
            "task_experts": self.task_experts,
        }
        found: Any = last.factorizations
        if first is not None:
            options |= {
                "groups": self.groups,
                "group_experts": self.group_experts,
                "group_features": first.out_features,
            }
            found = first.factorizations, found
        elif len(found) == 1:
            found = found[0]
        options |= {
            "kind": last.kind,
            "act_layer": last.act_layer,
            "bias": last.down.bias,
            "factorization": found,
            "gate": self.gate,
        }
        named = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{', '.join(map(repr, sizes))}, {named}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "experts": self.experts.to_dict(),
            "tasks": list(self.tasks),
            "task_experts": self.task_experts,
            "gate": self.gate.to_dict(),
            "first": None if self.first is None else self.first.to_dict(),
            "groups": None if self.groups is None else [list(group) for group in self.groups],
            "group_experts": self.group_experts,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MultiGateConfig:
        fields = {"experts", "tasks", "task_experts", "gate", "first", "groups", "group_experts"}
        found = dict(checked_fields(values, fields, "multi-gate mixture"))
        first, groups = found["first"], found["groups"]
        return cls(
            ExpertsConfig.from_dict(found["experts"]),
            as_tuple(found["tasks"]),
            found["task_experts"],
            Gate.from_dict(checked_fields(found["gate"], {*Gate().to_dict()}, "gate")),
            None if first is None else ExpertsConfig.from_dict(first),
            None if groups is None else tuple(map(as_tuple, as_tuple(groups))),
            found["group_experts"],
        )
