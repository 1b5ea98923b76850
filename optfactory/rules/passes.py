"""The passes of a step that look at whole tensors before any of them is written."""

from __future__ import annotations

from enum import IntEnum

from optfactory.rules.language import UpdateRule
from optfactory.rules.options import KernelOptions


class Stage(IntEnum):
    """What a pass over the bucket's elements found out, in the order of the passes."""

    GRADIENTS = 0  # sums of g^2, for percentile clipping
    NORMS = 1  # of parameters and gradients, for trust ratios that rules read
    TENSORS = 2  # norms of directions, what agrees with gradients; scales that elements share


def sums_of(rule: UpdateRule, options: KernelOptions) -> dict[Stage, int]:
    """The passes that a step needs before its update, and how many sums of a tensor each finds.

    >>> sums_of(UpdateRule("sgd", (), ()), KernelOptions(clips=True))
    {<Stage.GRADIENTS: 0>: 1}
    """
    before = rule.ratio_of == "g"
    sums = 2 * (rule.trust_ratio is not None and not before) + options.cautious
    found = {Stage.GRADIENTS: 1} if options.clips else {}
    found |= {Stage.NORMS: 2} if before else {}
    return found | ({Stage.TENSORS: sums} if sums or options.scales_first else {})
