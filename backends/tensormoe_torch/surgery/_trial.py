"""Surgery that is undone if the model fails afterwards, with an error that says what it read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from traceback import extract_tb, walk_tb
from typing import Any

from torch import nn

from tensormoe.errors import SpecError
from tensormoe_torch.surgery._inputs import evaluating, run_model


class _NotRun(Exception):
    """A model that fails on its example; the cause is what it raised."""


@contextmanager
def all_or_nothing(
    model: nn.Module, chosen: Mapping[str, nn.Module], names: Sequence[str]
) -> Iterator[None]:
    """Undo all changes if the body fails.

    Args:
        model: whose modules are replaced inside.
        chosen: the modules that were there, by each of their names.
        names: of the replaced modules, each once.

    Raises:
        SpecError: the model does not run its example with the new modules.
    """
    # hooks need nothing: the old modules kept their tables
    places = [(model.get_submodule(name.rpartition(".")[0]), name) for name in chosen]
    flags = [
        (module, flag, vars(module)[flag])
        for module in model.modules()
        for flag in _FLAGS.get(_kind(module), ())
        if flag in vars(module)
    ]
    try:
        yield
    except BaseException as error:
        told = _explain(error, model, names) if isinstance(error, _NotRun) else ""
        for parent, name in places:
            parent._modules[name.rpartition(".")[2]] = chosen[name]
        for module, flag, value in flags:
            setattr(module, flag, value)
        if told:
            raise SpecError(told) from error.__cause__
        raise


# what leave_fused_paths sets
_FLAGS: Mapping[type[nn.Module] | None, tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu",),
    nn.TransformerEncoder: ("use_nested_tensor",),
}


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _FLAGS if kind is not None and isinstance(module, kind)), None)


def try_out(model: nn.Module, example: Any) -> None:
    """Run a model on an example, as :func:`count_inputs` did before."""
    try:
        with evaluating(model):
            run_model(model, example)
    except Exception as error:
        # any code may run here
        raise _NotRun from error


def _explain(failed: _NotRun, model: nn.Module, names: Sequence[str]) -> str:
    """Module and line in which the model failed, and what it read of a new layer."""
    error = failed.__cause__
    assert error is not None
    owners = {id(module): name for name, module in model.named_modules()}
    inner = {id(part) for name in names for part in model.get_submodule(name).modules()}
    where, inside = "", ""
    frames = zip(walk_tb(error.__traceback__), extract_tb(error.__traceback__), strict=True)
    for (frame, _), summary in frames:
        module = frame.f_locals.get("self")
        if not isinstance(module, nn.Module) or id(module) not in owners:
            continue
        name = owners[id(module)]
        if id(module) in inner:
            inside = inside or name
        elif summary.name not in ("_call_impl", "_wrapped_call_impl"):
            where = f"in {name!r} " if name else "in the model "
            where += f"({type(module).__name__}.{summary.name}), at `{(summary.line or '')[:100]}`"
    read = getattr(error, "obj", None)
    wanted = ""
    if isinstance(error, AttributeError) and id(read) in inner:
        wanted = f", which reads {error.name!r} of {owners[id(read)]!r}"
    listed = ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")
    blame = f" It failed {where}{wanted}." if where else ""
    if inside and not wanted:
        blame += f" The new layer at {inside!r} was running."
    return (
        f"the model must run the example with the new layers in place of {listed}; "
        f"{type(error).__name__}: {str(error).rstrip('.')}.{blame} Everything was taken back. "
        "Leave such modules out of the selection, or select the whole block that reads them, if it "
        "is an MLP."
    )
