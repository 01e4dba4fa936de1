"""Refusals of what cannot be allocated, with the rule, the value and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tensormoe import CP, Gate, LayerSpec
from tensormoe.errors import BudgetError, RankError, SpecError
from tensormoe.selection import (
    AllocatedLayer,
    Allocation,
    Budget,
    LayerSite,
    Projection,
    Sensitivity,
    SensitivityPoint,
    allocate,
)

SITES = [LayerSite.of_experts(f"{k}.experts", 4, 16, 24) for k in range(2)]
NAMES = [name for site in SITES for name in site.unit_names]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
POINT = SensitivityPoint(CP(2), 88, 0.5)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("120%", "at most 100%"),
        ("0%", "above 0%"),
        ("-5%", "above 0%"),
        ("25", "above 0%"),
        ("many", "above 0%"),
        ("nan%", "above 0%"),
        (1.5, "at most 100%"),
        (float("nan"), "above 0%"),
        (0.0, "above 0%"),
        (0, "positive integer"),
        (-3, "positive integer"),
        (True, "budget must be a share"),
        (None, "budget must be a share"),
        ([1], "budget must be a share"),
        (10**9, "at most the 9,216 parameters"),
        (Budget(flops=10), "limit parameters alone"),
        (Budget(parameters=10, gate=False), "limit parameters alone"),
    ],
)
def test_budgets(budget: Any, said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        allocate(SITES, budget)


def test_the_smallest_budget_is_named_and_enough() -> None:
    with pytest.raises(BudgetError, match="at least 264 parameters") as caught:
        allocate(SITES, 200)
    assert caught.value.needed == {"parameters": 264}
    assert caught.value.given == {"parameters": 200}
    for by in ("equal", "size"):
        found = allocate(SITES, 264, by=by)
        assert found.parameters == 264
        assert all(kind == CP(1) for layer in found.layers for kind in layer.factorizations)
    with pytest.raises(BudgetError, match="at least 264"):
        allocate(SITES, 263)
    with pytest.raises(BudgetError, match="at least 1,056 bytes") as caught:
        allocate(SITES, 1055, unit="bytes")
    assert allocate(SITES, 1056, unit="bytes").bytes == 1056
    gated = [LayerSite.of_linear("a", 64, 64)]
    with pytest.raises(BudgetError) as caught:
        allocate(gated, 100, experts=8)
    assert (
        allocate(gated, int(caught.value.needed["parameters"]), experts=8).parameters
        == (caught.value.needed["parameters"])
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"by": "rank"}, SpecError, "by must be one of 'equal', 'size', 'sensitivity'"),
        ({"unit": "bits"}, SpecError, "unit must be one of"),
        ({"factorization": CP(4)}, RankError, "without a rank.*'cp'"),
        ({"factorization": "svd"}, SpecError, "factorization must be one of"),
        ({"factorization": ()}, SpecError, "at least one"),
        ({"factorization": ("cp", "tucker")}, SpecError, "without measured sensitivities"),
        ({"what": "experts"}, SpecError, "what must be left out"),
        ({"experts": 0}, SpecError, "experts must be positive"),
        ({"gate": "argmax"}, ValueError, "activation must be one of"),
        ({"by": "sensitivity"}, SpecError, "got neither"),
        ({"by": "size", "sensitivities": dict.fromkeys(NAMES, 1.0)}, SpecError, "alone"),
        ({"sensitivities": dict.fromkeys(NAMES, 1.0), "inputs": [1]}, SpecError, "got both"),
        ({"inputs": [1]}, SpecError, "a model with values"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        allocate(SITES, 0.5, **options)


def test_gates_that_choose_more_than_there_are() -> None:
    linear = LayerSite.of_linear("a", 64, 64)
    with pytest.raises(SpecError, match="at most the 4 experts; got 5"):
        allocate([linear], 0.5, experts=4, gate=Gate("top_k", k=5))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict.fromkeys(NAMES, float("nan")), "positive, finite numbers; got nan"),
        (dict.fromkeys(NAMES, float("inf")), "positive, finite"),
        (dict.fromkeys(NAMES, -1.0), "got -1.0 for '0.experts.gate_proj'"),
        (dict.fromkeys(NAMES, 0.0), "positive, finite"),
        (dict.fromkeys(NAMES, "1"), "positive, finite"),
        (dict.fromkeys(NAMES, True), "positive, finite"),
        ({**dict.fromkeys(NAMES, 1.0), "2.experts": 1.0}, "unknown '2.experts'"),
        (dict.fromkeys(NAMES[:-1], 1.0), "none for '1.experts.down_proj'"),
        ({}, "none for"),
        (3, "must be a mapping"),
        ("abc", "must be a mapping"),
        ([3], "must be Sensitivity values; got 3 at 0"),
        ([Sensitivity(NAMES[0], (POINT,))] * 2, "one per name"),
        ([Sensitivity(NAMES[0], (POINT,))], "none for '0.experts.up_proj'"),
    ],
)
def test_sensitivities(given: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        allocate(SITES, 0.5, sensitivities=given)


def test_sensitivities_of_another_factorization() -> None:
    known = [Sensitivity(name, (POINT,)) for name in NAMES]
    with pytest.raises(SpecError, match="must be of 'tucker'; got cp"):
        allocate(SITES, 0.5, factorization="tucker", sensitivities=known)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), "1", None])
def test_losses(loss: Any) -> None:
    with pytest.raises(SpecError, match="finite number"):
        SensitivityPoint(CP(2), 88, loss)
    for points in ((), (3,), 3):
        with pytest.raises(SpecError, match="at least one"):
            Sensitivity("a", points)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="a value such as"):
        SensitivityPoint("cp", 88, 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "model_type of a configuration"),
        ({"model_type": "rnn"}, "got 'rnn'. Of other models pass the model itself"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "llama"}, "must have 'hidden_size'; it is missing"),
        ({**CONFIG, "hidden_size": "64"}, "hidden_size of a configuration must be a positive"),
        ({**CONFIG, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**CONFIG, "num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({**CONFIG, "num_hidden_layers": 10**7}, "plausible"),
        ({**CONFIG, "attention_bias": "yes"}, "true or false; got 'yes'"),
        ({**CONFIG, "dtype": "int8"}, "dtype of a configuration"),
        ({**CONFIG, "model_type": "mixtral"}, "must have 'num_local_experts'"),
        ({**CONFIG, "model_type": "qwen3_moe", "num_experts": -1}, "non-negative integer"),
        ({**CONFIG, "model_type": "qwen3_moe", "mlp_only_layers": 3}, "list of integers"),
    ],
)
def test_configurations(values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        allocate(values, 0.5)


def test_parts() -> None:
    with pytest.raises(SpecError, match=r"'experts'; llama has none\. It has attention, mlp"):
        allocate(CONFIG, 0.5, what="experts")
    for what, said in (
        ("heads", "what must be one of"),
        ((), "at least one"),
        (3, "or several"),
        (("linear", "mlp"), "name a layer twice"),
    ):
        with pytest.raises(SpecError, match=said):
            allocate(CONFIG, 0.5, what=what)  # type: ignore[arg-type]


def test_models() -> None:
    for model, said in (
        ([], "must have layers"),
        ([SITES[0], SITES[0]], "different names; got '0.experts' twice"),
        ([3], "LayerSite values; got 3 at 0"),
        (3, "model must be the values of a config.json"),
        (None, "model must be the values"),
    ):
        with pytest.raises(SpecError, match=said):
            allocate(model, 0.5)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = allocate(tmp_path, 0.5)
    assert found == allocate(tmp_path / "config.json", 0.5) == allocate(CONFIG, 0.5)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match="must be JSON"):
        allocate(tmp_path, 0.5)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SpecError, match="mapping of names"):
        allocate(tmp_path, 0.5)
    with pytest.raises(SpecError, match="No such file"):
        allocate(tmp_path / "other", 0.5)


def test_sites() -> None:
    for values, said in (
        (("a", "conv", (Projection("", 2, 2),)), "kind of a layer"),
        (("a", "linear", ()), "at least one"),
        (("a", "linear", (3,)), "Projection values"),
        (("a", "mlp", (Projection("x", 2, 2),) * 2), "different roles"),
        (("a", "experts", (Projection("x", 2, 2),)), "experts must be given"),
        (("a", "linear", (Projection("", 2, 2),), 4), "experts must be given"),
        ((3, "linear", (Projection("", 2, 2),)), "name of a layer"),
    ):
        with pytest.raises(SpecError, match=said):
            LayerSite(*values)
    with pytest.raises(SpecError, match="out_features"):
        LayerSite.of_linear("a", 3, 0)


def test_allocations_that_are_none(tmp_path: Path) -> None:
    found = allocate(SITES, 0.5)
    values = found.to_dict()
    with pytest.raises(SpecError, match="exactly"):
        Allocation.from_dict({**values, "more": 1})
    with pytest.raises(SpecError, match="version"):
        Allocation.from_dict({**values, "version": 9})
    with pytest.raises(SpecError, match="layers must be a list"):
        Allocation.from_dict({**values, "layers": 3})
    with pytest.raises(SpecError, match="exactly"):
        Allocation.from_dict({**values, "layers": [{}]})
    with pytest.raises(SpecError, match="limit"):
        Allocation.from_dict({**values, "limit": "1"})
    path = tmp_path / "a.json"
    path.write_text("3")
    with pytest.raises(SpecError, match="JSON object"):
        Allocation.load(path)
    with pytest.raises(SpecError, match="could not be written"):
        found.save(tmp_path / "none" / "a.json")
    site = SITES[0]
    with pytest.raises(SpecError, match="sizes of its projections"):
        AllocatedLayer(site, (LayerSpec(16, 24, 4, CP(2), False),))
    with pytest.raises(SpecError, match="different names"):
        Allocation((found.layers[0],) * 2, "equal", 10)
