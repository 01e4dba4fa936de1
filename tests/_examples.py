"""A contract with fewer random examples, for libraries in which each takes long."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from hypothesis import given, is_hypothesis_test, settings
from hypothesis import strategies as st

from tensormoe.testing import BackendContract
from tensormoe.testing._layer_checks import CHECKS, LayerChecks

# what runs whole layers or gates, not one operation
_MANY = {*vars(LayerChecks), "test_gates_equal_those_of_numpy", "test_routing_equals_that_of_numpy"}

Contract = type[BackendContract]


def with_examples(operations: int, layers: int) -> Callable[[Contract], Contract]:
    """A decorator of a contract's class.

    Args:
        operations: how many examples each test of one operation has.
        layers: how many those of layers and gates have.
    """

    def decorated(contract: Contract) -> Contract:
        for name, test in inspect.getmembers(contract, is_hypothesis_test):
            fewer = settings(CHECKS, max_examples=layers if name in _MANY else operations)
            setattr(contract, name, fewer(given(data=st.data())(test.hypothesis.inner_test)))
        return contract

    return decorated
