"""tensormoe."""
__version__ = "0.1.0.dev0"
from tensormoe._spec import LayerSpec as LayerSpec
from tensormoe.factorizations import CP as CP, TensorRing as TensorRing, TensorTrain as TensorTrain, Tucker as Tucker, Hadamard as Hadamard, Dense as Dense
