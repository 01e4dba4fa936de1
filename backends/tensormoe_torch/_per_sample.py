"""Per-sample gradients, for engines that clip them one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import grad, vmap

from tensormoe.errors import SpecError
from tensormoe_torch._autograd import route
from tensormoe_torch._factors import Factors, mixture
from tensormoe_torch._gate import ExpertGate
from tensormoe_torch._sharded import stored

__all__ = ["per_sample_gradients"]


def per_sample_gradients(
    module: Factors | ExpertGate, activations: Sequence[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Gradients of each sample's share of a loss by the parameters of a layer: opacus's samplers.

    The parts of a layer that have parameters are its factors and its gate; register both::

        from opacus.grad_sample import register_grad_sampler

        register_grad_sampler([Factors, ExpertGate])(per_sample_gradients)

    Args:
        module: the factors or the gate of a layer.
        activations: what the module was called with, samples along the first axis.
        backprops: the derivative of the loss by its (first) result.

    Returns:
        By trainable parameter, its gradients (samples, …).

    Raises:
        SpecError: a gate of several levels, of whose results only the first one's derivative is
            given; a gate with batch norm, where a sample has no gradient of its own; one with noise
            or balance, whose choice is not known any more; parameters that are computed from
            others.

    >>> import torch
    >>> from tensormoe_torch import MuMoE
    >>> factors, x = MuMoE(8, 4, experts=3, rank=2).factors, torch.ones(5, 8)
    >>> found = per_sample_gradients(factors, [x, torch.ones(5, 3)], torch.ones(5, 4))
    >>> found[factors["input"]].shape
    torch.Size([5, 8, 2])
    """
    config, is_gate = module.config, isinstance(module, ExpertGate)
    gate = config.gate
    shares = config.buffer_shapes() or (gate is not None and gate.noise > 0)
    if is_gate and (config.spec.levels > 1 or shares):
        raise SpecError(
            "gradients of single samples need a gate of one level, without batch norm, noise and "
            "balance; got "
            f"{config.spec.levels} levels and {config.gate!r}. Freeze the gate, or give the layer "
            "coefficients."
        )
    prefix = "gate." if is_gate else "factors."
    names = [name for name in config.parameter_shapes() if name.startswith(prefix)]
    short = {name: name.removeprefix(prefix) for name in names}
    held = stored(module, short.values())
    trained = {name: held[short[name]] for name in names if held[short[name]].requires_grad}
    fixed = {name: held[short[name]].detach() for name in names if name not in trained}

    def share(parameters: dict[str, Tensor], cotangent: Tensor, *inputs: Tensor) -> Tensor:
        x, *given = (each.unsqueeze(0) for each in inputs)
        if is_gate:
            rows = x.reshape(-1, x.shape[-1])
            (result,), _ = route(
                config, fixed | parameters, rows, {}, cotangent.shape[:-1], training=False
            )
        else:
            result = mixture(config, fixed | parameters, x, given).squeeze(0)
        return (result * cotangent).sum()

    found = vmap(grad(share), in_dims=(None, *[0] * (1 + len(activations))))(
        {name: each.detach() for name, each in trained.items()}, backprops, *activations
    )
    return {parameter: found[name] for name, parameter in trained.items()}
