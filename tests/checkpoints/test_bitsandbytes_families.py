"""Checkpoints of bitsandbytes' optimizers with one state, and of AdEMAMix, which stacks two."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.checkpoints.harness import (
    SHAPES,
    Array,
    StateDict,
    alike,
    array,
    assert_quantized,
    flattened,
    nested,
    peer,
    values_of,
    weights,
)
from tests.families import states_of
from tests.torch_api.harness import clones, held, through_file, train

pytestmark = pytest.mark.usefixtures("small_tensors")

# The class without its width, how it is asked, and our family.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("SGD", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}, "sgd"),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.1}, "rmsprop"),
    ("Adagrad", {"lr": 0.02, "weight_decay": 0.1}, "adagrad"),
    ("Lion", {"lr": 0.001, "weight_decay": 0.1}, "lion"),
    ("AdEMAMix", {"weight_decay": 0.1, "alpha": 4.0}, "ademamix"),
    ("AdEMAMix", {"weight_decay": 0.0, "t_alpha": 20, "t_beta3": 20}, "ademamix"),
    ("LARS", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, "lars"),
]
# What we must be asked for beside it; at 8 bits its norms are not clipped.
OURS: dict[tuple[str, int], dict[str, Any]] = {
    ("LARS", 32): {"trust_ratio": "clip"},
    ("LARS", 8): {"trust_ratio": "clip", "max_unorm": 0.0},
}
# Their 8-bit states that we keep in the same map, so that codes can stay.
SAME_MAP = {"momentum_buffer", "exp_avg", "exp_avg_slow"}

STACKED = {"state1", "absmax1"}


@pytest.fixture(scope="module")
def bnb() -> Any:
    return peer("bitsandbytes").optim


def made(bnb: Any, name: str, bits: int, params: Any = None, steps: int = 4, **options: Any) -> Any:
    """One of bitsandbytes' optimizers; AdEMAMix32bit of 0.50.2 has no room for its two averages."""
    params = weights() if params is None else params
    if name == "AdEMAMix":
        optimizer = bnb.AdEMAMix(params, optim_bits=bits, **options)
    else:
        optimizer = getattr(bnb, f"{name}{bits}bit")(params, **options)
    train(optimizer, range(steps))
    return optimizer


def there(source: Any, p: torch.Tensor, family: str) -> dict[str, Array]:
    """All states of a parameter there under our names, by the maps that are stored with them."""
    entries = source.state[p]
    names = [state.name for state in states_of(family)]
    if family != "ademamix":
        return {name: decoded(entries, str(i)) for i, name in enumerate(names, start=1)}
    stacked = STACKED & entries.keys()
    fast, slow = ({**entries, **{key: entries[key][half] for key in stacked}} for half in (0, 1))
    parts = (decoded(fast, "1"), decoded(slow, "1"), decoded(entries, "2"))
    return dict(zip(names, parts, strict=True))


def decoded(entries: StateDict, number: str) -> Array:
    """The values of one of their states."""
    state = entries[f"state{number}"]
    if state.dtype == torch.float32:
        return array(state)
    scales = entries[f"absmax{number}"].numpy().repeat(256)[: state.numel()]
    table = entries[f"qmap{number}"].numpy()
    result: Array = (table[state.numpy()] * scales.reshape(state.shape)).astype(np.float32)
    return result


def difference(one: Any, other: Any) -> float:
    pairs = zip(held(one), held(other), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


# ---- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [nested, flattened])
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "options", "family"), CASES)
def test_every_width_and_form_is_read_into_every_width(
    bnb: Any, name: str, options: Any, family: str, bits: int, width: int, form: Any
) -> None:
    source = made(bnb, name, bits, **options)
    ours = build_optimizer(f"{family}{width}bit", clones(held(source)))
    ours.load_state_dict(through_file(form(source.state_dict())))
    (group,) = ours.param_groups
    for key, value in options.items():
        assert group[key] == value
    own = type(ours.config).model_fields.keys()
    assert not {"eps", "betas", "alpha", "t_alpha", "t_beta3"} & (group.keys() - own)
    for p, q in zip(held(source), held(ours), strict=True):
        assert ours.state[q]["step"] == 4
        for key, values in there(source, p, family).items():
            requantized = f"{key}_q8" in ours.state[q]
            cuts_blocks = q.dim() > 1 and q.shape[1] % 256  # rows end within their flat blocks
            if requantized and (bits == 32 or cuts_blocks or key not in SAME_MAP | {"exp_avg_sq"}):
                assert_quantized(ours.state[q], values, key)
            else:
                assert alike(values_of(ours.state[q], key), values)
    train(ours, range(4, 5))


@pytest.mark.parametrize(("name", "options", "family"), CASES)
def test_going_on_from_32_bits_is_going_on_there(
    bnb: Any, name: str, options: Any, family: str
) -> None:
    source = made(bnb, name, 32, **options)
    ours = build_optimizer(family, clones(held(source)))
    ours.load_state_dict(source.state_dict())
    train(ours, range(4, 14))
    train(source, range(4, 14))
    for p, q in zip(held(source), held(ours), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "options", "family"), CASES)
def test_the_next_step_from_8_bits_is_theirs(
    bnb: Any, name: str, options: Any, family: str
) -> None:
    source = made(bnb, name, 8, **options)
    ours = build_optimizer(family, clones(held(source)), **OURS.get((name, 8), {}))
    ours.load_state_dict(source.state_dict())
    train(ours, range(4, 5))
    train(source, range(4, 5))
    assert difference(source, ours) < 2e-6


def test_a_plain_and_a_paged_class_are_read(bnb: Any) -> None:
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        source = made(bnb, "PagedLion", 8)
    ours = build_optimizer("lion8bit", clones(held(source)))
    ours.load_state_dict(source.state_dict())
    assert ours.state[held(ours)[0]]["step"] == 4


# ---- AdEMAMix's scales ------------------------------------------------------------------------


def collided(saved: StateDict) -> StateDict:
    """As GPU kernels write: the slow average's scales begin at the place numel // 256."""
    saved = copy.deepcopy(flattened(saved))
    for entries in saved["state"].values():
        if "absmax1" not in entries:
            continue
        fast, slow = entries["absmax1"]
        numel = entries["state2"].numel()
        flat = torch.zeros(2 * len(fast))
        flat[: len(fast)] = fast
        flat[numel // 256 : numel // 256 + len(slow)] = slow
        entries["absmax1"] = flat.view(2, -1)
    return saved


@pytest.mark.parametrize("size", [4097, 4300])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_scales_that_collide_are_recognized(bnb: Any, size: int, sign: int) -> None:
    """Whatever the last block holds: where it is 0, its scale is 0 for another reason."""
    params = [torch.ones(size).requires_grad_()]
    source = bnb.AdEMAMix8bit(params)
    for _ in range(3):
        params[0].grad = torch.linspace(-1, 1, size)
        params[0].grad[4096:] = sign
        source.step()
    ours = build_optimizer("ademamix8bit", clones(params))
    ours.load_state_dict(source.state_dict())
    other = build_optimizer("ademamix8bit", clones(params))
    with pytest.raises(StateError, match=r"absmax1: has lost a scale.*, is no multiple of 256"):
        other.load_state_dict(collided(source.state_dict()))
    assert not other.state


def test_whole_blocks_have_room_for_all_scales(bnb: Any) -> None:
    source = made(bnb, "AdEMAMix", 8, [torch.ones(32, 256).requires_grad_()])
    saved = source.state_dict()
    ours = build_optimizer("ademamix8bit", clones(held(source)))
    ours.load_state_dict(collided(saved))
    ((p,), (q,)) = held(source), held(ours)
    for key, values in there(source, p, "ademamix").items():
        assert alike(values_of(ours.state[q], key), values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state1", torch.zeros(18, 512)),
        ("state1", None),
        ("state1", torch.zeros(3, 18, 512, dtype=torch.uint8)),
        ("absmax1", torch.zeros(36)),
        ("absmax1", torch.zeros(2, 35)),
        ("qmap1", torch.zeros(255)),
        ("qmap1", None),
    ],
    ids=str,
)
def test_damaged_stacks_are_named(bnb: Any, key: str, value: Any) -> None:
    saved = flattened(made(bnb, "AdEMAMix", 8).state_dict())
    saved["state"][0][key] = value
    if value is None:
        del saved["state"][0][key]
    with pytest.raises(StateError, match=rf"{key}(\[\d\])?: "):
        build_optimizer("ademamix8bit", weights()).load_state_dict(saved)


# ---- families are not mixed up ----------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("loaded_by", ["sgd", "rmsprop", "adagrad", "lion", "ademamix", "adamw"])
@pytest.mark.parametrize(("name", "options", "family"), CASES[:5])
def test_the_state_of_another_algorithm_is_refused(
    bnb: Any, name: str, options: Any, family: str, loaded_by: str, bits: int
) -> None:
    if family == loaded_by:
        pytest.skip("its own")
    ours = build_optimizer(f"{loaded_by}{bits}bit", weights())
    with pytest.raises(StateError, match=f"the checkpoint is of family '{family}'"):
        ours.load_state_dict(made(bnb, name, bits, **options).state_dict())
    assert not ours.state


def test_the_norms_of_lars_are_recognized(bnb: Any) -> None:
    source = made(bnb, "LARS", 32, lr=0.1, momentum=0.9)
    with pytest.raises(StateError, match="the checkpoint is of family 'lars'"):
        build_optimizer("sgd", weights()).load_state_dict(source.state_dict())


def test_a_second_moment_below_zero_is_refused(bnb: Any) -> None:
    saved = flattened(made(bnb, "RMSprop", 8).state_dict())
    saved["state"][0]["state1"][0, 0] = 0
    with pytest.raises(StateError, match="state1: has negative elements"):
        build_optimizer("rmsprop8bit", weights()).load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("rmsprop", {"momentum": 0.9}, "momentum: the checkpoint has 0.0, the config 0.9"),
        ("rmsprop", {"centered": True}, "centered: the checkpoint has False"),
        ("sgd", {"momentum": 0}, "momentum: the checkpoint has 0.9, the config 0.0"),
    ],
)
def test_other_states_are_refused(bnb: Any, name: str, config: Any, word: str) -> None:
    kind, options, _ = next(case for case in CASES if case[2] == name)
    ours = build_optimizer(name, weights(), **config)
    with pytest.raises(StateError, match=word):
        ours.load_state_dict(made(bnb, kind, 32, **options).state_dict())


# ---- writing ----------------------------------------------------------------------------------


def exported(bnb: Any, ours: Optimizer2State, name: str, bits: int) -> Any:
    """Their optimizer with our state."""
    options = {"lr": 1.0, "momentum": 0.5} if name in ("SGD", "LARS") else {}
    back = made(bnb, name, bits, clones(held(ours)), steps=0, **options)
    back.load_state_dict(through_file(ours.export_state_dict("bitsandbytes")))
    return back


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("name", "options", "family"), CASES)
def test_bitsandbytes_loads_an_export_and_goes_on(
    bnb: Any, name: str, options: Any, family: str, bits: int
) -> None:
    ours = build_optimizer(f"{family}{bits}bit", weights(), **options, **OURS.get((name, bits), {}))
    train(ours, range(4))
    back = exported(bnb, ours, name, bits)
    fresh = made(bnb, name, bits, **options)
    assert back.param_groups[0].keys() == fresh.param_groups[0].keys()
    for key, value in fresh.param_groups[0].items():
        assert key == "params" or back.param_groups[0][key] == value
    for p, q in zip(held(back), held(ours), strict=True):
        assert back.state[p]["step"] == 4
        for key, values in there(back, p, family).items():
            if f"{key}_q8" in ours.state[q] and back.state[p]["state1"].dtype == torch.uint8:
                scale = float(np.abs(values_of(ours.state[q], key)).max())
                np.testing.assert_allclose(values, values_of(ours.state[q], key), atol=scale / 50)
            else:
                assert alike(values, values_of(ours.state[q], key))
    train(back, range(4, 5))
    train(ours, range(4, 5))
    assert difference(back, ours) < (2e-6 if bits == 32 else 0.05)


@pytest.mark.parametrize(("name", "options", "family"), CASES)
def test_there_and_back_keeps_codes_and_scales(
    bnb: Any, name: str, options: Any, family: str
) -> None:
    source = made(bnb, name, 8, [torch.ones(32, 256).requires_grad_()], **options)
    ours = build_optimizer(f"{family}8bit", clones(held(source)))
    ours.load_state_dict(source.state_dict())
    back = exported(bnb, ours, name, 8)
    ((p,), (q,)) = held(source), held(back)
    kept = ["state1", "absmax1"] if states_of(family)[0].name in SAME_MAP else ["qmap1"]
    for key in kept:
        assert torch.equal(back.state[q][key], source.state[p][key])


def test_stacks_of_broken_blocks_are_written_in_32_bits(bnb: Any) -> None:
    """A GPU would read the scales of the slow average one place too early."""
    ours = build_optimizer("ademamix8bit", weights())
    train(ours, range(3))
    back = exported(bnb, ours, "AdEMAMix", 8)
    for shape, p in zip(SHAPES, held(back), strict=True):
        eight = math.prod(shape) % 256 == 0 and math.prod(shape) >= 4096
        assert back.state[p]["state1"].dtype == (torch.uint8 if eight else torch.float32)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("sgd", {"momentum": 0}, "momentum: 0 here, and bitsandbytes has no SGD without"),
        ("sgd", {"nesterov": True}, "nesterov: True has no counterpart"),
        ("sgd", {"dampening": 0.5}, "dampening: 0.5 has no counterpart"),
        ("rmsprop", {"momentum": 0.9}, "momentum: 0.9 has no counterpart"),
        ("adagrad", {"lr_decay": 0.1}, "lr_decay: 0.1 has no counterpart"),
        ("lion", {"maximize": True}, "maximize: True has no counterpart"),
        ("nadam", {}, "bitsandbytes has no nadam"),
    ],
)
def test_what_bitsandbytes_would_not_go_on_with_is_refused(
    name: str, options: Any, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        build_optimizer(name, weights(), **options).export_state_dict("bitsandbytes")
