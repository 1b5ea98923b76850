"""master_weights: 16-bit parameters that train as float32 copies of them would."""

from __future__ import annotations

import copy
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from optfactory import Optimizer2State, build_optimizer, plan, resolve
from optfactory.errors import ConfigError
from optfactory.optim import AdamW8bit
from tests.numerics.harness import DTYPES, Twin, array, bits, gradient, own_parameters, parameters
from tests.options.tools import SHAPES, SMALL, assert_refused, assert_resumes, families, train
from tests.reference.rounding import joined, nearest
from tests.sampling import spread

SPLIT: dict[str, Any] = {"master_weights": "split"}
FP32: dict[str, Any] = {"master_weights": "fp32"}
KINDS = [(SPLIT, torch.bfloat16), (FP32, torch.bfloat16), (FP32, torch.float16)]
kinds = pytest.mark.parametrize(
    ("asked", "dtype"), KINDS, ids=["split-bf16", "fp32-bf16", "fp32-fp16"]
)
NAMES = ["adamw8bit", "lamb", "lars8bit", "muon", "sgd16bit", "lion", "adamw16bit", "muon8bit"]


def master(optimizer: Optimizer2State, p: Tensor) -> NDArray[np.float32]:
    """The master of a parameter, from what is kept beside it."""
    state = optimizer.state[p]
    if "master" in state:
        return state["master"].numpy().copy()
    return joined(array(p), array(state["master_low"])).astype(np.float32)


def shapes_for(name: str) -> list[tuple[int, ...]]:
    return [(70, 65), (33, 40), (128, 64)] if name.startswith("muon") else SHAPES


def in_pairs(
    name: str, dtype: torch.dtype, asked: dict[str, Any], shapes: list[tuple[int, ...]]
) -> tuple[Optimizer2State, Optimizer2State]:
    """An optimizer of 16-bit parameters, and one of float32 parameters with their values."""
    halves = parameters(dtype, shapes)
    wide = [p.detach().float().requires_grad_() for p in halves]
    of_halves = ("master_weights", "param_rounding")
    more = {key: value for key, value in asked.items() if key not in of_halves}
    return build_optimizer(name, halves, **asked), build_optimizer(name, wide, **more)


def params_of(optimizer: Optimizer2State) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_both(
    pair: tuple[Optimizer2State, Optimizer2State], step: int, spoil: bool = False
) -> None:
    """A step of both with the same gradients."""
    for number, (p, q) in enumerate(zip(*map(params_of, pair), strict=True)):
        p.grad = gradient(tuple(p.shape), p.dtype, 1000 * step + number)
        if spoil:
            p.grad.view(-1)[:: 7 + step] = 0.0
            p.grad.view(-1)[3 :: 11 + step] = math.nan
        q.grad = p.grad.float()
    for optimizer in pair:
        optimizer.step()


def assert_alike(pair: tuple[Optimizer2State, Optimizer2State]) -> None:
    """Masters are the float32 parameters bit for bit, and states are the same."""
    for p, q in zip(*map(params_of, pair), strict=True):
        wide = q.detach().numpy()
        assert master(pair[0], p).tobytes() == wide.tobytes()
        assert array(p).tobytes() == rounded(wide, p.dtype, pair[0]).tobytes()
        for key, value in pair[1].state[q].items():
            assert bits(pair[0].state[p][key]).tobytes() == bits(value).tobytes(), key


def rounded(wide: NDArray[Any], dtype: torch.dtype, optimizer: Optimizer2State) -> NDArray[Any]:
    if optimizer.param_groups[0]["master_weights"] == "fp32":
        return nearest(wide.astype(np.float64), dtype)
    upper = (wide.view(np.uint32).astype(np.int64) + 0x8000 >> 16 << 16).astype(np.uint32)
    return upper.view(np.float32).astype(np.float64)


# ---- as float32 ----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", spread(NAMES, 4))
def test_trains_as_a_float32_copy(
    name: str, asked: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    steps = 50 if backend == "cpu" and not name.startswith("muon") else 5
    pair = in_pairs(name, dtype, {**asked, "lr": 1e-3, "weight_decay": 0.01}, shapes_for(name))
    for step in range(steps):
        step_both(pair, step)
    assert_alike(pair)


AROUND: dict[str, dict[str, Any]] = {
    "skipping": {"skip_zeros": True, "nonfinite": "skip_element", "optim_bits": 8},
    "clipping": {"percentile_clipping": 20, "maximize": True, "nonfinite": "skip_step"},
    "whole": {"optim_bits": 8, "block_wise": False, "min_8bit_size": 1, "cautious": True},
}


@kinds
@pytest.mark.parametrize("around", list(AROUND))
def test_other_options_do_as_beside_float32(
    around: str, asked: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    pair = in_pairs("adamw", dtype, {**asked, **AROUND[around], "lr": 0.01}, SHAPES)
    for step in range(6):
        step_both(pair, step, spoil=around == "skipping" or (around == "clipping" and step == 3))
    assert_alike(pair)


@kinds
@families
def test_follows_the_reference(
    family: str, asked: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    twin = Twin(family, own_parameters(family, dtype, SHAPES), lr=0.01, **asked)
    for step in range(4):
        twin.step(step)


@kinds
def test_strided_parameters(asked: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    p = parameters(dtype, [(70, 65)])[0].detach().t().contiguous().t().requires_grad_()
    q = p.detach().float().requires_grad_()
    pair = build_optimizer("adamw8bit", [p], **asked), build_optimizer("adamw8bit", [q])
    for step in range(3):
        step_both(pair, step)
    assert master(pair[0], p).tobytes() == q.detach().contiguous().numpy().tobytes()


# ---- numbers at the edges ------------------------------------------------------------------------

# Patterns of float32 that are hard to halve: ties, carries into the exponent and to infinity,
# subnormal numbers, both zeros.
HARD = [
    *(0x00000000, 0x80000000, 0x00000001, 0x80007FFF, 0x00008000, 0x3F808000, 0x3F817FFF),
    *(0x3F7F8000, 0xBF7FFFFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F7FFF, 0x7F800000, 0xFF800000),
]


def frozen(p: Tensor, asked: dict[str, Any], **more: Any) -> Optimizer2State:
    """An optimizer whose steps change nothing: they store masters as they read them."""
    optimizer = build_optimizer("sgd", [p], lr=0.0, momentum=0.0, **asked, **more)
    p.grad = torch.zeros_like(p)
    return optimizer


def test_halves_and_masters_are_one_to_one(backend: str) -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    patterns = np.concatenate([np.array(HARD, dtype=np.uint32), random])
    wide = patterns.view(np.float32)
    patterns = patterns[~np.isnan(wide)]
    low = (patterns & 0xFFFF).astype(np.uint16).view(np.int16)
    upper = ((patterns.astype(np.int64) - low) >> 16).astype(np.uint16).view(np.int16)
    p = torch.from_numpy(upper.copy()).view(torch.bfloat16).requires_grad_()
    optimizer = frozen(p, SPLIT)
    optimizer.init_states()
    optimizer.state[p]["master_low"].copy_(torch.from_numpy(low.copy()))
    optimizer.step()
    assert np.array_equal(p.detach().view(torch.int16).numpy(), upper)
    assert np.array_equal(optimizer.state[p]["master_low"].numpy(), low)


@kinds
def test_elements_that_are_not_finite(
    asked: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    """NaN stays NaN and infinity infinity, of either sign, and no neighbour is touched."""
    values = [math.nan, -math.nan, math.inf, -math.inf, 1.0, -0.0, 0.0] * 40
    p = torch.tensor(values, dtype=dtype).requires_grad_()
    start = array(p)
    optimizer = frozen(p, asked)
    for _ in range(2):
        optimizer.step()
    assert np.array_equal(array(p), start, equal_nan=True)
    signed = ~np.isnan(start) | (asked is SPLIT)  # torch's own rounding to 16 bits drops a NaN's
    assert np.array_equal(np.signbit(array(p))[signed], np.signbit(start)[signed])
    if asked is SPLIT:
        assert set(p.detach().view(torch.int16)[:2].tolist()) <= {0x7FC0, 0xFFC0 - 2**16}
        assert not optimizer.state[p]["master_low"].any()


def test_a_nan_of_any_pattern_stays_one(backend: str) -> None:
    """By its pattern alone, half a unit above the last NaN would be 0."""
    p = torch.ones(320, dtype=torch.bfloat16).requires_grad_()
    if hasattr(p, "grad_dtype"):  # newer torch asks for leave
        p.grad_dtype = None
    optimizer = build_optimizer("sgd", [p], lr=1.0, momentum=0.0, **SPLIT)
    patterns = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC08000, 0xFFFFC000] * 80, dtype=np.uint32)
    p.grad = torch.from_numpy(patterns.view(np.float32).copy())
    optimizer.step()
    assert bool(p.isnan().all())
    assert set(p.detach().view(torch.int16).tolist()) <= {0x7FC0, 0xFFC0 - 2**16}
    assert not optimizer.state[p]["master_low"].any()


# ---- parameters that users change ----------------------------------------------------------------


@kinds
def test_changes_from_outside_are_kept(
    asked: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    """Set, clipped or loaded: a step goes on from the present value."""
    pair = in_pairs("adamw", dtype, {**asked, "lr": 1e-3}, SMALL)
    for step in range(3):
        step_both(pair, step)
    (p, _), (q, _) = map(params_of, pair)
    with torch.no_grad():
        p[:5] = 0.25
        p[5:10] *= 0.0  # what is kept beside a zero may be below 0
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = 0.0
    step_both(pair, 3)
    now = master(pair[0], p)
    unit = {"split": 2.0**-9, "fp32": 0.0}[asked["master_weights"]]  # half of one at 0.25
    assert (np.abs(now[:5] - 0.25) <= unit).all()
    assert (np.abs(now[5:10]) <= (2.0**-134 if unit else 0.0)).all()
    assert now[10:].tobytes() == q.detach()[10:].numpy().tobytes()
    assert array(p[:5]).tobytes() == np.full((5, 300), 0.25).tobytes()


def test_fields_that_change_while_training_carry_the_master_over(backend: str) -> None:
    pair = in_pairs("adamw", torch.bfloat16, {**SPLIT, "lr": 1e-3}, SMALL)
    for step, kind in enumerate(("split", "fp32", "split")):
        pair[0].param_groups[0]["master_weights"] = kind
        step_both(pair, step)
    assert_alike(pair)
    pair[0].param_groups[0]["master_weights"] = "none"
    step_both(pair, 4)
    assert not {"master", "master_low"} & pair[0].state[params_of(pair[0])[0]].keys()


def test_rows_are_carried_over() -> None:
    for asked in (SPLIT, FP32):
        pair = in_pairs("adamw8bit", torch.bfloat16, {**asked, "lr": 1e-3}, [(64, 96)])
        for step in range(2):
            step_both(pair, step)
        for optimizer in pair:
            (p,) = params_of(optimizer)
            larger = torch.cat([p.detach(), torch.full((8, 96), 0.5, dtype=p.dtype)])
            optimizer.replace_parameter(p, larger.requires_grad_())
        for step in range(2, 4):
            step_both(pair, step)
        assert_alike(pair)


# ---- checkpoints ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name", spread(["adamw8bit", "muon", "lamb"], 1))
def test_resumes(name: str, asked: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    shapes = shapes_for(name) if name == "muon" else SMALL
    whole = assert_resumes(name, dtype, shapes, lr=1e-3, **asked)
    assert ("p0.master_low" in whole, "p0.master" in whole) == (asked is SPLIT, asked is FP32)


def test_checkpoints_of_other_kinds_are_converted(backend: str) -> None:
    """Split and whole masters take each other's; Kahan's rest and none give what there is."""
    kinds = {"split": SPLIT, "fp32": FP32, "kahan": {"param_rounding": "kahan"}, "none": {}}
    for source, said in kinds.items():
        pair = in_pairs("adamw8bit", torch.bfloat16, {**said, "lr": 1e-3}, SMALL)
        for step in range(3):
            step_both(pair, step) if source != "kahan" else train(pair[0], [step])
        saved = copy.deepcopy(pair[0].state_dict())
        for target, asked in kinds.items():
            halves = [p.detach().clone().requires_grad_() for p in params_of(pair[0])]
            other = build_optimizer("adamw8bit", halves, lr=1e-3, **asked)
            other.load_state_dict(saved)
            keys = {"compensation", "master_low", "master"} & other.state[halves[0]].keys()
            expected = {"split": "master_low", "fp32": "master", "kahan": "compensation"}
            assert keys == {expected[target]} - {""} if target in expected else not keys
            if {source, target} <= {"split", "fp32"}:
                for before, p in zip(params_of(pair[0]), halves, strict=True):
                    there, here = master(pair[0], before), master(other, p)
                    assert np.abs(there.view(np.int32) - here.view(np.int32)).max() <= 1  # of ties
            if source == "kahan" and target in ("split", "fp32"):
                rest = pair[0].state[params_of(pair[0])[0]]["compensation"]
                wide = (params_of(pair[0])[0].detach().float() + rest.float()).numpy()
                assert np.abs(master(other, halves[0]) - wide).max() <= 2.0**-24
            if source in ("split", "fp32") and target == "kahan":
                wide = master(pair[0], params_of(pair[0])[0])
                kept = array(halves[0]) + array(other.state[halves[0]]["compensation"])
                assert np.abs(kept - wide).max() <= 2.0**-17 * np.abs(wide).max()


# ---- what is said --------------------------------------------------------------------------------


def test_bytes_are_planned_and_reported() -> None:
    bare = plan("adamw8bit", _meta_model()).state_bytes
    count = sum(p.numel() for p in _meta_model().parameters())
    assert plan("adamw8bit", _meta_model(), **SPLIT).state_bytes - bare == 2 * count
    assert plan("adamw8bit", _meta_model(), **FP32).state_bytes - bare == 4 * count
    model = torch.nn.Linear(70, 65).to(torch.bfloat16)
    reported = build_optimizer("adamw8bit", model, **FP32).memory_report()
    assert reported == plan("adamw8bit", model, **FP32).report


def _meta_model() -> torch.nn.Module:
    return torch.nn.Linear(70, 65, device="meta", dtype=torch.bfloat16)


def test_paged_states_take_the_masters_along(tmp_path: Any) -> None:
    p = torch.ones(400, 300, dtype=torch.bfloat16).requires_grad_()
    optimizer = build_optimizer("paged_adamw8bit", [p], page_dir=str(tmp_path), **FP32)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert {row.where for row in optimizer.memory_report().rows} == {"file-mapped"}
    again = copy.deepcopy(optimizer)
    (q,) = params_of(again)
    assert torch.equal(again.state[q]["master"], optimizer.state[p]["master"])


def test_float32_parameters_beside_others_have_no_master(backend: str) -> None:
    params = [*parameters(torch.float32, SMALL), *parameters(torch.bfloat16, [(64, 70)])]
    optimizer = build_optimizer("adamw", params, **SPLIT)
    train(optimizer, range(2))
    kept = ["master_low" in optimizer.state[p] for p in params]
    assert kept == [False, False, True]


@pytest.mark.parametrize("more", [{"param_rounding": "kahan"}, {"param_rounding": "stochastic"}])
def test_contradictions_are_refused(more: dict[str, Any]) -> None:
    for asked in (SPLIT, FP32):
        with pytest.raises(ConfigError, match=r"master_weights.*drop one of them"):
            resolve("adamw8bit", **asked, **more)
        resolve("adamw8bit", master_weights="none", **more)


def test_refusals() -> None:
    for asked in (SPLIT, FP32):
        assert_refused(r"master_weights: is for 16-bit parameters", "adamw", **asked)
        with pytest.raises(ConfigError, match="compat: bitsandbytes decides master_weights"):
            resolve("adamw8bit", compat="bitsandbytes", **asked)
    assert_refused("master_weights", "adamw", master_weights="half")
    params = [("head.weight", torch.zeros(8, 8, dtype=torch.float16).requires_grad_())]
    with pytest.raises(ConfigError) as refused:
        build_optimizer("adamw", params, **SPLIT)
    assert re.search(r"float16.*head\.weight.*master_weights: fp32", str(refused.value))


def test_a_parameter_that_becomes_another_dtype_is_refused() -> None:
    for asked, dtype in ((SPLIT, torch.float16), (FP32, torch.float32)):
        p = torch.ones(4, 8, dtype=torch.bfloat16).requires_grad_()
        optimizer = build_optimizer("adamw", [p], **asked)
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.data, p.grad = p.data.to(dtype), None
        p.grad = torch.ones_like(p)
        with pytest.raises(ConfigError, match="keep its dtype"):
            optimizer.step()


def test_others_of_muon_have_masters_too() -> None:
    layers = torch.nn.Linear(32, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)
    model = torch.nn.Sequential(*layers).bfloat16()
    groups = build_optimizer("muon", model, **SPLIT).param_groups
    assert {group["optimizer"] for group in groups} == {"muon", "adamw"}
    assert {group["master_weights"] for group in groups} == {"split"}
    own = {"others": {"param_rounding": "kahan"}}
    groups = build_optimizer("muon", model, **SPLIT, **own).param_groups
    said = {group["optimizer"]: group["master_weights"] for group in groups}
    assert said == {"muon": "split", "adamw": None}


# ---- the warning ---------------------------------------------------------------------------------

LOST = "master_weights: split .* fp32 .*stochastic .* kahan .*master_weights: none"


def told(make: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    return [str(item.message) for item in seen if "are rounded to the nearest" in str(item.message)]


def _bf16() -> list[Tensor]:
    return [torch.ones(4, 8, dtype=torch.bfloat16).requires_grad_()]


def test_lost_updates_are_warned_of_once() -> None:
    def twice() -> None:
        optimizer = build_optimizer("adamw8bit", _bf16())
        optimizer.add_param_group({"params": _bf16()})

    def later() -> None:
        optimizer = build_optimizer("adamw8bit", [torch.ones(4, 8).requires_grad_()])
        optimizer.add_param_group({"params": _bf16()})
        optimizer.add_param_group({"params": _bf16()})

    for make in (twice, later, lambda: AdamW8bit(_bf16())):
        (message,) = told(make)
        assert re.search(LOST, message)


@pytest.mark.parametrize("asked", [
    SPLIT, FP32, {"master_weights": "none"}, {"param_rounding": "kahan"},
    {"param_rounding": "stochastic"},
], ids=str)  # fmt: skip
def test_a_choice_silences_the_warning(asked: dict[str, Any]) -> None:
    assert not told(lambda: build_optimizer("adamw8bit", _bf16(), **asked))
    assert not told(lambda: build_optimizer("adamw8bit", [{"params": _bf16(), **asked}]))
    assert not told(lambda: AdamW8bit(_bf16(), **asked))


def test_what_loses_nothing_is_not_warned_of() -> None:
    frozen = [p.requires_grad_(False) for p in _bf16()]
    wide = torch.ones(4, 8).requires_grad_()
    assert not told(lambda: build_optimizer("adamw8bit", [wide, *frozen]))


def test_every_dtype_is_known() -> None:
    assert {dtype for _, dtype in KINDS} == {DTYPES["bf16"], DTYPES["fp16"]}
