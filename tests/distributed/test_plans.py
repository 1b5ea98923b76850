"""Plans of a mesh are what the ranks of a real run report and allocate, to the byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from optfactory import build_optimizer, plan
from optfactory.planning.memory_plan import MemoryPlan
from tests.distributed.processes import Processes, Team
from tests.planning.test_mesh import Net

CASES: dict[str, dict[str, Any]] = {
    "adamw8bit": {},
    "adamw": {},
    "lamb8bit": {},
    "paged_adamw8bit": {"percentile_clipping": 50},
    "adam8bit": {"block_wise": False},
}
MESHES = ["1", "2", "3", "4", "2x2"]


class Matrices(nn.Module):
    """For tensor parallelism: matrices that are cut by rows, and nothing else but a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(300, 250, bias=False)
        self.down = nn.Linear(250, 131, bias=False)
        self.norm = nn.LayerNorm(131)


def figures(planned: MemoryPlan, rank: int) -> dict[str, Any]:
    of_rank = planned.on_rank(rank)
    return {
        "rows": [asdict(row) for row in of_rank.report.rows],
        "shares": Counter({(s.what, s.bits, s.place): s.nbytes for s in of_rank.shares}),
    }


def real(name: str, model: nn.Module, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a rank reports, plans for itself, and allocates."""
    optimizer = build_optimizer(name, model, **overrides)
    optimizer.init_states()
    here = plan(name, model, **overrides)
    return {
        "rows": [asdict(row) for row in optimizer.memory_report().rows],
        "here": figures(here, 0),
        "allocated": [
            sum(value.nbytes for value in optimizer.state[p].values())
            for p in model.parameters()
            if p.requires_grad
        ],
        "text": f"{optimizer.memory_report()}\n{here}",
    }


def work(team: Team) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for text in MESHES:
        sizes = tuple(int(size) for size in text.split("x"))
        mesh = team.meshes[sizes]
        if team.rank >= mesh.size():
            continue
        for name, overrides in CASES.items():
            model = Net()
            fully_shard(model, mesh=mesh)
            found[text, name] = real(name, model, overrides)
            if len(sizes) == 2:
                model = Matrices()
                by_rows = {"up": ColwiseParallel(), "down": ColwiseParallel()}
                parallelize_module(model, mesh["tp"], by_rows)
                fully_shard(model, mesh=mesh["dp"])
                found["tp", name] = real(name, model, overrides)
    return found


def test_every_rank_has_the_bytes_of_its_plan(processes: Processes) -> None:
    results = processes.run(work, 4)
    sizes: dict[str, set[int]] = {}
    for rank, found in enumerate(results):
        for (mesh, name), actual in found.items():
            overrides, model = CASES[name], Matrices() if mesh == "tp" else Net()
            shard, text = ("tp", "2x2") if mesh == "tp" else (None, mesh)
            planned = figures(plan(name, model, mesh=text, shard=shard, **overrides), rank)
            assert planned["rows"] == actual["rows"], (mesh, name, rank)
            assert [row["nbytes"] for row in actual["rows"]] == actual["allocated"]
            assert planned["shares"] == actual["here"]["shares"]
            assert actual["here"]["rows"] == actual["rows"]
            assert ("whole" in actual["text"]) == (mesh != "1")
            assert ("The model is sharded" in actual["text"]) == (mesh != "1")
            whole = build_optimizer(name, model, **overrides).memory_report()
            assert [row["global_nbytes"] for row in actual["rows"]] == [
                row.nbytes for row in whole.rows
            ]
            sizes.setdefault(mesh, set()).add(sum(actual["allocated"]))
    assert results[3].keys() == {(mesh, name) for mesh in ("4", "2x2", "tp") for name in CASES}
    assert len(sizes["4"]) > len(CASES)  # ranks differ
