"""A budget means the same everywhere: it covers all that is built, the gate included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import pytest
from flax import nnx

import tensormoe_cupy
import tensormoe_jax.equinox
import tensormoe_jax.nnx
import tensormoe_numpy
import tensormoe_torch
from tensormoe import Budget, Gate, select_rank
from tensormoe.functional import Options
from tensormoe.planning import gate_cost
from tensormoe.selection import linear_cost
from tensormoe_torch import from_linear, from_mlp, replace

Build = Callable[..., Any]


def _quick() -> dict[str, Callable[[str], Build]]:
    def of(package: Any, **options: Any) -> Callable[[str], Build]:
        return lambda name: lambda *args, **given: getattr(package, name)(*args, **given, **options)

    return {"numpy": of(tensormoe_numpy), "torch": of(tensormoe_torch, device="meta")}


def _traced() -> dict[str, Callable[[str], Build]]:
    """JAX layers by shapes alone, without compiling the code that draws their arrays."""

    def of(package: Any, source: Callable[[], dict[str, Any]]) -> Callable[[str], Build]:
        def build(name: str) -> Build:
            kind = getattr(package, name)
            return lambda *args, **given: eqx.filter_eval_shape(
                lambda: kind(*args, **given, **source())
            )

        return build

    return {
        "nnx": lambda name: (
            lambda *args, **given: nnx.eval_shape(
                lambda: getattr(tensormoe_jax.nnx, name)(*args, **given, rngs=nnx.Rngs(0))
            )
        ),
        "equinox": of(tensormoe_jax.equinox, lambda: {"key": jax.random.key(0)}),
    }


GATES = [Gate(), Gate("softmax", bias=True), Gate("top_k", k=2), None]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate and gate.activation)
@pytest.mark.parametrize("experts", [24, (4, 6)], ids=str)
@pytest.mark.parametrize("name", ["cp", "tensor_ring"])
def test_every_constructor_chooses_the_rank_that_select_rank_chooses(
    name: str, experts: int | tuple[int, ...], gate: Gate | None
) -> None:
    sizes = (30, 20, experts)
    paid = gate_cost(gate, 30, (24,) if isinstance(experts, int) else experts, 1).parameters
    for budget in (1500, Budget(parameters=1500), "linear"):
        limit = 31 * 20 if budget == "linear" else 1500
        if paid + 80 > limit:
            continue
        rank = select_rank(name, *sizes, budget=budget, gate=gate)
        kinds = _quick() if budget == "linear" else _quick() | _traced()
        for framework, kind in kinds.items():
            made = kind("MuMoE")(*sizes, name, budget=budget, gate=gate)
            assert made.spec.factorization.rank == rank, framework
            assert 0.8 * limit < made.num_parameters <= limit, framework
            assert made.num_parameters == made.spec.num_parameters + paid


def test_layers_of_the_other_doors_resolve_the_same() -> None:
    assert tensormoe_cupy.MuMoE.__init__ is tensormoe_numpy.MuMoE.__init__
    assert tensormoe_cupy.MuMoEMLP.__init__ is tensormoe_numpy.MuMoEMLP.__init__
    pure = Options(24, "cp", budget=1500).layer(30, 20)
    assert pure.spec.factorization.rank == select_rank("cp", 30, 20, 24, budget=1500)
    assert pure.num_parameters == pure.spec.num_parameters + pure.gate_parameters <= 1500


@pytest.mark.parametrize("name", ["cp", "tensor_ring", "tensor_train", "tucker"])
def test_one_option_leaves_the_gate_out(name: str) -> None:
    budget = Budget(parameters=1500, gate=False)
    alone = select_rank(name, 30, 20, 24, budget=1500, gate=None)
    assert select_rank(name, 30, 20, 24, budget=budget) == alone
    assert select_rank(name, 30, 20, 24, budget=1500, gate=False) == alone
    for kind in _quick().values():
        made = kind("MuMoE")(30, 20, 24, name, budget=budget)
        assert made.spec.factorization.rank == alone
        assert made.spec.num_parameters <= 1500 < made.num_parameters
        block = kind("MuMoEMLP")(30, 40, 20, experts=24, factorization=name, budget=budget)
        assert block.num_parameters - 30 * 24 <= 1500 < block.num_parameters


def test_without_rank_or_budget_the_gate_comes_on_top() -> None:
    for kind in _quick().values():
        made = kind("MuMoE")(30, 20, 512)
        assert made.spec.num_parameters <= 31 * 20 < made.num_parameters
        block = kind("MuMoEMLP")(30, 40, 20, experts=64)
        assert block.first.spec.num_parameters <= 31 * 40
        assert block.second.spec.num_parameters <= 41 * 20
        assert block.num_parameters > 31 * 40 + 41 * 20


@pytest.mark.parametrize("experts", [16, (4, 4)], ids=str)
@pytest.mark.parametrize("factorization", ["cp", "tensor_ring", ("tucker", "cp")], ids=str)
def test_a_blocks_budget_is_spent_once(factorization: Any, experts: Any) -> None:
    sizes, options = (48, 96, 48), {"experts": experts, "factorization": factorization}
    dense = 49 * 96 + 97 * 48
    for framework, kind in (_quick() | _traced()).items():
        for budget in (6000, "linear", Budget.like_mlp(48, 96, 48)):
            if framework in _traced() and budget != "linear":
                continue
            block = kind("MuMoEMLP")(*sizes, **options, budget=budget)
            limit = budget if isinstance(budget, int) else dense
            assert 0.95 * limit < block.num_parameters <= limit, framework


@pytest.mark.parametrize(
    "factorization", ["cp", "tensor_ring", ("tucker", "tensor_train")], ids=str
)
@pytest.mark.parametrize(
    "budget",
    [
        Budget(flops=2_500_000, batch=64),
        Budget(memory=250_000, batch=64),
        Budget(time=3e-4, batch=64),
        Budget(parameters=9000, flops=2_500_000, time=3e-4, batch=64),
    ],
    ids=repr,
)
def test_a_blocks_work_memory_and_time_keep_to_the_budget(
    budget: Budget, factorization: Any
) -> None:
    block = tensormoe_torch.MuMoEMLP(
        48, 96, 48, experts=(4, 4), factorization=factorization, budget=budget, device="meta"
    )
    # budgets give the same ranks in every framework, so that what one library copies is not in them
    spent = budget.spent(block.config.cost(64))
    assert all(spent[name] <= limit for name, limit in budget.limits.items())
    # memory stops to grow with the rank where weights are contracted beforehand
    least = 0.1 if set(budget.limits) == {"memory"} else 0.8
    assert max(spent[name] / limit for name, limit in budget.limits.items()) > least


def test_surgery_means_the_same() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    linear = nn.Linear(40, 30)
    layer, _ = from_linear(linear, 16, budget="linear")
    assert 1100 < layer.num_parameters <= 41 * 30
    mlp = nn.Sequential(nn.Linear(40, 80), nn.GELU(), nn.Linear(80, 40))
    block, _ = from_mlp(mlp, 16, ("cp", "tensor_ring"), budget="linear")
    assert 6300 < block.num_parameters <= 41 * 80 + 81 * 40
    model = nn.ModuleDict({"head": linear, "mlp": mlp})
    surgery = replace(model, ["head", "mlp"], experts=16, budget="linear")
    before, after = surgery.model_parameters
    assert 0.95 * before < after <= before
    for each in surgery.replacements:
        assert each.after.parameters <= each.before.parameters


def test_an_embedding_is_counted_as_one() -> None:
    """Ids pick rows: what they pick, rather than a product with the whole table, is counted."""
    budget = Budget(flops=200_000, batch=64)
    for kind in (_quick() | _traced()).values():
        made = kind("MuMoEEmbedding")(500, 32, 8, budget=budget)
        rank = made.spec.factorization.rank
        assert made.cost(64).flops <= 200_000
        more = kind("MuMoEEmbedding")(500, 32, 8, rank=rank + 1)
        assert more.cost(64).flops > 200_000
    assert linear_cost(500, 32, 64).flops > 200_000


def test_a_gated_blocks_budget_is_that_of_three_linear_layers() -> None:
    dense = Budget.like_mlp(48, 96, 48, gated=True).parameters
    assert dense == 2 * 49 * 96 + 97 * 48
    for kind in _quick().values():
        block = kind("MuMoEMLP")(48, 96, 48, experts=16, gated=True, budget="linear")
        assert 0.95 * dense < block.num_parameters <= dense
        assert block.first.spec.out_features == 2 * 96
