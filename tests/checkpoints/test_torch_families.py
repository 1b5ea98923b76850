"""Checkpoints of torch.optim's other optimizers: read, gone on from, and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from optfactory.config.schema import family_class
from optfactory.errors import ConfigError, StateError
from tests.checkpoints.harness import array, assert_quantized, same, values_of, weights
from tests.families import states_of
from tests.torch_api.harness import clones, held, snapshot, through_file, train

pytestmark = pytest.mark.usefixtures("small_tensors")

# The class, how it is asked, and what our config must say so that it keeps the same states.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}, {}),
    ("SGD", {"momentum": 0.8, "dampening": 0.3, "maximize": True}, {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "foreach": True}, {}),
    ("SGD", {}, {"momentum": 0}),
    ("RMSprop", {"alpha": 0.9, "weight_decay": 0.1}, {}),
    ("RMSprop", {"momentum": 0.9}, {"momentum": 0.5}),
    ("RMSprop", {"momentum": 0.9, "centered": True}, {"momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}, {}),
    ("Adagrad", {"initial_accumulator_value": 0.5, "eps": 1e-8}, {}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.01}, {}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
    ("RAdam", {"weight_decay": 0.1, "betas": (0.8, 0.9)}, {}),
    ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}),
]
NAMES = sorted({name for name, _, _ in CASES})


def kind(name: str) -> Any:
    return getattr(torch.optim, name)


def trained(name: str, steps: int = 7, **options: Any) -> Any:
    optimizer = kind(name)(weights(), **{"lr": 0.01, **options})
    train(optimizer, range(steps))
    return optimizer


def assert_alike(one: Any, other: Any) -> None:
    for p, q in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=2e-6)


def test_every_family_with_a_class_in_torch_has_a_case() -> None:
    models = [family_class(get_optimizer_info(name).config_class) for name in list_optimizers()]
    peers = [model.torch_peer for model in models]
    # Muon, whose directions are of bfloat16 in torch, is in tests/muon.
    assert {peer.name for peer in peers if peer} == {*NAMES, "Adam", "AdamW", "Muon"}


@pytest.mark.parametrize("paged", ["", "paged_"])
@pytest.mark.parametrize(("name", "options", "config"), CASES)
def test_going_on_from_torch_is_going_on_in_torch(
    name: str, options: Any, config: Any, paged: str
) -> None:
    torchs = trained(name, **options)
    ours = build_optimizer(f"{paged}{name.lower()}", clones(held(torchs)), **config)
    ours.load_state_dict(through_file(torchs.state_dict()))
    (group,), (theirs,) = ours.param_groups, torchs.param_groups
    shared = theirs.keys() & type(ours.config).model_fields.keys() - {"capturable"}
    assert {key: group[key] for key in shared} == {key: theirs[key] for key in shared}
    assert not {"foreach", "fused", "differentiable"} & group.keys()
    train(torchs, range(7, 17))
    train(ours, range(7, 17))
    assert_alike(torchs, ours)


@pytest.mark.parametrize(("name", "options", "config"), CASES)
def test_an_export_is_what_torch_would_have_written(name: str, options: Any, config: Any) -> None:
    torchs = trained(name, **options)
    ours = build_optimizer(name.lower(), clones(held(torchs)), **config)
    ours.load_state_dict(torchs.state_dict())
    exported = through_file(ours.export_state_dict("torch"))
    wanted = torchs.state_dict()
    switches = {"foreach", "fused"}
    for one, other in zip(exported["param_groups"], wanted["param_groups"], strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if k not in switches} == {
            k: v for k, v in other.items() if k not in switches
        }
    for key, entries in wanted["state"].items():
        assert exported["state"][key].keys() == entries.keys()
        for field, value in entries.items():
            torch.testing.assert_close(exported["state"][key][field], value, rtol=1e-6, atol=1e-9)
    back = kind(name)(clones(held(ours)), lr=1.0)
    back.load_state_dict(exported)
    train(back, range(7, 17))
    train(torchs, range(7, 17))
    assert_alike(back, torchs)


@pytest.mark.parametrize("name", NAMES)
def test_32_bits_are_quantized_where_the_config_says_8(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    torchs = trained(name, **options)
    ours = build_optimizer(f"{name.lower()}8bit", clones(held(torchs)))
    ours.load_state_dict(through_file(torchs.state_dict()))
    eights = 0
    for p, q in zip(held(torchs), held(ours), strict=True):
        for state in states_of(name.lower()):
            wanted = array(torchs.state[p][state.name])
            if f"{state.name}_q8" in ours.state[q]:
                assert_quantized(ours.state[q], wanted, state.name)
                eights += 1
            else:
                assert same(array(ours.state[q][state.name]), wanted)
    assert eights >= 4
    back = kind(name)(clones(held(ours)), lr=1.0)
    back.load_state_dict(ours.export_state_dict("torch"))
    for p, q in zip(held(back), held(ours), strict=True):
        for state in states_of(name.lower()):
            assert same(array(back.state[p][state.name]), values_of(ours.state[q], state.name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_torch_rounded_on_loading_are_read(name: str, dtype: torch.dtype) -> None:
    options = {"lr": 0.01} | ({"momentum": 0.9} if name == "SGD" else {})
    first = kind(name)(weights(dtype=dtype), **options)
    train(first, range(5))
    torchs = kind(name)(clones(held(first)), **options)
    torchs.load_state_dict(first.state_dict())
    train(torchs, range(5, 8))
    ours = build_optimizer(name.lower(), clones(held(torchs)))
    ours.load_state_dict(through_file(torchs.state_dict()))
    for p, q in zip(held(torchs), held(ours), strict=True):
        for state in states_of(name.lower()):
            assert same(array(ours.state[q][state.name]), array(torchs.state[p][state.name]))


# ---- SGD has no steps ------------------------------------------------------------------------


def test_the_first_gradient_is_taken_whole_only_where_no_buffer_is() -> None:
    """Dampening leaves the first gradient out of it, so the step after a buffer is no first."""
    torchs = kind("SGD")(weights(), lr=0.01, momentum=0.9, dampening=0.5)
    untrained, *others = held(torchs)
    for p in others:
        p.grad = torch.ones_like(p)
    torchs.step()
    saved = torchs.state_dict()
    saved["state"][0] = {"momentum_buffer": None}  # as older releases wrote it
    ours = build_optimizer("sgd", clones(held(torchs)))
    ours.load_state_dict(saved)
    assert not ours.state.get(held(ours)[0])
    assert ours.state[held(ours)[1]]["step"] == 1
    untrained.grad = torch.ones_like(untrained)
    train(torchs, range(1, 4))
    train(ours, range(1, 4))
    assert_alike(torchs, ours)


def test_a_buffer_before_the_first_step_is_none_in_an_export() -> None:
    ours = build_optimizer("sgd", weights(), lr=0.01, dampening=0.5)
    ours.init_states()
    torchs = kind("SGD")(clones(held(ours)), lr=1.0)
    torchs.load_state_dict(ours.export_state_dict("torch"))
    assert all(entries["momentum_buffer"] is None for entries in torchs.state.values())
    train(torchs, range(3))
    train(ours, range(3))
    assert_alike(torchs, ours)


# ---- NAdam's product -------------------------------------------------------------------------


def test_a_product_that_does_not_follow_from_the_steps_is_refused() -> None:
    torchs = trained("NAdam", steps=3)
    torchs.param_groups[0]["betas"] = (0.5, 0.999)
    train(torchs, range(3, 4))
    ours = build_optimizer("nadam", weights())
    before = snapshot(ours)
    with pytest.raises(StateError, match=r"mu_product: is .* after 4 steps, and .* follows from"):
        ours.load_state_dict(torchs.state_dict())
    assert snapshot(ours) == before


@pytest.mark.parametrize("value", [None, "0.3", torch.zeros(2), torch.tensor(torch.nan)], ids=str)
def test_a_damaged_product_is_named(value: Any) -> None:
    saved = trained("NAdam", steps=3).state_dict()
    saved["state"][0]["mu_product"] = value
    if value is None:
        del saved["state"][0]["mu_product"]
    with pytest.raises(StateError, match="mu_product"):
        build_optimizer("nadam", weights()).load_state_dict(saved)


def test_the_product_after_many_steps_is_read() -> None:
    torchs = kind("NAdam")([torch.ones(3).requires_grad_()])
    train(torchs, range(600))
    ours = build_optimizer("nadam", clones(held(torchs)))
    ours.load_state_dict(torchs.state_dict())


# ---- families are not mixed up ---------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("loaded_by", ["nadam", "radam", "adam", "adamw8bit", "sgd", "rmsprop"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", *NAMES])
def test_the_state_of_another_algorithm_is_refused(name: str, loaded_by: str, steps: int) -> None:
    family = get_optimizer_info(loaded_by).family
    if family == name.lower() or {family, name.lower()} == {"adam", "adamw"}:
        pytest.skip("its own")
    torchs = trained(name, steps)
    ours = build_optimizer(loaded_by, weights())
    with pytest.raises(StateError, match=rf"the checkpoint is of family.*'{name.lower()}'"):
        ours.load_state_dict(torchs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("name", ["Adamax", "ASGD", "Rprop", "Adadelta"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("loaded_by", ["adam", "radam", "sgd"])
def test_an_algorithm_that_is_not_here_is_refused(name: str, steps: int, loaded_by: str) -> None:
    with pytest.raises(
        StateError, match=r"nor is it of bitsandbytes, torchao or torch\.optim\.\{Ada"
    ):
        build_optimizer(loaded_by, weights()).load_state_dict(trained(name, steps).state_dict())


@pytest.mark.parametrize(
    ("name", "options", "config", "word"),
    [
        ("SGD", {}, {}, r"momentum: the checkpoint has 0.0, the config 0.9"),
        ("SGD", {"momentum": 0.9}, {"momentum": 0}, "momentum: the checkpoint has 0.9, the conf"),
        ("RMSprop", {"momentum": 0.9}, {}, "momentum: the checkpoint has 0.9, the config 0.0"),
        ("RMSprop", {"centered": True}, {}, "centered: the checkpoint has True, the config False"),
        ("RMSprop", {}, {"centered": True}, "centered: the checkpoint has False, the config True"),
    ],
)
def test_other_states_are_refused_by_what_decides_them(
    name: str, options: Any, config: Any, word: str
) -> None:
    ours = build_optimizer(name.lower(), weights(), **config)
    for saved in (
        trained(name, **options).state_dict(),
        build_optimizer(name.lower(), weights(), **{"momentum": 0.0, **options}).state_dict(),
    ):
        with pytest.raises(StateError, match=word):
            ours.load_state_dict(saved)
        assert not ours.state


@pytest.mark.parametrize("name", ["lion", "adopt", "adabelief", "adan", "ademamix"])
def test_torch_has_no_such_optimizer(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer: torch.optim has no {name}"):
        build_optimizer(name, weights()).export_state_dict("torch")
