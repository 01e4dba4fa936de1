"""Blocks, embeddings, and layers under PyTorch's transformations of functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, jvp, stack_module_state, vmap

from tensormoe import CP, Dense, Gate, Hadamard, LayerSpec, TensorRing
from tensormoe.testing import batch_shapes, coefficients, specs
from tensormoe_torch import MuMoEEmbedding, MuMoEMLP
from tests._blocks import ACTIVATIONS, block_output
from tests._kinds import GATES, UNEVEN
from tests.torch._helpers import WAYS, assert_mixture, build, gradients, normal, numpy_of, randomize


class TestMLP:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("lead", [(), (0,), (4,), (2, 3)])
    def test_it_is_two_mixtures_with_one_gate(self, name: str, lead: tuple[int, ...]) -> None:
        block = randomize(
            MuMoEMLP(
                6,
                7,
                5,
                act_layer=name,
                experts=(3, 2),
                factorization=(TensorRing(2), CP(3)),
                dtype=torch.float64,
            )
        )
        x = normal(*lead, 6, seed=1)
        made = [numpy_of(each) for each in block.coefficients(x)]
        layers = [
            [numpy_of(each) for each in part.materialize()] for part in (block.first, block.second)
        ]
        want = block_output(name, layers, made, numpy_of(x))
        for way in WAYS.values():
            with way():
                got = block(x)
                assert got.shape == (*lead, 5)
                np.testing.assert_allclose(numpy_of(got), want, rtol=1e-9, atol=1e-9)
                given_ones = block(x, block.coefficients(x))
            np.testing.assert_allclose(numpy_of(given_ones), want, rtol=1e-9, atol=1e-9)

    def test_activations_by_class(self) -> None:
        classes = {"gelu": "GELU", "relu": "ReLU", "silu": "SiLU", "tanh": "Tanh"}
        for name, kind in classes.items():
            block = MuMoEMLP(6, experts=3, rank=2, act_layer=getattr(torch.nn, kind))
            assert block.config.act_layer == name

    def test_sizes_default_to_the_inputs(self) -> None:
        block = MuMoEMLP(6, experts=3, factorization="cp", rank=2)
        assert (block.first.spec.out_features, block.second.spec.out_features) == (6, 6)
        assert block.first.gate is None
        assert block.second.gate is None

    def test_dropout(self) -> None:
        """Behind the activation and behind the second layer, in training alone."""
        options: dict[str, Any] = {"experts": 3, "rank": 8, "dtype": torch.float64}
        block = randomize(MuMoEMLP(6, 50, 40, drop=0.5, **options))
        plain = randomize(MuMoEMLP(6, 50, 40, **options))
        x = normal(200, 6)
        assert torch.equal(block.eval()(x), plain(x))
        torch.manual_seed(0)
        output = block.train()(x)
        made = block.coefficients(x)
        torch.manual_seed(0)
        middle = F.dropout(F.gelu(block.first(x, made)), 0.5)
        torch.testing.assert_close(output, F.dropout(block.second(middle, made), 0.5))
        assert 0.45 < (output == 0).double().mean() < 0.55
        assert not torch.equal(block(x), output)


@given(data=st.data())
def test_embeddings_are_mixtures_of_rows(data: st.DataObject) -> None:
    spec = data.draw(specs(bias=False), "spec")
    lead = data.draw(batch_shapes(), "batch shape")
    index = data.draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]), "dtype of ids")
    table = randomize(
        MuMoEEmbedding(
            spec.in_features,
            spec.out_features,
            spec.experts,
            spec.factorization,
            dtype=torch.float64,
        )
    )
    ids = torch.tensor(np.random.default_rng(0).integers(spec.in_features, size=lead))
    made = [torch.tensor(each) for each in data.draw(coefficients(spec.experts, lead))]
    one_hot = torch.nn.functional.one_hot(ids, spec.in_features).double()
    for way in WAYS.values():
        with way():
            output = table(ids.to(index), made)
        assert output.shape == (*lead, spec.out_features)
        assert_mixture(output, table, made, one_hot)


@pytest.mark.parametrize("kind", [CP(4), TensorRing(3), Hadamard(), Dense()], ids=str)
def test_embeddings_under_vmap(kind: Any) -> None:
    table = randomize(MuMoEEmbedding(9, 5, (3, 2), kind, dtype=torch.float64))
    ids = torch.tensor([[1, 2, 8], [0, 0, 4]])
    made = [normal(2, 3, count) for count in (3, 2)]
    found = vmap(lambda ids, a, b: table(ids, [a, b]))(ids, *made)
    torch.testing.assert_close(found, table(ids, made))


class TestTransforms:
    """``torch.func`` follows a layer."""

    @pytest.mark.parametrize(
        ("kind", "gate"),
        [*((kind, GATES[0]) for kind in UNEVEN), *((UNEVEN[0], gate) for gate in GATES[1:6])],
        ids=str,
    )
    def test_vmap_and_grad(self, kind: Any, gate: Gate) -> None:
        layer = build(LayerSpec(6, 5, (3, 2), kind), gate)
        x = normal(4, 6)
        torch.testing.assert_close(vmap(layer)(x), layer(x))
        torch.testing.assert_close(vmap(layer)(x.reshape(2, 2, 6)), layer(x).reshape(2, 2, 5))
        parameters = {name: each.detach() for name, each in layer.named_parameters()}

        def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
            return (functional_call(layer, values, (row,)) ** 2).sum()

        each = vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        want = gradients(layer(x), dict(layer.named_parameters()))
        for name, found in each.items():
            assert found.shape == (4, *parameters[name].shape)
            torch.testing.assert_close(found.sum(0), want[name], rtol=1e-8, atol=1e-8)

    def test_an_ensemble_of_layers(self) -> None:
        layers = [build(LayerSpec(6, 5, 3, CP(2)), Gate(), seed=seed) for seed in range(3)]
        parameters, buffers = stack_module_state(layers)
        x = normal(4, 6)

        def run(values: Any, kept: Any) -> Tensor:
            output: Tensor = functional_call(layers[0], (values, kept), (x,))
            return output

        found = vmap(run)(parameters, buffers)
        torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))

    # PyTorch's own derivatives in forward mode are written in TorchScript
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
    def test_forward_mode(self) -> None:
        layer = build(LayerSpec(6, 5, (3, 2), TensorRing(2)), Gate())
        x, along = normal(4, 6), normal(4, 6, seed=1)
        output, moved = jvp(layer, (x,), (along,))
        torch.testing.assert_close(output, layer(x))
        step = 1e-6
        want = (layer(x + step * along) - layer(x - step * along)) / (2 * step)
        torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-6)

    def test_batch_norm_in_inference(self) -> None:
        layer = build(LayerSpec(6, 5, (3, 2), CP(2)), Gate(normalization="batch")).eval()
        x = normal(4, 6)
        torch.testing.assert_close(vmap(layer)(x), layer(x))
