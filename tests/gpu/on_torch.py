"""PyTorch on a GPU: the contract of a backend, and the layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensormoe.testing import BackendContract
from tests.gpu._matching import DEVICE, Found, LayersMatch

torch = pytest.importorskip("torch")
tensormoe_torch = pytest.importorskip("tensormoe_torch")


def device(array: np.ndarray) -> Any:
    return torch.tensor(array, device=DEVICE)


def host(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().cpu().numpy()
    return found


def test_the_device(record_testsuite_property: Callable[[str, object], None]) -> None:
    assert device(np.ones(3)).device.type == DEVICE
    assert torch.backends.cuda.matmul.allow_tf32 is False
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    record_testsuite_property("device", name)
    record_testsuite_property("version", torch.__version__)


class TestContract(BackendContract):
    backend = tensormoe_torch.BACKEND

    def from_numpy(self, array: np.ndarray) -> Any:
        return device(array)

    def to_numpy(self, array: Any) -> np.ndarray:
        return host(array)


class TestLayers(LayersMatch):
    def run(self, layer: Any, path: Path, arguments: list[Any], cotangent: np.ndarray) -> Found:
        module = getattr(tensormoe_torch, type(layer).__name__).load(path, device=DEVICE)
        x = device(arguments[0])
        if x.is_floating_point():
            x.requires_grad_()
        output = module(x, *([device(each) for each in made] for made in arguments[1:]))
        output.backward(device(cotangent))
        found = {name: host(each.grad) for name, each in module.named_parameters()}
        return host(output), found | ({} if x.grad is None else {"x": host(x.grad)})
