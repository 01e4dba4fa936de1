"""Gate and up projection that were tried as one tensor and as two: the better way is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tensormoe.compression._measure import GroupReport
from tensormoe.compression._plan import CompressionPlan, GroupPlan
from tensormoe.compression._predicted import summed


def settle(plan: CompressionPlan, reports: Mapping[str, GroupReport]) -> CompressionPlan:
    """The plan with the groups that lose least, and no others to try.

    Args:
        plan: of a compression.
        reports: of all groups that were tried, by name.
    """
    better: dict[str, GroupPlan] = {}
    dropped: set[str] = set()
    for each in plan.others:
        apart = [reports[name] for name in each.instead]
        if losses([reports[each.group.name]]) < losses(apart):
            better[each.instead[0]] = each
            dropped |= {*each.instead[1:]}
    groups = tuple(
        better.get(each.group.name, each) for each in plan.groups if each.group.name not in dropped
    )
    return replace(plan, groups=groups, others=())


def losses(reports: Iterable[GroupReport]) -> float:
    """Loss by some groups, in one unit for all that have the same experts between them.

    The predicted increase of the model's loss; without gradients, squares of what outputs lack, and
    without a calibration, of what weights lack.
    """
    listed = [*reports]
    predicted = summed(each.predicted_loss for each in listed)
    if predicted is not None:
        return predicted
    return sum(
        (each.energy or 0.0) * (each.error if each.output_error is None else each.output_error) ** 2
        for each in listed
    )
