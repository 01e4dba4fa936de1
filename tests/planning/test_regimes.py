"""Every batch gets the cheapest of the programs of a layer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormoe import (
    CP,
    BaseDelta,
    Dense,
    Hadamard,
    LayerSpec,
    SharedBasis,
    SharedDelta,
    TensorRing,
    TensorTrain,
    Tucker,
)
from tensormoe.planning import Regimes, plan_regimes
from tensormoe.testing import specs
from tests._planned_work import program_work

REGIMES = [
    LayerSpec(64, 48, 8, Tucker((6, 24, 20))),
    LayerSpec(64, 48, (4, 3), Tucker((3, 3, 24, 20)), bias=False),
    LayerSpec(32, 32, 4, CP(200)),
    LayerSpec(40, 30, 3, TensorRing((6, 6, 30))),
    LayerSpec(40, 30, (3, 2), TensorRing((5, 6, 5, 30))),
    LayerSpec(40, 30, (3, 2), TensorTrain((9, 12, 40))),
    LayerSpec(24, 20, (2, 2, 3), CP(120)),
    LayerSpec(40, 30, 5, SharedBasis((3, 30))),
    LayerSpec(30, 40, (3, 2), SharedBasis((4, 30))),
    LayerSpec(24, 20, 3, BaseDelta(30)),
    LayerSpec(20, 24, (2, 2), SharedDelta(30)),
    LayerSpec(24, 20, 5, Hadamard()),
    LayerSpec(24, 20, 5, Dense()),
]


@pytest.mark.parametrize("spec", REGIMES, ids=str)
def test_every_batch_gets_the_cheapest_program_of_the_layer(spec: LayerSpec) -> None:
    regimes = plan_regimes(spec.network)
    assert regimes.starts[0] == 0
    assert list(regimes.starts) == sorted(set(regimes.starts))
    batches = {*range(1, 200), 1000, 10**4, 10**6, 10**9}
    for start in regimes.starts[1:]:
        batches |= {start - 2, start - 1, start, start + 1}
    for batch in sorted(batch for batch in batches if batch > 0):
        chosen = program_work(regimes.program(batch), batch)
        assert chosen == min(program_work(each, batch) for each in regimes.programs), batch


def test_paths_do_change_with_the_batch() -> None:
    """Otherwise the test above would see nothing."""
    assert sum(len(plan_regimes(spec.network).programs) > 1 for spec in REGIMES) >= 4


@settings(max_examples=60)
@given(spec=specs(largest=12, largest_rank=12), data=st.data())
def test_thresholds_are_exact(spec: LayerSpec, data: st.DataObject) -> None:
    regimes = plan_regimes(spec.network)
    for start, before, after in zip(
        regimes.starts[1:], regimes.programs, regimes.programs[1:], strict=False
    ):
        assert program_work(after, start) <= program_work(before, start)
        assert program_work(before, start - 1) <= program_work(after, start - 1)
    batch = data.draw(st.integers(1, 10**5), "batch")
    chosen = program_work(regimes.program(batch), batch)
    assert chosen == min(program_work(each, batch) for each in regimes.programs)


def test_regimes_look_programs_up_by_batch() -> None:
    first, second = (plan_regimes(LayerSpec(4, 3, 2, CP(k)).network).programs[0] for k in (1, 2))
    regimes = Regimes((0, 10), (first, second))
    assert [regimes.program(batch) for batch in (0, 1, 9, 10, 11)] == [first] * 3 + [second] * 2
    assert [regimes.index(batch) for batch in (0, 9, 10)] == [0, 0, 1]
