"""Muon's hybrid under engines, beside the same training in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from optfactory import build_optimizer, plan
from optfactory.errors import ConfigError
from optfactory.sharding.team import Line
from optfactory.sharding.team import Team as Holders
from tests.distributed.beside import Beside, Collectives
from tests.distributed.processes import Processes, Team
from tests.distributed.test_checkpoints import unequal, wholes
from tests.distributed.test_faults import bits, same
from tests.distributed.test_plans import figures
from tests.distributed.transformers import (
    by_rows,
    in_parallel,
    loss,
    on_a_grid,
    transformer,
)

NAMES = ["muon8bit", "muon32bit"]


def beside(model: nn.Module, name: str, **options: Any) -> Beside:
    found: Beside = Beside.of(model, name, transformer(), loss=loss, **options)
    return found


# ---- steps ---------------------------------------------------------------------------------------


def trained(team: Team, name: str) -> dict[str, list[str]]:
    """What differs under each engine."""
    found = {"rows": beside(by_rows(team.mesh), name).train(range(2), team.rank, team.world).wrong}
    found["tp"] = beside(in_parallel(team.mesh), name).train(range(2), 0, 1).wrong
    if team.world == 4:
        grid = team.meshes[2, 2]
        both = beside(by_rows(grid), name, param_groups={"qkv": {"match": "*.qkv.*", "split": 3}})
        found["hsdp, split"] = both.train(range(2), team.rank, 4).wrong
        found["grid"] = beside(on_a_grid(grid), name).train(range(2), team.rank // 2, 2).wrong
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("world", [4, 2, 3])
def test_models_train_as_in_one_process(processes: Processes, world: int) -> None:
    for name in NAMES:
        assert processes.run(trained, world, name) == [{}] * world


def scaled(team: Team) -> list[str]:
    """An infinity in the gradient of one process, then a good step."""
    both = beside(by_rows(team.mesh), "muon8bit", neuron_norm=True)
    both.train(range(1), team.rank, team.world)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    wrong = []
    for bad in (True, False):
        both.backward([0, 0], 0)
        both.compare_gradients()
        for m in (both.model, both.single):
            for p in m.parameters():
                p.grad.mul_(scaler.get_scale())
        if bad and team.rank == 1:
            both.model.layers[0].up.weight.grad.to_local()[0, 0] = torch.inf
        before = bits(both.model, both.optimizer)
        scaler.scale(torch.ones(()))
        scaler.step(both.optimizer)
        scaler.update()
        if same(before, bits(both.model, both.optimizer)) != bad:
            wrong.append(f"bad {bad}")
    alone = torch.amp.GradScaler("cpu", init_scale=2.0)
    alone.scale(torch.ones(()))
    alone.step(both.alone)
    both.compare()
    return [*wrong, *both.wrong]


def test_an_infinity_on_one_process_is_skipped_by_all(processes: Processes) -> None:
    assert processes.run(scaled, 2) == [[]] * 2


# ---- what is exchanged ---------------------------------------------------------------------------


def exchanged(
    team: Team, make: Callable[[Any], nn.Module], options: dict[str, Any]
) -> tuple[dict[str, int], int, int, int]:
    """Collectives of a step by name; bytes sent to others, counted and told; of all matrices."""
    model = make(team.mesh)
    optimizer = build_optimizer("muon8bit", model, lr=1e-2, ns_memory=10**8, **options)
    loss(model, 0).backward()
    real, sent = dist.all_to_all_single, []

    def counting(to: Tensor, of: Tensor, _: Any, sizes: list[int], **given: Any) -> Any:
        own = sizes[given["group"].rank()]
        sent.append(of.nbytes - 4 * own)
        return real(to, of, _, sizes, **given)

    with pytest.MonkeyPatch.context() as patch, Collectives() as collectives:
        patch.setattr(dist, "all_to_all_single", counting)
        optimizer.step()
    made = optimizer._current_plan()
    told = made.scratch.sent_bytes(made.gather())
    matrices = [g for g in optimizer.param_groups if g["optimizer"] == "muon8bit"]
    numel = sum(p.numel() for group in matrices for p in group["params"])
    names = {name: n for (name, _), n in collectives.found.items()}
    return names, sum(sent), told, numel


def test_bytes_of_a_step(processes: Processes) -> None:
    """Each matrix goes to its owner and back, but for what is there already."""
    for world in (1, 2, 4):
        found = processes.run(exchanged, world, by_rows, {})
        names, _, _, numel = found[0]
        # Four kinds of matrices, and one word of all before.
        expected = {"alltoall_base_": 8, "allreduce_": 1} if world > 1 else {}
        assert names == expected
        assert [told for _, _, told, _ in found] == [sent for _, sent, _, _ in found]
        total = sum(sent for _, sent, _, _ in found)
        # Rows are not quite even: owners have a little more or less than a share.
        assert total == pytest.approx(2 * 4 * numel * (world - 1) / world, rel=0.01)


def test_second_moments_of_neurons_take_one_word_for_each_batch(processes: Processes) -> None:
    found = processes.run(exchanged, 2, by_rows, {"neuron_norm": True})
    assert [names for names, *_ in found] == [{"alltoall_base_": 8, "allreduce_": 1 + 4}] * 2


def disagreeing(team: Team) -> list[str]:
    """One process without the gradient of a matrix, then a good step."""
    both = beside(by_rows(team.mesh), "muon8bit").train(range(1), team.rank, team.world)
    both.backward([0, 1, 2], team.rank)
    both.compare_gradients()
    weight = both.model.layers[1].out.weight
    before, gradient = bits(both.model, both.optimizer), weight.grad
    if team.rank == 2:
        weight.grad = None
    try:
        both.optimizer.step()
        both.wrong.append("no error")
    except ConfigError as error:
        if "layers.1.out.weight: some processes have a gradient" not in str(error):
            both.wrong.append(str(error))
    if not same(before, bits(both.model, both.optimizer)):
        both.wrong.append("something changed")
    weight.grad = gradient
    both.step()
    return both.wrong


def test_gradients_of_some_processes_only_are_refused_by_all(processes: Processes) -> None:
    assert processes.run(disagreeing, 3) == [[]] * 3


def without(team: Team) -> list[str]:
    """Some matrices without a gradient on any process."""
    both = beside(by_rows(team.mesh), "muon8bit").train(range(1), team.rank, team.world)
    for step in range(3):
        both.backward([step, step + 1], team.rank)
        both.compare_gradients()
        for m in (both.model, both.single):
            for p in (m.layers[step % 2].out.weight, m.layers[0].up.weight)[: 1 + step % 2]:
                p.grad = None
        both.step()
    return both.wrong


def test_matrices_without_a_gradient(processes: Processes) -> None:
    assert processes.run(without, 2) == [[]] * 2


def lines(team: Team) -> tuple[int, list[int], list[int]]:
    """How a process is numbered, and those of a row that a mesh has in another order."""
    holders = Holders(team.meshes[2, 2], (0, 1))
    assert holders.number_at(holders.place_of(holders.number)) == holders.number
    turned = DeviceMesh("cpu", [2, 0, 3, 1])
    return holders.number, [line.place for line in holders.lines], Line(turned, 0).by_rank


def test_members_are_numbered_by_their_places(processes: Processes) -> None:
    found = processes.run(lines, 4)
    assert found == [(n, [n // 2, n % 2], [1, 3, 0, 2]) for n in range(4)]


def ended(team: Team, folder: str) -> None:
    """A process ends where the others wait for its parts."""
    both = beside(by_rows(team.mesh), "muon8bit").train(range(1), team.rank, team.world)
    both.backward([0, 1], team.rank)
    with pytest.MonkeyPatch.context() as patch:
        if team.rank == 1:
            patch.setattr(dist, "all_to_all_single", lambda *_, **__: os._exit(1))
        try:
            both.optimizer.step()
        except RuntimeError as error:
            Path(folder, "message").write_text(str(error))


def test_nobody_waits_for_parts_of_a_process_that_ended(
    processes: Processes, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="the process ended"):
        processes.run(ended, 2, str(tmp_path))
    assert (tmp_path / "message").read_text()


# ---- memory --------------------------------------------------------------------------------------


def asked_on(mesh: str) -> dict[str, Any]:
    """On some meshes there are second moments of neurons, which all processes keep."""
    return {"neuron_norm": mesh in ("3", "grid")}


def measured(team: Team) -> dict[str, tuple[dict[str, Any], int]]:
    found = {}
    meshes = {"2": by_rows, "3": by_rows, "4": by_rows, "2x2": by_rows, "grid": on_a_grid}
    for text, make in meshes.items():
        sizes = (2, 2) if text == "grid" else tuple(int(size) for size in text.split("x"))
        if team.rank < team.meshes[sizes].size():
            model = make(team.meshes[sizes])
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer = build_optimizer("muon8bit", model, **asked_on(text))
            optimizer.step()
            (share,) = optimizer._current_plan().scratch._shares.values()
            here = plan("muon8bit", model, **asked_on(text))
            found[text] = (figures(here, 0), share.memory.nbytes)
    return found


PLACED = {
    "*": (Shard(0), Replicate()),
    "*.up.*": (_StridedShard(0, split_factor=2), Shard(0)),
    "*.down.weight": (Shard(0), Shard(1)),
}


def test_scratch_memory_is_what_plans_say(processes: Processes) -> None:
    results = processes.run(measured, 4)
    for rank, found in enumerate(results):
        for mesh, (here, nbytes) in found.items():
            asked = {"mesh": "2x2", "placements": PLACED} if mesh == "grid" else {"mesh": mesh}
            planned = figures(plan("muon8bit", transformer(), **asked, **asked_on(mesh)), rank)
            assert planned == here, (mesh, rank)
            assert planned["shares"]["scratch", 32, "resident"] == nbytes
    assert results[0].keys() == {"2", "3", "4", "2x2", "grid"}


# ---- checkpoints ---------------------------------------------------------------------------------


def saved(team: Team) -> dict[Any, Any]:
    both = beside(by_rows(team.mesh), "muon8bit", neuron_norm=True)
    both.train(range(2), team.rank, team.world)
    state = get_optimizer_state_dict(both.model, both.optimizer)
    folder = str(team.folder.parent / "muon")
    dcp.save({"optimizer": state}, checkpoint_id=folder, process_group=team.group)
    return wholes(state["state"])


def loaded(team: Team) -> dict[Any, Any]:
    model = by_rows(team.mesh)
    optimizer = build_optimizer("muon8bit", model, lr=1.0, neuron_norm=True)
    state = get_optimizer_state_dict(model, optimizer)
    folder = str(team.folder.parent / "muon")
    dcp.load({"optimizer": state}, checkpoint_id=folder, process_group=team.group)
    set_optimizer_state_dict(model, optimizer, state)
    momentum = optimizer.state[model.layers[0].up.weight]["momentum_buffer_q8"]
    assert momentum.shape == model.layers[0].up.weight.to_local().shape
    return wholes(get_optimizer_state_dict(model, optimizer)["state"])


def test_dcp_at_any_number_of_processes(processes: Processes) -> None:
    expected = processes.run(saved, 3)[0]
    for kept in ("momentum_buffer_q8", "neuron_second_moment"):
        assert any(kept in str(key) for key in expected)
    for world in (1, 2, 4):
        for found in processes.run(loaded, world):
            assert unequal(found, expected) == []
