"""The shared basis: the papers' formula, its two forms, and layers of it."""

from __future__ import annotations

import pytest

from tensormoe import SharedBasis
from tensormoe.testing import FactorizationContract


class TestSharedBasis(FactorizationContract):
    factorization = SharedBasis(1)
