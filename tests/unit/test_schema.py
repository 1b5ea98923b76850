"""Every configuration is either runnable or refused with all that is wrong and what is allowed."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError

from optfactory import build_optimizer, get_optimizer_info, resolve
from optfactory.config.schema import OptimizerConfig
from optfactory.config.widths import CODE_FIELDS, MAP_FIELDS
from optfactory.errors import ConfigError, UnknownOptimizerError
from tests.families import acts_on, beside, few_values, known_to
from tests.reference import reference_of
from tests.reference.facts import Facts
from tests.unit.harness import BLOCK_SIZES, NAMES, NUMBERS, refusal


def outcome(cfg: Any, **overrides: Any) -> OptimizerConfig | ConfigError:
    """The resolved config or the error; any other exception is a failure."""
    try:
        return resolve(cfg, **overrides)
    except ConfigError as error:
        return error


def fields_of(name: str) -> list[str]:
    return list(get_optimizer_info(name).defaults)


# ---- hypothesis -----------------------------------------------------------------------------

finite = st.floats(0, 1e30, allow_nan=False)
as_written = st.sampled_from([float, str, lambda x: f" {x!r} ", torch.tensor])
numbers = st.builds(lambda x, write: write(x), finite, as_written)
beta = st.floats(0, 1, exclude_max=True)
betas = st.builds(
    lambda pair, write: write(pair),
    st.tuples(beta, beta),
    st.sampled_from([tuple, list, str, lambda pair: [str(item) for item in pair]]),
)
ACCEPTED: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(NUMBERS, numbers),
    "betas": betas,
    "bias_correction": st.booleans(),
    "adam_w_mode": st.booleans(),
    "optim_bits": st.sampled_from([4, 8, 16, 32]),
    "state_format": st.sampled_from(["dynamic", "fp8"]),
    "state_bits": st.none(),  # tests/options/test_state_bits.py
    "amsgrad": st.booleans(),
    "is_paged": st.booleans(),
    "page_dir": st.none(),
    "page_memory": st.sampled_from(["auto", "managed", "pinned"]),
    "capturable": st.booleans(),
    "maximize": st.booleans(),
    "block_wise": st.booleans(),
    "signed_map": st.sampled_from(["dynamic", "symmetric"]),
    "second_moment_floor": st.booleans(),
    "state_rounding": st.sampled_from(["nearest", "stochastic"]),
    "percentile_clipping": st.integers(0, 100),
    "skip_zeros": st.booleans(),
    "nonfinite": st.sampled_from(["propagate", "skip_element", "skip_step"]),
    "param_rounding": st.sampled_from(["nearest", "stochastic", "kahan"]),
    "master_weights": st.sampled_from([None, "none", "split", "fp32"]),
    "seed": st.none() | st.integers(0, 2**24 - 1),
    "cautious": st.booleans(),
    "cautious_weight_decay": st.booleans(),
    "annotations": st.lists(st.sampled_from(["layer_id", "swa_lr"])).map(tuple),
    "compat": st.just("none"),  # tests/options/test_compat.py
    "trust_ratio_bounds": st.none() | st.just((0.0, 10.0)),
    "always_adapt": st.booleans(),
    "min_8bit_size": st.just(0) | st.integers(0, 10**6),
    "block_size": st.sampled_from(BLOCK_SIZES),
    "max_unorm": st.none() | finite,
    "ns_memory": st.none() | st.integers(1, 10**6),
}
# Beside these settings there is nothing to be cautious of.
IDLE = {
    "cautious": {"momentum": 0.0, "trust_ratio": "lars"},
    "cautious_weight_decay": {
        "adam_w_mode": False, "decoupled_weight_decay": False, "trust_ratio": "lamb",
    },
}  # fmt: skip
garbage = (
    st.floats(max_value=-1e-9)
    | st.sampled_from([math.nan, math.inf, -math.inf, "nan", "-inf", 7, -3, "", "a", "1e", "[1"])
    | st.sampled_from([True, False, None, {}, {"a": 1}, [], [0.9], (0.9, 0.99, 0.999), b"1", 1j])
)
names = st.sampled_from(NAMES)


def facts_of(name: str) -> Facts:
    return reference_of(get_optimizer_info(name).family).facts


def accepted(name: str, key: str) -> st.SearchStrategy[Any]:
    """What a field takes; of fields that not all families have, and of three betas, some of it."""
    if key == "trust_ratio":
        return st.sampled_from(few_values(name, key))
    flips = facts_of(name).flips.get(key, ())
    if flips and (key not in ACCEPTED or key == "betas"):
        return st.sampled_from([flip.value for flip in flips])
    return ACCEPTED[key]


def configs(
    values: Callable[[str, str], st.SearchStrategy[Any]],
) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with a name and any of its fields."""
    return names.flatmap(
        lambda name: st.fixed_dictionaries(
            {"name": st.just(name)}, optional={key: values(name, key) for key in fields_of(name)}
        )
    )


def step_of(config: Any) -> None:
    """Build the optimizer and take one step on an 8-bit sized tensor and a small one."""
    params = [torch.ones(2, 100).requires_grad_(), torch.ones(3).requires_grad_()]
    optimizer = build_optimizer(config, params)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == 1 for p in params)


def without_contradictions(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what contradicts the name or another field; each is tested on its own below."""
    name = values["name"]
    if get_optimizer_info(name).states:
        values.pop("optim_bits", None)
        values.pop("state_format", None)
    if values.get("optim_bits") == 4 and get_optimizer_info(name).base.too_coarse:
        values.pop("optim_bits")
    if name.startswith("paged_"):
        values.pop("is_paged", None)
    bits = get_optimizer_info(name).optim_bits or values.get("optim_bits", 32)
    if bits != 32:
        values.pop("amsgrad", None)
    if values.get("trust_ratio") != "clip":
        values.pop("max_unorm", None)
    elif "trust_coefficient" in fields_of(name):
        values.pop("eps", None)
        values.pop("trust_coefficient", None)
    fp8 = name.endswith("fp8") or (bits == 8 and values.get("state_format") == "fp8")
    for key in CODE_FIELDS if bits > 8 else MAP_FIELDS if bits == 4 or fp8 else ():
        values.pop(key, None)
    if bits != 8:
        values.pop("state_format", None)
    for key in ("signed_map", "second_moment_floor"):
        if not acts_on(name, key):
            values.pop(key, None)
    stated = get_optimizer_info(name).defaults | values
    for key, idle in IDLE.items():
        if beside(name, key) is None or any(
            stated.get(other) == value for other, value in idle.items()
        ):
            values.pop(key, None)
    if not values.get("block_wise", True):
        values.pop("block_size", None)
    if not values.get("neuron_norm"):
        values.pop("neuron_beta", None)
    if {values.get("param_rounding"), values.get("state_rounding")}.isdisjoint({"stochastic"}):
        values.pop("seed", None)
    if values.get("param_rounding", "nearest") != "nearest":
        values.pop("master_weights", None)
    if values.get("is_paged") or name.startswith("paged_"):
        values.pop("capturable", None)
    else:
        values.pop("page_memory", None)
    return without_refused(values)


def without_refused(values: dict[str, Any]) -> dict[str, Any]:
    """Drop what a family's facts say is refused beside its other values."""
    defaults = get_optimizer_info(values["name"]).defaults
    for key, flips in facts_of(values["name"]).refused.items():
        stated = {**defaults, **values}
        for flip in flips:
            if stated[key] == flip.value and flip.base.items() <= stated.items():
                values.pop(key, None)
    return values


def for_cpus(config: Any) -> Any:
    """The config without what is for GPUs or 16 bits alone, which these parameters refuse."""
    others = {"page_memory": "auto", "capturable": False, "param_rounding": "nearest", "seed": 0}
    return config.model_copy(update={**others, "master_weights": None})


@given(configs(accepted).map(without_contradictions))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_what_is_allowed_is_accepted_runs_and_survives_a_round_trip(values: dict[str, Any]) -> None:
    config = resolve(values)
    dumped = config.model_dump(mode="json")
    assert json.loads(json.dumps(dumped)) == dumped
    assert resolve(dumped) == config
    assert type(resolve(dumped)) is type(config)
    assert resolve(config) == config
    for key in (key for key in NUMBERS if key in fields_of(values["name"])):
        assert type(getattr(config, key)) is float
        if key in values:
            assert getattr(config, key) == pytest.approx(float(values[key]), rel=1e-6, abs=1e-38)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFACTORY_BACKEND", "reference")
        step_of(for_cpus(config))


@given(configs(lambda name, key: accepted(name, key) | garbage))
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_any_config_is_either_runnable_or_refused_with_path_and_value(
    values: dict[str, Any],
) -> None:
    assume(not isinstance(values.get("page_dir"), str))  # tests/torch_api/test_paging.py
    result = outcome(values)
    if isinstance(result, ConfigError):
        assert result.problems
        for problem in result.problems:
            assert problem in str(result)
            field = re.match(r"optimizer\.(\w+)(\.\w+)?: ", problem)
            assert field, problem
            assert "got " in problem or "contradicts the name" in problem, problem
            assert field[1] in values
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPTFACTORY_BACKEND", "reference")
        step_of(for_cpus(result))


@given(name=names, key=st.sampled_from(sorted(ACCEPTED)), value=garbage)
@settings(deadline=None, max_examples=150)
def test_a_refused_value_is_always_a_config_error(name: str, key: str, value: Any) -> None:
    result = outcome(name, **{key: value})
    if isinstance(result, ConfigError):
        assert isinstance(result, ValueError)
        assert f"optimizer.{key}" in str(result)
    else:
        assert resolve(result.model_dump(mode="json")) == result


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_any_text_as_a_name_is_known_or_refused(text: str) -> None:
    result = outcome(text)
    if isinstance(result, ConfigError):
        assert isinstance(result, UnknownOptimizerError)
        assert f"'{text}'" in str(result)
    else:
        assert result.name in NAMES


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=5)))
@settings(deadline=None, max_examples=60)
def test_any_mapping_is_accepted_or_refused_by_a_config_error(values: dict[str, Any]) -> None:
    known = (*ACCEPTED, "name", "_target_", "_partial_", "_convert_", "_recursive_", "_made_for_")
    unknown = [key for key in values if key not in known]
    assume(unknown and "_target_" not in values)  # another target is refused first
    error = refusal({**values, "name": "adamw"})
    assert all(f"optimizer.{key}: unknown key" in str(error) for key in unknown)


# ---- what may stand in a config -------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "1e-8", 1e-8),
        ("lr", "3E-4", 3e-4),
        ("eps", "1e-8", 1e-8),
        ("weight_decay", "0", 0.0),
        ("betas", "(0.9, 0.999)", (0.9, 0.999)),
        ("betas", "[0.8,0.95]", (0.8, 0.95)),
        ("betas", ["0.9", "9e-1"], (0.9, 0.9)),
        ("min_8bit_size", "1000", 1000),
        ("optim_bits", "8", 8),
        ("block_size", "128", 128),
    ],
)
def test_numbers_written_as_text_are_read(key: str, text: Any, value: Any) -> None:
    found = getattr(resolve("adamw8bit", **{key: text}), key)
    assert found == value
    assert type(found) is type(value)


def test_yaml_that_writes_numbers_as_text_is_read() -> None:
    values = yaml.safe_load("{name: adam, lr: 1e-4, eps: 1e-8, betas: [9e-1, 0.95]}")
    assert isinstance(values["lr"], str)  # PyYAML reads YAML 1.1, in which 1e-4 is no number
    config = resolve(values)
    assert (config.lr, config.eps, config.betas) == (1e-4, 1e-8, (0.9, 0.95))


@pytest.mark.parametrize(
    "value",
    [torch.tensor(0.25), torch.tensor(0.25).requires_grad_(), np.float64(0.25), np.array(0.25)],
    ids=["tensor", "trainable", "scalar", "array"],
)
def test_zero_dimensional_arrays_are_numbers(value: Any) -> None:
    config = resolve("adam", lr=value)
    assert config.lr == 0.25
    assert type(config.lr) is float


def test_omegaconf_nodes_become_plain_values() -> None:
    node = OmegaConf.create({"name": "adam", "betas": [0.8, 0.9], "lr": "1e-2"})
    config = resolve(node)
    assert config.betas == (0.8, 0.9)
    assert type(config.betas) is tuple
    assert config.lr == 0.01
    assert "omegaconf" not in pickle.dumps(config).decode("latin-1")


@pytest.mark.parametrize("where", ["mapping", "override"])
def test_a_list_node_inside_of_plain_values_is_read(where: str) -> None:
    pair = OmegaConf.create([0.8, 0.9])
    cfg = {"name": "adam", "betas": pair} if where == "mapping" else "adam"
    config = resolve(cfg, **({} if where == "mapping" else {"betas": pair}))
    assert config.betas == (0.8, 0.9)
    assert type(config.betas) is tuple


@pytest.mark.parametrize("key", ["optimizer", "model.optimizer", "a.b.c.opt"])
def test_problems_are_reported_at_the_nodes_own_place(key: str) -> None:
    root = OmegaConf.create()
    OmegaConf.update(root, key, {"name": "adam8bit", "lr": -1, "lrr": 2}, force_add=True)
    error = refusal(OmegaConf.select(root, key))
    assert error.problems[0].startswith(f"{key}.lr: ")
    assert error.problems[1].startswith(f"{key}.lrr: ")


def test_problems_of_a_node_in_a_list_are_reported_by_index() -> None:
    root = OmegaConf.create({"optimizers": [{"name": "adam"}, {"name": "adam", "lr": -1}]})
    assert "optimizers[1].lr: " in str(refusal(root.optimizers[1]))


def test_a_missing_value_is_named() -> None:
    root = OmegaConf.create({"model": {"optimizer": {"name": "adam", "lr": "???"}}})
    message = str(refusal(root.model.optimizer))
    assert "model.optimizer" in message
    assert "lr" in message
    assert "issing" in message


def test_a_missing_value_may_be_given_as_an_override() -> None:
    root = OmegaConf.create({"optimizer": {"name": "adam", "lr": "???"}})
    assert resolve(root.optimizer, lr=0.5).lr == 0.5


def test_interpolations_are_resolved() -> None:
    root = OmegaConf.create({"base": 0.25, "optimizer": {"name": "adam", "lr": "${base}"}})
    assert resolve(root.optimizer).lr == 0.25
    del root["base"]
    message = str(refusal(root.optimizer))
    assert "optimizer.lr" in message
    assert "base" in message


@pytest.mark.parametrize("node", ["list", "none", "missing"])
def test_a_node_that_is_no_mapping_is_refused(node: str) -> None:
    root = OmegaConf.create({"list": [1, 2], "none": None, "missing": "???"})
    value = root._get_node(node)
    error = refusal(value)
    assert "mapping" in str(error) or "resolved" in str(error)


@pytest.mark.parametrize("cfg", [3, 1.5, b"adam", ["adam"], object()])
def test_other_things_are_no_config(cfg: Any) -> None:
    assert type(cfg).__name__ in str(refusal(cfg))


@pytest.mark.parametrize(("cfg", "what"), [({}, "name"), ({"name": 3}, "3"), ({"name": None}, "N")])
def test_a_config_needs_a_name(cfg: dict[str, Any], what: str) -> None:
    message = str(refusal(cfg))
    assert "name" in message
    assert what in message


def test_keys_that_are_no_text_are_refused() -> None:
    assert "optimizer.3: " in str(refusal({"name": "adam", 3: 4}))


@pytest.mark.parametrize("as_node", [False, True])
def test_instantiates_own_keys_are_left_out(as_node: bool) -> None:
    values = {
        "_target_": "optfactory.build_optimizer",
        "_partial_": True,
        "_convert_": "all",
        "_recursive_": False,
        "name": "lamb8bit",
        "lr": 0.5,
    }
    config = resolve(OmegaConf.create(values) if as_node else values)
    assert config == resolve("lamb8bit", lr=0.5)
    assert not any(key.startswith("_") for key in config.model_dump())


def test_other_underscored_keys_are_unknown() -> None:
    assert "optimizer._other_: unknown key" in str(refusal({"name": "adam", "_other_": 1}))


def test_overrides_win_and_the_config_stays_as_it_was() -> None:
    values = {"name": "adam", "lr": 0.1, "betas": [0.8, 0.9]}
    before = copy.deepcopy(values)
    assert resolve(values, lr=0.2).lr == 0.2
    assert values == before
    config = resolve(values)
    assert resolve(config, lr=0.2).lr == 0.2
    assert config.lr == 0.1


# ---- configs as objects ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_configs_pickle_copy_and_compare(name: str) -> None:
    config = resolve(name, lr="3e-4", **known_to(name, {"betas": [0.8, 0.99]}))
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), resolve(config)):
        assert other == config
        assert type(other) is type(config)
        assert type(getattr(other, "betas", ())) is tuple
    assert config != resolve(name)
    assert hash(config) == hash(resolve(config))


def test_pickled_configs_are_read_by_another_process(tmp_path: Path) -> None:
    file = tmp_path / "configs"
    file.write_bytes(pickle.dumps([resolve(item, lr=0.5) for item in NAMES]))
    code = (
        "import pickle, sys; configs = pickle.load(open(sys.argv[1], 'rb')); "
        "print(*(f'{c.name}={c.lr}' for c in configs)); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(file)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert result.stdout.split() == [f"{item}=0.5" for item in NAMES], result.stderr


def test_configs_are_frozen() -> None:
    config = resolve("adam")
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_described_and_plain(name: str) -> None:
    config = resolve(name)
    for key, field in type(config).model_fields.items():
        assert field.description, key
        whole = key in ("param_groups", "others")
        plain = (dict,) if whole else (bool, int, float, str, tuple, type(None))
        assert type(getattr(config, key)) in plain, key
    assert config.name == name


def test_a_resolved_config_takes_another_names_defaults_but_keeps_what_was_set() -> None:
    config = resolve(resolve("adam8bit", lr=0.5), name="lamb8bit")
    assert config == resolve("lamb8bit", lr=0.5)
    assert config.adam_w_mode is True
