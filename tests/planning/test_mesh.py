"""Plans for ranks of a mesh, without processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from optfactory import build_optimizer, list_optimizers, plan
from optfactory.errors import ConfigError
from optfactory.planning.memory_plan import MemoryPlan
from optfactory.planning.spread import SCHEMES
from tests.planning.conftest import Factory, Run
from tests.planning.harness import on_meta, sized
from tests.sampling import spread


class Net(nn.Module):
    """Matrices that four ranks cannot share evenly, vectors of several blocks, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 96)
        self.body = nn.Linear(96, 250)
        self.wide = nn.Linear(513, 802, bias=False)  # paged as a whole, not in quarters
        self.norm = nn.LayerNorm(250)
        self.vector = nn.Parameter(torch.zeros(5000))
        self.few = nn.Parameter(torch.zeros(3, 5000))
        self.frozen = nn.Linear(96, 50).requires_grad_(False)
        self.register_buffer("table", torch.ones(77))


ROWS = {"embed.weight": (101, 96), "body.weight": (250, 96), "wide.weight": (802, 513),
        "few": (3, 5000)}  # fmt: skip


def ranks_of(planned: MemoryPlan) -> int:
    return sum(len(figures.ranks) for figures in planned.ranks)


def rows_at(size: int, ranks: int, rank: int) -> int:
    """As torch.chunk has it."""
    chunks = torch.arange(size).chunk(ranks)
    return len(chunks[rank]) if rank < len(chunks) else 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 512])
def test_bytes_of_each_rank_by_hand(ranks: int) -> None:
    planned = plan("adamw8bit", on_meta(Net), mesh=ranks)
    assert ranks_of(planned) == ranks
    for rank in {0, 1, 2, ranks // 2, ranks - 1} & set(range(ranks)):
        figures = planned.on_rank(rank)
        assert rank in figures.ranks
        rows = {row.name: row for row in figures.report.rows}
        for name, (size, cols) in ROWS.items():
            mine = rows_at(size, ranks, rank)
            assert rows[name].nbytes == 2 * mine * (cols + 4 * -(-cols // 256)) + 8, name
            assert rows[name].bits == 8
        # Scales of a vector's blocks are whole where its ranks do not begin at blocks.
        elements = rows_at(5000, ranks, rank)
        blocks = 20 if -(-5000 // ranks) % 256 else rows_at(20, ranks, rank)
        assert rows["vector"].nbytes == 2 * elements + 8 * blocks + 8
        assert rows["norm.bias"].nbytes == 8 * rows_at(250, ranks, rank) + 8
        assert rows["norm.bias"].bits == 32
        assert "min_8bit_size" in rows["norm.bias"].reason
        held = sum(p[: rows_at(len(p), ranks, rank)].numel() for p in on_meta(Net).parameters())
        shares = {share.what: share.nbytes for share in figures.shares if share.what != "state"}
        frozen = sum(
            p[: rows_at(len(p), ranks, rank)].numel() for p in on_meta(Net).frozen.parameters()
        )
        assert shares.get("parameters", 0) == 4 * held
        assert shares.get("gradients", 0) == 4 * (held - frozen)
        assert shares["buffers"] == 4 * 77


@pytest.mark.parametrize("name", ["adamw8bit", "lamb", "paged_adamw8bit"])
@pytest.mark.parametrize("mesh", [1, 2, 3, 4, "2x2", "1x3"])
def test_all_ranks_together_have_the_whole_state(name: str, mesh: int | str) -> None:
    planned = plan(name, on_meta(Net), mesh=mesh)
    whole = build_optimizer(name, Net()).memory_report()
    for figures in planned.ranks:
        found = [(row.name, row.bits, row.global_nbytes) for row in figures.report.rows]
        assert found == [(row.name, row.bits, row.nbytes) for row in whole.rows]
        assert figures.report.global_state_bytes == whole.state_bytes
        assert figures.state_bytes == figures.report.state_bytes
    copied = Counter[str]()
    for kind in planned.copies:
        copied[kind.what] += kind.nbytes * (kind.ranks - 1)
    sums = sum(figures.state_bytes * len(figures.ranks) for figures in planned.ranks)
    # What is copied is there more than once; of all else there is one.
    copies = 2 if mesh == "2x2" else 1
    ranks = ranks_of(planned) // copies
    cut = {kind.what: kind for kind in planned.copies if kind.ranks == ranks_of(planned) > 1}
    extra = sum(cut[what].nbytes * (ranks - 1) for what in cut if what != "parameters")
    assert sums == copies * (whole.state_bytes + (extra if ranks > 1 else 0))


def test_without_a_mesh_nothing_is_said_of_ranks() -> None:
    planned = plan("adamw8bit", on_meta(Net))
    assert (planned.mesh, planned.shard, planned.copies) == ((), "", ())
    assert [figures.ranks for figures in planned.ranks] == [(0,)]
    assert planned.as_dict()["sharding"] is None
    assert "rank" not in str(planned)
    assert "whole" not in str(planned.report)
    one = plan("adamw8bit", on_meta(Net), mesh=1)
    assert one.ranks == planned.ranks
    assert one.alternatives == planned.alternatives


def test_a_report_shows_the_whole_beside_what_is_here() -> None:
    report = plan("adamw8bit", on_meta(Net), mesh=4).on_rank(3).report
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "bits", "bytes", "here", "whole", "place"]
    few = next(line for line in lines if line.startswith("few"))
    assert few.split()[:4] == ["few", "8", "8", "30,488"]
    assert lines[-1].split() == [
        *("total", f"{report.state_bytes:,}", f"{report.global_state_bytes:,}"),
    ]


# ---- schemes ----------------------------------------------------------------------------------


def places_of(planned: MemoryPlan, name: str) -> list[int]:
    """Bytes of one parameter's state on every rank."""
    found = [planned.on_rank(rank).report.rows for rank in range(ranks_of(planned))]
    return [row.nbytes for rows in found for row in rows if row.name == name]


def test_hsdp_holds_copies_along_the_first_dimension() -> None:
    flat, two = plan("adamw8bit", on_meta(Net), mesh=2), plan("adamw8bit", on_meta(Net), mesh="3x2")
    assert two.shard == "hsdp"
    for rank in range(6):
        assert two.on_rank(rank).report == flat.on_rank(rank % 2).report
        assert two.on_rank(rank).shares == flat.on_rank(rank % 2).shares
    assert {(kind.what, kind.ranks) for kind in two.copies} == {
        *(("parameters", 3), ("state", 3), ("scales of cut blocks", 6), ("step counters", 6)),
    }
    assert {(kind.what, kind.ranks) for kind in flat.copies} == {
        *(("scales of cut blocks", 2), ("step counters", 2)),
    }


def test_tp_cuts_matrices_within_fsdp() -> None:
    planned = plan("adamw", on_meta(Net), mesh="2x4", shard="tp")
    rows = [rows_at(rows_at(802, 4, tp), 2, dp) for dp in range(2) for tp in range(4)]
    assert places_of(planned, "wide.weight") == [8 * 513 * mine + 8 for mine in rows]
    vector = [8 * rows_at(5000, 2, dp) + 8 for dp in range(2) for _ in range(4)]
    assert places_of(planned, "vector") == vector
    alone = plan("adamw", on_meta(Net), mesh=4, shard="tp")
    assert places_of(alone, "vector") == [8 * 5000 + 8] * 4
    assert places_of(alone, "wide.weight") == [8 * 513 * rows_at(802, 4, i) + 8 for i in range(4)]
    assert ("parameters", 4) in {(kind.what, kind.ranks) for kind in alone.copies}


def test_placements_may_be_stated_by_glob_or_by_a_function() -> None:
    strided = (_StridedShard(0, split_factor=2), Shard(0))
    stated: dict[str, Any] = {"*": strided, "wide.*": (Shard(0), Shard(-1)), "vector": [None, None]}
    given = plan("adamw8bit", on_meta(Net), mesh="2x2", placements=stated)
    # 513 columns in two: 257 and 256, and the scales of all three blocks.
    wide = [2 * 401 * (cols + 4 * 3) + 8 for _ in range(2) for cols in (257, 256)]
    assert places_of(given, "wide.weight") == wide
    assert places_of(given, "vector") == [2 * 5000 + 8 * 20 + 8] * 4

    def by_function(name: str, tensor: Tensor) -> Any:
        if name.startswith("wide"):
            assert tuple(tensor.shape) == (802, 513)
            return Shard(0), Shard(1)
        return (Replicate(), Replicate()) if name == "vector" else None

    called = plan("adamw8bit", on_meta(Net), mesh="2x2", shard="tp", placements=by_function)
    for name in ("wide.weight", "vector", "body.weight"):
        assert places_of(called, name) == places_of(given, name)


def test_lists_of_tensors_are_spread_too() -> None:
    named = list(on_meta(Net).named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    planned = plan("adamw8bit", trained, mesh=3)
    assert planned.on_rank(2).report == plan("adamw8bit", on_meta(Net), mesh=3).on_rank(2).report
    assert sum(sized(planned, "buffers").values()) == 0


# ---- what fits --------------------------------------------------------------------------------


def test_the_verdict_is_that_of_the_rank_that_needs_most() -> None:
    def model() -> nn.Module:
        # Three ranks of 100,000 elements, which are paged, and one of 99,000, which are not.
        return nn.ParameterDict({"a": nn.Parameter(torch.zeros(399, 1000))})

    planned = plan("paged_adamw", on_meta(model), mesh=4)
    large, small = planned.on_rank(0), planned.on_rank(3)
    assert planned.ranks[0] is large
    assert [row.where for row in (*large.report.rows, *small.report.rows)] == [
        *("file-mapped", "resident"),
    ]
    stay = 4 * 2 * 99_000 + 8 * 99_000 + 8
    assert planned.needed() == (stay, 4 * 2 * 100_000 + 8 * 100_000 + 8 - stay)
    most = sum(planned.needed())
    verdicts = {most: "fits", most - 1: "fits paged", stay: "fits paged", stay - 1: "no"}
    for memory, verdict in verdicts.items():
        own = replace(planned, memory=memory)
        assert own.verdict() == verdict
        same = next(other for other in own.alternatives if other.name == "paged_adamw")
        assert own.verdict(same) == verdict
        assert f"of {memory}" in str(own) or "each rank" in str(own)


def test_alternatives_are_planned_on_the_same_ranks() -> None:
    planned = plan("adamw8bit", on_meta(Net), mesh=4)
    assert [other.name for other in planned.alternatives] == list_optimizers()
    for other in spread(planned.alternatives, 16):
        own = plan(other.name, on_meta(Net), mesh=4)
        assert other.state_bytes == own.state_bytes
        assert planned.needed(other) == own.needed()
        for figures, state in zip(planned.ranks, other.ranks, strict=True):
            nbytes = sum(s.nbytes for s in state if s.what == "state")
            assert nbytes == own.on_rank(figures.ranks[0]).state_bytes


def test_a_plan_for_many_ranks_lays_out_each_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from optfactory.planning import sizes

    calls = Counter[tuple[int, ...]]()
    real: Callable[..., Any] = sizes.StateLayout.of
    monkeypatch.setattr(
        sizes.StateLayout, "of", lambda shape, *args: calls.update([shape]) or real(shape, *args)
    )
    few = plan("adamw8bit", on_meta(Net), mesh=6)
    asked = calls.total()
    calls.clear()
    planned = plan("adamw8bit", on_meta(Net), mesh=4096)
    assert len(few.ranks) <= len(planned.ranks) <= 10
    assert calls.total() <= 2 * asked


# ---- text, JSON, refusals ---------------------------------------------------------------------


def test_the_text_names_the_largest_and_the_smallest_rank() -> None:
    text = str(plan("adamw8bit", on_meta(Net), mesh=4, memory="1GiB"))
    assert "on 4 ranks\nfsdp: every tensor is cut along its first dimension" in text
    assert "rank 0 and 2 more" in text
    assert "rank 3\n" in text
    assert "on each rank." in text
    assert "the same on several ranks" in text
    assert "fewer than min_8bit_size" in text
    even = plan("adamw8bit", on_meta(lambda: nn.Linear(64, 64)), mesh=4)
    assert "bytes per rank" in str(even)
    assert "rank 0" not in str(even)


def test_json_has_the_ranks() -> None:
    planned = plan("adamw8bit", on_meta(Net), mesh="2x4", shard="tp")
    values = json.loads(json.dumps(planned.as_dict(), allow_nan=False))["sharding"]
    assert (values["mesh"], values["shard"]) == ([2, 4], "tp")
    assert sum(kind["count"] for kind in values["ranks"]) == 8
    sizes = [kind["bytes"] for kind in values["ranks"]]
    assert sizes == sorted(sizes, reverse=True)
    for kind in values["ranks"]:
        figures = planned.on_rank(kind["first"])
        assert kind["state_bytes"] == figures.report.state_bytes
        assert kind["bytes"] == sum(share.nbytes for share in figures.shares)
    assert {kind["what"] for kind in values["copies"]} >= {"parameters", "step counters"}


@pytest.mark.parametrize("rank", [-1, 4, None])
def test_a_rank_that_is_not_there_is_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="ranks are 0 to 3"):
        plan("adam", on_meta(Net), mesh=4).on_rank(rank)


@pytest.mark.parametrize(
    "mesh",
    [
        *(0, -1, True, 2.0, "", "x", "2x", "x2", "2x4x8", "0x2", "2X4", "2 x 4", "-2", 10**9),
        *((), (2, 0), (2, 4, 8), ("2", "4")),
    ],
)
def test_what_is_no_mesh_is_refused(mesh: Any) -> None:
    with pytest.raises(ConfigError, match="mesh is a number of ranks such as 8") as caught:
        plan("adam", on_meta(Net), mesh=mesh)
    assert repr(mesh) in str(caught.value)


def test_meshes_may_be_written_in_several_ways() -> None:
    texts = {str(plan("adam", on_meta(Net), mesh=mesh)) for mesh in (4, "4", (4,), [4])}
    assert len(texts) == 1
    assert str(plan("adam", on_meta(Net), mesh="2x4")) == str(
        plan("adam", on_meta(Net), mesh=[2, 4], shard="hsdp")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mesh": 8, "shard": "ddp"}, "shard is one of fsdp, hsdp, tp, got 'ddp'"),
        ({"mesh": 8, "shard": "hsdp"}, "there it is one of fsdp, tp"),
        ({"mesh": "2x4", "shard": "fsdp"}, "2x4; there it is one of hsdp, tp"),
        ({"shard": "fsdp"}, "shard 'fsdp' needs a mesh"),
        ({"placements": {}}, "placements are for a mesh"),
        ({"mesh": 2, "placements": {"nothing": [None]}}, r"placements\['nothing'\]: matches no"),
        ({"mesh": 2, "placements": {"few": [None] * 2}}, r"few: placements are one for each of 1"),
        ({"mesh": 2, "placements": {"few": Shard(0)}}, "few: placements are one for each of 1"),
        ({"mesh": 2, "placements": {"few": [Shard(2)]}}, "few: .* cuts dimension 2 of 2"),
        ({"mesh": 2, "placements": {"few": [Partial()]}}, "few: a placement is Shard"),
        ({"mesh": 2, "placements": {"few": ["0"]}}, "few: a placement is Shard"),
        (
            {"mesh": 2, "placements": {"few": [_StridedShard(0, split_factor=2)]}},
            "few: split_factor 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan("adam", on_meta(Net), **values)


def test_scalars_are_refused_as_by_fully_shard() -> None:
    def model() -> nn.Module:
        return nn.ParameterDict(
            {"a": nn.Parameter(torch.zeros(())), "b": nn.Parameter(torch.zeros(4))}
        )

    with pytest.raises(ConfigError, match="a: is a scalar, which fully_shard refuses"):
        plan("adam", on_meta(model), mesh=2)
    whole = plan("adam", on_meta(model), mesh=2, placements={"a": [Replicate()]})
    assert places_of(whole, "a") == [16, 16]


def test_the_command_plans_a_mesh(run: Run, factory: Factory) -> None:
    model = factory("def make():\n    return nn.Linear(300, 401)")
    expected = plan("lamb8bit", on_meta(lambda: nn.Linear(300, 401)), mesh="2x3", shard="tp")
    words = ("lamb8bit", "--model", model, "--mesh", "2x3", "--shard", "tp")
    assert run(*words) == (0, f"{expected}\n", "")
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)) == (0, json.loads(json.dumps(expected.as_dict())))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "2x"), "mesh is a number of ranks"),
        (("--mesh", "8", "--shard", "zero3"), f"shard is one of {', '.join(SCHEMES)}"),
        (("--shard", "tp"), "needs a mesh"),
    ],
)
def test_the_command_refuses_before_the_model_is_made(
    words: tuple[str, ...], message: str, run: Run, factory: Factory
) -> None:
    never = factory("raise SystemError('the model was made')")
    code, out, err = run("adam", "--model", never, *words)
    assert (code, out) == (1, "")
    assert message in err


def test_no_distributed_package_is_loaded_for_a_plan() -> None:
    source = (
        "import sys, torch, optfactory\n"
        "model = torch.nn.ParameterList([torch.zeros(9, 512), torch.zeros(5000)])\n"
        "optfactory.plan('adamw8bit', model, mesh='2x4', shard='tp')\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
