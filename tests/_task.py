"""A task that one linear layer cannot do."""

from __future__ import annotations

import numpy as np


def task() -> tuple[np.ndarray, np.ndarray, float]:
    """The sign of the first feature picks the matrix.

    Returns:
        Inputs (256, 8) and targets (256, 3) in float32, and the loss of the best linear layer.
    """
    x, maps = (
        np.random.default_rng(seed).standard_normal(shape).astype("float32")
        for seed, shape in enumerate([(256, 8), (2, 8, 3)])
    )
    target = np.where(x[:, :1] > 0, x @ maps[0], x @ maps[1])
    design = np.c_[x, np.ones(256, "float32")]
    best = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return x, target, float(((best - target) ** 2).mean())
