"""One rule for param groups against one parameter: does it match, and in which layer is it?"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase, translate

from torch import Tensor

from optfactory.config.group_rules import GroupRule
from optfactory.groups.hidden import HiddenMatrices
from optfactory.groups.layers import LayerNumbers
from optfactory.groups.origins import Origin, Origins

_NO_NAMES = "the parameters have no names; pass the model or model.named_parameters()"
_NO_MODEL = "needs the model; pass it in place of its parameters"


class Matcher:
    """One rule, prepared to be asked about many parameters.

    Args:
        flattens: whether convolutions count as matrices, unless the rule says so.
        implied: whether the rule is what `others` makes, and no user's.

    Attributes:
        reasons: why tensors that were asked about are no hidden matrices, by their ids.
    """

    def __init__(
        self, rule: GroupRule, origins: Origins, flattens: bool = False, implied: bool = False
    ) -> None:
        self.rule, self.implied = rule, implied
        self.reasons: dict[int, str] = {}
        self._hidden: HiddenMatrices | None = None
        if rule.hidden is not None:
            self._hidden = HiddenMatrices(origins, bool(rule.overrides.get("flatten", flattens)))
        self._origins = origins
        # A name must pass one test of each kind.
        globs = [re.compile(translate(text)).match for text in rule.match]
        expressions = [re.compile(text).search for text in rule.regex]
        self._name_tests = [tests for tests in (globs, expressions) if tests]
        self._listed: set[str] = set()
        self._failure = ""
        if rule.listed_by is not None:
            self._listed, self._failure = _listed_names(origins, rule.listed_by)
        self._find_layers()

    def _find_layers(self) -> None:
        """Number the layers, if the rule tells them apart."""
        self.layers: LayerNumbers | None = None
        self._layer_of: dict[int, int] = {}
        if self.rule.layer_decay is None:
            return
        parameters = list(self._origins.all())
        sizes = [(origin.names[0], tensor.numel()) for tensor, origin in parameters]
        self.layers = LayerNumbers(sizes, self.rule.blocks)
        ids = [id(tensor) for tensor, _ in parameters]
        self._layer_of = dict(zip(ids, self.layers.layers, strict=True))

    def problems(self, named: bool) -> list[str]:
        """What the rule needs to know, and the parameters do not say."""
        problems = [] if self.rule.optional else self._unknown(named)
        if self.layers is not None:
            if not named:
                problems.append(f"layer_decay: {_NO_NAMES}")
            elif not self.layers.lists:
                wanted = f"named {self.rule.blocks!r}" if self.rule.blocks else "in the model"
                problems.append(f"layer_decay: there is no list of blocks {wanted}")
        return problems

    def _unknown(self, named: bool) -> list[str]:
        """What keeps matchers from matching anything."""
        keys = self.rule.matchers
        by_name = [] if named else [key for key in keys if key in ("match", "regex")]
        problems = [f"{key}: {_NO_NAMES}" for key in by_name]
        if not self._origins.places:
            by_model = [key for key in keys if key in ("modules", "listed_by")]
            problems += [f"{key}: {_NO_MODEL}" for key in by_model]
        elif self._failure:
            problems.append(f"listed_by: {self._failure}")
        return problems

    def hits(self, tensor: Tensor) -> bool:
        """Whether a parameter meets all matchers, by any of its names."""
        origin = self._origins.of(tensor)
        if not self.rule.fits_ndim(tensor.ndim):
            return False
        names = origin.names if origin else []
        if not all(any(test(n) for test in tests for n in names) for tests in self._name_tests):
            return False
        if self.rule.listed_by is not None and self._listed.isdisjoint(names):
            return False
        if self.rule.modules and not _owned_by(origin, self.rule.modules):
            return False
        return self._hidden is None or self._is_hidden(tensor, self._hidden) == self.rule.hidden

    def _is_hidden(self, tensor: Tensor, matrices: HiddenMatrices) -> bool:
        reason = matrices.reason(tensor)
        if reason:
            self.reasons[id(tensor)] = reason
        return not reason

    def layer(self, tensor: Tensor) -> tuple[int, int]:
        """The layer of a parameter, by its first name, and the last one; 0 without layers."""
        if self.layers is None or not self.layers.lists or id(tensor) not in self._layer_of:
            return 0, 0
        return self._layer_of[id(tensor)], self.layers.last


def _listed_names(origins: Origins, method: str) -> tuple[set[str], str]:
    """The names that models, or modules inside them, return by a method; or why there are none."""
    found: set[str] = set()
    failure = f"the model has no method {method!r}"
    for place in origins.places:
        listing = getattr(place.module, method, None)
        if not callable(listing):
            continue
        try:
            found.update([place.name(name) for name in listing()])
        # Whatever the user's method raises, or a method that is no listing of names.
        except Exception as error:
            kind = type(place.module).__name__
            why = f"{kind}.{method}() does not return names: {type(error).__name__}: {error}"
            return set(), why
        failure = ""
    return found, failure


def _owned_by(origin: Origin | None, globs: tuple[str, ...]) -> bool:
    classes = {base.__name__ for owner in (origin.owners if origin else ()) for base in owner.mro()}
    return any(fnmatchcase(name, glob) for name in classes for glob in globs)
