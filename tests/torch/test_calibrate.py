"""Calibrations against sums over every row that a model's experts get."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormoe.compression import Calibration
from tensormoe.decomposition import Search
from tensormoe.errors import CheckpointError, PlanError, ShapeError, SpecError
from tensormoe_torch import compress
from tensormoe_torch.compression import calibrate, calibration_memory
from tests._torch_moe import Expert, OneByOne, sparse

NAMES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
QUICK = Search(starts=1, sweeps=8, polish=1)
TOKENS = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(7))


def loss(output: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
    )


def rows_of(model: Any, name: str, tokens: Tensor) -> list[dict[str, Any]]:
    """Every row of a layer, one by one, with inputs and outputs of each projection."""
    seen: list[Any] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for batch in tokens:
            model(batch[None])
    hook.remove()
    found = []
    for x, index, weights in seen:
        for token in range(len(x)):
            for place in range(index.shape[1]):
                n = int(index[token, place])
                both = module.gate_up_proj[n] @ x[token]
                gate, up = both.chunk(2)
                hidden = F.silu(gate) * up
                row = {"inputs": x[token], "hidden": hidden, "gate_proj": gate, "up_proj": up}
                row |= {"down_proj": module.down_proj[n] @ hidden}
                row = {key: each.detach().numpy() for key, each in row.items()}
                found.append(row | {"expert": n, "weight": float(weights[token, place])})
    return found


def moment(rows: list[Any]) -> Any:
    return np.stack(rows).T @ np.stack(rows) / len(rows)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_moments_are_means_over_rows(name: str) -> None:
    model = sparse(name)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    batches: Any = iter([TOKENS[:1], (TOKENS[1:2],), {"input_ids": TOKENS[2:]}])
    found = calibrate(model, batches, per_expert=True, dtype="float64")
    assert found.layers == NAMES
    for layer in NAMES:
        rows = rows_of(model, layer, TOKENS)
        arrays = {k.removeprefix(f"{layer}."): a for k, a in found.arrays.items() if layer in k}
        counts = np.bincount([row["expert"] for row in rows], minlength=4)
        np.testing.assert_array_equal(arrays["counts"], counts)
        assert found.rows(layer) == len(rows) == 2 * found.tokens[layer] == 2 * TOKENS.numel()
        weights = [sum(r["weight"] for r in rows if r["expert"] == n) for n in range(4)]
        np.testing.assert_allclose(arrays["weights"], weights, rtol=1e-9)
        np.testing.assert_allclose(found.mean_weights(layer), weights / counts, rtol=1e-9)
        np.testing.assert_allclose(found.frequencies(layer), counts / counts.sum())
        squares = [sum(r["weight"] ** 2 for r in rows if r["expert"] == n) for n in range(4)]
        np.testing.assert_allclose(arrays["squares"], squares, rtol=1e-9)
        sides = {"inputs": "inputs", "hidden": "hidden"}
        sides |= {role: f"{role}.outputs" for role in ("gate_proj", "up_proj", "down_proj")}
        for side, key in sides.items():
            np.testing.assert_allclose(
                arrays[key], moment([r[side] for r in rows]), rtol=1e-8, atol=1e-12
            )
            for n in range(4):
                own = [r[side] for r in rows if r["expert"] == n]
                np.testing.assert_allclose(
                    arrays[f"{key}.experts"][n], moment(own), rtol=1e-8, atol=1e-12
                )
                if side in ("inputs", "hidden"):
                    np.testing.assert_allclose(
                        arrays[f"{key}.experts.mean"][n], np.mean(own, axis=0), atol=1e-12
                    )
    # and the model is as it was
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for key, each in model.state_dict().items():
        torch.testing.assert_close(each, before[key], rtol=0, atol=0)


def test_gradients_are_those_of_each_projections_outputs() -> None:
    """By matrices of their own for every row, whose gradients are outer products."""
    model = sparse("mixtral")
    found = calibrate(model, TOKENS[:1], loss=loss, ridge=0.1, dtype="float64")
    assert all(each.requires_grad and each.grad is None for each in model.parameters())
    for layer in NAMES:
        module = model.get_submodule(layer)
        outputs: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": [], "down_proj": []}

        def run(
            x: Tensor, index: Tensor, weights: Tensor, module: Any = module, outputs: Any = outputs
        ) -> Tensor:
            sums = []
            for token in range(len(x)):
                parts = []
                for place in range(index.shape[1]):
                    n = index[token, place]
                    gate, up = (module.gate_up_proj[n] @ x[token]).chunk(2)
                    hidden = F.silu(gate) * up
                    down = module.down_proj[n] @ hidden
                    for role, each in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                        each.retain_grad()
                        outputs[role].append(each)
                    parts.append(weights[token, place] * down)
                sums.append(torch.stack(parts).sum(0))
            return torch.stack(sums)

        twin = copy.deepcopy(model)
        inside: Any = twin.get_submodule(layer)
        inside.forward = run
        value: Any = loss(twin(TOKENS[:1]), TOKENS[:1])
        value.backward()
        for role, listed in outputs.items():
            gradients = [each.grad.numpy() for each in listed if each.grad is not None]
            assert len(gradients) == 48
            kept = found.arrays[f"{layer}.{role}.gradients"]
            np.testing.assert_allclose(kept, moment(gradients), rtol=1e-7, atol=1e-12)


def test_experts_that_are_called_one_by_one() -> None:
    torch.manual_seed(0)
    model = OneByOne([Expert(bias=True) for _ in range(4)]).double()
    x = torch.randn(50, 6, dtype=torch.float64)
    found = calibrate(model, x, dtype="float64", loss=lambda y, _: y.square().sum())
    seen: list[Any] = []
    for expert in model.experts:
        expert.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    inputs = torch.cat(seen).numpy()
    np.testing.assert_allclose(found.arrays["experts.inputs"], moment([*inputs]), rtol=1e-9)
    np.testing.assert_allclose(found.arrays["experts.inputs.mean"], inputs.mean(0), rtol=1e-9)
    assert found.arrays["experts.counts"].tolist() == [len(each) for each in seen]
    assert "experts.w2.gradients" not in found.arrays
    assert found.arrays["experts.down_proj.gradients"].shape == (6, 6)


def test_a_file_gives_back_what_was_gathered(tmp_path: Path) -> None:
    model = sparse("mixtral")
    found = calibrate(model, TOKENS, identity={"config": "abc"}, ridge=0.02)
    found.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert (again.tokens, again.model, again.ridge) == (found.tokens, found.model, 0.02)
    assert set(again.arrays) == set(found.arrays)
    assert again.nbytes == found.nbytes
    assert repr(again) == repr(found) == "Calibration(2 layers, 72 tokens, ridge 0.02)"
    for key, array in found.arrays.items():
        assert again.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays[key], array)
    assert found.arrays[f"{NAMES[0]}.hidden"].dtype == np.float32
    needed = calibration_memory(model)
    whole = sum(a.size for k, a in found.arrays.items() if not k.endswith("values"))
    assert needed == 8 * whole
    more = calibration_memory(model, per_expert=True, gradients=True)
    found = calibrate(model, TOKENS, per_expert=True, loss=loss)
    assert more == 8 * sum(a.size for k, a in found.arrays.items() if not k.endswith("values"))


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = sparse("mixtral")
    with pytest.raises(SpecError, match="must hold experts"):
        calibrate(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(SpecError, match=r"16 and 24 .* got 8 and 16. Give at least 16 tokens"):
        calibrate(model, TOKENS[:1, :8])
    assert calibrate(model, TOKENS[:1, :8], ridge=0.1).tokens[NAMES[0]] == 8
    with pytest.raises(SpecError, match=r"got none\. Give more batches"):
        calibrate(model, [])
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with pytest.raises(SpecError, match="must have no padding"):
        calibrate(model, {"input_ids": TOKENS, "attention_mask": mask})
    with pytest.raises(PlanError, match="must fit in max_memory"):
        calibrate(model, TOKENS, max_memory=1000)
    with pytest.raises(SpecError, match="loss must give one number"):
        calibrate(model, TOKENS, loss=lambda output, _: output.logits)
    with pytest.raises(SpecError, match="ridge must be a positive number"):
        calibrate(model, TOKENS, ridge=-1.0)
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(
        ShapeError, match=r"in the inputs of the experts 'model.layers.1.mlp.experts'"
    ):
        calibrate(bad, TOKENS)
    assert not any(module._forward_pre_hooks for module in bad.modules())


@pytest.mark.parametrize("gradients", [False, True])
def test_little_memory_takes_more_runs_and_changes_nothing(gradients: bool) -> None:
    model = sparse("mixtral")
    options: Any = {"loss": loss if gradients else None, "per_expert": True, "ridge": 0.1}
    whole = calibrate(model, [TOKENS[:1], TOKENS[1:]], **options)
    total = calibration_memory(model, per_expert=True, gradients=gradients)
    half = calibration_memory(model, per_expert=True, gradients=gradients, max_memory=total - 1)
    assert half == total / 2
    told: list[int] = []
    batches = iter([TOKENS[:1], TOKENS[1:]])
    parts = calibrate(model, batches, max_memory=half, callback=told.append, **options)
    assert told == [1, 2, 3, 4]
    assert parts.layers == whole.layers
    assert parts.tokens == whole.tokens
    assert set(parts.arrays) == set(whole.arrays)
    for key, each in whole.arrays.items():
        np.testing.assert_array_equal(parts.arrays[key], each)
    told.clear()
    calibrate(model, TOKENS, max_memory=total, callback=told.append, **options)
    assert told == [1]
    with pytest.raises(PlanError, match=r"each layer must fit .* 'model.layers.0.mlp.experts'"):
        calibrate(model, TOKENS, max_memory=half - 1, **options)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"a": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match="must be a calibration; it is another"):
        Calibration.load(path)
    found = calibrate(sparse("mixtral"), TOKENS)
    found.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        Calibration.load(path)
    path.write_bytes(data[:-4] + np.float32("nan").tobytes())
    with pytest.raises(CheckpointError, match="must be finite"):
        [Calibration.load(path).arrays[key] for key in found.arrays]
    path.write_bytes(
        data.replace(b'"version\\":1', b'"version\\":9').replace(
            b'\\"version\\":1', b'\\"version\\":9'
        )
    )
    with pytest.raises(CheckpointError, match="of version 1; it is of 9"):
        Calibration.load(path)
    arrays = {k: a for k, a in found.arrays.items() if not k.endswith("hidden")}
    with pytest.raises(CheckpointError, match=r"must have .*hidden"):
        Calibration(arrays, found.tokens, {})
    arrays = {**found.arrays, f"{NAMES[0]}.inputs": np.ones((3, 4))}
    with pytest.raises(CheckpointError, match="inputs must fit its layer"):
        Calibration(arrays, found.tokens, {})


def errors(report: Any) -> list[float]:
    return [p.report.output_error for each in report.modules for p in each.projections]


@pytest.mark.parametrize("name", ["mixtral", "one by one"])
def test_a_calibration_takes_the_place_of_inputs(name: str) -> None:
    torch.manual_seed(0)
    tokens: Tensor = TOKENS
    model: Any = sparse("mixtral") if name == "mixtral" else None
    if model is None:
        model = OneByOne([Expert(bias=True) for _ in range(4)]).double()
        tokens = torch.randn(60, 6, dtype=torch.float64) * torch.logspace(0, -2, 6)
    found = calibrate(model, tokens, per_expert=True, dtype="float64")
    options: Any = {"rank": 3, "search": QUICK}
    reports = {}
    for words in (("none", "equal"), ("inputs", "equal"), ("both", "router")):
        wanted: Any = dict(zip(("weighting", "expert_weights"), words, strict=True))
        mine = copy.deepcopy(model)
        reports[words[0]] = compress(mine, "cp", calibration=found, **wanted, **options)
    plain = compress(copy.deepcopy(model), "cp", **options)
    for a, b in zip(plain.modules, reports["none"].modules, strict=True):
        for p, q in zip(a.projections, b.projections, strict=True):
            assert p.report.error == q.report.error
    losses = zip(errors(reports["inputs"]), errors(reports["none"]), strict=True)
    assert all(a < b for a, b in losses)
    assert all(each.output_error is None for each in reports["both"].modules)
    assert "outputs off by" in str(reports["inputs"])
    # what is predicted is what the rows lose: each of them, with its expert's factors
    if name == "mixtral":
        layer = NAMES[0]
        mine = copy.deepcopy(model)
        report = compress(mine, "cp", calibration=found, **options)
        factors: Any = mine.get_submodule(layer)
        before = model.get_submodule(layer).down_proj.detach().numpy()
        after = factors.down_proj.materialize()[0].detach().numpy()
        missing = whole = 0.0
        for row in rows_of(model, layer, TOKENS):
            n, hidden = row["expert"], row["hidden"]
            missing += float(np.square(before[n] @ hidden - after[n].T @ hidden).sum())
            whole += float(np.square(before[n] @ hidden).sum())
        assert errors(report)[2] == pytest.approx((missing / whole) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("experts", ["equal", "frequency", "router"])
@pytest.mark.parametrize("weighting", ["inputs", "both", "fisher"])
def test_what_is_minimized_is_a_sum_over_rows(weighting: str, experts: str) -> None:
    """Errors of all experts for all rows, outputs turned and stretched."""
    model = sparse("mixtral")
    found = calibrate(model, TOKENS, loss=loss, dtype="float64", ridge=0.05)
    mine = copy.deepcopy(model)
    words: Any = {"weighting": weighting, "expert_weights": experts}
    report = compress(mine, "cp", rank=3, calibration=found, search=QUICK, **words)
    layer = NAMES[1]
    rows = rows_of(model, layer, TOKENS)
    numbers = [row["expert"] for row in rows]
    weights = np.array([row["weight"] for row in rows])
    shares: Any = np.ones(4)
    if experts != "equal":
        powers = weights**2 if experts == "router" else np.ones(len(rows))
        shares = np.bincount(numbers, weights=powers, minlength=4)
    moments = moment([row["down_proj"] for row in rows])
    if weighting == "fisher":
        moments = found.arrays[f"{layer}.down_proj.gradients"]
    metric = moments / (np.trace(moments) / 16) + 0.05 * np.eye(16)
    values, vectors = np.linalg.eigh(metric)
    root = vectors * values ** (0.0 if weighting == "inputs" else 0.5)
    before = model.get_submodule(layer).down_proj.detach().numpy()
    factors: Any = mine.get_submodule(layer)
    after = factors.down_proj.materialize()[0].detach().numpy().transpose(0, 2, 1)
    x = np.stack([row["hidden"] for row in rows])
    sums = [
        sum(shares[n] * float(((x @ each[n].T @ root) ** 2).sum()) for n in range(4))
        for each in (before - after, before)
    ]
    wanted = (sums[0] / sums[1]) ** 0.5
    assert report.modules[1].projections[2].report.weighted_error == pytest.approx(wanted, rel=1e-6)


def test_a_layer_gets_what_compressed_layers_before_it_give() -> None:
    model = sparse("mixtral")
    options: Any = {"rank": 3, "search": QUICK, "inputs": iter([TOKENS[:2], TOKENS[2:]])}
    mine = copy.deepcopy(model)
    report = compress(mine, "cp", weighted=True, sequential=True, **options)
    # by hand: the first layer alone, then the second one of what is left
    twin = copy.deepcopy(model)
    by_hand: list[Any] = []
    for name in NAMES:
        given: Any = {**options, "inputs": [TOKENS[:2], TOKENS[2:]]}
        by_hand += compress(twin, "cp", weighted=True, select=name, **given).modules
    for a, b in zip(report.modules, by_hand, strict=True):
        assert a.output_error == pytest.approx(b.output_error, rel=1e-9)
    for key, each in mine.state_dict().items():
        torch.testing.assert_close(each, twin.state_dict()[key])
    at_once = compress(copy.deepcopy(model), "cp", weighted=True, **{**options, "inputs": TOKENS})
    assert at_once.modules[1].output_error != pytest.approx(report.modules[1].output_error)
    # one by one as well, and nothing is left behind
    lists = nn.Sequential(*(OneByOne([Expert() for _ in range(3)]).double() for _ in range(2)))
    x = torch.randn(40, 6, dtype=torch.float64)
    twins = copy.deepcopy(lists)
    compress(lists, "cp", rank=3, inputs=x, weighted=True, sequential=True, search=QUICK)
    for name in ("0.experts", "1.experts"):
        compress(twins, "cp", rank=3, inputs=x, weighted=True, select=name, search=QUICK)
    torch.testing.assert_close(lists(x), twins(x))
    for each in (mine, lists):
        assert not any(module._forward_hooks for module in each.modules())


def test_calibrations_of_other_models_are_refused_in_place() -> None:
    model = sparse("mixtral")
    found = calibrate(model, TOKENS)
    with pytest.raises(CheckpointError, match="its names and shapes of parameters differ"):
        compress(sparse("olmoe"), "cp", rank=2, calibration=found)
    other = sparse("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj += 1.0
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"those of down_proj in .*layers\.1.* differ"):
        compress(other, "cp", rank=2, calibration=found, search=QUICK)
    assert set(before) == set(other.state_dict())
    options: Any = {"rank": 2, "search": QUICK}
    with pytest.raises(SpecError, match="one of weighted and calibration"):
        compress(model, "cp", calibration=found, inputs=TOKENS, weighted=True, **options)
    with pytest.raises(SpecError, match="need a calibration"):
        compress(model, "cp", weighting="both", **options)
    with pytest.raises(SpecError, match=r"weighted by inputs\. Pass weighted"):
        compress(model, "cp", sequential=True, inputs=TOKENS, **options)
    with pytest.raises(SpecError, match="calibration must be a Calibration"):
        compress(model, "cp", calibration=7, **options)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="'fisher' needs second moments of gradients"):
        compress(model, "cp", calibration=found, weighting="fisher", **options)
