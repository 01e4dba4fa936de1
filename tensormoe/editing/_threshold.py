"""Thresholds of a classifier moved for a subgroup: by the experts that it uses, or blindly."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from tensormoe._extras import require
from tensormoe._validation import brief, is_number, non_negative_int
from tensormoe.backend import Array, Backend, backend_of, check_array, device_of
from tensormoe.editing._coefficients import one_level
from tensormoe.errors import ShapeError, SpecError
from tensormoe.functional._dtypes import cast, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray


def threshold_experts(
    logits: Array,
    coefficients: Any,
    subgroup: Array,
    scale: float,
    *,
    target: int,
    experts: int | None = None,
) -> Array:
    """Logits of which one is moved for inputs that use the experts of a subgroup.

    y_c + λ ⟨ā, a⟩, with a the coefficients of an input and ā the mean ones of the subgroup
    (:func:`subgroup_coefficients`): inputs that use other experts keep their logits, where one
    threshold for everybody moves them all. It corrects the bias of a classifier against a
    subpopulation without any training (expert thresholding; Oldfield et al. 2024, section 4, whose
    own formula was not at hand: this one follows descriptions of it).

    Args:
        logits: (..., C).
        coefficients: of one level, for the same inputs: an array (..., N), a ``TopK``, or a routing
            record.
        subgroup: ā, (N,).
        scale: λ, a finite number; below zero against the class.
        target: the class c whose logit is moved, in [0, C).
        experts: N, which a ``TopK`` does not tell.

    Returns:
        Logits of the same shape and dtype, differentiable by all arrays. The sum is in float32 at
        least.

    Raises:
        BackendError: arrays of an unknown library, or of several.
        ShapeError: logits, coefficients and subgroup that do not fit each other, coefficients of
            several levels, or a class out of range.
        SpecError: a scale that is not a finite number.

    >>> import numpy as np
    >>> logits, coefficients = np.zeros((2, 2)), np.array([[1.0, 0.0], [0.25, 0.75]])
    >>> threshold_experts(logits, coefficients, np.array([1.0, 0.0]), 2.0, target=1)
    array([[0. , 2. ],
           [0. , 0.5]])
    """
    given, backend = one_level(coefficients, experts)
    _check_logits(logits, backend, target)
    check_array(subgroup, backend, "subgroup")
    count = int(given.shape[-1])
    if tuple(subgroup.shape) != (count,):
        raise ShapeError(
            f"subgroup must be the mean coefficients of the {count} experts, ({count},); got "
            f"{tuple(subgroup.shape)}. subgroup_coefficients makes them."
        )
    if tuple(logits.shape[:-1]) != tuple(given.shape[:-1]):
        raise ShapeError(
            "logits and coefficients must be those of the same inputs; got "
            f"{tuple(logits.shape)} and {tuple(given.shape)}. Their leading axes must agree."
        )
    likeness = backend.namespace.sum(
        widened(given, backend) * widened(subgroup, backend), axis=-1, keepdims=True
    )
    return _moved(logits, likeness * _checked_scale(scale), target, backend)


def threshold_blindly(logits: Array, scale: float, *, target: int) -> Array:
    """Logits of which one is moved by the same amount for every input.

    This is a threshold for everybody, what :func:`threshold_experts` has to be better than.

    Args:
        logits: (..., C).
        scale: λ, a finite number.
        target: the class whose logit is moved, in [0, C).

    Returns:
        As :func:`threshold_experts`.

    Raises:
        BackendError, ShapeError, SpecError: as :func:`threshold_experts`.

    >>> import numpy as np
    >>> threshold_blindly(np.zeros((1, 3)), 0.5, target=2)
    array([[0. , 0. , 0.5]])
    """
    backend = backend_of(logits)
    _check_logits(logits, backend, target)
    return _moved(logits, _checked_scale(scale), target, backend)


def oversampled_indices(groups: Any, *, seed: int = 0) -> NDArray[Any]:
    """Indices of inputs with which every group is drawn as often as the largest one.

    Every input is there once, and inputs of smaller groups are drawn again, with replacement.
    Training on them is the usual remedy for small subgroups, and a control for edits without
    training. NumPy must be installed.

    Args:
        groups: (inputs,) the group of every input, whole numbers or text: an array that NumPy
            reads, or a sequence.
        seed: of the draws.

    Returns:
        (largest group · number of groups,) integers, in the order of the inputs.

    Raises:
        MissingDependencyError: no NumPy.
        ShapeError: not one group per input, or no inputs.
        SpecError: a seed that cannot be.

    >>> oversampled_indices(["men", "men", "men", "women"]).tolist()
    [0, 1, 2, 3, 3, 3]
    """
    require("oversampled_indices", ("numpy",), "numpy")
    import numpy as np

    try:
        found = np.asarray(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"groups must be one per input; got {brief(groups)}. Pass a list, or an array in host "
            "memory."
        ) from error
    if found.ndim != 1 or not found.size or found.dtype.kind not in "biuUS":
        raise ShapeError(
            "groups must be whole numbers or text, (inputs,), of one input at least; got "
            f"{found.dtype} of shape {found.shape}."
        )
    rng = np.random.default_rng(non_negative_int(seed, "seed"))
    _, numbers, sizes = np.unique(found, return_inverse=True, return_counts=True)
    drawn = [np.arange(found.size)]
    for group, size in enumerate(sizes):
        drawn.append(rng.choice(np.flatnonzero(numbers == group), sizes.max() - size))
    return np.sort(np.concatenate(drawn))


def _moved(logits: Array, shift: Any, target: int, backend: Backend) -> Array:
    """Logits with a shift, (..., 1) or a number, added to one class."""
    xp, wide = backend.namespace, widened(logits, backend)
    here = xp.arange(logits.shape[-1], device=device_of(logits)) == target
    # other classes are passed on as they are, infinite ones included
    moved = cast(xp.where(here, wide + shift, wide), logits.dtype, backend)
    return moved


def _check_logits(logits: Array, backend: Backend, target: int) -> None:
    check_array(logits, backend, "logits")
    if logits.ndim < 1 or not backend.namespace.isdtype(logits.dtype, "real floating"):
        raise ShapeError(
            f"logits must be real floating point, (..., C); got {logits.dtype} of shape "
            f"{tuple(logits.shape)}."
        )
    classes = int(logits.shape[-1])
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < classes:
        raise ShapeError(f"target must lie in [0, {classes}), the classes; got {brief(target)}.")


def _checked_scale(scale: float) -> float:
    if not is_number(scale) or not isfinite(scale):
        raise SpecError(f"scale must be a finite number; got {brief(scale)}.")
    return float(scale)
