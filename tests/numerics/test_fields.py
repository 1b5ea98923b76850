"""Every accepted field has an effect: on the update, the state or its place, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from optfactory.config.schema import family_class
from optfactory.errors import ConfigError
from tests.families import FIRST, acts_on, known_to
from tests.numerics.harness import bits, gradient

FAMILIES = {
    info.family: info.config_class
    for info in map(get_optimizer_info, list_optimizers())
    if info.name == info.family
}
SHAPES = [(4200,), (2000,), (70, 64)]
LARGE = (256, 400)  # from 100,000 elements on a state is paged if asked for
PAGES = "a folder of the test"


@dataclass(frozen=True)
class Flip:
    """One change of a field, in a context `base` in which it must show.

    Some show only with parameters of 16 bits, or with a gradient that is not finite.
    """

    value: Any
    base: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    spoiled: bool = False


def _flip(value: Any, **base: Any) -> Flip:
    return Flip(value, base)


def _half(value: Any, **base: Any) -> Flip:
    return Flip(value, base, dtype=torch.bfloat16)


def _spoiled(value: Any, **base: Any) -> Flip:
    return Flip(value, base, spoiled=True)


DECAYING = {"weight_decay": 0.1, "lr": 0.01}

# A new field needs a line here; the test of completeness fails without it.
FLIPS: dict[str, list[Flip]] = {
    "name": [_flip("paged_{family}8bit"), _flip("{other}", weight_decay=0.1)],
    "lr": [_flip(2e-3), _flip(0.0)],
    "betas": [_flip((0.8, 0.999)), _flip((0.9, 0.97)), _flip((0.0, 0.999))],
    "eps": [_flip(1e-3), _flip(1e-2, optim_bits=8)],
    "weight_decay": [_flip(0.2), _flip(0.2, adam_w_mode=True), _flip(0.2, adam_w_mode=False)],
    "bias_correction": [_flip(False), _flip(False, optim_bits=8)],
    "adam_w_mode": [
        _flip(False, adam_w_mode=True, **DECAYING),
        _flip(False, adam_w_mode=True, optim_bits=8, **DECAYING),
    ],
    "momentum": [_flip(0.5), _flip(0.5, optim_bits=8), _flip(0.0)],
    "dampening": [_flip(0.5), _flip(0.5, optim_bits=8)],
    "nesterov": [_flip(True), _flip(True, optim_bits=8)],
    "alpha": [_flip(0.9), _flip(0.0), _flip(0.9, optim_bits=8)],
    "centered": [_flip(True), _flip(True, momentum=0.5)],
    "optim_bits": [_flip(8)],
    "amsgrad": [_flip(True)],
    "is_paged": [_flip(True), _flip(True, optim_bits=8)],
    "page_dir": [_flip(PAGES, is_paged=True), _flip(PAGES, is_paged=True, optim_bits=8)],
    # For GPUs alone: refused on CPUs, and shown in tests/emulation and tests/gpu.
    "page_memory": [],
    "annotations": [],  # for other tools: tests/param_groups/test_annotations.py
    "capturable": [],
    "min_8bit_size": [_flip(1, optim_bits=8), _flip(1_000_000, optim_bits=8)],
    "block_size": [_flip(128, optim_bits=8), _flip(1024, optim_bits=8)],
    "trust_ratio": [_flip("clip"), _flip("clip", optim_bits=8)],
    "max_unorm": [
        _flip(0.01, trust_ratio="clip", eps=1e-6),
        _flip(0.01, trust_ratio="clip", optim_bits=8),
        _flip(0.0, trust_ratio="clip", max_unorm=0.01),
    ],
    "trust_ratio_bounds": [
        _flip((0.0, 0.01)),
        _flip((3.0, 4.0), optim_bits=8),
        _flip((0.0, 0.01), trust_ratio="clip"),
        _flip(None, trust_ratio_bounds=(0.0, 0.01)),
    ],
    "always_adapt": [
        _flip(False, weight_decay=0.0),
        _flip(False, weight_decay=0.0, optim_bits=8, trust_ratio="clip"),
    ],
    "maximize": [_flip(True), _flip(True, optim_bits=8), _flip(False, maximize=True)],
    "block_wise": [_flip(False, optim_bits=8)],
    "signed_map": [_flip("symmetric", optim_bits=8)],
    "second_moment_floor": [_flip(False, optim_bits=8)],
    "percentile_clipping": [
        _flip(5),
        _flip(5, optim_bits=8),
        _flip(99, percentile_clipping=0),
    ],
    "skip_zeros": [_flip(True), _flip(True, optim_bits=8)],
    "nonfinite": [
        _spoiled("skip_element"),
        _spoiled("skip_step"),
        _spoiled("skip_step", nonfinite="skip_element", optim_bits=8),
    ],
    "param_rounding": [
        _half("stochastic", lr=0.01),
        _half("kahan", lr=0.01, optim_bits=8),
        _half("kahan", lr=0.01, param_rounding="stochastic"),
    ],
    "seed": [
        _half(7, param_rounding="stochastic", lr=0.01),
        _half(2**24 - 1, param_rounding="stochastic", lr=0.01, optim_bits=8, seed=1),
    ],
    "compat": [
        _flip("bitsandbytes", optim_bits=8),
        _half("bitsandbytes", adam_w_mode=True, **DECAYING),
    ],
}
# What a family must say beside a field's flips.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {("lamb", "compat"): {"trust_ratio": "clip"}}
# Contexts in which a field could do nothing: asking for it there must be an error.
WITHOUT_EFFECT: dict[str, list[Flip]] = {
    "page_dir": [_flip(PAGES, is_paged=False)],
    "page_memory": [_flip("pinned", is_paged=False), _flip("pinned", is_paged=True)],
    "capturable": [_flip(True)],
    "max_unorm": [_flip(0.5, trust_ratio="lamb")],
    "amsgrad": [_flip(True, optim_bits=8)],
    "centered": [_flip(True, optim_bits=8)],
    "dampening": [_flip(0.5, momentum=0.0)],
    "nesterov": [_flip(True, momentum=0.0), _flip(True, dampening=0.5)],
    "block_size": [_flip(128)],
    "block_wise": [_flip(False), _flip(False, optim_bits=8, block_size=128)],
    "signed_map": [_flip("symmetric")],
    "second_moment_floor": [_flip(False)],
    "param_rounding": [_flip("stochastic"), _flip("kahan"), _flip("kahan", optim_bits=8)],
    "seed": [_flip(1), _flip(1, param_rounding="kahan")],
    "trust_ratio": [_flip("lamb", compat="bitsandbytes")],
    "adam_w_mode": [_flip(False, compat="bitsandbytes", weight_decay=0.1)],
    "bias_correction": [_flip(False, compat="bitsandbytes")],
    "skip_zeros": [_flip(True, compat="bitsandbytes")],
    "nonfinite": [_flip("skip_step", compat="bitsandbytes")],
}


def _fields(family: str) -> list[str]:
    return list(family_class(FAMILIES[family]).model_fields)


def _cases() -> list[Any]:
    return [
        pytest.param(family, field, _beside(family, field, flip), id=f"{family}-{field}-{number}")
        for family in FAMILIES
        for field in _fields(family)
        if acts_on(family, field)
        for number, flip in enumerate(FLIPS.get(field, []))
        if flip.value != flip.base.get(field, _default(family, field))
    ]


def _default(family: str, field: str) -> Any:
    return get_optimizer_info(family).defaults.get(field)


def _beside(family: str, field: str, flip: Flip) -> Flip:
    return replace(flip, base={**known_to(family, flip.base), **BESIDE.get((family, field), {})})


def _mapped(folder: Path) -> bool:
    """Whether a file of this folder is mapped into the process, deleted or not."""
    maps = Path("/proc/self/maps")
    return maps.exists() and str(folder) in maps.read_text()


def _observe(
    config: Mapping[str, Any],
    folder: Path,
    flip: Flip | None = None,
    group: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a user can see of two steps: parameters, states and where they live."""
    dtype = flip.dtype if flip else torch.float32
    paged = config.get("is_paged") or "is_paged" in (group or {})
    shapes = [*SHAPES, LARGE] if paged or config["name"].startswith("paged") else SHAPES
    params = [torch.linspace(-0.1, 0.2, torch.Size(s).numel()).view(s).clone() for s in shapes]
    params = [p.to(dtype).requires_grad_() for p in params]
    optimizer = build_optimizer(config, [{"params": params, **(group or {})}])
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = 0.1 * gradient(tuple(p.shape), p.dtype, 10 * step + i)
        if flip and flip.spoiled and step == 1:
            params[0].grad[400] = float("nan")
        optimizer.step()
    seen: dict[str, Any] = {"mapped": _mapped(folder)}
    for i, p in enumerate(params):
        seen[f"p{i}"] = hash(bits(p).tobytes())
        for key, tensor in optimizer.state[p].items():
            seen[f"p{i}.{key}"] = (tensor.dtype, tuple(tensor.shape), hash(bits(tensor).tobytes()))
    report = optimizer.memory_report()
    seen["bytes"] = report.state_bytes
    seen["rows"] = [(row.bits, str(row.where), row.nbytes) for row in report.rows]
    return seen


def _filled(value: Any, family: str, folder: Path) -> Any:
    if value is PAGES:
        return str(folder)
    if isinstance(value, str):
        other = next(name for name in sorted(FAMILIES) if name != family)
        return value.format(family=family, other=other)
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_a_flip(family: str) -> None:
    missing = set(_fields(family)) - set(FLIPS)
    assert not missing, f"no flip in this test's table for the fields {sorted(missing)}"
    for name in list_optimizers():
        info = get_optimizer_info(name)
        if info.family == family:
            # Rules for param groups have tests of their own.
            assert set(info.config_class.model_fields) == {*_fields(family), "param_groups"}


def test_no_flip_is_left_over() -> None:
    assert set(FLIPS) == {field for family in FAMILIES for field in _fields(family)}


@pytest.mark.parametrize(("family", "field", "flip"), _cases())
def test_flipping_a_field_shows(
    family: str, field: str, flip: Flip, backend: str, tmp_path: Path
) -> None:
    base = {"name": family, **flip.base}
    flipped = base | {field: _filled(flip.value, family, tmp_path)}
    if backend == "cuda" and field == "page_dir":
        with pytest.raises(ConfigError, match="page_dir: is for CPU parameters"):
            _observe(flipped, tmp_path, flip)
        return
    assert _observe(base, tmp_path, flip) != _observe(flipped, tmp_path, flip)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_config_shows_the_same(family: str, backend: str, tmp_path: Path) -> None:
    """What the flips are measured with does not differ by itself."""
    for bits_wanted in (32, 8):
        config = {"name": family, "optim_bits": bits_wanted, "is_paged": True}
        assert _observe(config, tmp_path) == _observe(config, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_a_field_that_could_do_nothing_is_refused(family: str, field: str, tmp_path: Path) -> None:
    if field not in _fields(family):
        pytest.skip(f"{family} has no {field}")
    params = [torch.zeros(8, requires_grad=True)]
    for flip in WITHOUT_EFFECT[field]:
        value = _filled(flip.value, family, tmp_path)
        known = known_to(family, flip.base)
        with pytest.raises(ConfigError, match=field):
            build_optimizer({"name": family, **known, field: value}, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_of_states_that_are_not_kept_is_refused(family: str) -> None:
    params = [torch.zeros(8, requires_grad=True)]
    for field in (field for field in _fields(family) if not acts_on(family, field)):
        for flip in FLIPS[field]:
            with pytest.raises(ConfigError, match=f"{field}: .*keeps no .*; drop it"):
                build_optimizer({"name": family, **flip.base, field: flip.value}, params)


def test_the_first_families_lack_no_flip() -> None:
    fields = [(case.values[0], case.values[1]) for case in _cases()]
    for family in FIRST:
        for field in _fields(family):
            assert fields.count((family, field)) == len(FLIPS[field])


@pytest.mark.parametrize(("family", "field", "flip"), _cases())
def test_a_field_in_a_param_group_shows_or_is_refused(
    family: str, field: str, flip: Flip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTFACTORY_BACKEND", "reference")
    torch.set_num_threads(1)
    base = {"name": family, **flip.base}
    group = {field: _filled(flip.value, family, tmp_path)}
    if field == "name":
        return  # torch keeps a group's own name under this key
    try:
        flipped = _observe(base, tmp_path, flip, group)
    except ConfigError:
        assert field not in {"lr", "betas", "eps", "weight_decay", "optim_bits"}
    else:
        assert flipped != _observe(base, tmp_path, flip)
