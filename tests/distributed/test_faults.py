"""What goes wrong on one process: nobody goes on with half a step, nobody waits for ever."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.distributed.beside import CASES, Beside
from tests.distributed.harness import state_of, whole
from tests.distributed.nets import fsdp, inputs, net
from tests.distributed.processes import Processes, Team


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What this process has of parameters and states, steps included."""
    found: list[Any] = [*model.parameters()]
    for entries in optimizer.state.values():
        found += entries.values()
    local = [x.to_local() if isinstance(x, DTensor) else x for x in found]
    return [x.detach().clone() for x in local]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(map(torch.equal, before, after))


def trained(team: Team, name: str, **options: Any) -> Beside:
    both: Beside = Beside.of(fsdp(team.mesh), name, **options)
    return both.train(range(2), team.rank, team.world)


# ---- a process ends ------------------------------------------------------------------------------


def killed_while_saving(team: Team, both: Beside, folder: str) -> None:
    model, optimizer = both.model, both.optimizer
    group = team.meshes[2, 2]["tp"].get_group()
    for number in range(2):
        weights, state = get_state_dict(model, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            if number and team.rank == 3:
                patch.setattr(os, "fsync", lambda file: os.kill(os.getpid(), signal.SIGKILL))
            to = {"model": weights, "optimizer": state}
            dcp.save(to, checkpoint_id=f"{folder}/{number}", process_group=group)
        both.train(range(2, 3), team.rank % 2, 2)
        after = [*map(whole, model.state_dict().values())]
        if team.rank == 2:
            torch.save(after, f"{folder}/expected")


def killed_while_stepping(team: Team, both: Beside, folder: str) -> None:
    """A gradient that is refused on one process, which then ends, as a script does."""
    model, optimizer = both.model, both.optimizer
    both.backward([0, 1], team.rank)
    before = bits(model, optimizer)
    if team.rank == 1:
        model.up.weight.grad._local_tensor = torch.eye(3).to_sparse()
    try:
        optimizer.step()
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    kept = same(before, bits(model, optimizer))
    Path(folder, f"process {team.rank}").write_text(f"{kept} {message}")
    if team.rank == 1:
        os._exit(1)


def in_pairs(team: Team, folder: str) -> None:
    """One process of each pair ends, for the one reason or the other."""
    mesh = team.meshes[2, 2]["tp"]
    use, name = (
        (killed_while_saving, "adamw8bit") if team.rank > 1 else (killed_while_stepping, "lamb8bit")
    )
    both: Beside = Beside.of(fsdp(mesh), name)
    use(team, both.train(range(2), team.rank % 2, 2), folder)


def go_on(team: Team, folder: str) -> list[int]:
    both: Beside = Beside.of(fsdp(team.mesh), "adamw8bit")
    weights, state = get_state_dict(both.model, both.optimizer)
    to = {"model": weights, "optimizer": state}
    dcp.load(to, checkpoint_id=f"{folder}/0", process_group=team.group)
    set_state_dict(
        both.model, both.optimizer, model_state_dict=to["model"], optim_state_dict=to["optimizer"]
    )
    both.train(range(2, 3), team.rank, 2)
    expected = torch.load(f"{folder}/expected")
    now = [*map(whole, both.model.state_dict().values())]
    return [n for n, (a, b) in enumerate(zip(now, expected, strict=True)) if not torch.equal(a, b)]


def test_a_process_that_ends_in_a_step_or_while_it_saves(
    processes: Processes, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"(?s)the process ended.*the process ended"):
        processes.run(in_pairs, 4, str(tmp_path))
    # The others get an error before they have written anything.
    refused, stopped = ((tmp_path / f"process {n}").read_text() for n in (1, 0))
    assert refused.startswith("True ConfigError: cannot update up.weight: its gradient is sparse")
    assert stopped.startswith("True RuntimeError")
    # A folder without this file is no checkpoint yet; the one before is.
    assert not (tmp_path / "1/.metadata").exists()
    assert processes.run(go_on, 2, str(tmp_path)) == [[]] * 2


# ---- gradients of one process only ---------------------------------------------------------------


def without_gradients(team: Team, case: str) -> tuple[bool, bool]:
    """Whether a process keeps what it has in a step without gradients, and in one with them."""
    name, options = CASES[case]
    both = trained(team, name, **options)
    model, optimizer = both.model, both.optimizer
    kept = []
    for has_none in (1, -1):
        both.backward([0, 1], team.rank)
        before = bits(model, optimizer)
        if team.rank == has_none:
            for p in model.parameters():
                p.grad = None
        optimizer.step()
        kept.append(same(before, bits(model, optimizer)))
    return kept[0], kept[1]


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_gradients_takes_part(processes: Processes, case: str) -> None:
    first, second = processes.run(without_gradients, 2, case)
    assert first == (False, False)
    assert second == (True, False)


def infinite(team: Team, case: str, scaled: bool) -> list[str]:
    """An infinity in the gradient of one process, then a good step."""
    name, options = CASES[case]
    both = trained(team, name, **options)
    model, optimizer, wrong = both.model, both.optimizer, []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled, growth_interval=100)
    for bad in (True, False):
        for m, seeds in ((model, [team.rank]), (both.single, [0, 1])):
            m.zero_grad()
            for seed in seeds:
                scaler.scale(m(inputs(seed)) / len(seeds) * (2 if m is model else 1)).backward()
        for p in model.parameters():  # the engine took the mean over processes
            if p.grad is not None:
                p.grad.to_local().div_(2)
        both.compare_gradients()
        if bad and team.rank == 1:
            model.up.weight.grad.to_local()[0, 0] = torch.inf
        before = bits(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if same(before, bits(model, optimizer)) != bad:
            wrong.append(f"bad {bad}")
        if scaled and scaler.get_scale() != 2.0:
            wrong.append(f"scale {scaler.get_scale()}")
        if not bad:
            alone = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
            alone.scale(torch.ones(()))
            alone.step(both.alone)
            both.compare()
    return [*wrong, *both.wrong]


@pytest.mark.parametrize(
    ("case", "scaled"),
    [("skips", False), ("adamw8bit", True), ("lamb8bit", True), ("skips", True)],
)
def test_an_infinity_on_one_process_is_skipped_by_all(
    processes: Processes, case: str, scaled: bool
) -> None:
    assert processes.run(infinite, 2, case, scaled) == [[]] * 2


# ---- engines that put other tensors into groups, or into the model -------------------------------


@pytest.mark.parametrize("stepped", [False, True])
def test_groups_of_fewer_tensors_than_names(stepped: bool) -> None:
    """DeepSpeed puts one flat tensor in the place of a group's parameters."""
    model = net()
    optimizer = build_optimizer("adamw", model, lr=1e-2)
    expected = build_optimizer("adamw", [nn.Parameter(torch.ones(500))], lr=1e-2)
    if stepped:
        model(inputs(0)).backward()
        optimizer.step()
    flat = nn.Parameter(torch.ones(500))
    optimizer.param_groups[0]["params"] = [flat]
    if stepped:
        optimizer.state.clear()
    for one in (optimizer, expected):
        p = one.param_groups[0]["params"][0]
        p.grad = torch.arange(500.0)
        one.step()
    assert torch.equal(flat, expected.param_groups[0]["params"][0])
    assert optimizer.param_groups[0]["param_names"] == ["param_groups[0].params[0]"]
    again = build_optimizer("adamw", net())
    again.param_groups[0]["params"] = [nn.Parameter(torch.ones(500))]
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state_dict()["state"][0]["exp_avg"], optimizer.state[flat]["exp_avg"])


@pytest.mark.parametrize("case", ["lamb", "clipped"])
def test_flat_pieces_are_refused_where_whole_tensors_are_needed(case: str) -> None:
    name, options = CASES[case]
    optimizer = build_optimizer(name, net(), lr=1e-2, **options)
    flat = nn.Parameter(torch.ones(5000))
    flat.grad = torch.ones(5000)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ConfigError, match="replaced the parameters by one flat tensor"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(5000))


def test_a_flat_piece_in_the_place_of_a_single_matrix_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    optimizer = build_optimizer("muon32bit", model)
    matrices = [group for group in optimizer.param_groups if group["optimizer"] == "muon32bit"]
    assert [len(group["params"]) for group in matrices] == [1]
    flat = matrices[0]["params"][0] = nn.Parameter(torch.ones(5000))
    flat.grad = torch.ones(5000)
    with pytest.raises(ConfigError, match="'muon' needs whole matrices"):
        optimizer.step()
    assert torch.equal(flat, torch.ones(5000))


def built_behind_a_forward(team: Team) -> list[str]:
    """Whole parameters are in the model then, in memory that is freed by the next backward."""
    found = []
    for given in (
        lambda m: m,
        lambda m: [{"params": m}],
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
    ):
        model = fsdp(team.mesh)
        with torch.no_grad():
            model(inputs(0))
        assert type(model.table.weight) is nn.Parameter
        optimizer = build_optimizer("adamw8bit", given(model), lr=1e-2)
        start = whole(model.state_dict()["table.weight"]).clone()
        model(inputs(team.rank)).backward()
        try:
            optimizer.step()
            moved = not torch.equal(whole(model.table.weight), start)
            found.append("trained" if moved else "left behind")
        except ConfigError as error:
            found.append(str(error))
    return found


def test_an_optimizer_built_behind_a_forward_trains_or_is_refused(processes: Processes) -> None:
    for found in processes.run(built_behind_a_forward, 2):
        assert found[:2] == ["trained"] * 2
        for message in found[2:]:
            assert "memory was freed" in message
            assert "model.reshard()" in message


def in_places(team: Team, name: str) -> list[str]:
    """Groups that hold placeholders for a while, and then what became of the parameters."""
    model, single = net(), net()
    optimizer = build_optimizer(name, model, lr=1e-2)
    optimizer.memory_report()  # makes plans for what is there now
    places = {n: i for i, n in enumerate(optimizer.param_groups[0]["param_names"])}
    params = optimizer.param_groups[0]["params"]
    for i, p in enumerate(params):
        params[i] = torch.empty(1, dtype=p.dtype)
    fully_shard(model, mesh=team.mesh)
    new = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [new[n] for n in places]
    both = Beside(model, single, optimizer, build_optimizer(name, single, lr=1e-2))
    both.train(range(3), team.rank, team.world)
    a, b = state_of(both.optimizer), state_of(both.alone)
    differing = [f"{k}" for k in b if not torch.equal(a[k], b[k])]
    return [*both.wrong, *differing]


@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
def test_placeholders_in_groups(processes: Processes, name: str) -> None:
    assert processes.run(in_places, 2, name) == [[]] * 2
