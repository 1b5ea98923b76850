"""Which numbers kernels know states by: a format for each width, and the blocks that share scales.

`optfactory.state.codecs` says what they are in memory. Wheels are built without torch, and need
this alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfactory.rules.language import StateSpec, UpdateRule

# By width, of states with a sign and of others; kernels/shared/formats.cuh has each of them.
FORMATS: dict[str, dict[bool, str]] = {
    "32bit": {True: "float32", False: "float32"},
    "16bit": {True: "bfloat16", False: "bfloat16"},
    "8bit": {True: "map8", False: "map8"},
    "fp8": {True: "e4m3", False: "e5m3"},
    "4bit": {True: "e2m1", False: "e3m1"},
}


def width_of_state(group: Mapping[str, Any], state: StateSpec) -> str:
    """The width at which a param group stores a state, where nothing speaks against it."""
    bits = (group["state_bits"] or {}).get(state.name, group["optim_bits"])
    return "fp8" if bits == 8 and group["state_format"] == "fp8" else f"{bits}bit"


def format_of(group: Mapping[str, Any], state: StateSpec) -> str:
    """How kernels call the numbers of such a state."""
    return FORMATS[width_of_state(group, state)][state.signed]


def block_size_of(rule: UpdateRule, group: Mapping[str, Any]) -> int:
    """Elements that share a scale; half as many where one of a rule's states has 4 bits."""
    size = int(group["block_size"])
    return halved(size) if any(width_of_state(group, s) == "4bit" for s in rule.states) else size


def halved(block_size: int) -> int:
    """Elements that share a scale of 4-bit state; least are 64, which kernels take at a time."""
    return max(block_size // 2, 64)
