"""Multi-gate mixtures: loops over tasks and experts, stages of a hierarchy, costs, training."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from scipy.special import softmax
from torch.utils.flop_counter import FlopCounterMode

import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import CP, Dense, Gate, TensorRing
from tensormoe.errors import BudgetError, GateError, PlanError, RankError, ShapeError, SpecError
from tensormoe.gates import load_balance_loss, z_loss
from tensormoe.mixtures import MultiGateConfig, experts_config, multi_gate_config
from tensormoe.routing import weigh_tasks
from tensormoe.selection import Budget
from tests.mixtures._contract import MixtureContract
from tests.mixtures._forms import drawn, tokens, torch_layer
from tests.mixtures.test_sparse import expert

GROUPS = (("click", "like"), ("watch",))
TASKS = ("click", "watch", "like")


def _multi(hidden: int | None = 7, **options: Any) -> MultiGateConfig:
    return multi_gate_config(6, hidden, 5, **{"tasks": TASKS, "experts": 2} | options)


class TestMultiGateMoE(MixtureContract):
    configs: ClassVar[Any] = {
        "of all experts": _multi(bias=True, gate=Gate("softmax", bias=True)),
        "with experts of tasks": _multi(
            kind="swiglu", task_experts=2, factorization=(TensorRing((2, 3, 2)), CP(4))
        ),
        "linear, entmax": _multi(
            None, kind="linear", task_experts=1, gate="entmax", factorization=CP(3), bias=True
        ),
        "groups": _multi(
            groups=GROUPS, task_experts=1, group_experts=3, group_features=4, bias=True
        ),
        "groups, top-k": _multi(
            None, kind="linear", groups=GROUPS, gate=Gate("top_k", k=2, normalization=None)
        ),
    }
    other = multi_gate_config(6, 7, 5, tasks=2, experts=3)
    compiled = ("of all experts", "linear, entmax", "groups")


def _all_outputs(pool: Any, arrays: Any, name: str, x: np.ndarray) -> np.ndarray:
    return np.array([expert(pool, arrays, name, n, x) for n in range(pool.num_experts)])


def _gate(arrays: Any, name: str, columns: slice, x: np.ndarray) -> np.ndarray:
    logits = x @ arrays[f"{name}router.projection"][:, columns]
    if f"{name}router.bias" in arrays:
        logits = logits + arrays[f"{name}router.bias"][columns]
    return softmax(logits)


def by_loops(config: MultiGateConfig, arrays: Any, x: np.ndarray) -> np.ndarray:
    """Each token, each task, each expert that it reads, by numbers that are counted here."""
    shared, own, of_group = config.shared_experts, config.task_experts, config.group_experts
    outputs = []
    for token in x:
        ys = []
        if config.groups is None:
            made = _all_outputs(config.experts, arrays, "experts", token)
            for task in range(len(config.tasks)):
                width = shared + own
                weights = _gate(arrays, "", slice(task * width, (task + 1) * width), token)
                mine = [*range(shared), *range(shared + task * own, shared + (task + 1) * own)]
                ys.append(sum(w * made[n] for w, n in zip(weights, mine, strict=True)))
            outputs.append(ys)
            continue
        made = _all_outputs(config.first, arrays, "first.experts", token)
        width, means = shared + of_group, []
        for group in range(len(config.groups)):
            weights = _gate(arrays, "first.", slice(group * width, (group + 1) * width), token)
            start = shared + group * of_group
            mine = [*range(shared), *range(start, start + of_group)]
            means.append(sum(w * made[n] for w, n in zip(weights, mine, strict=True)))
        weights = _gate(arrays, "first.", slice(len(config.groups) * width, None), token)
        common = sum(w * made[n] for w, n in zip(weights, range(len(made)), strict=True))
        width += own
        for place, task in enumerate(config.tasks):
            group = next(g for g, names in enumerate(config.groups) if task in names)
            columns = slice(place * width, (place + 1) * width)
            seen = np.concatenate([means[group], common])
            weights = _gate(arrays, "second.", columns, seen)
            behind = shared + len(config.groups) * of_group + place * own
            inputs = [(n, common) for n in range(shared)]
            inputs += [(shared + group * of_group + n, means[group]) for n in range(of_group)]
            inputs += [(behind + n, means[group]) for n in range(own)]
            ys.append(
                sum(
                    w * expert(config.experts, arrays, "second.experts", n, of)
                    for w, (n, of) in zip(weights, inputs, strict=True)
                )
            )
        outputs.append(ys)
    return np.array(outputs)


PLAIN = Gate("softmax", normalization=None, bias=True)


@pytest.mark.parametrize("kind", [Dense(), CP(4)], ids=str)
@pytest.mark.parametrize("own", [0, 2])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=str)
@pytest.mark.parametrize("experts", ["linear", "mlp", "swiglu"])
def test_loops_over_tasks_and_experts(experts: str, groups: Any, own: int, kind: Any) -> None:
    options: dict[str, Any] = {"kind": experts, "bias": True, "factorization": kind}
    options |= {"groups": groups, "task_experts": own}
    options |= {} if groups is None else {"group_experts": 3, "group_features": 4}
    config = _multi(None if experts == "linear" else 7, gate=PLAIN, **options)
    arrays, x = drawn(config), tokens(config, (4,))
    wanted = by_loops(config, arrays, x)
    found = tensormoe_numpy.MultiGateMoE.restore(config, arrays)(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10)
    theirs = torch_layer(config, arrays)(torch.tensor(x)).detach()
    np.testing.assert_allclose(theirs, wanted, rtol=1e-9, atol=1e-10)


def test_one_gate_of_all_experts_is_a_dense_mixture() -> None:
    config = _multi(None, kind="linear", tasks=1, experts=4, gate="entmax", bias=True)
    arrays, x = drawn(config), tokens(config)
    layer = tensormoe_numpy.MuMoE(
        6, 5, 4, Dense(), gate=Gate("entmax", normalization=None), dtype="float64", seed=0
    )
    layer.parameters["factors.weight"][...] = arrays["experts.projections.down_proj.factors.weight"]
    layer.parameters["factors.bias"][...] = arrays["experts.projections.down_proj.factors.bias"]
    layer.parameters["gate.projection_0"][...] = arrays["router.projection"]
    found = tensormoe_numpy.MultiGateMoE.restore(config, arrays)(x)
    np.testing.assert_allclose(found[..., 0, :], layer(x))


def test_records_have_a_place_for_every_expert() -> None:
    config = _multi(task_experts=1, tasks=2, gate="softmax")
    layer = tensormoe_numpy.MultiGateMoE.restore(config, drawn(config))
    routes = layer.route(tokens(config))
    assert routes.coefficients.shape == routes.logits.shape == (2, 3, 2, 4)
    assert routes.groups is None
    for task, hidden in ((0, 3), (1, 2)):
        mine = routes.coefficients[..., task, :]
        np.testing.assert_allclose(mine.sum(-1), 1.0)
        assert not mine[..., hidden].any()
        assert np.isneginf(routes.logits[..., task, hidden]).all()
        read = config.experts_of(task)
        assert sorted({*range(4)} - {hidden}) == [*read] == [*config.experts_of(f"task_{task}")]
        # even use of what a task reads is the least
        assert load_balance_loss(mine[..., read]) >= 1 - 1e-9
    assert np.isfinite(z_loss(routes.logits))
    with pytest.raises(SpecError, match="task must be one of"):
        config.experts_of("click")
    stages = _multi(groups=GROUPS)
    routes = tensormoe_numpy.MultiGateMoE.restore(stages, drawn(stages)).route(tokens(stages))
    # a gate per group, and one for what they share, of all experts
    assert routes.groups.coefficients.shape == (2, 3, 3, 6)
    assert (routes.groups.coefficients[..., -1, :] > 0).all()
    assert not routes.groups.coefficients[..., 0, 4:].any()


def test_tasks_do_not_see_experts_of_others() -> None:
    config = _multi(task_experts=1, groups=GROUPS, group_experts=1)
    layer = torch_layer(config, drawn(config))
    x = torch.tensor(tokens(config, (4,)))
    layer(x)[:, TASKS.index("watch")].square().sum().backward()
    first = layer.first.experts.down_proj.factors["weight"].grad
    second = layer.second.experts.down_proj.factors["weight"].grad
    # what all groups share is made of all experts
    assert all(each.any() for each in first)
    used = [bool(each.any()) for each in second]
    assert used == [True, True, False, True, False, True, False]
    assert config.experts_of("watch") == (0, 1, 3, 5)


def test_a_gate_sees_the_experts_of_its_task_alone() -> None:
    """Normalization and spread are of those that a task reads."""
    rng = np.random.default_rng(0)
    logits, gate = rng.standard_normal((5, 7)), Gate("entmax", alpha=1.4)
    found = weigh_tasks(gate, logits, [((0, 2), (3, 4)), ((0, 4),)], 5).coefficients
    from tensormoe.gates import activate

    np.testing.assert_allclose(found[:, 0, [0, 1, 3]], activate(gate, logits[:, :3]).coefficients)
    np.testing.assert_allclose(found[:, 1, :4], activate(gate, logits[:, 3:]).coefficients)
    assert not found[:, 0, [2, 4]].any()
    with pytest.raises(GateError, match=r"logits must have shape \(rows, 7\)"):
        weigh_tasks(gate, logits[:, :6], [((0, 2), (3, 4)), ((0, 4),)], 5)


@pytest.mark.parametrize("batch", [1, 10, 64])
@pytest.mark.parametrize("factorization", [Dense(), CP(8)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"task_experts": 2}, {"groups": GROUPS, "task_experts": 1}]
)
@pytest.mark.parametrize("kind", ["linear", "mlp", "swiglu"])
def test_products_are_what_pytorch_counts(
    kind: str, options: Any, factorization: Any, batch: int
) -> None:
    config = multi_gate_config(
        16,
        None if kind == "linear" else 24,
        12,
        tasks=TASKS,
        experts=3,
        kind=kind,
        factorization=factorization,
        **options,
    )
    layer, x = torch_layer(config, drawn(config)), torch.tensor(tokens(config, (batch,)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert layer.cost(batch).matmul_flops == counter.get_total_flops()
    assert layer.cost(batch).parameters == sum(each.numel() for each in layer.parameters())


def test_costs_of_what_cannot_be() -> None:
    with pytest.raises(PlanError, match="batch must be a non-negative integer; got -1"):
        _multi().cost(-1)


def test_experts_run_once_whatever_the_tasks() -> None:
    few, many = (_multi(tasks=count, experts=4).cost(10).matmul_flops for count in (1, 9))
    # eight more gates, and eight more sums
    assert many - few == 8 * 10 * 2 * (6 * 4 + 4 * 5)


def test_budgets_cover_experts_and_gates() -> None:
    for groups in (None, GROUPS):
        options: dict[str, Any] = {"factorization": "cp", "groups": groups, "task_experts": 1}
        found = multi_gate_config(32, 64, None, tasks=TASKS, experts=4, budget=9000, **options)
        assert 8000 < found.num_parameters <= 9000
        free = Budget(parameters=9000, gate=False)
        wider = multi_gate_config(32, 64, None, tasks=TASKS, experts=4, budget=free, **options)
        assert wider.num_parameters > 9000
        with pytest.raises(
            BudgetError, match=r"parameters must be at least \d+ for this mixture"
        ) as caught:
            multi_gate_config(32, 64, None, tasks=TASKS, experts=4, budget=30, **options)
        needed = int(caught.value.needed["parameters"])
        enough = multi_gate_config(32, 64, None, tasks=TASKS, experts=4, budget=needed, **options)
        assert enough.num_parameters <= needed
        with pytest.raises(BudgetError):
            multi_gate_config(32, 64, None, tasks=TASKS, experts=4, budget=needed - 1, **options)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tasks": ({"tasks": 0}, SpecError, "tasks must be a positive integer; got 0"),
    "no names": ({"tasks": ()}, SpecError, r"tasks must be names that differ, .*; got \(\)"),
    "a name twice": ({"tasks": ("a", "a")}, SpecError, "tasks must be names that differ"),
    "names that are none": ({"tasks": (1, 2)}, SpecError, "tasks must be names that differ"),
    "no experts": ({"experts": 0}, SpecError, "experts must be a positive integer; got 0"),
    "experts of tasks": ({"task_experts": -1}, SpecError, "task_experts must be a non-negative"),
    "experts of no group": ({"group_experts": 2}, SpecError, "group_experts must be None without"),
    "size of no group": ({"group_features": 2}, SpecError, "group_features must be None without"),
    "no groups": ({"groups": ()}, SpecError, "groups must hold at least one group"),
    "groups of names": ({"groups": TASKS}, SpecError, "groups must be tuples of tasks; got"),
    "a task without a group": (
        {"groups": (("click",), ("like",))},
        SpecError,
        "groups must hold each of the tasks .* once",
    ),
    "a task in two": (
        {"groups": (TASKS, ("like",))},
        SpecError,
        "groups must hold each of the tasks .* once",
    ),
    "an empty group": ({"groups": (TASKS, ())}, SpecError, "none must be empty"),
    "no such place": ({"groups": ((0, 1, 3),)}, SpecError, "groups must hold each of the tasks"),
    "no experts of groups": (
        {"groups": GROUPS, "group_experts": 0},
        SpecError,
        "group_experts must be a positive",
    ),
    "batch norm": (
        {"gate": Gate(normalization="batch")},
        GateError,
        "must have neither batch norm nor noise",
    ),
    "balance": ({"gate": Gate("top_k", k=1, balance=0.1)}, GateError, "neither batch norm nor"),
    "k": ({"gate": Gate("top_k", k=3)}, GateError, "k must be at most the 2 experts that a gate"),
    "no gate": ({"gate": None}, GateError, "gate must be a Gate or the name of an activation"),
    "a name of a gate": ({"gate": "relu"}, GateError, "activation must be one of"),
    "rank and budget": ({"factorization": CP(2), "budget": 900}, RankError, "exclude one another"),
    "factorizations of stages": (
        {"factorization": (("cp", "cp"), ("cp", "cp"))},
        SpecError,
        "a pair for each of the 1 stages; got 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name: str) -> None:
    options, error, message = REFUSED[name]
    for make in (
        lambda **named: tensormoe_numpy.MultiGateMoE(6, 7, **named, seed=0),
        lambda **named: tensormoe_torch.MultiGateMoE(6, 7, **named),
        lambda **named: tensormoe_jax.nnx.MultiGateMoE(6, 7, **named, rngs=0),
        lambda **named: tensormoe_jax.equinox.MultiGateMoE(6, 7, **named, key=jax.random.key(0)),
    ):
        with pytest.raises(error, match=message):
            make(**{"tasks": TASKS, "experts": 2} | options)


def test_configurations_whose_parts_do_not_fit() -> None:
    pool, gate = experts_config(6, 7, 5, 4), Gate("softmax")
    with pytest.raises(SpecError, match="experts must hold at least one that all tasks share"):
        MultiGateConfig(pool, ("a", "b"), 2, gate)
    with pytest.raises(SpecError, match="must be given together"):
        MultiGateConfig(pool, ("a", "b"), 1, gate, pool)
    stages = _multi(groups=GROUPS).to_dict()
    broken = stages | {"first": stages["first"] | {"down": pool.down.to_dict()}}
    with pytest.raises(SpecError):
        MultiGateConfig.from_dict(broken)
    fewer = experts_config(6, 7, 6, 3).to_dict()
    with pytest.raises(SpecError, match="first must be 6 experts with 6 outputs"):
        MultiGateConfig.from_dict(stages | {"first": fewer})


def test_records_of_other_stages() -> None:
    one, two = _multi(), _multi(groups=GROUPS, group_experts=1)
    layers = [tensormoe_numpy.MultiGateMoE.restore(each, drawn(each)) for each in (one, two)]
    x = tokens(one)
    for layer, other in (layers, layers[::-1]):
        with pytest.raises(ShapeError, match="routes must be the record of these tokens"):
            layer(x, other.route(x))


def test_hooks_learning_rates_and_initial_values() -> None:
    layer = tensormoe_torch.MultiGateMoE(8, 6, tasks=2, experts=3, groups=((0,), (1,)))
    seen: list[Any] = []
    layer.second.router.register_forward_hook(lambda module, given, made: seen.append(made))
    x = torch.randn(5, 8)
    y = layer(x)
    assert seen[0].coefficients.shape == (5, 2, 9)
    # all experts of a task have equal weights at first
    torch.testing.assert_close(layer.route(x).coefficients.max(), torch.tensor(1 / 6))
    assert y.std() > 0
    groups = tensormoe_torch.parameter_groups(layer, 0.1, gate_lr=1e-4)
    routing = {id(each) for each in groups[2]["params"]}
    assert routing == {id(layer.first.router.projection), id(layer.second.router.projection)}
    chosen = tensormoe_torch.MultiGateMoE(
        400, tasks=2, experts=9, kind="linear", gate=Gate("top_k", k=2)
    )
    assert abs(chosen.router.projection.std().item() * 20 * 3**0.5 - 1) < 0.05


def _tasks() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8)).astype("float32")
    first = np.tanh(x @ rng.standard_normal((8, 3)))
    second = np.abs(x @ rng.standard_normal((8, 3)))
    return x, np.stack([first, second], 1).astype("float32")


@pytest.mark.parametrize("groups", [None, ((0,), (1,))], ids=["one stage", "two stages"])
def test_training_lowers_the_loss_of_every_task(groups: Any) -> None:
    x, target = (torch.tensor(each) for each in _tasks())
    torch.manual_seed(0)
    layer = tensormoe_torch.MultiGateMoE(
        8, 16, 3, tasks=2, experts=3, task_experts=1, groups=groups
    )
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(150):
        each = (layer(x) - target).square().mean((0, 2))
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        losses.append(each.detach())
    assert (losses[-1] < 0.25 * losses[0]).all()


def test_training_in_jax_lowers_the_loss() -> None:
    x, target = (jnp.asarray(each) for each in _tasks())
    module = tensormoe_jax.nnx.MultiGateMoE(
        8, 16, 3, tasks=2, experts=3, task_experts=1, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(module, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(module: Any, optimizer: Any) -> Any:
        def loss(module: Any) -> Any:
            return ((module(x) - target) ** 2).mean()

        found, slopes = nnx.value_and_grad(loss)(module)
        optimizer.update(module, slopes)
        return found

    losses = [float(step(module, optimizer)) for _ in range(150)]
    assert losses[-1] < 0.25 * losses[0]
