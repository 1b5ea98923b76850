"""compat: bitsandbytes beside the installed package, where its CPU path does the same."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from optfactory import build_optimizer
from tests.numerics.harness import DTYPES, gradient, parameters

COMPAT: dict[str, Any] = {"compat": "bitsandbytes"}


def _peer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes", exc_type=ImportError)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_32_bits_agree_with_the_package(dtype: str) -> None:
    """Without decay its CPU path is that of its GPUs."""
    peer = _peer()
    ours, theirs = (parameters(DTYPES[dtype], [(20, 300)]) for _ in range(2))
    asked = {"lr": 1e-2, "weight_decay": 0.0}
    optimizers = (
        build_optimizer("adamw32bit", ours, **asked, **COMPAT),
        peer.optim.AdamW32bit(theirs, **asked),
    )
    for step in range(10):
        for side, optimizer in zip((ours, theirs), optimizers, strict=True):
            side[0].grad = gradient((20, 300), DTYPES[dtype], step)
            optimizer.step()
    tolerance = {"fp32": 1e-7, "bf16": 2e-3}[dtype]
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)


def test_8_bits_go_on_from_the_state_of_the_package() -> None:
    """Its codes and scales lie in the same grid; its CPU codes differ near zero alone."""
    peer = _peer()
    ours, theirs = (parameters(torch.float32, [(20, 300)])[0] for _ in range(2))
    asked = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = build_optimizer("adam8bit", [ours], **asked, **COMPAT)
    other = peer.optim.Adam8bit([theirs], **asked)
    for step in range(6):
        g = gradient((20, 300), torch.float32, step)
        theirs.grad, ours.grad = g.clone(), g.clone()
        if step == 0:
            optimizer.init_states()
        else:
            _copy_state(optimizer.state[ours], other.state[theirs])
            with torch.no_grad():
                ours.copy_(theirs)
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-8)
        for index, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            mine, peers = optimizer.state[ours], other.state[theirs]
            scales = mine[f"{name}_absmax"]
            torch.testing.assert_close(scales, peers[f"absmax{index}"], rtol=1e-6, atol=0)
            stored = (scales > 0).repeat_interleave(256)[: ours.numel()].view(ours.shape)
            codes, its = mine[f"{name}_q8"].int()[stored], peers[f"state{index}"].int()[stored]
            value = peers[f"qmap{index}"].abs()[its]
            assert (codes == its)[value > 0.1].float().mean() > 0.99
            assert ((codes - its).abs() <= 1)[value > 1e-2].all()


def _copy_state(mine: dict[str, torch.Tensor], its: dict[str, Any]) -> None:
    for index, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        mine[f"{name}_q8"].copy_(its[f"state{index}"])
        mine[f"{name}_absmax"].copy_(its[f"absmax{index}"])
