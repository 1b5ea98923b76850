"""Distributed Checkpoint and torch's state dict helpers, on any number of processes and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions as Options
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from optfactory import build_optimizer
from tests.distributed.harness import by_rows, cut, state_of, stepped, values, whole
from tests.distributed.nets import fsdp, net, same_gradients
from tests.distributed.processes import PROCESSES, Processes, Team

NAMES = ["adamw8bit", "lamb8bit", "adamw", "paged_adamw8bit"]


def trained(model: Any, name: str, seeds: range, **options: Any) -> torch.optim.Optimizer:
    optimizer = build_optimizer(name, model, lr=1e-2, **options)
    go_on(model, optimizer, seeds)
    return optimizer


def go_on(model: Any, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    single = net()
    for seed in seeds:
        same_gradients(model, single, seed)
        optimizer.step()
    model.zero_grad()


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def wholes(state: dict[str, Any]) -> dict[Any, Any]:
    return {(n, k): whole(x) for n, entries in state.items() for k, x in entries.items()}


def unequal(a: dict[Any, Any], b: dict[Any, Any]) -> list[Any]:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return [k for k in a if not torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))]


def save(team: Team, name: str, flat: bool) -> dict[Any, Any]:
    model = fsdp(team.mesh)
    optimizer = trained(model, name, range(3))
    state = get_optimizer_state_dict(
        model, optimizer, options=Options(flatten_optimizer_state_dict=flat)
    )
    folder = team.folder.parent / f"{name}{flat}"
    dcp.save({"optimizer": state}, checkpoint_id=str(folder), process_group=team.group)
    return wholes(get_optimizer_state_dict(model, optimizer)["state"])


def load(team: Team, name: str, flat: bool) -> dict[Any, Any]:
    options = Options(flatten_optimizer_state_dict=flat)
    model = fsdp(team.mesh)
    optimizer = build_optimizer(name, model, lr=1.0)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    folder = team.folder.parent / f"{name}{flat}"
    dcp.load({"optimizer": state}, checkpoint_id=str(folder), process_group=team.group)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    return wholes(get_optimizer_state_dict(model, optimizer)["state"])


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_dcp_at_any_number_of_processes(processes: Processes, name: str, flat: bool) -> None:
    saved = processes.run(save, 3, name, flat)[0]
    for world in range(1, PROCESSES + 1):
        for found in processes.run(load, world, name, flat):
            assert unequal(found, saved) == []


def through_one_process(team: Team, name: str) -> list[Any]:
    """Sharded to whole, to a plain optimizer, and back."""
    model = fsdp(team.mesh)
    optimizer = trained(model, name, range(3))
    options = Options(full_state_dict=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    saved = wholes(get_optimizer_state_dict(model, optimizer)["state"])
    plain = net()
    one = build_optimizer(name, plain, lr=1.0)
    set_optimizer_state_dict(plain, one, full)
    again = fsdp(team.mesh)
    many = build_optimizer(name, again, lr=1.0)
    numbered = one.state_dict()
    many.load_state_dict(numbered)
    back = wholes(get_optimizer_state_dict(again, many)["state"])
    plain_state, sharded_state = state_of(one), state_of(optimizer)
    one.load_state_dict(optimizer.state_dict())
    return [
        *unequal(plain_state, sharded_state),
        *unequal(back, saved),
        *unequal(state_of(one), sharded_state),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_whole_checkpoints_into_sharded_optimizers_and_back(
    processes: Processes, name: str
) -> None:
    assert processes.run(through_one_process, 3, name) == [[]] * 3


def masters_through_one_process(team: Team, kind: str, other: str) -> list[Any]:
    """Sharded to whole, and back into another kind of masters, which keeps their values."""

    def made(model: Any, kind: str) -> torch.optim.Optimizer:
        return build_optimizer("adamw8bit", model, lr=1e-3, master_weights=kind)

    model = fsdp(team.mesh).bfloat16()
    optimizer = made(model, kind)
    for seed in range(3):
        for p in trainable(model):
            p.grad = p.detach() * (seed - 0.7)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    full = get_optimizer_state_dict(model, optimizer, options=Options(full_state_dict=True))
    plain = net().bfloat16()
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q))
    one = made(plain, kind)
    set_optimizer_state_dict(plain, one, full)
    wrong = unequal(state_of(one), state_of(optimizer))
    second = made(model, other)
    second.load_state_dict(one.state_dict())
    third = made(model, kind)
    third.load_state_dict(second.state_dict())
    fourth = made(model, kind)
    fourth.load_state_dict(saved)
    set_optimizer_state_dict(model, third, get_optimizer_state_dict(model, third))
    return [*wrong, *unequal(state_of(third), state_of(optimizer)),
            *unequal(state_of(fourth), state_of(optimizer))]  # fmt: skip


@pytest.mark.parametrize(("kind", "other"), [("split", "fp32"), ("fp32", "split")])
def test_masters_are_gathered_and_converted(processes: Processes, kind: str, other: str) -> None:
    assert processes.run(masters_through_one_process, 3, kind, other) == [[]] * 3


def broadcast(team: Team, name: str) -> list[Any]:
    model = fsdp(team.mesh)
    optimizer = trained(model, name, range(3))
    full = get_optimizer_state_dict(
        model, optimizer, options=Options(full_state_dict=True, cpu_offload=True)
    )
    again = fsdp(team.mesh)
    many = build_optimizer(name, again, lr=1.0)
    options = Options(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(again, many, full if team.rank == 0 else {}, options=options)
    return unequal(
        wholes(get_optimizer_state_dict(again, many)["state"]),
        wholes(get_optimizer_state_dict(model, optimizer)["state"]),
    )


def test_whole_checkpoints_broadcast_from_the_first_process(processes: Processes) -> None:
    assert processes.run(broadcast, PROCESSES, "adamw8bit") == [[]] * PROCESSES


def converted(team: Team, source: str, target: str) -> list[Any]:
    """From one width to another: as in one process."""
    model = fsdp(team.mesh)
    optimizer = trained(model, source, range(3))
    other = build_optimizer(target, fsdp(team.mesh), lr=1.0)
    other.load_state_dict(optimizer.state_dict())
    plain = trained(net(), source, range(3))
    expected = build_optimizer(target, net(), lr=1.0)
    expected.load_state_dict(plain.state_dict())
    return unequal(state_of(other), state_of(expected))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(("adamw", "adamw8bit"), ("adamw8bit", "adamw"), ("lamb8bit", "lamb32bit")),
        *(("adamw", "adamw16bit"), ("adamw16bit", "adamw8bit")),
    ],
)
def test_widths_are_converted_as_in_one_process(
    processes: Processes, source: str, target: str
) -> None:
    assert processes.run(converted, 3, source, target) == [[]] * 3


def from_torch(team: Team) -> list[Any]:
    model, plain = fsdp(team.mesh), net()
    theirs = torch.optim.AdamW(trainable(model), lr=1e-2)
    single = torch.optim.AdamW(trainable(plain), lr=1e-2)
    go_on(model, theirs, range(2))
    go_on(plain, single, range(2))
    ours = build_optimizer("adamw", fsdp(team.mesh), lr=1.0)
    ours.load_state_dict(theirs.state_dict())
    expected = build_optimizer("adamw", net(), lr=1.0)
    expected.load_state_dict(single.state_dict())
    wrong = [k for k, v in state_of(expected).items() if not torch.allclose(v, state_of(ours)[k])]
    exported = ours.export_state_dict("torch")
    again = torch.optim.AdamW(trainable(fsdp(team.mesh)), lr=1.0)
    again.load_state_dict(exported)
    first = next(iter(again.state.values()))
    assert first["exp_avg"].placements == next(model.parameters()).placements
    return wrong


def test_checkpoints_of_torch_and_back(processes: Processes) -> None:
    assert processes.run(from_torch, 2) == [[]] * 2


def exported(team: Team, layout: str) -> list[Any]:
    """Of 8 bits, and of vectors whose blocks are cut."""
    shapes = [(101, 96), (5000,)]
    start, steps = values(shapes, 1, torch.float32), [values(shapes, 2, torch.float32)]
    single = stepped([nn.Parameter(x.clone()) for x in start], steps, "adamw8bit", {})
    parts = [nn.Parameter(cut(x, team.mesh, by_rows(x.shape))) for x in start]
    pieces = [[cut(g, team.mesh, by_rows(g.shape)) for g in step] for step in steps]
    sharded = stepped(parts, pieces, "adamw8bit", {})
    a, b = sharded.export_state_dict(layout), single.export_state_dict(layout)
    assert a["param_groups"] == b["param_groups"]
    return [
        (n, k)
        for n, entries in b["state"].items()
        for k, v in entries.items()
        if not torch.equal(torch.as_tensor(whole(a["state"][n][k])), torch.as_tensor(v))
    ]


@pytest.mark.parametrize("layout", ["torch", "bitsandbytes"])
def test_exports(processes: Processes, layout: str) -> None:
    assert processes.run(exported, 3, layout) == [[]] * 3


def made_by_the_helper(team: Team, name: str) -> list[float]:
    """Parameters and the first real step, after the helpers made the state of a new optimizer."""
    model, expected = fsdp(team.mesh), fsdp(team.mesh)
    single = net()
    optimizer = build_optimizer(name, model, lr=1e-2, eps=0.0)
    before = [whole(p).clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(float(entries["step"]) == 0 for entries in optimizer.state.values())
    other = build_optimizer(name, expected, lr=1e-2, eps=0.0)
    for some, its in ((model, optimizer), (expected, other)):
        same_gradients(some, single, 1)
        its.step()
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return [
        n
        for n, (a, b) in enumerate(pairs)
        if not torch.equal(whole(a).nan_to_num(), whole(b).nan_to_num())
    ]


@pytest.mark.parametrize("name", ["adamw8bit", "lamb"])
def test_state_made_by_the_helpers_is_as_fresh(processes: Processes, name: str) -> None:
    assert processes.run(made_by_the_helper, 2, name) == [[]] * 2


def bytes_per_parameter(team: Team, count: int) -> tuple[int, int]:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(count)))
    fully_shard(model, mesh=team.mesh)
    optimizer = build_optimizer("adamw8bit", model)
    options = Options(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    text = sum(len(str(v)) for k, v in state.items() if k.startswith("param_groups"))
    return len(state), text


def test_flat_state_dicts_grow_with_the_number_of_parameters(processes: Processes) -> None:
    (few, short), _ = processes.run(bytes_per_parameter, 2, 20)
    (many, long), _ = processes.run(bytes_per_parameter, 2, 40)
    assert (many, long) == (2 * few, 2 * short)


def another_width(team: Team) -> str:
    """A checkpoint of 8-bit state into an optimizer of 32 bits, by DCP itself."""
    model = fsdp(team.mesh)
    state = get_optimizer_state_dict(model, trained(model, "adamw8bit", range(1)))
    folder = str(team.folder / "saved")
    dcp.save({"optimizer": state}, checkpoint_id=folder, process_group=team.group)
    wide = build_optimizer("adamw", model, lr=1.0)
    target = get_optimizer_state_dict(model, wide)
    try:
        dcp.load({"optimizer": target}, checkpoint_id=folder, process_group=team.group)
    except BaseException as error:  # CheckpointException is none of Exception's
        return str(error)
    return ""


def test_dcp_never_reads_codes_as_numbers(processes: Processes) -> None:
    for message in processes.run(another_width, 2):
        assert "Missing key" in message
        assert "exp_avg" in message


def saved_while_training(team: Team) -> list[Any]:
    """`async_save` copies what it saves: steps go on, with collectives of their own group."""
    model = fsdp(team.mesh)
    optimizer = trained(model, "lamb8bit", range(2))
    state = get_optimizer_state_dict(model, optimizer)
    before = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in wholes(state["state"]).items()
    }
    folder = str(team.folder / "saved")
    group = dist.new_group(list(range(PROCESSES)))
    saving = dcp.async_save({"optimizer": state}, checkpoint_id=folder, process_group=group)
    go_on(model, optimizer, range(2, 4))
    saving.result()
    again = fsdp(team.mesh)
    other = build_optimizer("lamb8bit", again, lr=1.0)
    target = get_optimizer_state_dict(again, other)
    dcp.load({"optimizer": target}, checkpoint_id=folder, process_group=team.group)
    set_optimizer_state_dict(again, other, target)
    return unequal(wholes(get_optimizer_state_dict(again, other)["state"]), before)


def test_async_save(processes: Processes) -> None:
    assert processes.run(saved_while_training, PROCESSES) == [[]] * PROCESSES
