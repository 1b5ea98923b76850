"""Kernels write to the memory that tensors have now, and not at all where they have none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from optfactory import build_optimizer
from optfactory.errors import ConfigError, StateError
from tests.conftest import on_cpus
from tests.torch_api.harness import assert_same_training, bits, held, train, trained, weight


def with_data(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def with_set(tensor: Tensor) -> None:
    fresh = tensor.detach().clone()
    tensor.set_(fresh.untyped_storage(), 0, fresh.size(), fresh.stride())


def with_resize(tensor: Tensor) -> None:
    values, storage = tensor.detach().clone(), tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    tensor.copy_(values)


REPLACE: list[Callable[[Tensor], Any]] = [with_data, with_set, with_resize, Tensor.share_memory_]


@on_cpus
@pytest.mark.parametrize("name", ["adam", "lamb8bit"])
@pytest.mark.parametrize("replace", REPLACE, ids=lambda f: f.__name__)
def test_state_in_other_memory_under_the_same_object_is_what_is_updated(
    replace: Callable[[Tensor], Any], name: str, backend: str
) -> None:
    optimizer, expected = trained(name), trained(name)
    with torch.no_grad():
        for p in held(optimizer):
            for value in optimizer.state[p].values():
                replace(value)
    train(optimizer, range(3, 5))
    train(expected, range(3, 5))
    assert_same_training(optimizer, expected)


@on_cpus
def test_state_whose_memory_was_freed_is_refused(backend: str) -> None:
    optimizer = trained("adam8bit")
    p = held(optimizer)[0]
    before = bits(p)
    optimizer.state[p]["exp_avg_q8"].untyped_storage().resize_(0)
    with pytest.raises(StateError, match=r"'exp_avg_q8' of .*: (has no data|is larger)"):
        optimizer.step()
    assert bits(p) == before
    assert optimizer.state[held(optimizer)[1]]["step"] == 3


@on_cpus
@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_a_tensor_whose_memory_was_freed_is_refused(what: str, backend: str) -> None:
    p, other = weight(), weight()
    optimizer = build_optimizer("adam", [("other", other), ("w", p)])
    train(optimizer, range(1))
    p.grad = torch.ones_like(p)
    (p if what == "parameter" else p.grad).untyped_storage().resize_(0)
    before = bits(other)
    with pytest.raises(ConfigError, match=r"cannot update w: "):
        optimizer.step()
    assert bits(other) == before
    assert optimizer.state[other]["step"] == 1


@on_cpus
@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e300, float("inf")])
def test_a_step_that_is_no_count_is_refused(value: float, backend: str) -> None:
    p, other = weight(), weight(70, 80)
    optimizer = build_optimizer("adam", [("w", p), ("other", other)])
    train(optimizer, range(1))
    optimizer.state[p]["step"].fill_(value)
    before = bits(other)
    with pytest.raises(StateError, match="the state 'step' of w is no count of steps"):
        optimizer.step()
    assert bits(other) == before
    assert optimizer.state[other]["step"] == 1


@on_cpus
@pytest.mark.parametrize("name", ["adam", "lamb", "adam8bit"])
def test_lazily_negated_and_zero_gradients_are_read_as_they_are(name: str, backend: str) -> None:
    def run(lazy: bool) -> list[bytes]:
        params = [weight(70, 80), weight(70, 80)]
        optimizer = build_optimizer(name, params, lr=0.1)
        for step in range(4):
            z = torch.randn(70, 80, 2, generator=torch.Generator().manual_seed(step))
            negated = torch.view_as_complex(z).conj().imag
            zero = torch._efficientzerotensor((70, 80))
            assert negated.is_neg()
            params[0].grad = negated if lazy else negated.resolve_neg()
            params[1].grad = zero if lazy else torch.zeros(70, 80)
            optimizer.step()
        return [bits(p) for p in params]

    assert run(lazy=True) == run(lazy=False)


class Wrapped(Tensor):
    """A wrapper subclass, as libraries of quantized weights have them."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Wrapped:
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        raise NotImplementedError(function)


def test_a_parameter_without_memory_of_its_own_is_refused_when_built() -> None:
    wrapped = torch.nn.Parameter(Wrapped(torch.ones(64, 64)))
    with pytest.raises(ConfigError, match=r"has no memory of its own"):
        build_optimizer("adam8bit", [wrapped])


@on_cpus
def test_fake_parameters_and_gradients_are_refused_at_the_step(backend: str) -> None:
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(300))
        optimizer = build_optimizer("adam", [("w", fake)])
        fake.grad = torch.ones_like(fake)
        with pytest.raises(ConfigError, match="cannot update w: is a FakeTensor"):
            optimizer.step()


def test_a_view_that_is_negated_when_read_is_refused_when_built() -> None:
    p = torch.ones(4, dtype=torch.complex64).conj().imag.detach().requires_grad_()
    with pytest.raises(ConfigError, match="negated when it is read"):
        build_optimizer("adam", [p])


def tied(kind: str) -> list[Tensor]:
    memory = torch.linspace(-1, 1, 400_000)
    first = torch.nn.Parameter(memory)
    second = torch.nn.Parameter(memory[100_000:] if kind == "overlapping" else memory)
    return [first, torch.nn.Parameter(torch.ones(3)), second]


@on_cpus
@pytest.mark.parametrize("kind", ["same", "overlapping"])
@pytest.mark.parametrize("name", ["adam", "adam8bit"])
def test_parameters_on_one_memory_are_updated_one_after_the_other(
    kind: str, name: str, backend: str
) -> None:
    """As by two optimizers that step in turn."""

    def gradients(params: list[Tensor], step: int) -> None:
        for index, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + index)
            p.grad = torch.randn(p.shape, generator=generator)

    together, apart = tied(kind), tied(kind)
    one = build_optimizer(name, together, lr=0.1)
    several = [build_optimizer(name, [p], lr=0.1) for p in apart]
    for step in range(3):
        gradients(together, step)
        one.step()
        gradients(apart, step)
        for optimizer in several:
            optimizer.step()
    assert [bits(p) for p in together] == [bits(p) for p in apart]


def test_parameters_that_come_to_share_memory_later_are_noticed(backend: str) -> None:
    params = [weight(300), weight(300)]
    optimizer = build_optimizer("adam", params, lr=0.1)
    train(optimizer, range(2))
    params[1].data = params[0].data
    twins = copy.deepcopy(params)
    train(optimizer, range(2, 3))
    assert bits(params[0]) == bits(params[1]) != bits(twins[0])
    assert len({bucket.key.turn for bucket in optimizer._current_plan().gather()}) == 2


def test_state_made_under_inference_mode_is_ordinary(backend: str) -> None:
    p = weight(70, 80)
    optimizer = build_optimizer("lamb8bit", [p])
    with torch.inference_mode():
        optimizer.init_states()
    train(optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
        optimizer.step()
    train(optimizer, range(1, 3))
    assert not any(value.is_inference() for value in optimizer.state[p].values())
    assert optimizer.state[p]["step"] == 4
