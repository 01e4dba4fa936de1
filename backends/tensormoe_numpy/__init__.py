"""tensormoe on NumPy: the adapter and the layers."""

from tensormoe_numpy._adapter import BACKEND as BACKEND
from tensormoe_numpy._adapter import NumpyBackend as NumpyBackend
