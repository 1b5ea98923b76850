"""Engines that keep a part of each parameter, or copies, beside training in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from optfactory import build_optimizer
from tests.distributed.beside import CASES, Beside, small_pages
from tests.distributed.harness import whole
from tests.distributed.nets import fsdp, inputs, net
from tests.distributed.processes import Processes, Team


def data_parallel(team: Team) -> nn.Module:
    return DistributedDataParallel(net(), process_group=team.group, find_unused_parameters=True)


def with_bucket_views(team: Team) -> nn.Module:
    return DistributedDataParallel(
        net(),
        process_group=team.group,
        find_unused_parameters=True,
        gradient_as_bucket_view=True,
        bucket_cap_mb=0.01,  # type: ignore[arg-type]
    )


def in_rows(team: Team) -> nn.Module:
    return fsdp(team.mesh)


def not_resharded(team: Team) -> nn.Module:
    return fsdp(team.mesh, reshard_after_forward=False)


def offloaded(team: Team) -> nn.Module:
    return fsdp(team.mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def in_columns(team: Team) -> nn.Module:
    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.ndim == 2 and p.shape[1] % team.world == 0 else None

    model = fsdp(team.mesh, shard_placement_fn=place)
    assert model.table.weight.placements == (Shard(1),)
    return model


def bfloat16(team: Team) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp(team.mesh, mp_policy=policy)


def several_at_once(team: Team) -> nn.Module:
    model = net()
    fully_shard([model.up, model.norm, model.down], mesh=team.mesh)
    return fully_shard(model, mesh=team.mesh)  # type: ignore[return-value]


def copied(team: Team) -> nn.Module:
    return replicate(net(), mesh=team.mesh)  # type: ignore[return-value]


def on_a_grid(team: Team) -> nn.Module:
    return fsdp(team.meshes[2, 2])


COPIES = [data_parallel, with_bucket_views, copied]
SHARDS = [in_rows, not_resharded, offloaded, in_columns, several_at_once, bfloat16]
# How far bfloat16 is from float32, in one process too.
NEAR = {bfloat16: 0.5}

Engine = Callable[[Team], nn.Module]


def train(team: Team, engines: list[Engine], case: str) -> dict[str, list[str]]:
    name, options = CASES[case]
    wrong = {}
    for engine in engines:
        with small_pages():
            both = Beside.of(engine(team), name, near=NEAR.get(engine, 1e-4), **options)
            both.train(range(3), team.rank, team.world)
        if both.wrong:
            wrong[engine.__name__] = both.wrong
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_every_case(processes: Processes, case: str) -> None:
    for world in (2, 4) if case in ("adamw8bit", "lamb8bit", "clipped") else (2,):
        assert processes.run(train, world, [data_parallel, in_rows], case) == [{}] * world


@pytest.mark.parametrize("case", ["adamw8bit", "lamb8bit"])
def test_every_way_to_wrap(processes: Processes, case: str) -> None:
    assert processes.run(train, 2, [*COPIES, *SHARDS], case) == [{}] * 2
    assert processes.run(train, 4, [copied, in_columns, on_a_grid], case) == [{}] * 4


def replicas(team: Team) -> dict[str, list[int]]:
    """Parameters that differ between replicas, whose own random numbers do."""
    wrong = {}
    for rounding in ("stochastic", "kahan"):
        model = net().bfloat16()
        torch.manual_seed(team.rank)  # from which an optimizer draws the seed that it is not given
        wrapped = DistributedDataParallel(
            model, process_group=team.group, find_unused_parameters=True
        )
        optimizer = build_optimizer("adamw8bit", wrapped, lr=1e-2, param_rounding=rounding)
        for seed in range(3):
            optimizer.zero_grad()
            wrapped(inputs(10 * seed + team.rank)).backward()
            optimizer.step()
        for n, p in enumerate(model.parameters()):
            first = p.detach().clone()
            torch.distributed.broadcast(first, 0, group=team.group)
            if not torch.equal(first, p):
                wrong.setdefault(rounding, []).append(n)
    return wrong


def test_replicas_of_16_bits_stay_the_same(processes: Processes) -> None:
    assert processes.run(replicas, 2) == [{}] * 2


def ignoring(team: Team, name: str) -> list[str]:
    """Parameters that FSDP2 leaves alone stay whole, beside pieces in one group."""
    model = net()
    ignored = {model.table.weight, model.few.bias}
    for module in (model.up, model.norm, model.down, model.few):
        fully_shard(module, mesh=team.mesh, ignored_params=ignored)
    fully_shard(model, mesh=team.mesh, ignored_params=ignored)
    assert not isinstance(model.table.weight, DTensor)
    assert isinstance(model.up.weight, DTensor)
    # Nobody sums their gradients up, so all processes have the same data.
    return Beside.of(model, name).train(range(3), 0, 1).wrong


def accumulating(team: Team, name: str) -> list[str]:
    both = Beside.of(fsdp(team.mesh), name)
    model = both.model
    for seed in range(3):
        data = [10 * seed + n for n in range(2 * team.world)]
        both.backward(data, team.rank)  # zeros what was there, and has the plain model's gradients
        model.zero_grad()
        model.set_requires_gradient_sync(False)
        (model(inputs(data[team.rank])) / 2).backward()
        both.optimizer.step()  # there are no gradients yet: it does nothing
        both.compare()
        model.set_requires_gradient_sync(True)
        (model(inputs(data[team.world + team.rank])) / 2).backward()
        both.compare_gradients()
        both.step()
    return both.wrong


def clipping(team: Team, name: str) -> list[str]:
    both = Beside.of(fsdp(team.mesh), name)
    for seed in range(3):
        both.backward([2 * seed + n for n in range(team.world)], team.rank)
        norms = [
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3) for m in (both.model, both.single)
        ]
        assert whole(norms[0]) > 1e-3
        both.compare_gradients()
        both.step()
    return both.wrong


def moving(team: Team, name: str) -> list[str]:
    """Engines and `model.to()` swap the memory of parameters under the same objects."""
    both = Beside.of(fsdp(team.mesh), name)
    for seed in range(3):
        both.train(range(seed, seed + 1), team.rank, team.world)
        before = [p.to_local().data_ptr() for p in both.model.parameters()]
        both.model._apply(lambda t: t.clone())
        after = [p.to_local().data_ptr() for p in both.model.parameters()]
        assert before != after
    return both.wrong


def in_hooks(team: Team, name: str) -> list[str]:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    model, single = fsdp(team.mesh), net()
    own = {p: build_optimizer(name, [p], lr=1e-2) for p in model.parameters() if p.requires_grad}
    alone = {
        p: build_optimizer(name, [q], lr=1e-2)
        for p, q in zip(model.parameters(), single.parameters(), strict=True)
        if p in own
    }
    mine = dict(zip(model.parameters(), single.parameters(), strict=True))

    def step(p: Any) -> None:
        mine[p].grad = whole(p.grad).clone()
        own[p].step()
        alone[p].step()
        p.grad = None

    for p in own:
        p.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        model(inputs(10 * seed + team.rank)).backward()
    pairs = zip(model.named_parameters(), single.parameters(), strict=True)
    start = dict(net().named_parameters())
    moved = [n for n, p in model.named_parameters() if not torch.equal(whole(p), start[n])]
    assert len(moved) == len(own) - 2  # without the layer that is not used
    return [n for (n, p), q in pairs if not torch.equal(whole(p), q)]


USES = [ignoring, accumulating, clipping, moving]


def uses(team: Team, name: str) -> dict[str, list[str]]:
    # Hooks run in no order that processes share, so that nothing of them may need all processes.
    asked = [*USES, in_hooks] if name == "adamw8bit" else USES
    found = {use.__name__: use(team, name) for use in asked}
    return {title: wrong for title, wrong in found.items() if wrong}


@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
def test_uses_of_fsdp2(processes: Processes, name: str) -> None:
    assert processes.run(uses, 2, name) == [{}] * 2
