"""CuPy without a GPU: NumPy behind exactly the names and arguments of the installed CuPy.

What is not in the installed package is not here, an argument that its function does not have is an
error, and arrays refuse what CuPy's refuse: implicit conversion, NumPy's functions, mixed operands.
Results of reductions are arrays without axes. Whatever waits for the device is counted.
"""

from __future__ import annotations

from tests._cupy_standin._array import Array as Array
from tests._cupy_standin._install import ADAPTER as ADAPTER
from tests._cupy_standin._install import ON_DEVICE as ON_DEVICE
from tests._cupy_standin._install import installed as installed
from tests._cupy_standin._layers import assert_same as assert_same
from tests._cupy_standin._layers import device as device
from tests._cupy_standin._layers import host as host
from tests._cupy_standin._layers import randomize as randomize
from tests._cupy_standin._layers import twin as twin
from tests._cupy_standin._log import LOG as LOG
from tests._cupy_standin._log import waits as waits
from tests._cupy_standin._module import Special as Special
from tests._cupy_standin._module import Standin as Standin
from tests._cupy_standin._signatures import signature_of as signature_of
