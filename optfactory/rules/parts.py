"""The rules that kernels run for one rule: those around the products of whole matrices are two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from optfactory.rules.language import UpdateRule

# Takes directions that were made of whole matrices, in place of gradients.
DIRECT = UpdateRule("direct", (), ())


@dataclass(frozen=True)
class RulePart:
    """One rule that kernels run.

    Attributes:
        rule: what they run.
        settings: hyperparameters that differ from the group's, as another part heeds these.
        in_scratch: whether parameters are float32, as directions are written in their place ...
        from_scratch: ... or gradients are, as these are what is read.
    """

    rule: UpdateRule
    settings: Mapping[str, Any] = field(default_factory=dict)
    in_scratch: bool = False
    from_scratch: bool = False

    def dtypes(self, parameter: str, gradient: str) -> tuple[str, str]:
        """What kernels call the dtypes of what they write and read, given those of a parameter."""
        return (
            "float" if self.in_scratch else parameter,
            "float" if self.from_scratch else gradient,
        )


# What acts on gradients and states, and has done so before the step; and on parameters alone.
_BEFORE = {"maximize": False, "percentile_clipping": 100, "optim_bits": 32, "is_paged": False}
_BEHIND = {"cautious_weight_decay": False}


def direction_part(rule: UpdateRule) -> RulePart:
    """What makes the directions of a rule with a transform."""
    return RulePart(replace(rule, transform=None), _BEHIND, in_scratch=True)


STEP_PART = RulePart(DIRECT, _BEFORE, from_scratch=True)


def parts_of(rule: UpdateRule) -> Iterator[RulePart]:
    """All that kernels run for a rule, in order.

    >>> [part.rule.name for part in parts_of(UpdateRule("sgd", (), ()))]
    ['sgd']
    """
    if rule.transform is None:
        yield RulePart(rule)
    else:
        yield direction_part(rule)
        yield STEP_PART
