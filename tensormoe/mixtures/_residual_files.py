"""Files of adapters alone: one layer's, or all of a model by the paths of their modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from tensormoe._validation import brief
from tensormoe.backend import Array, Backend
from tensormoe.checkpoint import match_arrays, read_checkpoint
from tensormoe.errors import CheckpointError, TensormoeError
from tensormoe.mixtures._residual import ResidualConfig


@dataclass(frozen=True, eq=False)
class Adapters:
    """Adapters by the path of their module in a model, as files hold them.

    A layer that is saved by itself has the path ``""``. In a file, arrays have the names that they
    have in the model: ``<path>.adapter.factors.input``.

    Args:
        configs: by path.
        arrays: by path, and by canonical name there: ``adapter.factors.input``, ….
    """

    configs: Mapping[str, ResidualConfig]
    arrays: Mapping[str, Mapping[str, Array]]

    def to_dict(self) -> dict[str, Any]:
        """The configurations in plain values, as files hold them."""
        return {"modules": {path: config.to_dict() for path, config in self.configs.items()}}

    def named(self) -> dict[str, Array]:
        """All arrays by their names in a file."""
        return {
            _joined(path, name): array
            for path, arrays in self.arrays.items()
            for name, array in arrays.items()
        }


def read_adapters(path: str | PathLike[str], backend: Backend) -> Adapters:
    """The adapters of a file, whichever framework wrote it.

    Args:
        path: the file.
        backend: the library of the arrays to return.

    Raises:
        CheckpointError: not a file of adapters, or arrays that do not fit their description; the
            message lists every difference.
    """
    saved = read_checkpoint(path, backend)
    if saved.block != ResidualConfig.block:
        raise CheckpointError(
            f"the file must hold adapters, as save_adapter writes them; got a {saved.block}. Open "
            f"it with {saved.block}.load."
        )
    modules = saved.config.get("modules")
    if set(saved.config) != {"modules"} or not isinstance(modules, Mapping) or not modules:
        raise CheckpointError(
            f"a file of adapters must describe its modules; got {brief(saved.config)}. It is "
            "damaged: copy it anew."
        )
    configs: dict[str, ResidualConfig] = {}
    for name, values in modules.items():
        try:
            configs[name] = ResidualConfig.from_dict(values)
        except TensormoeError as error:
            raise CheckpointError(
                f"the file does not describe adapters: at {name!r}: {error}"
            ) from (error)
    named = {name: _shapes(config) for name, config in configs.items()}
    match_arrays(
        {
            _joined(name, each): shape
            for name, shapes in named.items()
            for each, shape in shapes.items()
        },
        saved.arrays,
    )
    arrays = {
        name: {each: saved.arrays[_joined(name, each)] for each in shapes}
        for name, shapes in named.items()
    }
    return Adapters(configs, arrays)


def adapter_of(
    adapters: Adapters, config: ResidualConfig | None, name: str | None = None
) -> tuple[ResidualConfig, dict[str, Array]]:
    """One adapter of a file: its configuration, and its layer's arrays by canonical name.

    Args:
        adapters: of the file.
        config: what it must be; None for any.
        name: path of its module, in a file of several.

    Raises:
        CheckpointError: no such path, several and none named, or another layer's adapter; the
            message lists every difference.
    """
    held = ", ".join(map(repr, [*adapters.configs][:3]))
    if name is None:
        if len(adapters.configs) > 1:
            raise CheckpointError(
                f"the file holds {len(adapters.configs)} adapters, {held}, …; one must be named. "
                "Pass name=…, the path of its module."
            )
        name = next(iter(adapters.configs))
    elif name not in adapters.configs:
        raise CheckpointError(
            f"name must be the path of an adapter in the file; got {brief(name)}, and it holds "
            f"{held}."
        )
    if config is not None:
        check_adapters({name: config}, Adapters({name: adapters.configs[name]}, {}))
    arrays = {each.removeprefix("adapter."): one for each, one in adapters.arrays[name].items()}
    return adapters.configs[name], arrays


def check_adapters(wanted: Mapping[str, ResidualConfig], found: Adapters) -> None:
    """Refuse adapters of other layers.

    Args:
        wanted: those of the model, by path.
        found: those of a file.

    Raises:
        CheckpointError: modules or configurations differ; the message lists every difference.
    """
    lines = [f"{path!r} is missing" for path in wanted if path not in found.configs]
    lines += [f"{path!r} is unexpected" for path in found.configs if path not in wanted]
    for path, config in wanted.items():
        other = found.configs.get(path)
        if other is not None and other != config:
            at = f"{path}: " if path else ""
            lines += (at + each for each in _differences(config.to_dict(), other.to_dict()))
    if lines:
        raise CheckpointError(
            "the adapters of a file must be those of the same layers. Add adapters with the file's "
            "own settings instead. Differences:\n" + "\n".join(lines)
        )


def _shapes(config: ResidualConfig) -> dict[str, tuple[int, ...]]:
    return {**config.parameter_shapes(), **config.buffer_shapes()}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _differences(wanted: Any, found: Any, place: str = "") -> Iterator[str]:
    """Every value that differs, with its place."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in wanted:
            inner = f"{place}.{key}" if place else key
            yield from _differences(wanted[key], found.get(key), inner)
    elif wanted != found:
        yield f"{place} must be {wanted!r}; got {found!r}"
