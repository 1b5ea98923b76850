"""What a name takes, where it runs, and what it was compared with: asked of the code, not written.

Bytes are those of the layout that a step would use; whether FSDP1 is an engine is asked of the
check that refuses configs there; losses are those that `examples/widths.py` measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optfactory.config.names import width_of
from optfactory.group_config import whole_tensors_problem
from optfactory.registry import OptimizerInfo, get_optimizer_info
from optfactory.state.layout import StateLayout

ROOT = Path(__file__).parents[2]
# A matrix of a model with billions of parameters: scales are few, step counters nothing.
_SHAPE = (4096, 4096)
_CALLED = {"map8": "dynamic map"}


@dataclass(frozen=True)
class Stored:
    """How a name keeps the state of a large matrix.

    Attributes:
        width: as names say it.
        bytes_per_parameter: of state, scales included.
        states: each state with the format of its numbers.
    """

    width: str
    bytes_per_parameter: float
    states: dict[str, str]


def stored(info: OptimizerInfo) -> Stored:
    """How a name keeps its state with default hyperparameters."""
    group = info.config_class(name=info.name).model_dump()
    layout = StateLayout.of(_SHAPE, torch.device("cpu"), torch.float32, info.config_class, group)
    formats = {spec.name: codec.formats[spec.signed] for spec, codec in layout.stored}
    states = {name: _CALLED.get(form, form) for name, form in formats.items()}
    elements = _SHAPE[0] * _SHAPE[1]
    return Stored(width_of(group), layout.nbytes / elements, states)


def devices(info: OptimizerInfo) -> list[str]:
    """Where a name runs: paged state needs memory that can leave a device."""
    return ["CPU", "CUDA"] if info.is_paged else ["CPU", "CUDA", "others"]


def takes_pieces(info: OptimizerInfo) -> bool:
    """Whether a name trains under FSDP1, whose pieces say nothing of whole tensors."""
    return not whole_tensors_problem(info.config_class(name=info.name))


def checkpoints(info: OptimizerInfo) -> list[str]:
    """Whose state dicts a name reads and writes, beside those of its family."""
    family = info.base
    peers = []
    if family.torch_peer:
        peers.append(f"torch.optim.{family.torch_peer.name}")
    if family.bitsandbytes_peer:
        peers.append("bitsandbytes")
    if family.torchao_peer:
        peers.append("torchao")
    return peers


def loss_against_32_bits(info: OptimizerInfo, width: str) -> float | None:
    """By how many percent the loss after 2000 steps is off that of 32 bits; None at 32."""
    losses = _losses()
    own, exact = losses.get((info.family, width)), losses.get((info.family, "32bit"))
    if width == "32bit" or own is None or exact is None:
        return None
    return 100 * (own / exact - 1)


@cache
def _losses() -> dict[tuple[str, str], float]:
    text = (ROOT / "examples" / "results" / "widths.json").read_text(encoding="utf-8")
    runs: list[dict[str, Any]] = json.loads(text)["runs"]
    return {(run["family"], run["width"]): run["loss"] for run in runs}


def names_of(family: str, names: list[str]) -> list[OptimizerInfo]:
    """The rows of a family among names."""
    rows = map(get_optimizer_info, names)
    return [info for info in rows if info.family == family]
