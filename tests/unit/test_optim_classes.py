"""The classes with bitsandbytes' arguments: same order, every argument with effect or refused."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch

from optfactory import Optimizer2State, optim
from optfactory.errors import ConfigError

CLASSES = {name: getattr(optim, name) for name in optim.__all__}
WIDTHS = {name: 8 if name.endswith("8bit") else 32 for name in CLASSES}
THEIRS = {
    name: item
    for name, item in vars(bitsandbytes.optim).items()
    if isinstance(item, type) and not name.startswith("_")
}

# The classes of bitsandbytes that are missing here.
MISSING = {"GlobalOptimManager"}

# Arguments that only its older API had, and what a name states there.
OLDER = {"percentile_clipping", "block_wise", "is_paged", "options"}

# Defaults that differ: None leaves an argument to the name of the class, or to the config.
LEFT_OPEN = {"optim_bits", "is_paged", "max_unorm"}
# And the decay of Adam, which must be said to be decoupled.
OTHER_DEFAULTS = dict.fromkeys(["Adam", "AdamW"], LEFT_OPEN | {"weight_decay"})

# What a class wants beside the parameters.
WANTED = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "LARS": {"lr": 0.01, "momentum": 0.9},
    "PytorchLARS": {"momentum": 0.9},
}


def parameter() -> torch.Tensor:
    return torch.linspace(-1, 1, 64 * 128).view(64, 128).clone().requires_grad_()


def family_of(name: str) -> str:
    """A class' name without what it says of width and paging."""
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def build(name: str, **given: Any) -> Optimizer2State:
    """A class' optimizer of one parameter."""
    optimizer: Optimizer2State = CLASSES[name](
        [parameter()], **WANTED.get(family_of(name), {}) | given
    )
    return optimizer


def stepped(optimizer: Optimizer2State) -> torch.Tensor:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.linspace(0.1, -0.3, p.numel()).view_as(p)
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_its_name(name: str) -> None:
    optimizer = build(name, lr=0.01)
    assert isinstance(optimizer, Optimizer2State)
    paged, bits = optimizer.config.is_paged, optimizer.config.optim_bits
    assert (paged, bits) == (name.startswith("Paged"), WIDTHS[name])
    plain = optimizer.config.name.replace("_", "")
    assert plain == {"PytorchLARS": "lars32bit"}.get(name, name.lower())
    stepped(optimizer)
    (state,) = optimizer.state.values()
    assert any(key.endswith("_q8") for key in state) == (bits == 8)


def test_every_class_of_bitsandbytes_is_here_or_known_to_be_missing() -> None:
    assert set(THEIRS) - set(CLASSES) == MISSING
    assert set(CLASSES) <= set(THEIRS)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_keep_bitsandbytes_order_and_defaults(name: str) -> None:
    """What its newer releases still have stands in the same order; they dropped two arguments."""
    theirs = inspect.signature(THEIRS[name].__init__).parameters
    ours = inspect.signature(CLASSES[name].__init__).parameters
    common = [argument for argument in ours if argument in theirs]
    assert common == [argument for argument in theirs if argument in ours]
    assert set(theirs) == set(common)
    assert set(ours) - set(theirs) <= OLDER
    open_ = OTHER_DEFAULTS.get(family_of(name), LEFT_OPEN)
    for key in common:
        if key in open_:
            assert ours[key].default is None or ours[key].default == theirs[key].default, key
        else:
            assert ours[key].default == theirs[key].default, key


@pytest.mark.parametrize(
    "name", [name for name in CLASSES if not ("AdEMAMix" in name or "LARS" in name)]
)
def test_the_older_arguments_stand_behind_min_8bit_size(name: str) -> None:
    ours = list(inspect.signature(CLASSES[name].__init__).parameters)
    at = ours.index("min_8bit_size")
    assert ours[at + 1 : at + 3] == ["percentile_clipping", "block_wise"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Foo", "no optimizer of that name; the classes are .*Adam.*list_optimizers.*register"),
        ("LARC8bit", "no optimizer of that name; the classes are"),
        ("PytorchLARC", "no optimizer of that name; the classes are"),
        ("GlobalOptimManager", "a rule of param_groups"),
        ("NAdam8bit", r"build_optimizer\('nadam8bit', params\)"),
        ("PagedRAdam", r"build_optimizer\('paged_radam', params\)"),
        ("_private", "^module 'optfactory.optim' has no attribute '_private'$"),
    ],
)
def test_a_class_that_does_not_exist_is_told_as_such(name: str, expected: str) -> None:
    with pytest.raises(AttributeError, match=expected) as caught:
        getattr(optim, name)
    assert "Did you mean" not in "".join(traceback.format_exception(caught.value))
    assert not hasattr(optim, name)


@pytest.mark.parametrize(
    ("name", "given"), [("SGD8bit", {}), ("SGD", {"optim_bits": 8}), ("SGD8bit", {"momentum": 0})]
)
def test_sgd_without_momentum_has_nothing_to_keep_at_8_bits(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"without momentum there is no state.*momentum above 0"):
        CLASSES[name]([parameter()], 0.1, **given)
    assert CLASSES["SGD"]([parameter()], 0.1).config.momentum == 0


@pytest.mark.parametrize("name", [name for name, bits in WIDTHS.items() if bits == 8])
def test_8bit_classes_refuse_amsgrad_and_other_widths(name: str) -> None:
    with pytest.raises(ValueError, match="amsgrad"):
        build(name, amsgrad=True)
    with pytest.raises(ValueError, match="optim_bits"):
        build(name, optim_bits=16)


@pytest.mark.parametrize("name", CLASSES)
def test_what_contradicts_the_name_of_a_class_is_refused(name: str) -> None:
    if name.startswith("Paged"):
        with pytest.raises(ConfigError, match="is_paged: False contradicts"):
            build(name, is_paged=False)
    assert build(name, is_paged=True).config.is_paged
    if name.endswith("bit"):
        with pytest.raises(ConfigError, match=f"optim_bits: {40 - WIDTHS[name]} contradicts"):
            build(name, optim_bits=40 - WIDTHS[name])
    assert build(name, optim_bits=WIDTHS[name]).config.optim_bits == WIDTHS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_the_defaults_in_a_signature_state_nothing(name: str) -> None:
    """Command lines write them out and give them back."""
    parameters = inspect.signature(CLASSES[name].__init__).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    given |= WANTED.get(family_of(name), {})
    assert build(name, **given).config == build(name).config


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Adam32bit", {"block_size": 64}),
        ("LAMB32bit", {"block_wise": False}),
        ("LAMB", {"block_wise": False}),
        ("LAMB", {"trust_ratio": "lamb", "max_unorm": 1.0}),
        ("LARS8bit", {"lr": 0.1, "momentum": 0.9, "trust_ratio": "lars", "max_unorm": 0.02}),
        ("LARS", {"lr": 0.1, "momentum": 0.9, "trust_coefficient": 0.02}),
        ("PytorchLARS", {"nesterov": True}),
        ("AdamW", {"block_wise": False}),
        ("Lion", {"block_wise": False}),
        ("SGD", {"lr": 0.1, "nesterov": True}),
        ("SGD", {"lr": 0.1, "dampening": 0.5}),
        ("RMSprop32bit", {"signed_map": "symmetric"}),
        ("AdEMAMix", {"alpha": 0.0, "t_alpha": 10}),
    ],
)
def test_an_argument_without_effect_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=list(arguments)[-1]):
        CLASSES[name]([parameter()], **arguments)


# ---- weight decay of Adam --------------------------------------------------------------------

ADAMS = [name for name in CLASSES if family_of(name) == "Adam"]


@pytest.mark.parametrize("name", ADAMS)
def test_weight_decay_of_adam_must_say_which_one_is_meant(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CLASSES[name]([parameter()], weight_decay=0.05)
    message = str(caught.value)
    assert "optimizer.weight_decay: 0.05 means decoupled decay in bitsandbytes' Adam" in message
    assert "adam_w_mode=True" in message
    assert "AdamW class" in message
    assert "adam_w_mode=False" in message
    for mode in (True, False):
        optimizer = CLASSES[name]([parameter()], weight_decay=0.05, adam_w_mode=mode)
        assert optimizer.param_groups[0]["adam_w_mode"] is mode
    assert CLASSES[name]([parameter()], weight_decay=0.0).config.weight_decay == 0


def test_what_the_refusal_says_of_both_libraries_is_so() -> None:
    def run(kind: Any, **given: Any) -> torch.Tensor:
        p = parameter()
        optimizer = kind([p], lr=0.01, weight_decay=0.5, **given)
        for scale in (1.0, 3.0):
            p.grad = scale * torch.linspace(0.1, -0.3, p.numel()).view_as(p)
            optimizer.step()
        return p.detach()

    theirs = run(bitsandbytes.optim.Adam32bit)
    torch.testing.assert_close(run(optim.Adam32bit, adam_w_mode=True), theirs, rtol=1e-5, atol=1e-6)
    torchs = run(torch.optim.Adam)
    torch.testing.assert_close(run(optim.Adam, adam_w_mode=False), torchs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(theirs, torchs, atol=1e-3)


def test_weight_decay_of_a_group_must_say_so_too() -> None:
    groups = [{"params": [parameter()], "weight_decay": 0.05}]
    with pytest.raises(ConfigError, match=r"param_groups\[0\]\.weight_decay: 0\.05 means"):
        optim.Adam8bit(groups)
    assert optim.Adam8bit(groups, adam_w_mode=True).param_groups[0]["weight_decay"] == 0.05
    groups[0]["adam_w_mode"] = False
    optimizer = optim.Adam8bit(groups)
    assert optimizer.param_groups[0]["adam_w_mode"] is False
    rule = {"head": {"match": "head", "weight_decay": 0.05}}
    with pytest.raises(ConfigError, match=r"param_groups\[head\]\.weight_decay: 0\.05 means"):
        optim.Adam8bit([("head", parameter())], param_groups=rule)
    with pytest.raises(ConfigError, match=r"param_groups\[1\]\.weight_decay"):
        optimizer.add_param_group({"params": [parameter()], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1


def test_an_unclear_decay_is_told_beside_other_problems() -> None:
    with pytest.raises(ConfigError, match="3 problem") as caught:
        optim.PagedAdam8bit([parameter()], lr=-1, weight_decay=0.05, is_paged=False)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("decay", [-1, "much", float("nan")])
def test_a_decay_that_is_none_is_refused_as_such(decay: Any) -> None:
    for groups in ([parameter()], [{"params": [parameter()], "weight_decay": decay}]):
        given = {} if isinstance(groups[0], dict) else {"weight_decay": decay}
        with pytest.raises(ConfigError, match="weight_decay: Input should be"):
            optim.Adam(groups, **given)


def test_defaults_of_the_families() -> None:
    assert optim.Adam([parameter()]).config.weight_decay == 0
    assert optim.AdamW([parameter()]).config.weight_decay == 0.01
    lamb = optim.LAMB([parameter()]).config
    assert (lamb.trust_ratio, lamb.max_unorm, lamb.eps) == ("clip", None, 1e-8)
    assert lamb.weight_decay == 0
    assert optim.LAMB8bit([parameter()]).config.block_wise is False
    assert optim.LAMB([parameter()], optim_bits=8).config.block_wise is False
    assert optim.LAMB([parameter()], trust_ratio="lamb").config.max_unorm is None
    lars = optim.LARS8bit([parameter()], 0.1, 0.9).config
    assert (lars.trust_ratio, lars.max_unorm, lars.block_wise) == ("clip", None, False)
    assert optim.PytorchLARS([parameter()]).config.momentum == 0


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Adam", {"percentile_clipping": 5}),
        ("Adam8bit", {"block_wise": False}),
        ("Adam8bit", {"min_8bit_size": 10**6}),
        ("LAMB8bit", {"block_wise": True}),
        ("LAMB8bit", {"max_unorm": 0.01}),
        ("LAMB", {"max_unorm": 0.01}),
        ("LAMB", {"bias_correction": False}),
        ("LAMB", {"adam_w_mode": False, "weight_decay": 0.1}),
        ("LAMB32bit", {"amsgrad": True}),
        ("AdamW32bit", {"amsgrad": True}),
        ("Lion", {"betas": (0.5, 0.6)}),
        ("RMSprop8bit", {"block_wise": False}),
        ("PagedLion8bit", {"percentile_clipping": 5}),
        ("SGD", {"dampening": 0.5}),
        ("LARS8bit", {"max_unorm": 0.001}),
        ("LARS8bit", {"block_wise": True}),
        ("LARS", {"nesterov": True}),
        ("LARS32bit", {"trust_ratio": "lars"}),
        ("PytorchLARS", {"dampening": 0.5}),
        ("PytorchLARS", {"max_unorm": 0.001}),
        ("SGD", {"nesterov": True}),
        ("SGD8bit", {"nesterov": True}),
        ("SGD32bit", {"weight_decay": 0.1}),
        ("RMSprop", {"alpha": 0.5}),
        ("RMSprop", {"centered": True}),
        ("RMSprop8bit", {"momentum": 0.9}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("Adagrad8bit", {"initial_accumulator_value": 0.1}),
        ("AdEMAMix", {"alpha": 0.0}),
        ("AdEMAMix", {"t_alpha": 10}),
        ("AdEMAMix8bit", {"t_beta3": 10}),
        ("PagedAdEMAMix32bit", {"betas": (0.9, 0.99, 0.999)}),
    ],
)
def test_an_argument_has_an_effect(name: str, arguments: dict[str, Any]) -> None:
    def run(**given: Any) -> torch.Tensor:
        optimizer = build(name, **{"lr": 0.01, **given})
        p = optimizer.param_groups[0]["params"][0]
        for scale in (1.0, 3.0, 0.2):
            p.grad = scale * torch.linspace(0.1, -0.3, p.numel()).view_as(p).roll(int(7 * scale))
            optimizer.step()
        return p.detach()

    plain = {"weight_decay": 0.1} if "adam_w_mode" in arguments else {}
    assert not torch.equal(run(**plain), run(**arguments))


def test_args_are_read_key_by_key() -> None:
    args = SimpleNamespace(optim_bits=8, percentile_clipping=50, min_8bit_size=1, skip_zeros=False)
    config = optim.Adam([parameter()], args=args).config
    assert (config.optim_bits, config.percentile_clipping, config.min_8bit_size) == (8, 50, 1)
    with pytest.raises(ConfigError, match="typo"):
        optim.Adam([parameter()], args=SimpleNamespace(typo=1))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="foreach"):
        optim.Adam([parameter()], foreach=True)


@pytest.mark.parametrize("name", CLASSES)
def test_pickling_and_copying_keep_the_class_and_the_trajectory(name: str) -> None:
    optimizer = build(name, lr=0.01)
    stepped(optimizer)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    expected = stepped(optimizer)
    for other in copies:
        assert type(other) is CLASSES[name]
        assert torch.equal(stepped(other), expected)


def test_groups_as_frameworks_pass_them() -> None:
    groups = [{"params": [parameter()], "weight_decay": 0.0}, {"params": [parameter()]}]
    optimizer = optim.AdamW8bit(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_a_tensor_lr_stays_a_tensor() -> None:
    lr = torch.tensor(0.01)
    optimizer = optim.Adam([parameter()], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
