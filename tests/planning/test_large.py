"""Models of billions of parameters: planned in the memory that the process has anyway."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optfactory import list_optimizers
from tests.sampling import spread

ROOT = Path(__file__).parents[2]

# Llama 7B: its tensors by shape, and how often each occurs.
SHAPES = {
    (32000, 4096): 2,
    (4096, 4096): 4 * 32,
    (11008, 4096): 2 * 32,
    (4096, 11008): 32,
    (4096,): 2 * 32 + 1,
}
COUNT = sum(SHAPES.values())
ELEMENTS = sum(number * math.prod(shape) for shape, number in SHAPES.items())
SCALES = sum(n * (s[0] * -(-s[1] // 256) if len(s) > 1 else 16) for s, n in SHAPES.items())

SOURCE = """
import json, resource, sys
import torch
from examples.plan_memory import llama
from optfactory import plan, ready_rules

NAMES = sys.argv[1:]  # of other names that are planned, too

def planned(depth):
    with torch.device("meta"):
        model = llama(depth=depth)
    return plan("paged_adamw8bit", model, device="cuda", memory="80GB",
                param_groups=ready_rules("llama"), names=NAMES), \\
        plan("adam", model, names=NAMES), plan("lamb8bit", model, names=NAMES), \\
        plan("adamw8bit", model, mesh=512, names=NAMES)

str(planned(depth=1))  # whatever is loaded or kept once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plans = planned(depth=32)
text = str(plans[0])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"grown_mib": (after - before) / 1024, "plans": [p.as_dict() for p in plans]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_seven_billion_parameters_are_planned_in_a_few_megabytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOURCE, *spread(list_optimizers(), 40)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["grown_mib"] < 30
    ruled, adam, lamb, sharded = found["plans"]
    assert ELEMENTS == 6_738_415_616
    for values in (ruled, adam, lamb):
        sizes = {(s["what"], s["bits"]): s["nbytes"] for s in values["shares"]}
        assert sizes["parameters", 16] == sizes["gradients", 16] == 2 * ELEMENTS
        assert len(values["parameters"]) == COUNT
    assert adam["state_bytes"] == 8 * ELEMENTS + 8 * COUNT
    assert lamb["state_bytes"] == 2 * (ELEMENTS + 4 * SCALES) + 8 * COUNT
    # Embeddings and head at 32 bits: three bytes more for each of two states, and no scales.
    wide, scales = 2 * 32000 * 4096, 2 * 32000 * 16
    assert ruled["state_bytes"] == lamb["state_bytes"] + 2 * 3 * wide - 2 * 4 * scales
    # On 512 ranks the first has the larger parts, and all scales of the vectors' cut blocks.
    rows = {shape: -(-shape[0] // 512) for shape in SHAPES}
    assert sharded["state_bytes"] == sum(
        count * (2 * rows[shape] + 2 * 4 * 16 + 8)
        if len(shape) == 1
        else count * (2 * rows[shape] * (shape[1] + 4 * -(-shape[1] // 256)) + 8)
        for shape, count in SHAPES.items()
    )
    assert sum(kind["count"] for kind in sharded["sharding"]["ranks"]) == 512
    assert {group["name"] for group in ruled["groups"]} == {
        *("embeddings", "default", "no_decay", "head"),
    }
    assert ruled["verdict"] == "fits"
    places = {(s["device"], s["place"]) for s in ruled["shares"]}
    assert places == {("cuda", "resident"), ("cuda", "managed"), ("cpu", "resident")}
