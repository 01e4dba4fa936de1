"""Tables of a GPU report on PyTorch: eager, compiled, and in CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from _gpu_records import Cells, Recorder
from _gpu_roofline import Rooflines, bound, measured, published, relative_error
from _gpu_settings import (
    FLOAT32,
    PRECISIONS,
    TF32,
    TOLERANCES,
    Precision,
    Setting,
    Sizes,
    check_rounding,
    settings,
)
from _gpu_timing import Turns, torch_cold, torch_elapsed
from _shared import Call, interleaved
from _torch_layers import direct, plain_products, recorded, stepped, trained
from torch import Tensor, nn

from tensormoe_torch import MuMoE

MICRO = 1e6
LONG_COMPILATION = 10.0


class TorchTables:
    """Measures on one device.

    Args:
        recorder: of this part.
        sizes: of the report.
        device: "cuda" or "cpu".
        rooflines: by name of a precision; those that are missing leave cells empty.
    """

    def __init__(self, recorder: Recorder, sizes: Sizes, device: str, rooflines: Rooflines) -> None:
        self.recorder, self.sizes, self.device = recorder, sizes, device
        self.rooflines = rooflines
        self.elapsed = torch_elapsed(device)
        self.precisions = tuple(each for each in PRECISIONS if has_precision(device, each))

    def device_facts(self) -> Rooflines:
        """Record what the device is and whether TF32 is in use; its rooflines."""
        recorder = self.recorder
        name = "CPU"
        if self.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            name = properties.name
            recorder.fact("compute capability", f"{properties.major}.{properties.minor}")
            recorder.fact("multiprocessors", properties.multi_processor_count)
            recorder.fact("memory, GiB", properties.total_memory / 2**30)
            recorder.fact("L2 cache, MiB", _l2_bytes() / 2**20)
            recorder.fact("CUDA of PyTorch", torch.version.cuda)
        recorder.fact("device", name)
        for precision in PRECISIONS:
            if precision not in self.precisions:
                recorder.left_out(precision.name, "the device has no tensor cores for it")
        for precision in self.precisions:
            what = f"error of a product on PyTorch, {precision.name}"
            recorder.tried(what, partial(self._product_error, what, precision))
        turn = Turns(self.elapsed, self.sizes.turn)
        own = measured(self.device, self.precisions, self.sizes, turn)
        for precision in self.precisions:
            rate = own[precision.name].matmul_rate / 1e12
            recorder.fact(f"measured TFLOP/s, {precision.name}", rate)
        recorder.fact("measured copy, GB/s", own[FLOAT32.name].bandwidth / 1e9)
        recorder.fact("measured smallest operation, µs", own[FLOAT32.name].overhead * MICRO)
        known = published(name)
        recorder.fact("roofline", "measured, as below" if known is None else "published peaks")
        if known is None:
            return own
        for name, roofline in known.items():
            recorder.fact(f"published TFLOP/s, {name}", roofline.matmul_rate / 1e12)
        return known

    def eager(self) -> None:
        """Layer, products and einsum, one call after another."""
        self._each("PyTorch, eager", self._eager_row)

    def graphs(self) -> None:
        """The layer's forward call captured in a CUDA graph, which Python does not slow."""
        if self.device != "cuda":
            self.recorder.left_out("CUDA graphs", "they need a GPU")
            return
        self._each("PyTorch, forward in a CUDA graph", self._graph_row)

    def compiled(self) -> None:
        """Compiled calls, and the seconds that compiling takes."""
        # what every first compilation loads is no layer's
        first = self._compile(lambda x: x.sin() @ x)
        ones = torch.ones(8, 8, device=self.device)
        self.recorder.tried("compiling one product", partial(first, ones))
        self._each("PyTorch, compiled", self._compiled_row)

    def _each(self, table: str, row: Callable[[Setting], Cells]) -> None:
        def run(setting: Setting) -> None:
            torch.manual_seed(0)
            tf32 = setting.precision.tf32
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            self.recorder.row(table, setting.cells | row(setting))

        self.recorder.each(settings(self.sizes, self.precisions), run, self._clean)

    def _eager_row(self, setting: Setting) -> Cells:
        layer, rank, x = self._made(setting)
        einsum, plain = direct(layer, x), self._linear(setting)
        fits = not self.recorder.tried(f"einsum of {setting}", einsum)
        with torch.no_grad():
            if fits:
                check_equal(layer(x), einsum(), setting.precision)
            forward: list[Call] = [
                lambda: layer(x),
                lambda: plain(x),
                plain_products(recorded(lambda: layer(x))),
                *([einsum] if fits else []),
            ]
            mine, linear, products, *other = self._compare(forward)
        x.requires_grad_()
        step = stepped(lambda: layer(x), layer, x)
        products_too = plain_products(recorded(step))
        steps = [step, stepped(lambda: plain(x), plain, x), products_too]
        einsum_step = stepped(einsum, layer, x) if fits else None
        if einsum_step and not self.recorder.tried(f"step of einsum of {setting}", einsum_step):
            steps.append(einsum_step)
        both, linear_step, products_step, *other_step = self._compare(steps)
        return {
            "rank": str(rank),
            "forward µs": mine * MICRO,
            "÷ products": mine / products,
            "÷ nn.Linear": mine / linear,
            "einsum ÷ layer": other[0] / mine if other else None,
            "% of roofline": self._share(layer, setting, mine),
            "step µs": both * MICRO,
            "step ÷ products": both / products_step,
            "step ÷ nn.Linear": both / linear_step,
            "einsum ÷ step": other_step[0] / both if other_step else None,
            "step, % of roofline": self._share(layer, setting, both, training=True),
        }

    def _graph_row(self, setting: Setting) -> Cells:
        layer, _, x = self._made(setting)

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        products = plain_products(recorded(forward))
        replays = [_captured(each) for each in (forward, products)]
        mine, alone, eager = self._compare([*replays, forward])
        return {
            "forward µs": mine * MICRO,
            "L2 cold µs": torch_cold(replays[0], _l2_bytes()) * MICRO,
            "eager ÷ graph": eager / mine,
            "÷ products in a graph": mine / alone,
            "% of roofline": self._share(layer, setting, mine),
        }

    def _compiled_row(self, setting: Setting) -> Cells:
        # what was compiled before counts against a limit
        torch._dynamo.reset()
        layer, rank, x = self._made(setting)
        mine = self._compiled_module(layer, x)
        linear = self._compiled_module(self._linear(setting), x)
        forward, both = mine["forward µs"], mine["step µs"]
        return {
            "rank": str(rank),
            "forward µs": forward,
            "eager ÷ compiled": mine["eager"] / forward,
            "÷ nn.Linear": forward / linear["forward µs"],
            "einsum ÷ layer": self._compiled_einsum(layer, x, setting, forward),
            "% of roofline": self._share(layer, setting, forward / MICRO),
            "step µs": both,
            "eager ÷ compiled step": mine["eager step"] / both,
            "step ÷ nn.Linear": both / linear["step µs"],
            "step, % of roofline": self._share(layer, setting, both / MICRO, training=True),
            "compiling s": mine["compiling s"],
            "compiling step s": mine["compiling step s"],
            "compiling nn.Linear's step s": linear["compiling step s"],
        }

    def _compiled_module(self, module: nn.Module, x: Tensor) -> dict[str, float]:
        """Microseconds of calls, compiled and eager, and the seconds that compiling takes."""
        compiled = self._compile(module)
        with torch.no_grad():
            seconds = timed(partial(compiled, x))
            forward, eager = self._compare([partial(compiled, x), partial(module, x)])
        source = x.clone().requires_grad_()
        steps = [stepped(partial(each, source), module, source) for each in (compiled, module)]
        # the backward pass is compiled when the first one is asked for
        step_seconds = timed(steps[0])
        both, eager_both = self._compare(steps)
        return {
            "forward µs": forward * MICRO,
            "eager": eager * MICRO,
            "step µs": both * MICRO,
            "eager step": eager_both * MICRO,
            "compiling s": seconds,
            "compiling step s": step_seconds,
        }

    def _compiled_einsum(
        self, layer: MuMoE, x: Tensor, setting: Setting, mine: float
    ) -> float | None:
        """The direct formulation, compiled as far as the compiler can, relative to the layer."""
        name = f"compiled einsum of {setting}"
        if self.recorder.left < LONG_COMPILATION and self.device == "cuda":
            self.recorder.left_out(name, "no time left")
            return None
        einsum = torch.compile(direct(layer, x), backend=self._backend, dynamic=False)
        with torch.no_grad():
            if self.recorder.tried(name, einsum):
                return None
            return self._compare([einsum])[0] * MICRO / mine

    @property
    def _backend(self) -> str:
        # on the CPU the report itself is tried: C++ compilers take longer than all the rest
        return "inductor" if self.device == "cuda" else "eager"

    def _compile(self, module: Any) -> Any:
        return torch.compile(module, fullgraph=True, dynamic=False, backend=self._backend)

    def _made(self, setting: Setting) -> tuple[MuMoE, Any, Tensor]:
        dtype = getattr(torch, setting.precision.dtype)
        features = self.sizes.features
        made = trained(setting.factorization, setting.experts, features, self.device, dtype)
        if made is None:
            raise ValueError(f"no rank within the parameters of {features} → {features}")
        layer, rank = made
        return layer, rank, torch.randn(setting.batch, features, device=self.device, dtype=dtype)

    def _linear(self, setting: Setting) -> nn.Linear:
        dtype = getattr(torch, setting.precision.dtype)
        return nn.Linear(self.sizes.features, self.sizes.features, device=self.device, dtype=dtype)

    def _compare(self, calls: list[Call]) -> list[float]:
        turn = Turns(self.elapsed, self.sizes.turn)
        return interleaved(calls, self.sizes.seconds, turn=turn)

    def _share(
        self, layer: MuMoE, setting: Setting, seconds: float, training: bool = False
    ) -> float | None:
        least = bound(layer.config, setting.batch, setting.precision, self.rooflines, training)
        return None if least is None else 100 * least / seconds

    def _product_error(self, what: str, precision: Precision) -> None:
        torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
        torch.manual_seed(0)
        dtype = getattr(torch, precision.dtype)
        left, right = (torch.randn(512, 512, device=self.device).to(dtype) for _ in range(2))
        exact = left.double() @ right.double()
        error = relative_error((left @ right).double().cpu().numpy(), exact.cpu().numpy())
        self.recorder.fact(what, f"{error:.1e}")
        check_rounding(precision, error)

    def _clean(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def check_equal(mine: Tensor, other: Tensor, precision: Precision) -> None:
    """Raise if two formulations of the same layer are apart."""
    apart = float((mine.float() - other.float()).abs().max() / other.float().abs().max())
    if not apart <= TOLERANCES[precision.name]:
        raise ArithmeticError(f"layer and einsum differ by {apart:.1e} of the largest output")


def timed(call: Call) -> float:
    """Seconds by the clock of a call that has never run."""
    start = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start


def _captured(call: Call) -> Call:
    """A graph of a call's kernels."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def has_precision(device: str, precision: Precision) -> bool:
    """Whether a device multiplies in a precision, and not in place of it in another."""
    if device == "cpu":
        return precision is not TF32
    return not precision.tensor_cores or torch.cuda.get_device_capability() >= (8, 0)


def _l2_bytes() -> int:
    found: int = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    return found
