"""Dask as a backend of tensormoe: calls record a graph of tasks, and ``compute`` runs it.

Rows of a batch stay in the chunks they came in, so that a batch may be larger than memory.
"""

from tensormoe_dask._adapter import BACKEND as BACKEND
from tensormoe_dask._adapter import DaskBackend as DaskBackend

__all__ = ["BACKEND", "DaskBackend"]
