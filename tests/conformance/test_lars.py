"""LARS beside bitsandbytes' classes of that name, which differ among themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from tests.conformance import bitsandbytes_oracles as bnb
from tests.conformance.harness import Deviation, apart, distance, feed, pair, peer
from tests.conftest import on_cpus

SHAPES: list[tuple[int, ...]] = [(20, 300), (257,), (33, 300)]


def _scaled(scales: tuple[float, ...]) -> Any:
    """Tensors whose steps are not clipped, are, and are as `scales` says, on both sides."""
    pairs = pair(SHAPES)
    for side in pairs:
        for p, scale in zip(side, scales, strict=True):
            with torch.no_grad():
                p.mul_(scale)
    return pairs


def _compare(ours: Any, theirs: Any, pairs: Any, deviation: Deviation) -> list[float]:
    """How far tensors went in 30 steps, which both must go."""
    starts = [p.detach().clone() for p in pairs[0]]
    for step in range(30):
        feed(step, *pairs)
        ours.step()
        theirs.step()
    went = [distance(p, start) for p, start in zip(pairs[0], starts, strict=True)]
    for p, their, path in zip(*pairs, went, strict=True):
        deviation("p, relative", apart(p, their, path or 1.0), 1e-5)
    return went


@pytest.mark.parametrize(
    "asked",
    [{}, {"nesterov": True}, {"dampening": 0.5}, {"max_unorm": 0.1}, {"max_unorm": 0.0}],
    ids=str,
)
@on_cpus
def test_clip_is_their_plain_torch_class(
    asked: dict[str, Any], backend: str, deviation: Deviation
) -> None:
    """Its norm is of the update with the decay, as on their CPUs."""
    pairs = _scaled((100.0, 1.0, 0.1))
    shared = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, **asked}
    ours = build_optimizer("lars", pairs[0], trust_ratio="clip", **shared)
    theirs = peer("bitsandbytes").optim.PytorchLARS(pairs[1], **shared)
    assert min(_compare(ours, theirs, pairs, deviation)) > 1e-4


@on_cpus
def test_compat_is_the_generic_one(backend: str, deviation: Deviation) -> None:
    """Its norm leaves this step's decay out, as their GPUs do, and zeros stay."""
    pairs = _scaled((100.0, 0.1, 0.0))
    shared: dict[str, Any] = {"lr": 0.01, "weight_decay": 5.0, "max_unorm": 0.02}
    asked = {"trust_ratio": "clip", "compat": "bitsandbytes", "momentum": 0.9}
    ours = build_optimizer("lars32bit", pairs[0], **shared, **asked)
    theirs = bnb.Generic(pairs[1], "lars", betas=(0.9, 0.0), eps=0.0, **shared)
    went = _compare(ours, theirs, pairs, deviation)
    assert went[2] == 0 < min(went[:2])
    with_decay = _scaled((100.0, 0.1, 0.0))
    del asked["compat"]
    other = build_optimizer("lars32bit", with_decay[0], **shared, **asked)
    for step in range(30):
        feed(step, *with_decay)
        other.step()
    assert distance(with_decay[0][1], pairs[0][1]) > 1e-6
