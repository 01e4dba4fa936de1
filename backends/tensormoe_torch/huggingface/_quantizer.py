"""Quantizer that transformers calls when it loads a model with factorized layers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tensormoe.checkpoint._model_config import METHOD
from tensormoe.errors import BackendError, CheckpointError, SpecError
from tensormoe_torch._mlp import MuMoEMLP
from tensormoe_torch.adapters import freeze, has_adapters
from tensormoe_torch.compression._experts import FactorizedExperts
from tensormoe_torch.huggingface._build import install
from tensormoe_torch.huggingface._config import TensormoeConfig


@register_quantizer(METHOD)
class TensormoeQuantizer(HfQuantizer):
    """Puts factorized layers into a model before its weights are loaded.

    transformers makes one for every folder whose ``config.json`` names the method. A loaded model
    is a plain one afterwards: it trains, changes its dtype and is saved like any other.
    """

    quantization_config: TensormoeConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to factorize while loading.

        Raises:
            SpecError: the model on disk is dense.
        """
        if not self.pre_quantized:
            raise SpecError(
                "a dense model can't be factorized while it is loaded. Load it without "
                "quantization_config, and call tensormoe_torch.compress or replace."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        made = install(model, self.quantization_config.modules, checkpoint_files)
        self._shapes = {
            id(module): {key: array.shape for key, array in module.state_dict().items()}
            for module in made
        }
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Leave factorized layers out of a plan of tensor or expert parallelism.

        Rules of a plan are for the dense experts that were there: their hooks would sum the outputs
        of whole layers over all processes. Loaded layers are cut along legs of their own.
        """
        # rules have a wildcard in the place of a layer's number
        modules = self.quantization_config.modules
        factorized = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules}
        for key in [*plan]:
            if any(key == name or key.startswith(f"{name}.") for name in factorized):
                del plan[key]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        _check_loaded(model, self._shapes)
        _check_groups(model)
        # nothing of this method is needed any more: factors are weights like others, and what
        # transformers keeps quantized models from (casts, training, given state_dicts) is fine
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        model.config.quantization_config = TensormoeConfig.of(model)
        if has_adapters(model):
            # as they were added
            freeze(model)
        _cut(model, self.quantization_config.modules)
        return model

    def is_serializable(self) -> bool:
        """Whether such models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether such models can be trained."""
        return True


def _check_loaded(model: nn.Module, shapes: Mapping[int, Mapping[str, torch.Size]]) -> None:
    """Refuse layers whose weights are missing: transformers leaves them uninitialized.

    Args:
        model: that was loaded.
        shapes: of the weights of each layer, by its identity.

    Raises:
        CheckpointError: there are some.
        BackendError: weights that accelerate would fetch for modules of its own choice.
    """
    arrays = [
        (f"{name}.{key}", array, shapes[id(module)].get(key))
        for name, module in model.named_modules()
        if id(module) in shapes
        for key, array in module.state_dict(keep_vars=True).items()
    ]
    offloaded = [name for name, array, _ in arrays if array.device.type == "meta"]
    if offloaded:
        raise BackendError(
            f"factorized layers can't be offloaded; {offloaded[0]!r} and {len(offloaded) - 1} more "
            "are. Give a device_map that keeps them on a device."
        )
    # there are releases that take any shape from a quantized model's files
    missing = [
        name
        for name, array, shape in arrays
        if array.shape != shape or not getattr(array, "_is_hf_initialized", False)
    ]
    if missing:
        raise CheckpointError(
            f"the files must hold every weight of the factorized layers; {missing[0]!r} and "
            f"{len(missing) - 1} more are missing, or of other shapes. The folder is damaged or "
            "incomplete: copy it anew."
        )


def _cut(model: nn.Module, names: Iterable[str]) -> None:
    """Cut factorized layers over the devices of transformers' tensor parallelism, if that is on.

    Layers stay whole that make both halves of gated units: their factors would be saved in shapes
    that no folder has. So do those that the devices do not divide, with a warning.
    """
    meshes = getattr(model, "_mesh_manager", None)
    if meshes is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return
    from tensormoe_torch.parallel import parallelize

    for name in names:
        module = model.get_submodule(name)
        halves = isinstance(module, FactorizedExperts) and module.gate_up_proj is not None
        if halves or (isinstance(module, MuMoEMLP) and module.config.gated):
            continue
        try:
            parallelize(module, meshes.get_mesh("tp"))
        except SpecError as error:
            warnings.warn(f"{name} stays whole on every device: {error}", stacklevel=2)


def _check_groups(model: nn.Module) -> None:
    """Refuse merged experts whose groups are not numbers of experts.

    Raises:
        CheckpointError: some are not.
    """
    for name, module in model.named_modules():
        if not isinstance(module, FactorizedExperts) or module.groups is None:
            continue
        count = module.down_proj.spec.num_experts
        if not bool(((module.groups >= 0) & (module.groups < count)).all()):
            raise CheckpointError(
                f"{name}.groups must hold numbers of experts, 0 to {count - 1}; the file has "
                f"{int(module.groups.min())} to {int(module.groups.max())}. The folder is damaged: "
                "copy it anew."
            )
