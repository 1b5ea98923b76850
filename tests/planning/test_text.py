"""A plan as text and as JSON: the same every time, in columns, with all that it knows."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from optfactory import plan, resolve
from optfactory.planning.memory_plan import MemoryPlan
from optfactory.planning.text import human
from tests.families import NAMES_OF_FIRST
from tests.planning.harness import NAMES, Odd, Tied, on_meta

RULES: dict[str, dict[str, Any]] = {
    "embeddings": {"modules": "Embedding", "optim_bits": 32},
    "no_decay": {"ndim": "<=1", "weight_decay": 0.0},
    "head": {"match": "lm_head.*", "lr": 0.5},
    "more": {"match": "more.*", "lr": 0.5, "optional": True},
}
TEXT = """\
paged_adamw8bit for 4 trained tensors of 522,500 elements

group       tensors  elements  overrides
no_decay          2     2,500  weight_decay: 0.0
embeddings        1   120,000  optim_bits: 32
default           1   400,000

memory      device  bits  place         bytes
parameters  cuda      16  resident  1,045,000  1020.51 KiB
gradients   cuda      16  resident  1,045,000  1020.51 KiB
state       cpu       32  resident         24         24 B
state       cuda      32  resident     20,000    19.53 KiB
state       cuda      32  managed     960,000   937.50 KiB
state       cpu        8  resident          8          8 B
state       cuda       8  managed     800,000   781.25 KiB
state       cuda       8  resident     16,000    15.62 KiB
total                               3,886,032     3.71 MiB
Activations and what the backward pass keeps come on top.
It fits only with paged state elsewhere: 2.03 MiB, and 1.68 MiB that can leave, of 2.38 MiB.

tensors  not 8-bit, or not paged, because of
      2  fewer than min_8bit_size (4096); fewer than 100000: not paged  norm, body.bias

name                 state  on the device
adam              3.99 MiB       5.98 MiB  no
adam16bit         2.45 MiB       4.44 MiB  no
adam32bit         3.99 MiB       5.98 MiB  no
adam4bit          1.35 MiB       3.34 MiB  no
adam8bit          1.71 MiB       3.71 MiB  no
adamfp8           1.71 MiB       3.71 MiB  no
adamw             3.99 MiB       5.98 MiB  no
adamw16bit        2.45 MiB       4.44 MiB  no
adamw32bit        3.99 MiB       5.98 MiB  no
adamw4bit         1.35 MiB       3.34 MiB  no
adamw8bit         1.71 MiB       3.71 MiB  no
adamwfp8          1.71 MiB       3.71 MiB  no
lamb              3.99 MiB       5.98 MiB  no
lamb16bit         2.45 MiB       4.44 MiB  no
lamb32bit         3.99 MiB       5.98 MiB  no
lamb4bit          1.35 MiB       3.34 MiB  no
lamb8bit          1.71 MiB       3.71 MiB  no
lambfp8           1.71 MiB       3.71 MiB  no
paged_adam        3.99 MiB       5.98 MiB  fits paged
paged_adam16bit   2.45 MiB       4.44 MiB  fits paged
paged_adam32bit   3.99 MiB       5.98 MiB  fits paged
paged_adam4bit    1.35 MiB       3.34 MiB  fits paged
paged_adam8bit    1.71 MiB       3.71 MiB  fits paged
paged_adamfp8     1.71 MiB       3.71 MiB  fits paged
paged_adamw       3.99 MiB       5.98 MiB  fits paged
paged_adamw16bit  2.45 MiB       4.44 MiB  fits paged
paged_adamw32bit  3.99 MiB       5.98 MiB  fits paged
paged_adamw4bit   1.35 MiB       3.34 MiB  fits paged
paged_adamw8bit*  1.71 MiB       3.71 MiB  fits paged
paged_adamwfp8    1.71 MiB       3.71 MiB  fits paged
paged_lamb        3.99 MiB       5.98 MiB  fits paged
paged_lamb16bit   2.45 MiB       4.44 MiB  fits paged
paged_lamb32bit   3.99 MiB       5.98 MiB  fits paged
paged_lamb4bit    1.35 MiB       3.34 MiB  fits paged
paged_lamb8bit    1.71 MiB       3.71 MiB  fits paged
paged_lambfp8     1.71 MiB       3.71 MiB  fits paged

param_groups.head: matches no parameter; the parameters are norm, token.weight, body.weight, \
body.bias. Mend it, drop it, or set optional: true

param_groups.more: matches no parameter, and is optional"""


def model() -> nn.Module:
    module = nn.Module()
    module.token = nn.Embedding(300, 400)
    module.body = nn.Linear(200, 2000)
    module.norm = nn.Parameter(torch.zeros(500))
    return module


def example() -> MemoryPlan:
    module = on_meta(model, torch.bfloat16)
    return plan("paged_adamw8bit", module, device="cuda", memory="2.5MB", param_groups=RULES)


def test_the_text_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # A family that is added would be listed, too.
    monkeypatch.setattr("optfactory.planning.memory_plan.list_optimizers", lambda _: NAMES_OF_FIRST)
    assert str(example()) == TEXT


def test_it_is_the_same_every_time() -> None:
    assert str(example()) == str(example())
    assert json.dumps(example().as_dict()) == json.dumps(example().as_dict())


def columns(lines: list[str]) -> list[int]:
    """Where a line of blanks runs through all lines of a table."""
    width = max(map(len, lines))
    padded = [line.ljust(width) for line in lines]
    return [i for i in range(width) if all(line[i] == " " for line in padded)]


@pytest.mark.parametrize("name", ["adam", "paged_lamb8bit"])
@pytest.mark.parametrize("memory", [None, "1GB"])
def test_tables_are_aligned(name: str, memory: str | None) -> None:
    rules = {"wide and long label": {"match": "wide.*", "lr": 0.125, "betas": (0.5, 0.75)}}
    text = str(plan(name, on_meta(Odd), memory=memory, param_groups=rules))
    tables = [part.splitlines() for part in text.split("\n\n")[1:]]
    assert [table[0].split()[0] for table in tables][:2] == ["group", "memory"]
    for table in tables:
        rows = [line for line in table if not line.startswith(("Activations", "It fits"))]
        # Two blanks between columns: the header's words stand above their column.
        blanks = set(columns(rows))
        for gap in re.finditer(r"(?<=\S)  +(?=\S)", rows[0]):
            assert blanks & set(range(gap.start(), gap.end()))
    assert not re.search(r"[ \t]+$", text, re.M)


def test_why_tensors_are_wide_or_not_paged_is_told_by_reason() -> None:
    table = next(p for p in str(plan("paged_adam8bit", on_meta(Odd))).split("\n\n") if "not 8" in p)
    lines = table.splitlines()[1:]
    reasons = [row.reason for row in plan("paged_adam8bit", on_meta(Odd)).report.rows]
    assert sum(int(line.split()[0]) for line in lines) == len(list(filter(None, reasons)))
    assert sum("min_8bit_size (4096)" in line for line in lines) == 1
    assert sum("rows shorter than 64" in line for line in lines) == 1
    assert "not 8-bit" not in str(plan("adam", on_meta(Odd)))


def test_a_tied_model_and_buffers_are_shown() -> None:
    text = str(plan("adam", on_meta(Tied)))
    assert re.search(r"^buffers +cpu +64 +resident +\d", text, re.M)
    assert text.splitlines()[0] == "adam for 3 trained tensors of 4,992 elements"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *((0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.00 KiB")),
        *((1024**2, "1.00 MiB"), (3 * 1024**3 // 2, "1.50 GiB"), (1024**4, "1.00 TiB")),
        (5000 * 1024**4, "5000.00 TiB"),
    ],
)
def test_bytes_in_binary_units(nbytes: int, text: str) -> None:
    assert human(nbytes) == text


def test_as_dict_is_complete_and_json() -> None:
    planned = example()
    values = json.loads(json.dumps(planned.as_dict(), allow_nan=False))
    assert resolve(values["config"]) == planned.config
    assert values["groups"] == json.loads(json.dumps([asdict(g) for g in planned.groups]))
    assert values["shares"] == [asdict(share) for share in planned.shares]
    assert values["parameters"] == [asdict(row) for row in planned.report.rows]
    assert values["unmatched"].keys() == {"head"}
    assert values["idle"].keys() == {"more"}
    assert values["state_bytes"] == planned.report.state_bytes
    assert (values["bytes_that_stay"], values["bytes_that_can_leave"]) == planned.needed()
    assert (values["memory"], values["verdict"]) == (2_500_000, "fits paged")
    assert [row["name"] for row in values["alternatives"]] == NAMES
    assert all(
        row.keys() == {"name", "state_bytes", "verdict", "problem"}
        for row in values["alternatives"]
    )
    assert values.keys() == {
        *("config", "groups", "unmatched", "idle", "shares", "state_bytes", "bytes_that_stay"),
        *("bytes_that_can_leave", "parameters", "alternatives", "sharding", "memory"),
        "verdict",
    }
