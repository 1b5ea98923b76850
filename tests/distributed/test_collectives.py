"""What a step of sharded parameters costs: collectives, plans, and pages of each process' own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optfactory import build_optimizer
from optfactory.memory import placement
from optfactory.step.facts import Facts
from optfactory.step.keys import Keys
from optfactory.step.plan import StepPlan
from tests.distributed.beside import CASES, Collectives, small_pages
from tests.distributed.nets import fsdp, inputs, net, tensor_parallel_fsdp
from tests.distributed.processes import Processes, Team
from tests.distributed.test_tensor_parallel import in_parallel, loss

Found = list[tuple[str, int]]


def engines(team: Team) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        "ddp": lambda: DistributedDataParallel(
            net(), process_group=team.group, find_unused_parameters=True
        ),
        "fsdp2": lambda: fsdp(team.mesh),
    }
    if team.world == 4:
        found["hsdp"] = lambda: fsdp(team.meshes[2, 2])
        found["grid"] = lambda: tensor_parallel_fsdp(team.meshes[2, 2])
    return found


def counted(team: Team, case: str) -> dict[str, Found]:
    """The collectives of the third step, by engine: names and numbers of processes."""
    name, options = CASES[case]
    found = {}
    for title, make in engines(team).items():
        model = make()
        optimizer = build_optimizer(name, model, lr=1e-2, **options)
        for seed in range(3):
            optimizer.zero_grad()
            model(inputs(seed)).backward()
            with Collectives() as collectives:
                optimizer.step()
        found[title] = sorted(collectives.found.elements())
    model = in_parallel(team.mesh)
    optimizer = build_optimizer(name, model, lr=1e-2, **options)
    for seed in range(3):
        optimizer.zero_grad()
        loss(model, seed).backward()
        with Collectives() as collectives:
            optimizer.step()
    found["tp"] = sorted(collectives.found.elements())
    return found


def sums(*sizes: int) -> Found:
    return [("allreduce_", size) for size in sizes]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # No process needs anything of others, but the scales of blocks that columns cut.
        ("adamw", {"fsdp2": [], "hsdp": [], "tp": [], "grid": []}),
        ("adamw8bit", {"fsdp2": [], "hsdp": [], "tp": sums(4), "grid": sums(2)}),
        # Of the dimensions that cut something; never of all processes where a mesh is smaller.
        ("lamb", {"fsdp2": sums(4), "hsdp": sums(2), "tp": sums(4), "grid": sums(2, 2)}),
    ],
)
def test_collectives_of_a_step(processes: Processes, case: str, expected: dict[str, Found]) -> None:
    assert processes.run(counted, 4, case) == [{"ddp": [], **expected}] * 4


def bytes_of(team: Team, case: str) -> tuple[int, int]:
    """The bytes that a step gives to collectives, and the number of trained parameters."""
    name, options = CASES[case]
    model = fsdp(team.mesh)
    optimizer = build_optimizer(name, model, lr=1e-2, **options)
    model(inputs(0)).backward()
    sent = []
    real = dist.all_reduce

    def counting(vector: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(vector.nbytes)
        return real(vector, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        optimizer.step()
    return sum(sent), sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("case", "each"), [("lamb", 16), ("clipped", 8), ("adamw8bit", 0)])
def test_bytes_grow_with_parameters_alone(processes: Processes, case: str, each: int) -> None:
    for world in (1, 2, 4):
        for sent, count in processes.run(bytes_of, world, case):
            assert sent == (each * count if world > 1 else 0)


def counted_of_two(team: Team) -> dict[str, Found]:
    return {case: counted(team, case)["fsdp2"] for case in ("adamw8bit", "lamb8bit", "clipped")}


def test_collectives_do_not_leave_their_mesh(processes: Processes) -> None:
    """Two of four processes: what the others do not call cannot be waited for."""
    expected = {"adamw8bit": [], "lamb8bit": sums(2), "clipped": sums(2)}
    assert processes.run(counted_of_two, 2) == [expected] * 2


def planned(team: Team) -> Counter[str]:
    """How often what outlives steps is made anew in ten of them."""
    made: Counter[str] = Counter()

    def count(patch: pytest.MonkeyPatch, kind: type, name: str) -> None:
        original = getattr(kind, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            made[f"{kind.__name__}.{name}"] += 1
            return original(*args, **kwargs)

        patch.setattr(kind, name, counting)

    model = fsdp(team.mesh)
    optimizer = build_optimizer("adamw8bit", model, lr=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((StepPlan, "__init__"), (Keys, "sorted"), (Facts, "__init__")):
            count(patch, kind, name)
        for seed in range(10):
            optimizer.zero_grad()
            model(inputs(seed)).backward()
            optimizer.step()
    return made


def test_ten_steps_make_one_plan(processes: Processes) -> None:
    for made in processes.run(planned, 2):
        assert made["StepPlan.__init__"] == made["Keys.sorted"] == made["Facts.__init__"] == 1


def mapped_files() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Address ranges of this process' maps of files of state, by device and inode."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, device, inode, *path = line.split(maxsplit=5)
        if path and "optfactory-" in path[0]:
            assert path[0].endswith("(deleted)")
            begin, end = (int(x, 16) for x in addresses.split("-"))
            found.setdefault((device, inode), []).append((begin, end))
    return found


def paged(team: Team) -> tuple[list[tuple[str, str]], list[int]]:
    """The files of this process' state, and the rights on the folders that they were made in."""
    modes = []
    from_file = torch.from_file

    def noting(path: str, **given: Any) -> Any:
        modes.append(os.stat(Path(path).parent).st_mode & 0o777)
        return from_file(path, **given)

    model = fsdp(team.mesh)
    with small_pages(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "from_file", noting)
        optimizer = build_optimizer("paged_adamw8bit", model, page_dir=str(team.folder))
        model(inputs(0)).backward()
        optimizer.step()
        dist.barrier(team.group)
        assert list(team.folder.iterdir()) == []
        pages = [span for spans in mapped_files().values() for span in spans]
        places = {row.name: row.where for row in optimizer.memory_report().rows}
        for p, entries in optimizer.state.items():
            if entries.get("exp_avg_q8") is None:
                continue
            codes = entries["exp_avg_q8"]
            assert codes.shape == p.to_local().shape
            is_paged = any(begin <= codes.data_ptr() < end for begin, end in pages)
            # What this process holds counts, not the whole.
            assert is_paged == (codes.numel() >= placement.PAGED_MIN_NUMEL)
        assert places["up.weight"] == placement.FILE_MAPPED
        assert places["few.bias"] == placement.RESIDENT
    return list(mapped_files()), modes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from /proc")
def test_each_process_pages_its_shards_into_files_of_its_own(processes: Processes) -> None:
    (first, modes), (second, _) = processes.run(paged, 2)
    assert first
    assert second
    assert not set(map(tuple, first)) & set(map(tuple, second))
    assert set(modes) == {0o700}
