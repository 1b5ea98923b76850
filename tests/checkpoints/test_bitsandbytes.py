"""Checkpoints of bitsandbytes: read in all their forms, gone on from, and written."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optfactory import build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.checkpoints.harness import (
    NESTED,
    SHAPES,
    TABLES,
    StateDict,
    alike,
    array,
    assert_quantized,
    decoded_flat,
    encoded_flat,
    flattened,
    nested,
    peer,
    same,
    values_of,
    values_of_bitsandbytes,
    weights,
)
from tests.torch_api.harness import clones, held, snapshot, through_file, train

pytestmark = pytest.mark.usefixtures("small_tensors")

STATES = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def bnb() -> Any:
    return peer("bitsandbytes").optim


def train_theirs(optimizer: Any, steps: range) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        train(optimizer, steps)


def theirs(kind: Any, params: list[Tensor] | None = None, **options: Any) -> Any:
    """One of bitsandbytes' optimizers after four steps."""
    optimizer = kind(params or weights(), **options)
    train_theirs(optimizer, range(4))
    return optimizer


def difference(one: Any, other: Any, places: tuple[int, ...] = tuple(range(len(SHAPES)))) -> float:
    pairs = list(zip(held(one), held(other), strict=True))
    return max(float((pairs[i][0] - pairs[i][1]).detach().abs().max()) for i in places)


def made(block: int | None, step: Any = 4) -> StateDict:
    """A flat 8-bit state dict in blocks of this many elements; None: one scale per tensor."""
    rng = np.random.default_rng(0)
    state: dict[int, StateDict] = {}
    for index, shape in enumerate(SHAPES):
        entries: StateDict = {"step": step}
        for number, name in enumerate(STATES, start=1):
            values = (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, shape)).astype("f4")
            values = values if name == "exp_avg" else np.square(values)
            if math.prod(shape) < 4096:
                entries[f"state{number}"] = torch.from_numpy(np.array(values))
                continue
            size = block or math.prod(shape)
            codes, scales = encoded_flat(values, name, size)
            entries[f"state{number}"] = torch.from_numpy(codes)
            entries[f"qmap{number}"] = torch.from_numpy(TABLES[name].values.copy())
            if block:
                entries[f"absmax{number}"] = torch.from_numpy(scales)
            else:
                entries[f"max{number}"] = torch.from_numpy(scales)
                entries[f"new_max{number}"] = torch.zeros(1)
        state[index] = entries
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(SHAPES)))}]}


def values_of_made(entries: StateDict, name: str, block: int | None) -> Any:
    number = STATES.index(name) + 1
    state = entries[f"state{number}"].numpy()
    if state.dtype == np.float32:
        return state
    scales = entries[f"absmax{number}" if block else f"max{number}"].numpy()
    return decoded_flat(state, scales, name, block or state.size)


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [nested, flattened])
@pytest.mark.parametrize("name", ["adamw32bit", "paged_adamw", "adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize(
    "kind", ["AdamW", "AdamW8bit", "Adam8bit", "PagedAdamW", "PagedAdam8bit", "PagedAdamW8bit"]
)
def test_every_width_and_form_is_read_into_every_width(
    bnb: Any, kind: str, name: str, form: Any
) -> None:
    source = theirs(getattr(bnb, kind), lr=0.02, weight_decay=0.1)
    saved = source.state_dict()
    assert NESTED in saved["state"][0]
    ours = build_optimizer(name, clones(held(source)))
    ours.load_state_dict(through_file(form(saved)))
    group = ours.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["amsgrad"]) == (0.02, 0.1, False)
    assert group["is_paged"] == name.startswith("paged")
    assert not {"alpha", "t_alpha", "t_beta3"} & group.keys()
    for p, q in zip(held(source), held(ours), strict=True):
        assert ours.state[q]["step"] == 4
        for key in STATES:
            values = values_of_bitsandbytes(source.state[p], key)
            requantized = "8bit" in name and f"{key}_q8" in ours.state[q]
            cuts_blocks = q.dim() > 1 and q.shape[1] % 256  # rows end within their flat blocks
            if requantized and ("8bit" not in kind or cuts_blocks):
                assert_quantized(ours.state[q], values, key)
            else:
                assert alike(values_of(ours.state[q], key), values)
    train(ours, range(4, 5))


@pytest.mark.parametrize("name", ["adamw8bit", "adamw32bit"])
@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit"])
def test_the_next_step_is_theirs(bnb: Any, kind: str, name: str) -> None:
    source = theirs(getattr(bnb, kind), lr=0.02, weight_decay=0.1)
    ours = build_optimizer(name, clones(held(source)))
    ours.load_state_dict(source.state_dict())
    train(ours, range(4, 5))
    train(source, range(4, 5))
    exact = (0, 2, 4, 5) if "8bit" in name else tuple(range(len(SHAPES)))
    assert difference(source, ours, exact) < 1e-6
    assert difference(source, ours) < 0.02


def test_codes_of_the_same_blocks_are_taken_over(bnb: Any) -> None:
    source = theirs(bnb.AdamW8bit)
    ours = build_optimizer("adamw8bit", weights())
    ours.load_state_dict(source.state_dict())
    for index in (0, 2):
        entries, state = source.state[held(source)[index]], ours.state[held(ours)[index]]
        for number, key in enumerate(STATES, start=1):
            assert same(state[f"{key}_q8"].numpy(), entries[f"state{number}"].numpy())
            scales = state[f"{key}_absmax"].numpy().reshape(-1)
            assert same(scales, entries[f"absmax{number}"].numpy())


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_going_on_in_32_bits_is_going_on_there(bnb: Any, name: str) -> None:
    kind, options = (bnb.AdamW, {}) if name == "adamw" else (bnb.LAMB, {"trust_ratio": "clip"})
    # The CPU code of bitsandbytes forms LAMB's norms before the bias is corrected, so that the
    # trust ratio has to stay out of the way.
    extra = {} if name == "adamw" else {"max_unorm": 1e6}
    source = theirs(kind, lr=0.01, weight_decay=0.1, **extra)
    ours = build_optimizer(name, clones(held(source)), **options, **extra)
    ours.load_state_dict(through_file(source.state_dict()))
    train(source, range(4, 14))
    train(ours, range(4, 14))
    assert difference(source, ours) < 1e-6


@pytest.mark.parametrize("name", ["adamw32bit", "paged_adamw8bit", "adamw8bit"])
@pytest.mark.parametrize("block", [256, 2048, None])
@pytest.mark.parametrize("form", [nested, flattened])
def test_blocks_of_all_releases_are_read(form: Any, block: int | None, name: str) -> None:
    saved = made(block)
    ours = build_optimizer(name, weights())
    ours.load_state_dict(through_file(form(saved)))
    exact = 0
    for index, p in enumerate(held(ours)):
        for key in STATES:
            values = values_of_made(saved["state"][index], key, block)
            state = ours.state[p]
            inside = block is None or p.dim() < 2 or p.shape[1] % 256 == 0
            if f"{key}_q8" not in state or inside:
                # Blocks that lie within one of theirs keep its codes and its scale.
                assert alike(values_of(state, key), values)
                exact += 1
            else:
                assert_quantized(state, values, key)
    assert exact >= 8
    train(ours, range(4, 6))


def test_the_stored_map_is_honoured() -> None:
    saved = made(256)
    for entries in saved["state"].values():
        if "qmap1" in entries:  # with -1.0 in place of the smallest negative value
            values = entries["qmap1"]
            entries["qmap1"] = torch.cat([torch.tensor([-1.0]), values[:126], values[127:]])
    expected = [values_of_bitsandbytes(entries, "exp_avg") for entries in saved["state"].values()]
    wide, narrow = (build_optimizer(name, weights()) for name in ("adamw", "adamw8bit"))
    wide.load_state_dict(saved)
    narrow.load_state_dict(saved)
    for values, p, q in zip(expected, held(wide), held(narrow), strict=True):
        assert same(array(wide.state[p]["exp_avg"]), values)
        if "exp_avg_q8" in narrow.state[q]:
            assert_quantized(narrow.state[q], values, "exp_avg")


@pytest.mark.parametrize("step", [7, torch.tensor(7), torch.tensor(7.0)], ids=repr)
def test_steps_are_numbers_or_tensors(step: Any) -> None:
    ours = build_optimizer("adamw8bit", weights())
    ours.load_state_dict(made(256, step))
    assert {ours.state[p]["step"].item() for p in held(ours)} == {7.0}


def test_scratch_of_old_releases_is_left_out() -> None:
    saved = made(256)
    for entries in saved["state"].values():
        entries["gnorm_vec"] = torch.zeros(100)
    build_optimizer("adamw8bit", weights()).load_state_dict(saved)


@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_a_dict_without_state_brings_its_hyperparameters(bnb: Any, kind: str) -> None:
    saved = getattr(bnb, kind)(weights(), lr=0.125).state_dict()
    ours = build_optimizer("adamw" if kind == "AdamW" else "lamb", weights())
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 0.125


def entry(saved: StateDict, key: str) -> StateDict:
    """The mapping that a field of the first parameter lies in."""
    entries: StateDict = saved["state"][0]
    inner: StateDict = entries.get(NESTED, {})
    return inner if key in inner else entries


def edited(key: str, change: Any) -> Any:
    def apply(saved: StateDict) -> None:
        place = entry(saved, key)
        place[key] = change(place[key])

    return apply


BROKEN = {
    "NaN scales": (
        edited("absmax1", lambda t: t.clone().fill_(math.nan)),
        "w0.absmax1: has scales that are NaN",
    ),
    "infinite scales": (edited("absmax2", lambda t: t + math.inf), "w0.absmax2: .*infinite"),
    "negative scales": (edited("absmax2", lambda t: -t - 1), "w0.absmax2: .*negative"),
    "a block less": (edited("absmax1", lambda t: t[:-1]), r"w0.absmax1: .*\(36,\).*\(35,\)"),
    "another number of blocks": (edited("absmax2", lambda t: t[:7]), r"w0.absmax2: .*\(7,\)"),
    "scales in half precision": (edited("absmax1", Tensor.half), "w0.absmax1: .*float16"),
    "signed codes": (edited("state1", Tensor.char), "w0.state1: .*int8"),
    "codes of another shape": (edited("state2", lambda t: t.T), r"w0.state2: .*\(512, 18\)"),
    "a map of 16 values": (edited("qmap1", lambda t: t[:16]), r"w0.qmap1: .*\(256,\).*\(16,\)"),
    "a map with NaN": (edited("qmap2", lambda t: t * math.nan), "w0.qmap2: .*from 0 to 1"),
    "a map that is too large": (edited("qmap1", lambda t: 2 * t), "w0.qmap1: .*from -1 to 1"),
    "a negative map of squares": (edited("qmap2", lambda t: -t), "w0.qmap2: .*from 0 to 1"),
    "no map": (lambda s: entry(s, "qmap1").pop("qmap1"), "w0.qmap1: missing"),
    "no scales": (lambda s: entry(s, "absmax1").pop("absmax1"), "w0.absmax1: missing"),
    "no second state": (lambda s: entry(s, "state2").pop("state2"), "w0.state2: missing"),
    "no step": (lambda s: s["state"][0].pop("step"), "w0.step: missing"),
    "half a step": (edited("step", lambda _: 0.5), "w0.step: expected a count below"),
    "a third state": (lambda s: s["state"][0].update(state3=1), "w0: .*state3"),
    "a list inside": (lambda s: s["state"][0].update({NESTED: [1]}), f"w0.{NESTED}: .*list"),
    "three betas": (lambda s: s["param_groups"][0].update(betas=(0, 0, 0)), "betas"),
    "no eps": (lambda s: s["param_groups"][0].pop("eps"), r"param_groups\[0\].eps: missing"),
}


@pytest.mark.parametrize("form", [nested, flattened])
@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named_and_changes_nothing(change: Any, words: str, form: Any) -> None:
    saved = form(made(256))
    change(saved)
    ours = build_optimizer("adamw8bit", [(f"w{i}", p) for i, p in enumerate(weights())])
    train(ours, range(2))
    before = snapshot(ours)
    with pytest.raises(StateError, match=words):
        ours.load_state_dict(saved)
    assert snapshot(ours) == before
    train(ours, range(2, 3))


def test_state_in_another_memory_order_is_refused() -> None:
    saved = made(256)
    saved["state"][0]["state1"] = saved["state"][0]["state1"].T.contiguous().T
    with pytest.raises(StateError, match=r"state1: is not contiguous.*\.contiguous\(\)"):
        build_optimizer("adamw8bit", weights()).load_state_dict(saved)


@pytest.mark.parametrize(
    ("kind", "name", "options", "words"),
    [
        ("AdamW", "adam", {}, "optimizer: .*'adamw'.*'adam'.*0.01"),
        ("AdamW", "lamb", {}, "optimizer: .*'adamw'.*'lamb'"),
        ("LAMB", "adamw", {}, "optimizer: .*'lamb'.*'adamw'"),
        ("AdamW", "adamw", {"amsgrad": True}, "amsgrad"),
        ("Lion8bit", "adamw8bit", {}, "optimizer: .*'lion'.*'adamw8bit'.*fresh state"),
        ("RMSprop", "adamw", {}, "optimizer: .*'rmsprop'.*'adamw'.*fresh state"),
        ("AdEMAMix8bit", "adamw8bit", {}, "optimizer: .*'ademamix'.*'adamw8bit'"),
    ],
)
def test_what_bitsandbytes_computes_otherwise_is_refused(
    bnb: Any, kind: str, name: str, options: Any, words: str
) -> None:
    source = theirs(getattr(bnb, kind))
    ours = build_optimizer(name, weights(), **options)
    with pytest.raises(StateError, match=words):
        ours.load_state_dict(source.state_dict())
    assert not ours.state


def test_their_adam_is_read_where_decay_is_decoupled_or_zero(bnb: Any) -> None:
    decaying = theirs(bnb.Adam, weight_decay=0.1, lr=0.02)
    ours = build_optimizer("adam", clones(held(decaying)), adam_w_mode=True)
    ours.load_state_dict(decaying.state_dict())
    train(ours, range(4, 8))
    train(decaying, range(4, 8))
    assert difference(decaying, ours) < 1e-6
    plain = theirs(bnb.Adam)
    ours = build_optimizer("adam", clones(held(plain)))
    ours.load_state_dict(plain.state_dict())
    assert ours.param_groups[0]["adam_w_mode"] is False


# ---- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 256, 2048])
@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW"])
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit", "adamw"])
def test_bitsandbytes_loads_an_export_and_goes_on(
    bnb: Any, name: str, kind: str, block: int
) -> None:
    blocks = {"block_size": block} if name.endswith("8bit") else {}
    ours = build_optimizer(name, weights(), lr=0.02, weight_decay=0.1, **blocks)
    train(ours, range(4))
    exported = through_file(ours.export_state_dict("bitsandbytes"))
    target = getattr(bnb, kind)(clones(held(ours)))
    target.load_state_dict(exported)
    (group,) = target.param_groups
    assert group.keys() == bnb.AdamW(weights()).param_groups[0].keys()
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.1)
    unchanged = []
    for index, (p, q) in enumerate(zip(held(target), held(ours), strict=True)):
        assert target.state[p]["step"] == 4
        for key in STATES:
            values = values_of(ours.state[q], key, block)
            found = values_of_bitsandbytes(target.state[p], key)
            wide = f"{key}_q8" not in ours.state[q]
            whole_blocks = block >= 256 and (q.dim() < 2 or q.shape[1] % 256 == 0)
            if wide or whole_blocks:
                assert alike(found, values)
                unchanged.append(index)
            else:
                codes, scales = encoded_flat(values, key)
                assert same(found, decoded_flat(codes, scales, key))
    train_theirs(target, range(4, 5))
    train(ours, range(4, 5))
    assert difference(target, ours, tuple(unchanged)) < 1e-6
    train_theirs(target, range(5, 8))
    train(ours, range(5, 8))
    assert difference(target, ours) < 0.1


def test_an_export_comes_back_bit_for_bit() -> None:
    ours = build_optimizer("adamw8bit", weights())
    train(ours, range(4))
    back = build_optimizer("adamw8bit", clones(held(ours)))
    back.load_state_dict(ours.export_state_dict("bitsandbytes"))
    for index in (0, 2, 4, 5):
        for key, value in ours.state[held(ours)[index]].items():
            assert same(array(back.state[held(back)[index]][key]), array(value))


def test_lamb_loads_an_export(bnb: Any) -> None:
    ours = build_optimizer("lamb", weights(), trust_ratio="clip", max_unorm=1e6)
    train(ours, range(4))
    target = bnb.LAMB(clones(held(ours)), max_unorm=1e6)
    target.load_state_dict(ours.export_state_dict("bitsandbytes"))
    train(target, range(4, 8))
    train(ours, range(4, 8))
    assert difference(target, ours) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adam", {"weight_decay": 0.1}, "weight_decay: 0.1 is L2"),
        ("adamw", {"amsgrad": True}, "amsgrad: bitsandbytes never"),
        ("lamb8bit", {}, "trust_ratio: 'lamb'"),
        ("adamw8bit", {"bias_correction": False}, "bias_correction: False"),
    ],
)
def test_what_bitsandbytes_would_not_go_on_with_is_refused(
    name: str, options: Any, words: str
) -> None:
    ours = build_optimizer(name, weights(), **options)
    with pytest.raises(ConfigError, match=words):
        ours.export_state_dict("bitsandbytes")
