"""One rule for param groups against one parameter: does it match, and in which layer is it?"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase, translate

from torch import Tensor

from optfactory.group_rules import GroupRule
from optfactory.layers import LayerNumbers
from optfactory.origins import Origin, Origins, plain_name


class Matcher:
    """One rule, prepared to be asked about many parameters."""

    def __init__(self, rule: GroupRule, origins: Origins) -> None:
        self.rule = rule
        self._origins = origins
        # A name must pass one test of each kind.
        globs = [re.compile(translate(text)).match for text in rule.match]
        expressions = [re.compile(text).search for text in rule.regex]
        self._name_tests = [tests for tests in (globs, expressions) if tests]
        self._listed = _listed_names(origins, rule.listed_by) if rule.listed_by else None
        self.layers = _layers(rule, origins)

    def problems(self, named: bool) -> list[str]:
        """What the rule needs to know, and the parameters do not say."""
        rule = self.rule
        by_name = [key for key in rule.matchers if key in ("match", "regex")]
        by_name += ["layer_decay"] if rule.layer_decay is not None else []
        problems = []
        if not named:
            problems += [
                f"{key}: the parameters have no names; pass the model or model.named_parameters()"
                for key in by_name
            ]
        if not self._origins.models:
            problems += [
                f"{key}: needs the model; pass it in place of its parameters"
                for key in ("modules", "listed_by")
                if key in rule.matchers
            ]
        elif self._listed is None and rule.listed_by and not rule.optional:
            problems.append(f"listed_by: the model has no method {rule.listed_by!r}")
        if named and self.layers and not self.layers.lists:
            wanted = f"named {rule.blocks!r}" if rule.blocks else "in the model"
            problems.append(f"layer_decay: there is no list of blocks {wanted}; set blocks to one")
        return problems

    def hits(self, tensor: Tensor) -> bool:
        """Whether a parameter meets all matchers, by any of its names."""
        origin = self._origins.of(tensor)
        if not self.rule.fits_ndim(tensor.ndim):
            return False
        names = origin.names if origin else []
        if not all(any(test(n) for test in tests for n in names) for tests in self._name_tests):
            return False
        if self.rule.listed_by and not any(name in (self._listed or ()) for name in names):
            return False
        return not self.rule.modules or _owned_by(origin, self.rule.modules)

    def layer(self, tensor: Tensor) -> tuple[int, int]:
        """The layer of a parameter, by its first name, and the last one; 0 without layers."""
        origin = self._origins.of(tensor)
        if self.layers is None or origin is None:
            return 0, 0
        return self.layers.of(origin.names[0]), self.layers.last


def _listed_names(origins: Origins, method: str) -> set[str] | None:
    """The names that models, or modules inside them, return by a method; None if none has it."""
    found = [
        {plain_name(f"{prefix}.{name}" if prefix else str(name), model) for name in listing()}
        for model in origins.models
        for prefix, module in model.named_modules()
        if callable(listing := getattr(module, method, None))
    ]
    return set().union(*found) if found else None


def _layers(rule: GroupRule, origins: Origins) -> LayerNumbers | None:
    if rule.layer_decay is None:
        return None
    sizes = [(origin.names[0], tensor.numel()) for tensor, origin in origins.all()]
    return LayerNumbers(sizes, rule.blocks)


def _owned_by(origin: Origin | None, globs: tuple[str, ...]) -> bool:
    classes = {base.__name__ for owner in (origin.owners if origin else ()) for base in owner.mro()}
    return any(fnmatchcase(name, glob) for name in classes for glob in globs)
