"""The router of a sparse mixture as a module of its own: from tokens to experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensormoe.editing import scale_routes
from tensormoe.mixtures import PER_CHOICE, MixtureConfig, Parts, SparseConfig
from tensormoe.routing import CartesianRoutes, LevelRoutes, ProductRoutes, Routes
from tensormoe_torch._activations import ACTIVATIONS
from tensormoe_torch._adapter import BACKEND
from tensormoe_torch._autograd import no_autocast
from tensormoe_torch._checks import check_input
from tensormoe_torch._gate import across_processes
from tensormoe_torch._hooks import move_hooks
from tensormoe_torch._sharded import Copied
from tensormoe_torch.mixtures._base import reset_own

# a pytree to PyTorch, so that transformations and wrappers find the tensors of a record
for _record in (Routes, ProductRoutes, LevelRoutes, CartesianRoutes):
    torch.export.register_dataclass(
        _record, serialized_type_name=f"tensormoe.routing.{_record.__name__}"
    )


class MixtureRouter(Copied):
    """Routing of a mixture: (..., in) to the routing record.

    Its parameters are the mixture's arrays whose names start with ``router.``. Logits and scores
    are float32 at least. A forward hook on this module sees the record of every call.

    Args:
        config: the mixture.
        device: of the parameters.
        dtype: of the parameters; buffers are float32 at least.

    Attributes:
        config: the mixture.
        synchronized: whether, in training, ``balance`` counts the load of all processes of a group;
            :func:`synchronize_gates` sets it.
        process_group: that group; None for all processes.
        boundary: of a mixture that is cut over devices, which all have the whole router.
        steering: what is added to the logits, one amount per expert each; contexts set it for a
            while. Compiled models see it, other than a new hook.
        scaling: factors of the weights by the expert's number, set likewise.
    """

    # of the class, so that routers that were pickled before have them
    steering: tuple[tuple[float, ...], ...] = ()
    scaling: tuple[Mapping[int, float], ...] = ()

    def __init__(self, config: MixtureConfig, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.synchronized = False
        self.process_group: dist.ProcessGroup | None = None
        self._own = {
            name.removeprefix("router."): array
            for name, array in config.own.items()
            if name.startswith("router.")
        }
        for name, array in self._own.items():
            empty = torch.empty(array.shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        for name, shape in config.buffer_shapes().items():
            empty = torch.empty(shape, device=device, dtype=wide)
            self.register_buffer(name.partition(".")[2], empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew: a projection like that of ``nn.Linear``, biases of zero."""
        reset_own(self, self._own)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self, x: Tensor) -> Any:
        """The experts of tokens (..., in).

        In training, noise is drawn from PyTorch's generator, and biases for the choice move.

        Args:
            x: (..., in), in the mixture's dtype.

        Raises:
            BackendError, ShapeError: the input does not fit.
        """
        features = self.config.in_features
        x, weight = self._whole(x), self._whole(next(self.parameters(recurse=False)))
        batch_shape = check_input(x, features, weight, narrower=True)
        rows = x.reshape(prod(batch_shape), features)
        held = {f"router.{name}": self._whole(getattr(self, name)) for name in self._own}
        held |= {f"router.{name}": buffer for name, buffer in self.named_buffers(recurse=False)}
        for amounts in self.steering:
            added = torch.tensor(amounts, dtype=torch.float32, device=x.device)
            bias = held.get("router.bias")
            held["router.bias"] = added if bias is None else bias + added
        across = self.synchronized and self.training
        with no_autocast(x.device.type):
            routes, changed = self.config.route(
                Parts(_no_layers, held, ACTIVATIONS.__getitem__, BACKEND),
                rows,
                training=self.training,
                noise=self._noise(rows) if self.training else None,
                across=across_processes(self.process_group) if across else None,
            )
        for name, values in changed.items():
            with torch.no_grad():
                self.get_buffer(name.partition(".")[2]).copy_(values)
        for factors in self.scaling:
            routes = scale_routes(routes, factors)
        return routes.reshaped(batch_shape, BACKEND) if len(batch_shape) != 1 else routes

    def _noise(self, rows: Tensor) -> Tensor | None:
        shape = self.config.noise_shape(rows.shape[0])
        if shape is None:
            return None
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return self._agreed(torch.randn(shape, device=rows.device, dtype=wide))


class SparseRouter(MixtureRouter):
    """Logits, scores, and the choice of k experts: (..., in) to the routing record.

    Its parameters are ``projection`` (in, N) and, if the router has one, ``bias`` (N,); a router
    with ``balance`` has the buffer ``choice_bias`` (N,). Logits and scores are float32 at least. A
    forward hook on this module sees the record of every call.

    Args:
        config: the mixture.
        device: of the parameters.
        dtype: of the parameters; buffers are float32 at least.

    Attributes:
        config: the mixture.
        synchronized: whether, in training, ``balance`` counts the load of all processes of a group;
            :func:`synchronize_gates` sets it.
        process_group: that group; None for all processes.
    """

    config: SparseConfig

    @torch.no_grad()
    def pruned(self, config: SparseConfig, kept: Sequence[int]) -> SparseRouter:
        """A router of some of the outputs, with the mode, flags and hooks of this one.

        Args:
            config: of the mixture without the other experts.
            kept: the outputs that stay.
        """
        index = torch.tensor(kept, device=self.get_parameter("projection").device)
        new = SparseRouter(config, "meta", self.get_parameter("projection").dtype)
        taken = {
            name: each.index_select(-1, index) if name in PER_CHOICE else each
            for name, each in self.state_dict().items()
        }
        new.load_state_dict(taken, assign=True)
        new.train(self.training)
        for name, parameter in self.named_parameters():
            new.get_parameter(name).requires_grad_(parameter.requires_grad)
        new.synchronized, new.process_group = self.synchronized, self.process_group
        move_hooks(self, new)
        return new

    def extra_repr(self) -> str:
        """The part of ``repr`` between the brackets."""
        count = self.config.num_choices
        return f"{self.config.in_features}, {count}, {self.config.top_k}, {self.config.router!r}"


def _no_layers(name: str, x: Tensor, given: object) -> Tensor:
    raise LookupError(f"a router runs no layer; got {name!r}.")
