"""The layout of torch.optim.Adam and AdamW, whatever their implementation (foreach, fused, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optfactory.checkpoints.convert import decode
from optfactory.checkpoints.fields import FLOATS, Fields
from optfactory.checkpoints.records import GroupRecord, Record
from optfactory.state.layout import StateLayout

# How torch computes a step, not what; torch takes them from the checkpoint that it loads.
_SWITCHES: dict[str, Any] = {"foreach": None, "fused": None, "differentiable": False}


class TorchLayout:
    """Reads and writes state dicts of torch.optim.Adam and AdamW."""

    families: tuple[str, ...] = ("adam", "adamw")
    title = "torch.optim.Adam or AdamW"
    takes_dtensors = True
    expressed: tuple[str, ...] = (
        *("lr", "betas", "eps", "weight_decay", "maximize", "amsgrad", "adam_w_mode"),
    )

    def read_group(self, saved: Mapping[str, Any]) -> GroupRecord:
        """Torch's hyperparameters; newer releases also say how weight decay enters."""
        dropped = ("capturable", "decoupled_weight_decay", *_SWITCHES)
        values = {key: value for key, value in saved.items() if key not in dropped}
        problems = []
        if "amsgrad" not in saved:
            problems = ["amsgrad: missing; the checkpoint is not of torch.optim.Adam or AdamW"]
        decoupled = saved.get("decoupled_weight_decay")
        if not isinstance(decoupled, bool):
            return GroupRecord("", values, problems, self.families)
        values["adam_w_mode"] = decoupled
        return GroupRecord("adamw" if decoupled else "adam", values, problems)

    def read_entries(
        self, fields: Fields, layout: StateLayout, saved: Mapping[str, Any]
    ) -> Record | None:
        """Torch keeps states in the parameter's dtype."""
        states = {
            state.name: fields.state(state.name, state, layout.shape, FLOATS)
            for state in layout.rule.states
        }
        return Record.of(fields.step(), states)

    def write_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Nothing: torch has all that `expressed` lists."""
        return []

    def write_group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Torch's hyperparameters, with the implementation left to torch."""
        return {
            **{key: group[key] for key in self.expressed if key != "adam_w_mode"},
            "capturable": group["capturable"],
            "decoupled_weight_decay": group["adam_w_mode"],
            **_SWITCHES,
        }

    def write_entries(self, layout: StateLayout, record: Record) -> dict[str, Any]:
        """Float32 values, the step too; torch casts them to the parameter's dtype."""
        states = {name: decode(stored).clone() for name, stored in record.states.items()}
        return {"step": record.step.float(), **states}
