"""CONTRIBUTING's worked example: what it says to write is all that a new optimizer needs."""

from __future__ import annotations

from tests.conftest import on_cpus
from tests.recipe import follow, run

# QHM in float64, written from the paper; 8-bit momentum may be off by half a code's distance.
CHECK = """
import torch
from optfactory import build_optimizer, list_optimizers

# A step is 0.01; 16-bit momentum is off by a 128th at most, fp8 by a 8th, 4-bit by a third.
LIMITS = {"m8bit": 1e-4, "16bit": 4e-4, "hmfp8": 4e-3, "m4bit": 1.2e-2}
assert len(list_optimizers("*qhm*")) == 12
for name in list_optimizers("*qhm*"):
    torch.manual_seed(0)
    p = torch.randn(70, 64, requires_grad=True)
    expected, m = p.detach().double(), torch.zeros(70, 64, dtype=torch.float64)
    optimizer = build_optimizer(name, [p], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        p.grad = torch.rand(70, 64) + 0.1
        g = p.grad.double()
        m = 0.9 * m + 0.1 * g
        u = 0.3 * g + 0.7 * m
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * u
        optimizer.step()
    assert (p - expected).abs().max() < LIMITS.get(name[-5:], 4e-6), name
    bits = {row.bits for row in optimizer.memory_report().rows}
    assert bits == {optimizer.config.optim_bits}, name
"""


@on_cpus  # the example is run in a process of its own, which knows nothing of `backend`
def test_the_worked_example_makes_all_names(tmp_path, backend):
    assert len(follow(tmp_path)) == 3
    run(tmp_path, "-c", CHECK)
    assert (tmp_path / "configs" / "optimizer" / "paged_qhm8bit.yaml").is_file()
