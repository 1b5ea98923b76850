"""FSDP1, ZeroRedundancyOptimizer and PostLocalSGDOptimizer, beside one process."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from optfactory import build_optimizer
from optfactory.errors import ConfigError
from tests.distributed.beside import CASES, small_pages
from tests.distributed.nets import Net, inputs, net
from tests.distributed.processes import Processes, Team

with warnings.catch_warnings():  # the module uses what torch has deprecated
    warnings.simplefilter("ignore")
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

ELEMENTWISE = [
    *(("adamw", {}), ("paged_adam", {"amsgrad": True}), ("lion", {}), ("adan", {})),
    *(("sgd", {"nesterov": True}), ("rmsprop", {"momentum": 0.9}), ("radam", {}), ("ademamix", {})),
]


def named(model: nn.Module) -> dict[str, Tensor]:
    prefixes = ("_fsdp_wrapped_module.", "module.")
    found = {}
    for name, p in model.named_parameters():
        for prefix in prefixes:
            name = name.replace(prefix, "")
        found[name] = p.detach().clone()
    return found


def pieces(team: Team, **given: Any) -> nn.Module:
    wrap = partial(
        FullyShardedDataParallel,
        process_group=team.group,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        **given,
    )
    model = net()
    model.up, model.down = wrap(model.up), wrap(model.down)
    return wrap(model)  # type: ignore[return-value]


def flat(team: Team, name: str, options: dict[str, Any]) -> list[str]:
    """FSDP1 of uneven pieces: two rows of 250 are in none of them whole."""
    model, single = pieces(team), net()
    with small_pages():
        optimizer, alone = (build_optimizer(name, m, lr=1e-2, **options) for m in (model, single))
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(10 * step + team.rank)).backward()
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                for p, q in zip(model.parameters(), single.parameters(), strict=True):
                    q.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
            alone.step()
    # With offload to CPUs, as is the default, torch 2.13 gives all states one buffer on CPUs.
    on_the_spot = FullOptimStateDictConfig(offload_to_cpu=False)
    kind = (StateDictType.FULL_STATE_DICT, FullStateDictConfig(), on_the_spot)
    with FullyShardedDataParallel.state_dict_type(model, *kind):
        saved = FullyShardedDataParallel.optim_state_dict(model, optimizer, group=team.group)
        loaded = FullyShardedDataParallel.optim_state_dict_to_load(
            model, optimizer, saved, group=team.group
        )
    optimizer.load_state_dict(loaded)
    with FullyShardedDataParallel.summon_full_params(model):
        now = named(model)
    wrong = [n for n, p in named(single).items() if not torch.equal(p, now[n])]
    if team.rank == 0:
        own = {n: alone.state[p] for n, p in single.named_parameters() if p in alone.state}
        wrong += [
            f"{n} {k}"
            for n, entries in own.items()
            for k, value in entries.items()
            if not torch.equal(torch.as_tensor(saved["state"][n][k]), value)
        ]
    return wrong


@pytest.mark.parametrize(("name", "options"), ELEMENTWISE, ids=lambda x: str(x))
def test_pieces_of_fsdp1(processes: Processes, name: str, options: dict[str, Any]) -> None:
    assert processes.run(flat, 2, name, options) == [[]] * 2


def refused(team: Team) -> list[str]:
    """On all processes alike, those whose pieces are empty too; before anything is called."""
    model = pieces(team)
    found = []
    for case in ("adamw8bit", "lamb", "clipped", "skips"):
        name, options = CASES[case]
        try:
            build_optimizer(name, model, **options)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_pieces_of_fsdp1_are_refused_where_norms_or_blocks_need_the_whole(
    processes: Processes,
) -> None:
    for messages in processes.run(refused, 4):
        assert len(messages) == 4
        assert all("fully_shard (FSDP2)" in message for message in messages)


def redundancy(team: Team, model: nn.Module, case: str, lr: float) -> ZeroRedundancyOptimizer:
    name, options = CASES[case]
    made: Any = partial(build_optimizer, name, **options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return ZeroRedundancyOptimizer(trainable, made, process_group=team.group, lr=lr)


def step(model: nn.Module, single: Net, seed: int) -> None:
    """Gradients of the plain model, and the same ones for another."""
    single.zero_grad()
    single(inputs(seed)).backward()
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()


def share(team: Team, case: str, file: str) -> list[int]:
    name, options = CASES[case]
    model, single = net(), net()
    optimizer = redundancy(team, model, case, 1e-2)
    alone = build_optimizer(name, single, lr=1e-2, **options)
    for seed in range(3):
        step(model, single, seed)
        optimizer.step()
        alone.step()
    optimizer.consolidate_state_dict(to=0)
    if team.rank == 0:
        torch.save(optimizer.state_dict(), file)
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return [n for n, (p, q) in enumerate(pairs) if not torch.equal(p, q)]


def go_on(team: Team, case: str, file: str) -> list[int]:
    """From a checkpoint of other processes, beside four steps of one."""
    name, options = CASES[case]
    model, single = net(), net()
    alone = build_optimizer(name, single, lr=1e-2, **options)
    for seed in range(3):
        step(model, single, seed)
        alone.step()
    model.load_state_dict(single.state_dict())
    optimizer = redundancy(team, model, case, 1.0)
    optimizer.load_state_dict(torch.load(file))
    step(model, single, 3)
    optimizer.step()
    alone.step()
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return [n for n, (p, q) in enumerate(pairs) if not torch.equal(p, q)]


@pytest.mark.parametrize("case", ["adamw", "adamw8bit", "lamb8bit", "paged"])
def test_zero_redundancy(processes: Processes, case: str, tmp_path: Path) -> None:
    """Whole parameters, each updated by one process; loaded by as many, more and fewer."""
    file = str(tmp_path / "saved")
    assert processes.run(share, 2, case, file) == [[]] * 2
    for world in (1, 2, 4):
        assert processes.run(go_on, world, case, file) == [[]] * world


def averaged(team: Team, name: str) -> list[int]:
    """Local steps, and the mean of parameters at every second one."""
    models = [net(), net()]
    averager = PeriodicModelAverager(period=2, process_group=team.group)
    inner = [build_optimizer(name, m, lr=1e-2) for m in models]
    local = PostLocalSGDOptimizer(inner[0], averager)
    for seed in range(4):
        for m, optimizer in zip(models, (local, inner[1]), strict=True):
            optimizer.zero_grad()
            m(inputs(10 * seed + team.rank)).backward()
            optimizer.step()
        if seed % 2 == 0:
            for p in models[1].parameters():
                with torch.no_grad():
                    dist.all_reduce(p.div_(team.world), group=team.group)
    saved = local.state_dict()
    again = PostLocalSGDOptimizer(build_optimizer(name, net()), averager)
    again.load_state_dict(saved)
    assert again.param_groups[0]["lr"] == 1e-2
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    return [n for n, (p, q) in enumerate(pairs) if not torch.allclose(p, q, atol=1e-6)]


def test_local_steps_whose_parameters_are_averaged(processes: Processes) -> None:
    assert processes.run(averaged, 2, "adamw8bit") == [[]] * 2
