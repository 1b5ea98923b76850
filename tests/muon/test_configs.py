"""What configs say of matrices: refused values, families from outside, the warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from optfactory import build_optimizer, families, resolve
from optfactory.errors import ConfigError
from optfactory.extend import MatrixConfig, OptimizerConfig, StateSpec, UpdateRule, register
from tests.muon.harness import built, give, iterated, matrices


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ns_steps": 0}, "ns_steps: "),
        ({"ns_steps": 100}, "ns_steps: "),
        ({"ns_steps": 6, "ns_coefficients": "you"}, "ns_coefficients: .*5 steps, not 6"),
        ({"ns_coefficients": "moun"}, "ns_coefficients: .*muon, you, polar_express"),
        ({"ns_coefficients": [[1.5, -0.5]]}, "ns_coefficients"),
        ({"ns_coefficients": [[1.5, -0.5, 0.0]] * 2}, "ns_coefficients: .*2 triples for 5"),
        ({"ns_coefficients": [3.4445, 4.775, 2.0315]}, "ns_coefficients: .*check their signs"),
        ({"ns_dtype": "float16"}, "ns_dtype"),
        ({"ns_memory": 0}, "ns_memory"),
        ({"adjust_lr": "orignal"}, "adjust_lr"),
        ({"split": 0}, "split"),
        ({"momentum": 1.0}, "momentum"),
        ({"skip_zeros": True}, "skip_zeros: .*whole matrices.*set skip_zeros: false"),
        ({"cautious": True}, "cautious: .*set cautious: false"),
        ({"nonfinite": "skip_element"}, "nonfinite: .*skip_step or propagate"),
        ({"compat": "bitsandbytes"}, "compat: .*bitsandbytes has no muon"),
        ({"betas": [0.9, 0.99]}, "betas"),
    ],
    ids=str,
)
def test_refused_in_configs_and_in_groups(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.{message}"):
        resolve("muon", **asked)
    group = {"params": matrices([(8, 8)]), **asked}
    with pytest.raises(ConfigError, match=rf"param_groups\[0\]\.{message}"):
        build_optimizer("muon", [group])
    rule = {"all": {"match": "*", **asked}}
    with pytest.raises(ConfigError, match=rf"param_groups\.all\.{message}"):
        resolve("muon", param_groups=rule)


def test_one_triple_may_stand_for_a_list() -> None:
    one = resolve("muon", ns_coefficients=[1.5, -0.5, 0])
    assert one == resolve("muon", ns_coefficients=[[1.5, -0.5, 0]])
    assert one.model_dump()["ns_coefficients"] == ((1.5, -0.5, 0.0),)
    assert resolve(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("shape", "asked"),
    [((7,), {}), ((), {}), ((2, 3, 4, 5), {}), ((8, 6), {"split": 3}), ((9, 5, 4), {"split": 3})],
    ids=str,
)
def test_a_group_of_no_matrices_is_refused(shape: tuple[int, ...], asked: dict[str, Any]) -> None:
    p = torch.zeros(shape, requires_grad=True)
    groups = [{"params": [("a.weight", p)], "optimizer": "muon", **asked}]
    with pytest.raises(ConfigError, match=r"params: 'muon' trains matrices.*a\.weight \("):
        build_optimizer("adamw", groups)
    frozen = [{"params": [("a.weight", p.detach())], "optimizer": "muon", **asked}]
    build_optimizer("adamw", frozen)


def test_tensors_without_names_are_told_of_once() -> None:
    params = [*matrices([(8, 8)]), torch.zeros(5, requires_grad=True)]
    with pytest.warns(UserWarning, match="the parameters have no names") as caught:
        optimizer = build_optimizer("muon8bit", params)
    assert len(caught) == 1
    assert [g["optimizer"] for g in optimizer.param_groups] == ["muon8bit", "adamw8bit"]
    assert optimizer.param_groups[1]["params"] == [params[1]]


def test_an_optimizer_for_matrices_without_any_says_so() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 9))
    with pytest.warns(UserWarning, match="no parameter is a hidden matrix, so that 'muon8bit' tr"):
        build_optimizer("muon8bit", model)
    rules = {"head": {"match": "1.weight", "optimizer": "muon8bit"}}
    build_optimizer("muon8bit", model, param_groups=rules)


# ---- optimizers from outside -------------------------------------------------------------------

PLAIN = UpdateRule("plain_muon", (), (), text="u = g;", transform="orthogonalize")


class PlainConfig(MatrixConfig):
    """Orthogonalized gradients, without momentum."""

    family: ClassVar[str] = "plain"

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
        return PLAIN

    @classmethod
    def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
        return {"decay": 1.0, "step_size": group["lr"]}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})


@pytest.mark.usefixtures("registry")
def test_a_family_from_outside_makes_directions_of_matrices(backend: str) -> None:
    register(PlainConfig)
    params = matrices([(48, 80), (80, 48)])
    starts = [p.detach().clone() for p in params]
    optimizer = built(params, "plain", lr=0.5, adjust_lr="original")
    give(params, 0)
    optimizer.step()
    for p, start in zip(params, starts, strict=True):
        assert p.grad is not None
        u = iterated(p.grad.double(), [(3.4445, -4.7750, 2.0315)] * 5)
        size = 0.5 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
        torch.testing.assert_close(
            p.detach().double(), start.double() - size * u, atol=1e-5, rtol=0
        )
    mixed = build_optimizer(
        "plain", torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    )
    assert [g["optimizer"] for g in mixed.param_groups] == ["plain", "adamw"]


@pytest.mark.usefixtures("registry")
def test_a_rule_and_its_schema_must_agree_on_matrices() -> None:
    class Wrong(OptimizerConfig):
        """Says nothing of matrices."""

        family: ClassVar[str] = "wrong"

        @classmethod
        def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
            return PLAIN

        @classmethod
        def scalars(cls, group: Mapping[str, Any], step: Any) -> dict[str, Any]:
            return {"decay": 1.0, "step_size": group["lr"]}

    class WithoutTransform(PlainConfig):
        """Has the fields, and no use for them."""

        family: ClassVar[str] = "useless"

        @classmethod
        def rule(cls, group: Mapping[str, Any]) -> UpdateRule:
            return UpdateRule(
                "kept", (StateSpec("kept", signed=True),), (), text="kept = g; u = g;"
            )

    for config in (Wrong, WithoutTransform):
        with pytest.raises((ConfigError, TypeError, ValueError), match="transform"):
            register(config)


@pytest.mark.parametrize(
    ("name", "asked", "others", "taken"),
    [
        ("muon", {"param_rounding": "kahan"}, {}, {"param_rounding": "kahan"}),
        ("muon", {"param_rounding": "kahan"}, {"param_rounding": "nearest"}, {}),
        ("muon8bit", {"param_rounding": "stochastic", "seed": 3}, {}, {"seed": 3}),
        ("muon8bit", {"seed": 3}, {}, {"seed": None}),  # adamw8bit rounds to nearest
        ("muon8bit", {"seed": 3}, {"name": "lion8bit"}, {"seed": 3}),
        ("muon8bit", {"seed": 3}, {"name": "lion8bit", "seed": 4}, {"seed": 4}),
        ("paged_muon", {"page_dir": "."}, {}, {"page_dir": "."}),
        ("paged_muon", {"page_dir": "."}, {"name": "adamw"}, {"page_dir": None}),
        ("muon", {"nonfinite": "skip_step"}, {}, {"nonfinite": "skip_step"}),
    ],
    ids=str,
)
def test_what_is_said_of_all_parameters_holds_for_others(
    name: str, asked: dict[str, Any], others: dict[str, Any], taken: dict[str, Any]
) -> None:
    """How parameters are stored, where pages are, and what skips a step; not what states are."""
    weight = torch.zeros(8, 8, dtype=torch.bfloat16, requires_grad=True)
    named = [("0.weight", weight), ("0.bias", torch.zeros(8, requires_grad=True))]
    groups = build_optimizer(
        name, named, others=others, percentile_clipping=90, **asked
    ).param_groups
    (group,) = [group for group in groups if group["params"][0] is not weight]
    assert {key: group[key] for key in taken} == taken
    assert group["percentile_clipping"] == 100
