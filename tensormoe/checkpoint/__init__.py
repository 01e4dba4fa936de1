"""One file for every framework: arrays by name, and what rebuilds the block they belong to.

A checkpoint is a `safetensors <https://github.com/huggingface/safetensors>`_ file, so any program
that reads those can read its arrays; nothing in it is ever executed. Its metadata say how to
rebuild the block:

==========  ==================================================================================
key         value
==========  ==================================================================================
format      ``tensormoe``
version     schema version of the file, an integer
block       class of the block, e.g. ``MuMoE``
config      JSON of the block's spec, gate and options
prefix      what stands before every name, in files that a model is made of; none otherwise
bits        8 or 4 where factors are rounded, and stored as ``….codes`` and ``….scales``; none
            otherwise. Such a file has the version 2, all others 1
==========  ==================================================================================

Blocks save and load themselves with the functions below, which know neither blocks nor names.

>>> import tempfile, os
>>> import numpy as np
>>> from tensormoe_numpy import BACKEND
>>> with tempfile.TemporaryDirectory() as folder:
...     path = os.path.join(folder, "layer.safetensors")
...     save_checkpoint(path, "MuMoE", {"rank": 2}, {"factors.input": np.ones((3, 2))})
...     header = peek_checkpoint(path)
...     checkpoint = read_checkpoint(path, BACKEND)
>>> header.block, header.config, header.arrays
('MuMoE', {'rank': 2}, {'factors.input': ArrayInfo(dtype='float64', shape=(3, 2))})
>>> match_arrays({"factors.input": (3, 2)}, checkpoint.arrays).arrays["factors.input"].sum()
np.float64(6.0)
"""

from __future__ import annotations

from tensormoe.checkpoint._blocks import check_arrays, check_config, read_block
from tensormoe.checkpoint._checkpoint import (
    ArrayMatch,
    Checkpoint,
    match_arrays,
    peek_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tensormoe.checkpoint._files import PARTIAL_SUFFIX
from tensormoe.checkpoint._format import SCHEMA_VERSION, CheckpointHeader
from tensormoe.checkpoint._safetensors import ArrayInfo

__all__ = [
    "PARTIAL_SUFFIX",
    "SCHEMA_VERSION",
    "ArrayInfo",
    "ArrayMatch",
    "Checkpoint",
    "CheckpointHeader",
    "check_arrays",
    "check_config",
    "match_arrays",
    "peek_checkpoint",
    "read_block",
    "read_checkpoint",
    "save_checkpoint",
]
