"""Between passes nothing is counted or written: an exchange that fails leaves all in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optfactory import backends, build_optimizer
from optfactory.errors import ConfigError
from optfactory.memory import placement
from optfactory.rules.passes import Stage
from optfactory.state.specs import HISTORY_KEY
from optfactory.step.buckets import Bucket
from tests.emulation.driver import EmulatedDriver
from tests.emulation.graphs import GraphDriver
from tests.emulation.harness import emulator, on
from tests.emulation.paging import Pages
from tests.sharding.shards import Shards, Spread, assert_bits, random, run_together
from tests.unit.harness import needs_compiler

VECTOR = Spread((5000,), (3,), (0,))
ROWS = Spread((7, 600), (2,), (0,))
ASKED: dict[str, Any] = {"lr": 0.01, "min_8bit_size": 1}


def stages_of(bucket: Bucket) -> list[Stage]:
    return [found.stage for found in backends.backend_for(bucket.key.device).update(bucket)]


def held(shards: Shards) -> list[Tensor]:
    """Copies of all that a step may change."""
    slots = [slot for plan in shards.plans for slot in plan.slots]
    kept = [slot.parameter.detach().clone() for slot in slots]
    return kept + [x.clone() for slot in slots for x in slot.state.values()]


@pytest.mark.parametrize(
    ("name", "spread", "asked", "stages"),
    [
        ("adamw", VECTOR, {}, []),
        ("adamw8bit", ROWS, {}, []),
        ("adamw8bit", VECTOR, {}, [Stage.TENSORS]),
        ("adamw8bit", ROWS, {"block_wise": False}, [Stage.TENSORS]),
        ("lamb", ROWS, {}, [Stage.TENSORS]),
        ("adamw", ROWS, {"percentile_clipping": 5}, [Stage.GRADIENTS]),
        ("lamb8bit", VECTOR, {"percentile_clipping": 5}, [Stage.GRADIENTS, Stage.TENSORS]),
        ("lion", ROWS, {"cautious": True}, [Stage.TENSORS]),
    ],
    ids=str,
)
def test_a_pause_for_each_stage_that_is_needed(
    name: str, spread: Spread, asked: dict[str, Any], stages: list[Stage], backend: str
) -> None:
    shards = Shards(name, [spread], torch.float32, **ASKED | asked)
    shards.give_gradients(0)
    (ranks,) = shards.buckets()
    found = run_together(shards.backend, ranks)
    assert [item.stage for item in found] == stages
    has_norms = [item.sums is not None for item in found]
    has_sums = any(word in (name, *asked) for word in ("lamb", "lamb8bit", "cautious"))
    assert has_norms == [stage is Stage.GRADIENTS or has_sums for stage in stages]


def test_what_is_found_is_of_the_part_that_is_here(backend: str) -> None:
    shards = Shards("lamb8bit", [VECTOR], torch.float32, **ASKED, percentile_clipping=5)
    shards.give_gradients(0)
    (ranks,) = shards.buckets()
    for bucket in ranks:
        (slot,), found = bucket.slots, shards.backend.update(bucket)
        for x in (slot.parameter.grad, slot.parameter):
            findings = next(found)
            assert x is not None
            assert findings.sums is not None
            assert findings.sums.dtype == torch.float64
            assert findings.sums.shape == (1, 1 if findings.stage is Stage.GRADIENTS else 2)
            torch.testing.assert_close(findings.sums[0, 0], x.detach().double().square().sum())
        ((number, maxima),) = findings.maxima
        assert number == 0
        assert maxima.dtype == torch.float32
        scales = maxima.view(2, 20)
        assert slot.layout.piece is not None
        here = set(slot.layout.piece.fragments[:, 2].tolist())
        assert [bool(x) for x in scales[0] > 0] == [n in here for n in range(20)]


@pytest.mark.parametrize("pause", [0, 1])
def test_an_exchange_that_fails_leaves_steps_and_states(pause: int, backend: str) -> None:
    shards = Shards("lamb8bit", [VECTOR], torch.bfloat16, **ASKED, percentile_clipping=5)
    for step in range(2):
        shards.give_gradients(step)
        shards.step()
    before, shards_before = held(shards), shards.slots(0)
    shards.give_gradients(2)
    (ranks,) = shards.buckets()
    for bucket in ranks:
        abandoned = shards.backend.update(bucket)
        for _ in range(pause + 1):
            next(abandoned)
        del abandoned
    noted = [slot.state[HISTORY_KEY] for slot in shards_before]
    for old, new in zip(before, held(shards), strict=True):
        if pause == 0 or not any(torch.equal(new, history) for history in noted):
            assert_bits(new, old, "state")
    shards.step()  # the same step once more
    shards.assert_same()


def test_a_step_that_the_host_skips_finds_nothing(backend: str) -> None:
    shards = Shards("lamb8bit", [VECTOR], torch.float32, **ASKED, percentile_clipping=5)
    shards.give_gradients(0)
    before = held(shards)
    (ranks,) = shards.buckets()
    for bucket in ranks:
        bucket.found_inf = torch.ones((), device=bucket.key.device)
        assert stages_of(bucket) == []
    for old, new in zip(before, held(shards), strict=True):
        assert_bits(new, old, "state")


# ---- on the device ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
def test_steps_on_the_device_count_behind_the_last_pause(name: str) -> None:
    with on(emulator()[0]):
        shards = Shards(name, [VECTOR], torch.float32, **ASKED, capturable=True)
        for step in range(2):
            shards.give_gradients(step)
            shards.step()
        shards.assert_same()
        shards.give_gradients(2)
        (ranks,) = shards.buckets()
        for bucket in ranks:
            next(shards.backend.update(bucket))
        assert [slot.state["step"].item() for slot in shards.slots(0)] == [2.0] * 3
        for bucket in ranks:  # a skipped step finds something here, which nobody completes
            bucket.found_inf = torch.ones(())
            assert stages_of(bucket) == [Stage.TENSORS]
            bucket.found_inf = None
        assert [slot.state["step"].item() for slot in shards.slots(0)] == [2.0] * 3
        shards.step()
        shards.assert_same()


@needs_compiler
@pytest.mark.parametrize("name", ["adamw8bit", "lamb8bit"])
def test_graphs_capture_the_passes_over_cut_blocks(name: str) -> None:
    from optfactory.backends.cuda.backend import CudaBackend

    driver = GraphDriver()
    with on(CudaBackend(driver)):
        shards = Shards(name, [VECTOR], torch.float32, **ASKED, capturable=True)
        shards.give_gradients(0)
        shards.step()
        gradients = [slot.parameter.grad for slot in shards.slots(0)]
        buckets = shards.buckets()
        graph = driver.capture(lambda: [run_together(shards.backend, b) for b in buckets])
        shards.optimizer.step()
        shards.assert_same()
        for step in range(1, 3):
            new = random((5000,), torch.float32, step)
            for p, slot, g in zip(shards.whole * 3, shards.slots(0), gradients, strict=True):
                assert slot.layout.piece is not None
                assert g is not None
                p.grad = new
                g.copy_(new[slot.layout.piece.box.slices])
            graph.replay()
            shards.optimizer.step()
            shards.assert_same()


@needs_compiler
@pytest.mark.parametrize("where", [placement.PINNED, placement.MANAGED])
def test_paged_state_of_cut_blocks(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(monkeypatch, where)
    spreads = [Spread((5, 60_000), (2,), (1,)), Spread((31_000,), (2,), (0,))]
    with on(emulator()[0]):
        shards = Shards("paged_adamw8bit", spreads, torch.float32, **ASKED)
        for step in range(2):
            shards.give_gradients(step)
            shards.step()
            shards.assert_same()
        slots = [slot for plan in shards.plans for slot in plan.slots]
        assert {slot.layout.where for slot in slots} == {where}
        assert all(slot.layout.options.cuts_blocks for slot in slots)
        (ranks,) = shards.buckets()
        assert len(ranks[0].tables.conveyors[0].states.pieces) > 2
    pages.guarded.check()


@needs_compiler
def test_nothing_is_launched_for_tensors_without_elements() -> None:
    driver = EmulatedDriver()
    from optfactory.backends.cuda.backend import CudaBackend

    with on(CudaBackend(driver)):
        spread = Spread((100,), (16,), (0,))
        shards = Shards("lamb8bit", [spread], torch.float32, **ASKED, percentile_clipping=5)
        shards.give_gradients(0)
        (ranks,) = shards.buckets()
        driver.launches.clear()
        stages_of(ranks[-1])
    kernels = {kernel for kernel, _ in driver.launches}
    assert not kernels & {"optfactory_update", "optfactory_statistics"}
    assert "optfactory_commit" in kernels  # the scales of blocks that others hold


# ---- what cannot be numbered -----------------------------------------------------------------


def test_random_bits_of_scattered_elements_are_refused(backend: str) -> None:
    spread = Spread((3, 8, 100), (2, 2), (1, 2))
    asked = {"param_rounding": "stochastic", **ASKED}
    shards = Shards("adamw8bit", [spread], torch.bfloat16, **asked)
    shards.give_gradients(0)
    with pytest.raises(ConfigError, match="cannot update p0: stochastic rounding"):
        shards.buckets()


def test_a_group_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = Spread((3, 8, 100), (2, 2), (1, 2)).shardings()[0]
    p = torch.zeros(3, 4, 50, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr("optfactory.groups.parameters.Sharding.of", lambda tensor: spread)
    with pytest.raises(ConfigError, match="cannot be done for deep: sharded along several"):
        build_optimizer("adamw", [("deep", p)], param_rounding="stochastic")
