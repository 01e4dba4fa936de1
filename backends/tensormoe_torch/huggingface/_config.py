"""Description in a model's ``config.json`` of its factorized layers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from tensormoe.checkpoint._model_config import METHOD, SCHEMA_VERSION, model_config
from tensormoe.errors import SpecError
from tensormoe_torch.huggingface._describe import described, entry


@register_quantization_config(METHOD)
class TensormoeConfig(QuantizationConfigMixin):
    """The factorized layers of a model, as ``quantization_config`` in its ``config.json``.

    Args:
        modules: for each layer by its name in the model what :meth:`to_dict` of its configuration
            gives, with its ``kind``.

    Attributes:
        quant_method: ``"tensormoe"``.
        modules: as given.

    Raises:
        SpecError: a layer that cannot be.
    """

    def __init__(self, modules: Mapping[str, Mapping[str, Any]]) -> None:
        if not isinstance(modules, Mapping):
            raise SpecError(f"modules must be a mapping of names and layers; got {modules!r:.80}.")
        for name, values in modules.items():
            if not isinstance(name, str) or not all(name.split(".")):
                raise SpecError(f"a module must have a dotted name; got {name!r:.80}.")
            entry(name, values)
        for name in modules:
            parts = name.split(".")
            outer = {".".join(parts[:count]) for count in range(1, len(parts))} & modules.keys()
            if outer:
                raise SpecError(f"no module may lie in another; {name!r} lies in {outer.pop()!r}.")
        self.quant_method = METHOD
        self.modules = dict(modules)
        self._model: weakref.ref[nn.Module] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> TensormoeConfig:
        """A configuration that always describes the current layers of a model."""
        config = cls({})
        config._model = weakref.ref(model)
        return config

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The inverse of :meth:`to_dict`; strict about names.

        Raises:
            SpecError: a value is missing, unknown or cannot be.
        """
        expected = set(model_config({}))
        if not isinstance(config_dict, Mapping) or set(config_dict) != expected:
            found = sorted(config_dict) if isinstance(config_dict, Mapping) else config_dict
            raise SpecError(
                f"a quantization_config of {METHOD!r} must have exactly {sorted(expected)}; got "
                f"{found!r:.200}. The config.json is damaged: copy it anew."
            )
        version = config_dict["version"]
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise SpecError(
                f"the version of a quantization_config must be 1 to {SCHEMA_VERSION}; got "
                f"{version!r:.80}. A newer tensormoe wrote it: pip install --upgrade tensormoe."
            )
        config = cls(config_dict["modules"])
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, for JSON.

        Raises:
            SpecError: the model holds a layer that plain values can't rebuild.
        """
        model = None if self._model is None else self._model()
        return model_config(self.modules if model is None else described(model))

    def __getstate__(self) -> dict[str, Any]:
        # a copy describes the model as it is now: it may end up with another model
        return {"quant_method": METHOD, "modules": self.to_dict()["modules"], "_model": None}
