"""Layers and experts whose factors are integers with scales: what they compute, hold and refuse."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensormoe
from tensormoe import LowRank, TensorRing
from tensormoe.decomposition import Search, decompose
from tensormoe.errors import BudgetError, RankError, ShapeError, SpecError
from tensormoe.gates import OneExpert
from tensormoe_torch import MuMoE, compress, scale_experts, silence_experts
from tensormoe_torch._rounded import RoundedFactors
from tensormoe_torch.adapters import add_adapters
from tensormoe_torch.compression import FactorizedExperts, calibrate, evaluate, next_token_loss
from tensormoe_torch.parallel._cut import cut_factors
from tests._torch_moe import TOKENS, rebuilt, sparse

QUICK = Search(sweeps=4, polish=1)
BITS = pytest.mark.parametrize("bits", [8, 4])


def layer(**options: Any) -> MuMoE:
    torch.manual_seed(0)
    return MuMoE(24, 16, 5, TensorRing((2, 3, 8)), **options)


def nbytes(module: nn.Module) -> int:
    """Bytes of all tensors, as a program sees them that knows nothing of bits."""
    return sum(each.untyped_storage().nbytes() for each in module.state_dict().values())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def mixtral(dtype: torch.dtype = torch.float32) -> Any:
    return sparse("mixtral", dtype)


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rounded_layer_is_the_layer_of_its_values(bits: int, dtype: torch.dtype) -> None:
    plain = layer(dtype=dtype)
    rounded = copy.deepcopy(plain)
    assert rounded.quantize(bits) is rounded
    x = torch.randn(2, 3, 24, dtype=dtype)
    back = copy.deepcopy(rounded).dequantize()
    assert (plain.bits, rounded.bits, back.bits) == (None, bits, None)
    assert torch.equal(rounded(x), back(x))
    for found, expected in zip(rounded.materialize(), back.materialize(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(rounded.expert(3)[0], back.expert(3)[0])
    off = (rounded(x) - plain(x)).norm() / plain(x).norm()
    assert 1e-4 < off < (0.03 if bits == 8 else 0.4)
    assert [*rounded.factors] == [*plain.factors]
    for name, values in rounded.factors.items():
        assert torch.equal(values, back.factors[name])


@BITS
@pytest.mark.parametrize("features", [(64, 128), (24, 16)])
@pytest.mark.parametrize("kind", [LowRank(64), LowRank(5), "dense"])
def test_few_rows_take_the_slices_of_their_experts(
    kind: Any, features: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = MuMoE(*features, 12, kind, gate=None).quantize(bits)
    plain = copy.deepcopy(made).dequantize()
    whole = []
    original = RoundedFactors.by_name
    monkeypatch.setattr(
        RoundedFactors, "by_name", lambda self: whole.append(self) or original(self)
    )
    for count in (0, 1, 4, 6, 7, 30):
        index = torch.randint(0, 12, (count,))
        if count > 1:
            index[1] = index[0]
        x = torch.randn(count, features[0], requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        whole.clear()
        found, expected = made(x, OneExpert(index)), plain(twin, OneExpert(index))
        assert bool(whole) == (not 0 < count <= 6)
        torch.testing.assert_close(found, expected)
        cotangent = torch.randn_like(found)
        found.backward(cotangent)
        expected.backward(cotangent)
        torch.testing.assert_close(x.grad, twin.grad)
    whole.clear()
    # factors that experts share have no slices
    shared, values = MuMoE(24, 16, 12, TensorRing(2), gate=None).quantize(bits), torch.randn(2, 24)
    assert shared(values, OneExpert(torch.tensor([3, 1]))).shape == (2, 16)
    assert whole


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_smaller(bits: int, dtype: torch.dtype) -> None:
    made = MuMoE(64, 64, 8, LowRank(16), bias=False, gate=None, dtype=dtype)
    before = nbytes(made)
    assert before == made.factor_bytes == 2 * 64 * 8 * 16 * dtype.itemsize
    made.quantize(bits)
    scales = 8 * dtype.itemsize / 64
    assert nbytes(made) == made.factor_bytes == 2 * 64 * 8 * 16 * (bits + scales) / 8
    assert [*made.parameters()] == []


@BITS
def test_state_dicts_copies_and_pickles(bits: int) -> None:
    made = layer().quantize(bits)
    x = torch.randn(3, 24)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), made(x))
    other = layer().quantize(bits)
    other.load_state_dict({k: torch.zeros_like(v) for k, v in other.state_dict().items()})
    assert not torch.equal(other(x), made(x))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer().load_state_dict(made.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict(layer().state_dict())


@BITS
def test_its_text_makes_it(bits: int) -> None:
    made = layer().quantize(bits)
    names = {"torch": torch, "MuMoE": MuMoE, "Gate": tensormoe.Gate, "TensorRing": TensorRing}
    again = eval(repr(made), names)
    assert repr(again) == repr(made)
    assert (again.bits, again.config) == (bits, made.config)


@BITS
def test_other_dtypes_have_the_same_scales(bits: int) -> None:
    made = layer().quantize(bits)
    wide = {name: each.clone() for name, each in made.factors.items()}
    made.to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert made.factors.get_submodule("input").codes.dtype in (torch.int8, torch.uint8)
    assert all(each.dtype == torch.bfloat16 for each in made.factors.values())
    assert made(torch.randn(3, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    made.float()
    for name, each in made.factors.items():
        assert torch.equal(each, wide[name])
    assert made.to("meta").factors["input"].device.type == "meta"


@BITS
def test_compiled_and_differentiated_by_its_inputs(bits: int) -> None:
    made = layer(bias=False).quantize(bits)
    plain = copy.deepcopy(made).dequantize()
    x = torch.randn(6, 24, requires_grad=True)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), made(x))
    (found,) = torch.autograd.grad(made(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(found, expected)
    assert [name for name, _ in made.named_parameters()] == ["gate.projection_0"]
    made(x).sum().backward()
    assert all(each.grad is not None for each in made.parameters())


def test_hooks_and_modes_stay() -> None:
    made = layer(gate=None).eval()
    calls = []
    made.factors.register_forward_hook(lambda *_: calls.append(1))
    x, given = torch.randn(3, 24), torch.rand(3, 5)
    for change in (lambda: made.quantize(8), made.dequantize):
        change()
        calls.clear()
        made(x, given)
        assert calls == [1]
        assert not made.factors.training


@BITS
def test_what_needs_floats_is_refused(bits: int) -> None:
    made = layer().quantize(bits)
    before = copy.deepcopy(made.state_dict())
    for change in (
        made.reset_parameters,
        lambda: made.factors.update({"input": torch.ones(24, 3, 8)}),
        lambda: silence_experts(made, [1]),
        lambda: made.quantize(bits),
        lambda: made.quantize(12 - bits),
    ):
        with pytest.raises(SpecError, match=r"dequantize\(\)"):
            change()
    for name, each in made.state_dict().items():
        assert torch.equal(each, before[name])
    part: Any = None
    with pytest.raises(SpecError, match=r"cut over devices; got some of . bits in 'a'"):
        cut_factors(made, part, "a")
    made.dequantize().reset_parameters()
    for wrong in (16, None, 5, "8"):
        with pytest.raises(SpecError, match="bits must be"):
            layer().quantize(wrong)  # type: ignore[arg-type]
    broken = layer()
    with torch.no_grad():
        broken.factors["output"][0, 0, 0] = torch.nan
    with pytest.raises(ShapeError, match="finite"):
        broken.quantize(bits)
    assert broken.bits is None
    pruned = layer()
    nn.utils.parametrize.register_parametrization(pruned.factors, "input", nn.Identity())
    with pytest.raises(SpecError, match="computed"):
        pruned.quantize(bits)


@BITS
@pytest.mark.parametrize("name", ["low_rank", "tucker", "dense"])
def test_compressed_models_compute_what_their_values_do(name: str, bits: int) -> None:
    model = mixtral(torch.float64)
    original = copy.deepcopy(model)
    budget = None if name == "dense" else 0.25
    report = compress(model, name, budget=budget, bits=bits, search=QUICK)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, FactorizedExperts)
    assert experts.bits == bits
    assert [each.bits for each in report.modules[0].projections] == [bits] * 3
    wanted = rebuilt(original, model)
    torch.testing.assert_close(logits(model), logits(wanted), rtol=1e-9, atol=1e-11)
    # errors are of what is there
    for module in report.modules:
        held = model.get_submodule(module.name)
        for each in module.projections:
            found = held.projections[each.role].materialize()[0]
            stack = _dense(original.get_submodule(module.name), each.role)
            error = (found - stack).norm() / stack.norm()
            assert each.report.error == pytest.approx(float(error), rel=1e-6)


def _dense(experts: Any, role: str) -> Tensor:
    """A projection of transformers' experts as (experts, in, out)."""
    if role == "down_proj":
        found: Tensor = experts.down_proj.detach().mT
        return found
    gate, up = experts.gate_up_proj.detach().mT.chunk(2, dim=-1)
    return gate if role == "gate_proj" else up


@BITS
def test_bytes_are_counted_and_memory_is_less(bits: int) -> None:
    model = mixtral(torch.bfloat16)
    original = copy.deepcopy(model)
    held = sum(nbytes(each.mlp.experts) for each in original.model.layers)
    report = compress(model, "low_rank", budget=0.4, bits=bits, search=QUICK)
    found = sum(nbytes(each.mlp.experts) for each in model.model.layers)
    assert report.nbytes == (held, found)
    assert found <= 0.4 * held
    before, after = report.model_bytes
    assert before - after == held - found
    assert after == sum(
        each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers())
    )
    assert report.to_dict()["model_bytes"] == (before, after)
    assert report.to_dict()["modules"][0]["projections"][0]["bits"] == bits
    # entries of rounded factors are parameters of the model still
    assert report.model_parameters[0] - report.model_parameters[1] == (
        report.parameters[0] - report.parameters[1]
    )
    assert f"factors in {bits} bits: experts " in str(report)
    evaluation = evaluate(original, model, TOKENS)
    assert evaluation.weight_bytes == (before, after)
    plain = compress(copy.deepcopy(original), "low_rank", budget=0.4, search=QUICK)
    assert plain.parameters[1] < report.parameters[1]
    assert "bits" not in str(plain)


def test_dense_in_few_bits_needs_no_budget() -> None:
    model = mixtral(torch.bfloat16)
    report = compress(copy.deepcopy(model), "dense", bits=4)
    assert report.nbytes[1] / report.nbytes[0] == 4.25 / 16
    assert all(each.report.controls == () for each in report.modules[0].projections)
    with pytest.raises(BudgetError, match="dense of 8 bits takes"):
        compress(model, "dense", budget=0.5, bits=8)
    with pytest.raises(RankError, match="bytes"):
        compress(model, "low_rank", rank=400, bits=8)
    with pytest.raises(SpecError, match="can't be promised with 8 bits"):
        compress(model, "cp", tolerance=0.5, bits=8)
    with pytest.raises(SpecError, match="bits must be"):
        compress(model, "cp", rank=2, bits=3)
    with pytest.raises(SpecError, match="16 bits are of models in bfloat16 or float16"):
        compress(mixtral(), "cp", rank=2, bits=16)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    same = compress(copy.deepcopy(model), "cp", budget=0.3, bits=16, search=QUICK)
    assert same.parameters == compress(model, "cp", budget=0.3, search=QUICK).parameters


@BITS
def test_calibrated_errors_are_of_rounded_factors(bits: int) -> None:
    model = mixtral()
    calibration = calibrate(model, TOKENS, per_expert=True)
    errors = {}
    for given in (None, bits):
        mine = copy.deepcopy(model)
        report = compress(mine, "low_rank", rank=8, calibration=calibration, bits=given)
        first = report.modules[0].projections[0].report
        errors[given] = (first.error, first.output_error, first.weighted_error)
    for plain, rounded in zip(errors[None], errors[bits], strict=True):
        assert plain is not None
        assert rounded is not None
        assert rounded > plain


@pytest.mark.parametrize("share", ["equal", "sensitivity"])
def test_choices_and_shares_keep_to_the_bytes(share: str) -> None:
    model = mixtral(torch.bfloat16)
    calibration = calibrate(model, TOKENS, per_expert=True, loss=next_token_loss)
    report = compress(
        model,
        ["low_rank", "cp"],
        budget=0.3,
        bits=8,
        calibration=calibration,
        share=share,
        search=QUICK,
    )
    assert report.nbytes[1] == sum(nbytes(each.mlp.experts) for each in model.model.layers)
    assert report.nbytes[1] <= 0.3 * report.nbytes[0]


def test_what_is_done_with_rounded_experts() -> None:
    model = mixtral()
    compress(model, "dense", bits=8)
    before = logits(model)
    experts = model.model.layers[0].mlp.experts
    # training leaves them as they are, and reaches what is before them
    assert [name for name, _ in experts.named_parameters()] == []
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0
    # values can be read: compressed again, merged
    again = copy.deepcopy(model)
    compress(again, "low_rank", rank=4, search=QUICK)
    assert again.model.layers[0].mlp.experts.bits is None
    with pytest.raises(SpecError, match=r"dequantize\(\)"):
        scale_experts(experts.up_proj, {0: 2.0})
    assert experts.dequantize() is experts
    assert torch.equal(logits(model), before)
    assert len([*experts.parameters()]) == 3
    assert all(each.requires_grad for each in experts.parameters())
    assert experts.quantize(8).bits == 8
    assert torch.equal(logits(model), before)


def test_adapters_on_rounded_experts_train() -> None:
    model = mixtral()
    compress(model, "low_rank", rank=6, bits=4, search=QUICK)
    before = logits(model)
    add_adapters(model, rank=2)
    experts = model.model.layers[0].mlp.experts
    assert experts.bits == 4
    torch.testing.assert_close(logits(model), before)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(logits(model), before)
    assert experts.bits == 4


def test_decompositions_have_the_values_of_codes() -> None:
    torch.manual_seed(0)
    weights, bias = torch.randn(4, 12, 8), torch.randn(4, 8)
    for bits in (8, 4):
        found = decompose(weights, "low_rank", rank=3, bias=bias, bits=bits)
        made = MuMoE.restore(found.config(), found.parameters).quantize(bits)
        for name, values in made.factors.items():
            assert torch.equal(values, found.factors[name])
        matrix, row = made.materialize()
        assert row is not None
        error = (matrix - weights).norm() / weights.norm()
        assert found.report.error == pytest.approx(float(error), rel=1e-5)
        error = (row - bias).norm() / bias.norm()
        assert found.report.bias_error == pytest.approx(float(error), rel=1e-5)
    with pytest.raises(SpecError, match="can't be promised with 4 bits"):
        decompose(weights, "cp", tolerance=0.5, bits=4)
    with pytest.raises(SpecError, match="bits must be"):
        decompose(weights, "cp", rank=1, bits=6)
