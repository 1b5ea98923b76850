"""What rules mean, by brute force: every parameter is asked about every rule, name by name.

Written from the documentation, without the package's own code.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

BASE = {"lr": 0.25, "weight_decay": 0.01, "eps": 1e-8, "optim_bits": 32}
NO_OVERRIDES = ("match", "regex", "modules", "ndim", "listed_by", "optional", "lr_scale")
NO_OVERRIDES += ("layer_decay", "blocks")


class Unclear(Exception):
    """The documentation does not say what to expect."""


@dataclass
class Place:
    """A parameter and where it is found: each name with the classes of the module behind it."""

    tensor: Tensor
    found: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def first_name(self) -> str:
        return self.found[0][0]


def places(model: nn.Module) -> list[Place]:
    known: dict[int, Place] = {}
    for name, tensor, classes in walk(model, []):
        known.setdefault(id(tensor), Place(tensor)).found.append((name, classes))
    return list(known.values())


def walk(module: nn.Module, path: list[str]) -> Iterator[tuple[str, Tensor, list[str]]]:
    classes = [base.__name__ for base in type(module).__mro__]
    for key, tensor in module._parameters.items():
        if tensor is not None:
            yield ".".join([*path, key]), tensor, classes
    for key, child in module._modules.items():
        if child is not None:
            yield from walk(child, [*path, key])


def listed(model: nn.Module, method: str) -> set[str] | None:
    """The full names that modules list; None if none has the method."""
    names: set[str] | None = None
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if hasattr(module, method):
            names = (names or set()) | {path + name for name in getattr(module, method)()}
        stack += [(f"{path}{key}.", child) for key, child in module._modules.items() if child]
    return names


def alternatives(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def ndim_fits(wanted: Any, ndim: int) -> bool:
    text = str(wanted).replace(" ", "")
    for sign, holds in (
        ("<=", ndim <= int(re.sub(r"\D", "", text))),
        (">=", ndim >= int(re.sub(r"\D", "", text))),
        ("<", ndim < int(re.sub(r"\D", "", text))),
        (">", ndim > int(re.sub(r"\D", "", text))),
    ):
        if text.startswith(sign):
            return holds
    return ndim == int(text.removeprefix("=="))


def matches(rule: dict[str, Any], place: Place, model: nn.Module) -> bool:
    if "ndim" in rule and not ndim_fits(rule["ndim"], place.tensor.dim()):
        return False
    answers = []
    for name, classes in place.found:
        answer = {
            "match": lambda v, n=name: any(fnmatch.fnmatchcase(n, g) for g in alternatives(v)),
            "regex": lambda v, n=name: any(re.search(r, n) for r in alternatives(v)),
            "modules": lambda v, c=classes: any(
                fnmatch.fnmatchcase(one, g) for g in alternatives(v) for one in c
            ),
            "listed_by": lambda v, n=name: n in (listed(model, v) or ()),
        }
        answers.append([test(rule[key]) for key, test in answer.items() if key in rule])
    by_one_name = any(map(all, answers))
    by_any_name = all(map(any, zip(*answers, strict=True)))
    if by_one_name != by_any_name:
        raise Unclear("one of its names meets one matcher, another name the other")
    return by_one_name


# ---- layers ----------------------------------------------------------------------------------


def lists_around(name: str) -> list[tuple[str, str]]:
    """The lists that a parameter is in, each with the number of its block, outermost first."""
    parts = name.split(".")
    return [(".".join(parts[:i]), part) for i, part in enumerate(parts[:-1]) if part.isdigit()]


def layers(all_places: list[Place], blocks: str | None) -> tuple[list[int], int]:
    """The layer of each parameter, and how many blocks there are."""
    around = [lists_around(place.first_name) for place in all_places]
    if blocks is None:
        sizes: dict[str, int] = {}
        for place, lists in zip(all_places, around, strict=True):
            if lists:
                sizes[lists[0][0]] = sizes.get(lists[0][0], 0) + place.tensor.nelement()
        if sorted(sizes.values())[-2:-1] == sorted(sizes.values())[-1:] != []:
            raise Unclear("two lists of blocks are of one size")
        largest = max(sizes, key=lambda key: sizes[key], default=None)
        chosen = [lists[0] if lists and lists[0][0] == largest else None for lists in around]
    else:
        chosen = [
            next((one for one in lists if fnmatch.fnmatchcase(one[0], blocks)), None)
            for lists in around
        ]
    order: list[tuple[str, str]] = []
    for block in chosen:
        if block is not None and block not in order:
            order.append(block)
    numbers, current = [], 0
    for index, block in enumerate(chosen):
        if block is not None:
            current = order.index(block) + 1
        behind = all(other is None for other in chosen[index:])
        numbers.append(len(order) + 1 if behind else current)
    return numbers, len(order)


# ---- everything ------------------------------------------------------------------------------


def expected(model: nn.Module, rules: dict[str, Any]) -> tuple[set[str], dict[str, dict[str, Any]]]:
    """The labels of the rules that are refused, and what each trained parameter has otherwise."""
    all_places = places(model)
    refused: set[str] = set()
    hits: dict[str, list[bool]] = {}
    numbered: dict[str, tuple[list[int], int]] = {}
    for label, rule in rules.items():
        if "listed_by" in rule and listed(model, rule["listed_by"]) is None:
            refused |= set() if rule.get("optional") else {label}
        if "layer_decay" in rule:
            numbered[label] = layers(all_places, rule.get("blocks"))
            refused |= set() if numbered[label][1] else {label}
        hits[label] = [matches(rule, place, model) for place in all_places]
        if not any(hits[label]) and not rule.get("optional"):
            refused.add(label)
    found = {}
    for index, place in enumerate(all_places):
        if not place.tensor.requires_grad:
            continue
        values, scale, decay = dict(BASE), 1.0, 1.0
        mine = [label for label in rules if hits[label][index]]
        for label in mine:
            rule = rules[label]
            values |= {key: rule[key] for key in rule if key not in NO_OVERRIDES}
            scale = rule.get("lr_scale", scale)
            if "layer_decay" in rule:
                numbers, count = numbered[label]
                decay = rule["layer_decay"] ** (count + 1 - numbers[index])
        stating = [label for label in mine if "lr" in rules[label]]
        if stating and any("lr_scale" in rules[label] for label in mine):
            refused.add(stating[-1])
        found[place.first_name] = {**values, "lr": values["lr"] * scale * decay}
    return refused, found
