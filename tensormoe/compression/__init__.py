"""Whole checkpoints: the experts of a model on disk → factors, or matrices rebuilt from them.

A model is a ``.safetensors`` file, an index of several, or the folder that they are in. Its experts
are found by their keys: by a :class:`Pattern` for each projection, or by one of :data:`PRESETS`.
The matrices of one layer and one projection are a :class:`Group`: one tensor (experts, in, out),
which is read, decomposed and written before the next one. :class:`Compression` says what is wanted,
:func:`plan_compression` what that takes, and :func:`compress_checkpoint` does it, as the command
``tensormoe compress`` does.

With a client of a Dask cluster, its workers decompose the groups.

The work is done on NumPy in float32, or in float64 where the experts are. Memory and files are
counted in bytes, parameters in entries, times in seconds. Errors are Frobenius norms of what is
missing, relative to those of the experts: 0 where nothing was lost, 1 where everything was.

Another way to fewer bytes is fewer experts, on any library. :func:`choice_frequencies` and
:func:`cosine_similarity` say which of them :func:`group_experts` puts together,
:func:`cluster_experts` does so by their outputs, and :func:`merge_stacks` makes one of each group.
:func:`most_frequent` says which ones stay where the others are pruned, by frequencies or
:func:`reap_saliency`.

>>> import tempfile
>>> from pathlib import Path
>>> import numpy as np
>>> from safetensors.numpy import save_file
>>> from tensormoe_numpy import MuMoE
>>> rng = np.random.default_rng(0)
>>> modes = [rng.standard_normal((size, 2), dtype="float32") for size in (8, 24, 16)]
>>> matrices = np.einsum("nr,or,ir->noi", *modes)  # 8 experts, stored as (out, in)
>>> tensors = {f"layers.0.experts.{number}.w1": each for number, each in enumerate(matrices)}
>>> wanted = Compression("cp", rank=2, experts=("layers.*.experts.*.w1",))
>>> with tempfile.TemporaryDirectory() as folder:
...     model, output = Path(folder, "model.safetensors"), Path(folder, "factors")
...     save_file(tensors, model)
...     plan = plan_compression(model, wanted)
...     result = compress_checkpoint(model, output, wanted)
...     layer = MuMoE.load(output / result.groups[0].file)
>>> plan.dense_entries, plan.parameters
(3072, 96)
>>> result.groups[0].name, result.groups[0].error < 1e-3
('layers.0.experts.*.w1', True)
>>> weight, _ = layer.expert(3)
>>> weight.shape, np.allclose(weight, matrices[3].T, atol=1e-2)
((16, 24), True)
"""

from __future__ import annotations

from tensormoe.compression._calibration import EXPERT_WEIGHTS, WEIGHTINGS, Calibration
from tensormoe.compression._clustering import cluster_experts
from tensormoe.compression._gate_up import GATE_UP
from tensormoe.compression._grouping import (
    ExpertGroups,
    allot_experts,
    group_experts,
    most_frequent,
)
from tensormoe.compression._groups import Group
from tensormoe.compression._measure import GroupReport
from tensormoe.compression._merging import merge_stacks
from tensormoe.compression._mixtures import merge_mixture, prune_mixture
from tensormoe.compression._patterns import LAYOUTS, PRESETS, Pattern, Preset
from tensormoe.compression._plan import CompressionPlan, GroupPlan, plan_compression
from tensormoe.compression._predicted import predicted_loss
from tensormoe.compression._progress import CompressionProgress
from tensormoe.compression._run import CompressionResult, compress_checkpoint
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import Model, Shard
from tensormoe.compression._sharing import SHARES
from tensormoe.compression._statistics import (
    choice_frequencies,
    cosine_similarity,
    reap_saliency,
)

__all__ = [
    "EXPERT_WEIGHTS",
    "GATE_UP",
    "LAYOUTS",
    "PRESETS",
    "SHARES",
    "WEIGHTINGS",
    "Calibration",
    "Compression",
    "CompressionPlan",
    "CompressionProgress",
    "CompressionResult",
    "ExpertGroups",
    "Group",
    "GroupPlan",
    "GroupReport",
    "Model",
    "Pattern",
    "Preset",
    "Shard",
    "allot_experts",
    "choice_frequencies",
    "cluster_experts",
    "compress_checkpoint",
    "cosine_similarity",
    "group_experts",
    "merge_mixture",
    "merge_stacks",
    "most_frequent",
    "plan_compression",
    "predicted_loss",
    "prune_mixture",
    "reap_saliency",
]
