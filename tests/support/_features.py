"""Probes of what every framework does in the same words."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import tensormoe_jax
import tensormoe_numpy._activations
from tensormoe import CP, Gate, LayerSpec, TensorRing, backend_of, convert, functional
from tensormoe.functional import BlockConfig, LayerConfig
from tensormoe.testing import reconstruct
from tests._cupy_standin import ADAPTER, host
from tests._everywhere import FORMS, PACKAGES, JaxLayer
from tests._frameworks import NUMPY, Config, Framework, class_name
from tests._one_layer import (
    TOLERANCES,
    assert_found,
    assert_near,
    assert_one_file,
    assert_one_layer,
)
from tests.support._layers import check_slopes, prepared

LAYER = LayerConfig(LayerSpec(4, 3, (3, 2), TensorRing(2)), Gate())
BLOCK = BlockConfig(
    LayerConfig(LayerSpec(4, 5, 3, CP(2)), Gate()),
    LayerConfig(LayerSpec(5, 3, 3, TensorRing(2)), None),
    "gelu",
)
GATED = BlockConfig(
    LayerConfig(LayerSpec(4, 6, 3, CP(2)), Gate()),
    LayerConfig(LayerSpec(3, 5, 3, TensorRing(2)), None),
    "silu",
    gated=True,
)
TABLE = LayerConfig(LayerSpec(7, 4, 3, CP(2), False), None, indexed_input=True)


def check_as_numpy(framework: Framework, config: Config, how: str, dtype: str) -> None:
    """Outputs, statistics and gradients are NumPy's, and in float64 gradients are slopes."""
    arrays, call = prepared(config, how, (3,), dtype)
    with framework.precision(dtype):
        found = framework.run(framework.restore(config, arrays), call)
        want = NUMPY.run(NUMPY.restore(config, arrays), call)
        assert_found(found, want, TOLERANCES[dtype], str(framework))
        if dtype == "float64" and how != "indexed":
            check_slopes(framework, config, arrays, call)


def check_levels(framework: Framework) -> None:
    """One, two and three levels of experts, chosen level by level."""
    for experts in ((4,), (3, 2), (2, 2, 2)):
        config = LayerConfig(LayerSpec(4, 3, experts, CP(2)), None)
        check_as_numpy(framework, config, "dense", "float64")


def check_half(framework: Framework, dtype: str) -> None:
    """Parameters, output and gradients keep the dtype, and are near what float64 says."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    want = NUMPY.run(NUMPY.restore(LAYER, arrays), call)
    if dtype == "float16":
        narrow = {name: each.astype(dtype) for name, each in arrays.items()}
        small = type(call)(call.x.astype(dtype), None, call.cotangent.astype(dtype))
        found = framework.run(framework.restore(LAYER, narrow), small)
        for name, each in (("output", found.output), *found.gradients.items()):
            assert each.dtype == dtype, name
            wanted = want.output if name == "output" else want.gradients[name]
            assert_near(each.astype("float32"), wanted, 2e-2, name)
        return
    output = _bfloat16(framework, arrays, call.x)
    assert_near(output, want.output, 5e-2, "output")


def _bfloat16(framework: Framework, arrays: Any, x: np.ndarray) -> np.ndarray:
    """The output of a layer in bfloat16, as float32."""
    library = "torch" if framework.name == "PyTorch" else "jax"
    if library == "torch":
        layer = framework.restore(LAYER, arrays).bfloat16()
        output = layer(convert(x, "torch", copy=True).bfloat16()).detach()
        assert str(output.dtype) == "torch.bfloat16"
        return output.float().numpy()
    narrow = {name: each.astype("bfloat16") for name, each in convert(arrays, "jax").items()}
    output = FORMS[framework.name](LAYER, narrow, convert(x, "jax").astype("bfloat16"), None)[0]
    assert output.dtype == "bfloat16"
    return np.asarray(output.astype("float32"))


def check_checkpoints(framework: Framework) -> None:
    """It writes the file that NumPy writes, and opens it."""
    with tempfile.TemporaryDirectory() as folder:
        for config, how in ((LAYER, "gate"), (BLOCK, "gate"), (GATED, "gate"), (TABLE, "dense")):
            arrays, call = prepared(config, how, (3,), "float32")
            path = Path(folder, "layer")
            path.write_bytes(assert_one_file(config, arrays, (NUMPY, framework), Path(folder)))
            assert_one_layer(path, config, arrays, call, (NUMPY, framework))


def check_exchange(framework: Framework) -> None:
    """Its arrays become NumPy's, and NumPy's become its own."""
    arrays, _ = prepared(LAYER, "gate", (3,), "float32")
    layer = framework.restore(LAYER, arrays)
    held = layer.state_dict() if hasattr(layer, "state_dict") else layer.arrays
    library = backend_of(*held.values()).name
    there = convert(held, "numpy", copy=True)
    back = convert(there, library)
    assert backend_of(*back.values()).name == library
    for name, array in arrays.items():
        np.testing.assert_array_equal(there[name], array)
        got = host(back[name]) if ADAPTER.owns(back[name]) else np.asarray(back[name])
        np.testing.assert_array_equal(got, array)


def check_weights(framework: Framework) -> None:
    """All experts' matrices are those that TensorLy builds, and one expert's is one of them."""
    config = LayerConfig(LAYER.spec, None)
    arrays, _ = prepared(config, "dense", (3,))
    with framework.precision("float64"):
        layer = user_layer(framework, config, arrays)
        if isinstance(layer, JaxLayer):
            pair = layer.arrays, tensormoe_jax.BACKEND
            every, biases = functional.materialize(config, *pair)
            one, bias = functional.expert_weight(config, pair[0], (1, 1), pair[1])
        else:
            (every, biases), (one, bias) = layer.materialize(), layer.expert(1, 1)
        every, biases, one, bias = (host_of(each) for each in (every, biases, one, bias))
    factors = {name.removeprefix("factors."): each for name, each in arrays.items()}
    whole = reconstruct(config.spec.factorization, factors)
    assert_near(every, whole[..., :-1, :], 1e-12, "materialize")
    assert_near(biases, whole[..., -1, :], 1e-12, "biases")
    assert_near(one, every[1, 1], 1e-12, "expert")
    assert_near(bias, biases[1, 1], 1e-12, "bias")


def check_block_weights(framework: Framework) -> None:
    """An expert of a block is what the block computes when only this expert has a coefficient."""
    for config in (BLOCK, GATED):
        arrays, call = prepared(config, "dense", (3,))
        only = np.zeros_like(call.made[0])  # type: ignore[index]
        only[:, 1] = 1.0
        one = type(call)(call.x, [only], call.cotangent)
        with framework.precision("float64"):
            found = framework.run(framework.restore(config, arrays), one).output
            layer = user_layer(framework, config, arrays)
            if isinstance(layer, JaxLayer):
                pairs = [
                    functional.expert_weight(part, named, (1,), tensormoe_jax.BACKEND)
                    for part, named in _parts(config, layer.arrays)
                ]
                every = [
                    functional.materialize(part, named, tensormoe_jax.BACKEND)
                    for part, named in _parts(config, layer.arrays)
                ]
            else:
                pairs, every = layer.expert(1), layer.materialize()
                sizes = (layer.in_features, layer.hidden_features, layer.out_features)
                assert sizes == (4, config.hidden_features, config.second.spec.out_features)
                assert [each.batch for each in layer.plan(3)] == [3, 3]
            weights = [[host_of(each) for each in pair] for pair in pairs]
            for pair, stack in zip(weights, every, strict=True):
                for each, whole in zip(pair, stack, strict=True):
                    assert_near(each, host_of(whole)[1], 1e-12, "materialize")
        middle = call.x @ weights[0][0] + weights[0][1]
        function = tensormoe_numpy._activations.ACTIVATIONS[config.act_layer or ""][0]
        if config.gated:
            size = config.hidden_features
            middle = function(middle[:, :size]) * middle[:, size:]
        else:
            middle = function(middle)
        assert_near(middle @ weights[1][0] + weights[1][1], found, 1e-12, "expert")


def _parts(config: BlockConfig, arrays: Any) -> list[tuple[LayerConfig, dict[str, Any]]]:
    """The layers of a block, each with its arrays."""
    return [
        (part, {key.removeprefix(name): each for key, each in arrays.items() if name in key})
        for part, name in ((config.first, "first."), (config.second, "second."))
    ]


def check_cost(framework: Framework) -> None:
    """What a call costs is what the core's cost model says, before anything runs."""
    arrays, _ = prepared(LAYER, "gate", (3,), "float32")
    layer = user_layer(framework, LAYER, arrays)
    want = layer.plan(64).cost(None)
    assert layer.cost(64).flops > want.flops > 0
    assert layer.num_parameters == sum(each.size for each in arrays.values())


def check_copies(framework: Framework) -> None:
    """Copied and pickled layers are the same, in arrays of their own."""
    arrays, call = prepared(LAYER, "gate", (3,), "float32")
    layer = framework.restore(LAYER, arrays)
    want = framework.run(layer, call)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_found(framework.run(again, call), want, 0.0, str(framework))


def user_layer(framework: Framework, config: Config, arrays: Any) -> Any:
    """What users hold: a module where the framework has modules."""
    package = PACKAGES.get(framework.name)
    layer = framework.restore(config, arrays)
    if package is None:
        return layer
    return getattr(package, class_name(config)).restore(config, layer.arrays)


def host_of(array: Any) -> np.ndarray:
    """An array of any framework as NumPy's."""
    if ADAPTER.owns(array):
        found: np.ndarray = host(array)
        return found
    return np.asarray(array.detach() if hasattr(array, "detach") else array)
