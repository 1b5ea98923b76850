"""What is accepted as parameters, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optfactory import Optimizer2State, build_optimizer
from optfactory.errors import ConfigError
from tests.unit.harness import give_gradients, refused, trainable, trained


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.LayerNorm(64), nn.Linear(64, 3))


# ---- accepted forms -------------------------------------------------------------------------

FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: m,
    "generator": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "tuple": lambda m: tuple(m.parameters()),
    "named": lambda m: m.named_parameters(),
    "named list": lambda m: list(m.named_parameters()),
    "parameter list": lambda m: nn.ParameterList(m.parameters()),
    "group": lambda m: [{"params": list(m.parameters())}],
    "group of a generator": lambda m: [{"params": m.parameters()}],
    "group of a module": lambda m: [{"params": m}],
    "groups of modules": lambda m: ({"params": layer} for layer in m),
    "named group": lambda m: [{"params": m.named_parameters()}],
    "groups of one tensor": lambda m: [{"params": p} for p in m.parameters()],
    "mixed sizes": lambda m: [{"params": m[0].parameters()}, {"params": [*m[1:].parameters()]}],
    "with an empty group": lambda m: [{"params": []}, {"params": m.parameters()}],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
def test_every_form_trains_the_same_parameters(
    form: Callable[[nn.Module], Any], name: str, backend: str
) -> None:
    expected = trained(build_optimizer(name, list(model().parameters())))
    m = model()
    optimizer = build_optimizer(name, form(m))
    assert isinstance(optimizer, Optimizer2State)
    for got, want in zip(trained(optimizer), expected, strict=True):
        assert torch.equal(got, want)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in m.parameters()}


def test_names_are_kept_for_reports_and_checkpoints() -> None:
    m = model()
    for params in (m, m.named_parameters(), [{"params": m.named_parameters()}]):
        optimizer = build_optimizer("adam8bit", params)
        names = [name for name, _ in m.named_parameters()]
        assert [row.name for row in optimizer.memory_report().rows] == names
        assert optimizer.param_groups[0]["param_names"] == names
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_unnamed_parameters_are_named_by_place() -> None:
    groups = [{"params": [trainable(3)]}, {"params": [trainable(2), trainable(4)]}]
    rows = build_optimizer("adam", groups).memory_report().rows
    assert [row.name for row in rows][1:] == [
        "param_groups[1].params[0]",
        "param_groups[1].params[1]",
    ]


@pytest.mark.parametrize("first_named", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_groups_with_and_without_names_stand_side_by_side(first_named: bool, added: bool) -> None:
    named, plain = nn.Linear(4, 3), trainable(5)
    groups: list[dict[str, Any]] = [{"params": named}, {"params": [plain]}]
    places = ["param_groups[1].params[0]", "param_groups[0].params[0]"]
    names = ["weight", "bias", places[0]] if first_named else [places[1], "weight", "bias"]
    if not first_named:
        groups.reverse()
    optimizer = build_optimizer("adam", groups[:1] if added else groups)
    if added:
        optimizer.add_param_group(groups[1])
    assert [row.name for row in optimizer.memory_report().rows] == names
    trained(optimizer)
    before = optimizer.state_dict()
    optimizer.load_state_dict(before)
    assert [len(group["params"]) for group in before["param_groups"]] in ([2, 1], [1, 2])
    assert all(optimizer.state[p]["step"] == 3 for p in (named.weight, named.bias, plain))


def test_frozen_parameters_of_a_module_are_left_out() -> None:
    m = model()
    m[0].weight.requires_grad_(False)
    optimizer = build_optimizer("adam", m)
    assert all(p is not m[0].weight for group in optimizer.param_groups for p in group["params"])
    assert len(optimizer.param_groups[0]["params"]) == 5


def test_frozen_tensors_in_a_list_cost_nothing_until_they_train() -> None:
    p, q = trainable(5), trainable(6)
    q.requires_grad_(False)
    optimizer = build_optimizer("adam", [p, q])
    optimizer.init_states()
    assert set(optimizer.state) == {p}
    assert len(optimizer.memory_report().rows) == 1
    before = q.clone()
    give_gradients([p])
    optimizer.step()
    assert torch.equal(q, before)
    q.requires_grad_()
    give_gradients([p, q])
    optimizer.step()
    assert not torch.equal(q, before)
    assert optimizer.state[q]["step"] == 1
    assert optimizer.state[p]["step"] == 2
    assert len(optimizer.memory_report().rows) == 2


def test_tied_parameters_of_a_module_are_trained_once() -> None:
    m = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    m[1].weight = m[0].weight
    optimizer = build_optimizer("adam", m)
    assert len(optimizer.param_groups[0]["params"]) == 3
    m(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert optimizer.state[m[0].weight]["step"] == 1


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (1, 1, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", ["adam", "adamw8bit", "lamb", "paged_lamb8bit"])
def test_any_shape_trains(shape: tuple[int, ...], name: str, backend: str) -> None:
    p, other = trainable(*shape), trainable(300)
    before = p.detach().clone()
    optimizer = build_optimizer(name, [p, other], lr=0.1, min_8bit_size=0)
    assert torch.equal(trained(optimizer)[0], p)
    assert p.shape == shape
    assert p.isfinite().all()
    assert p.numel() == 0 or not torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_supported_dtypes_train_in_their_dtype(dtype: torch.dtype) -> None:
    p = trainable(300, dtype=dtype)
    before = p.detach().clone()
    trained(build_optimizer("adam", [p], lr=0.1))
    assert p.dtype == dtype
    assert (p != before).all()


# ---- refused parameters ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [[], (), iter(()), nn.ReLU(), [{"params": []}], [{"params": ()}]]
)
def test_nothing_to_optimize_is_refused(params: Any) -> None:
    assert "nothing to optimize" in refused(params)


def test_a_frozen_module_is_nothing_to_optimize() -> None:
    assert "nothing to optimize: all 6 parameters" in refused(model().requires_grad_(False))


@pytest.mark.parametrize(
    "params",
    [trainable(3), nn.Parameter(torch.ones(2)), "weights", {"params": [trainable(3)]}, 3],
    ids=lambda value: type(value).__name__,
)
def test_a_single_thing_is_refused_with_its_type(params: Any) -> None:
    message = refused(params)
    assert type(params).__name__ in message
    assert "list" in message


def test_no_parameters_at_all_are_refused_with_what_to_give() -> None:
    assert "give them as the second argument or as params=" in refused(None)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_unordered_parameters_are_refused(kind: type) -> None:
    assert "ordered" in refused([{"params": kind([trainable(3), trainable(4)])}])
    assert "ordered" in refused(kind([trainable(3), trainable(4)]))


def test_duplicates_are_refused_within_and_across_groups() -> None:
    p, q = trainable(3), trainable(4)
    assert "same tensor as param_groups[0].params[0]" in refused([p, q, p])
    message = refused([{"params": [p]}, {"params": [q, p]}])
    assert "param_groups[1].params[1]: is the same tensor as param_groups[0].params[0]" in message
    assert "b: is the same tensor as a" in refused([("a", p), ("b", p)])


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "integer": (lambda: torch.ones(3, dtype=torch.int64), "torch.int64"),
    "boolean": (lambda: torch.ones(3, dtype=torch.bool), "torch.bool"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64).requires_grad_(), "torch.complex64"),
    "double": (lambda: trainable(3, dtype=torch.float64), "torch.float64"),
    "float8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "sparse": (lambda: torch.eye(3).to_sparse().requires_grad_(), "sparse_coo"),
    "not a leaf": (lambda: trainable(3) * 2, "leaf"),
    "array": (lambda: [1.0, 2.0], "list"),
    "none": (lambda: None, "NoneType"),
    "module": (lambda: nn.Linear(2, 2), "Linear"),
}


@pytest.mark.parametrize(("make", "reason"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("form", ["list", "named", "group", "added"])
def test_tensors_that_cannot_be_optimized_are_refused(
    make: Callable[[], Any], reason: str, form: str
) -> None:
    bad, good = make(), trainable(3)
    if form == "list":
        message, place = refused([good, bad]), "param_groups[0].params[1]"
    elif form == "named":
        message, place = refused([("good", good), ("layer.bad", bad)]), "layer.bad"
    elif form == "group":
        message, place = refused([{"params": [good]}, {"params": [bad]}]), "params[0]"
    else:
        optimizer = build_optimizer("adam", [good])
        with pytest.raises(ConfigError) as caught:
            optimizer.add_param_group({"params": [bad]})
        message, place = str(caught.value), "params[0]"
        assert len(optimizer.param_groups) == 1
    assert place in message
    assert reason in message


def test_all_bad_parameters_are_reported_at_once() -> None:
    bad = [("a", torch.ones(3, dtype=torch.int32)), ("b", trainable(3)), ("c", trainable(3) * 2)]
    with pytest.raises(ConfigError) as caught:
        build_optimizer("adam", bad)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["a", "c"]


def test_a_leaf_that_retains_its_gradient_may_be_optimized_as_in_torch() -> None:
    p = trainable(3) * 2
    p.retain_grad()
    assert build_optimizer("adam", [p]).param_groups[0]["params"][0] is p


@pytest.mark.parametrize(
    "entries",
    [
        lambda p, q: [("a", p), q],
        lambda p, q: [p, ("b", q)],
        lambda p, q: [("a", p), (2, q)],
        lambda p, q: [("a", p), ("b", q, 3)],
        lambda p, q: [{"params": [("a", p), q]}],
        lambda p, q: [{"params": [p]}, q],
        lambda p, q: [p, {"params": [q]}],
        lambda p, q: [{"params": [p]}, {"param": [q]}],
        lambda p, q: [{"params": None}],
        lambda p, q: [{"params": 3}],
        lambda p, q: [{"params": "weights"}],
    ],
)
def test_mixed_and_malformed_entries_are_refused(entries: Callable[[Tensor, Tensor], Any]) -> None:
    assert refused(entries(trainable(3), trainable(4)))
