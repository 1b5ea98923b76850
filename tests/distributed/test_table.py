"""The documented table of engines: each of them steps, saves, and reads what others have saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from optfactory import build_optimizer
from tests.distributed.harness import whole
from tests.distributed.processes import Processes, Team
from tests.distributed.test_tensor_parallel import block, in_parallel, in_sequence, loss, with_fsdp

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "how-to" / "sharded-training.md"
# Tested where they are at home: they have no state dict helpers of this kind.
ELSEWHERE = {"ZeroRedundancyOptimizer", "FSDP1"}


def ddp(team: Team) -> nn.Module:
    return DistributedDataParallel(block(), process_group=team.group)


def sharded(mesh: Any) -> nn.Module:
    model = block()
    for module in (model.up, model.down):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


ENGINES: dict[str, Callable[[Team], nn.Module]] = {
    "DDP": ddp,
    "`replicate`": lambda team: replicate(block(), process_group=team.group),
    "FSDP2 (`fully_shard`)": lambda team: sharded(team.mesh),
    "HSDP": lambda team: sharded(team.meshes[2, 2]),
    "tensor parallel": lambda team: in_parallel(team.mesh),
    "with sequence parallel": lambda team: in_sequence(team.mesh),
    "FSDP2": lambda team: with_fsdp(team.meshes[2, 2]),
}


def work(team: Team) -> list[str]:
    """Which engines do not have the state that another saved, bit for bit."""
    saved = {}
    for number, (title, engine) in enumerate(ENGINES.items()):
        model = engine(team)
        optimizer = build_optimizer("adamw8bit", model, lr=1e-2)
        for seed in range(2):
            optimizer.zero_grad()
            loss(model, seed).backward()
            optimizer.step()
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"o": state}, checkpoint_id=str(team.folder / str(number)))
        saved[title] = wholes(state)
    wrong = []
    for place, (title, engine) in enumerate(ENGINES.items()):
        for number, source in enumerate(ENGINES):
            if (number - place) % len(ENGINES) > 1 and not os.environ.get("OPTFACTORY_ALL_TESTS"):
                continue  # a sample: its own, and the next one's
            model = engine(team)
            optimizer = build_optimizer("adamw8bit", model, lr=1.0)
            state = get_optimizer_state_dict(model, optimizer)
            dcp.load({"o": state}, checkpoint_id=str(team.folder / str(number)))
            set_optimizer_state_dict(model, optimizer, state)
            found = wholes(get_optimizer_state_dict(model, optimizer))
            same = found.keys() == saved[source].keys()
            if not same or any(not torch.equal(found[k], saved[source][k]) for k in found):
                wrong.append(f"{source} to {title}")
    return wrong


def wholes(state: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, key): whole(value).clone()
        for name, entries in state["state"].items()
        for key, value in entries.items()
    }


def test_engines_read_what_others_have_saved(processes: Processes) -> None:
    assert processes.run(work, 4) == [[]] * 4


def test_the_table_names_the_engines_that_are_tested() -> None:
    text = PAGE.read_text(encoding="utf-8")
    block_of_table = text.split("<!-- engines -->")[1].split("<!-- /engines -->")[0]
    rows = re.findall(r"^\| (.+?) \|", block_of_table, re.M)[1:]
    named = {engine for row in rows for engine in re.split(r", | or ", row)}
    assert named == set(ENGINES) | ELSEWHERE
