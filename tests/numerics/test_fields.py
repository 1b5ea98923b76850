"""Every accepted field has an effect: on the update, the state or its place, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from optfactory import build_optimizer, get_optimizer_info, list_optimizers
from optfactory.config.schema import family_class
from optfactory.errors import ConfigError
from tests.families import FIRST, acts_on, beside, is_of_matrices, known_to
from tests.numerics.harness import bits, gradient
from tests.reference import reference_of
from tests.reference.facts import Flip, flip

FAMILIES = {
    info.family: info.config_class
    for info in map(get_optimizer_info, list_optimizers())
    if info.name == info.family
}
SHAPES = [(4200,), (2000,), (70, 64)]
MATRICES = [(70, 64), (30, 64), (4, 40, 64)]
LARGE = (256, 400)  # from 100,000 elements on a state is paged if asked for
PAGES = "a folder of the test"


def _half(value: Any, **base: Any) -> Flip:
    return Flip(value, base, dtype="bfloat16")


def _spoiled(value: Any, **base: Any) -> Flip:
    return Flip(value, base, spoiled=True)


DECAYING = {"weight_decay": 0.1, "lr": 0.01}

# A new field needs a line here, or among the facts of its family beside the reference; the test of
# completeness fails without it.
FLIPS: dict[str, list[Flip]] = {
    "name": [flip("paged_{family}8bit"), flip("{other}", weight_decay=0.1)],
    "lr": [flip(2e-3), flip(0.0)],
    "betas": [flip((0.8, 0.999)), flip((0.9, 0.97)), flip((0.0, 0.999))],
    "eps": [flip(1e-3), flip(1e-2, optim_bits=8)],
    "weight_decay": [flip(0.2), flip(0.2, adam_w_mode=True), flip(0.2, adam_w_mode=False)],
    "bias_correction": [flip(False), flip(False, optim_bits=8)],
    "adam_w_mode": [
        flip(False, adam_w_mode=True, **DECAYING),
        flip(False, adam_w_mode=True, optim_bits=8, **DECAYING),
    ],
    "optim_bits": [flip(8), flip(16)],
    "state_format": [flip("fp8", optim_bits=8)],
    "state_bits": [],  # other names by family: tests/options/test_state_bits.py
    "amsgrad": [flip(True)],
    "is_paged": [flip(True), flip(True, optim_bits=8)],
    "page_dir": [flip(PAGES, is_paged=True), flip(PAGES, is_paged=True, optim_bits=8)],
    # For GPUs alone: refused on CPUs, and shown in tests/emulation and tests/gpu.
    "page_memory": [],
    "annotations": [],  # for other tools: tests/param_groups/test_annotations.py
    "capturable": [],
    "min_8bit_size": [flip(1, optim_bits=8), flip(1_000_000, optim_bits=8)],
    "block_size": [flip(128, optim_bits=8), flip(1024, optim_bits=8)],
    "trust_ratio": [flip("clip"), flip("clip", optim_bits=8)],
    "max_unorm": [
        flip(0.01, trust_ratio="clip", eps=1e-6),
        flip(0.01, trust_ratio="clip", optim_bits=8),
        flip(0.0, trust_ratio="clip", max_unorm=0.01),
    ],
    "trust_ratio_bounds": [
        flip((0.0, 0.01)),
        flip((3.0, 4.0), optim_bits=8),
        flip((0.0, 0.01), trust_ratio="clip"),
        flip(None, trust_ratio_bounds=(0.0, 0.01)),
    ],
    "always_adapt": [
        flip(False, weight_decay=0.0),
        flip(False, weight_decay=0.0, optim_bits=8, trust_ratio="clip"),
    ],
    "maximize": [flip(True), flip(True, optim_bits=8), flip(False, maximize=True)],
    "block_wise": [flip(False, optim_bits=8)],
    "signed_map": [flip("symmetric", optim_bits=8)],
    "second_moment_floor": [flip(False, optim_bits=8)],
    "state_rounding": [
        flip("stochastic", optim_bits=8, state_rounding="nearest"),
        flip("nearest", optim_bits=8, state_rounding="stochastic"),
    ],
    "percentile_clipping": [
        flip(5),
        flip(5, optim_bits=8),
        flip(99, percentile_clipping=0),
    ],
    "skip_zeros": [flip(True), flip(True, optim_bits=8)],
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
    "master_weights": [
        _half("split", lr=0.01),
        _half("fp32", lr=0.01, optim_bits=8),
        _half("fp32", lr=0.01, master_weights="split"),
    ],
    "seed": [
        _half(7, param_rounding="stochastic", lr=0.01),
        flip(7, state_rounding="stochastic", optim_bits=8),
        _half(2**24 - 1, param_rounding="stochastic", lr=0.01, optim_bits=8, seed=1),
    ],
    "cautious": [flip(True), flip(True, optim_bits=8)],
    "cautious_weight_decay": [flip(True, lr=0.01), flip(True, lr=0.01, optim_bits=8)],
    "compat": [
        flip("bitsandbytes", optim_bits=8),
        _half("bitsandbytes", adam_w_mode=True, decoupled_weight_decay=True, **DECAYING),
    ],
}
# What a family must say beside a field's flips.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {("lamb", "compat"): {"trust_ratio": "clip"}}
# Contexts in which a field could do nothing: asking for it there must be an error.
WITHOUT_EFFECT: dict[str, list[Flip]] = {
    "page_dir": [flip(PAGES, is_paged=False)],
    "page_memory": [flip("pinned", is_paged=False), flip("pinned", is_paged=True)],
    "capturable": [flip(True)],
    "max_unorm": [flip(0.5, trust_ratio="lamb")],
    "amsgrad": [flip(True, optim_bits=8)],
    "block_size": [flip(128)],
    "block_wise": [flip(False), flip(False, optim_bits=8, block_size=128)],
    "signed_map": [flip("symmetric")],
    "second_moment_floor": [flip(False)],
    "param_rounding": [flip("stochastic"), flip("kahan"), flip("kahan", optim_bits=8)],
    "master_weights": [flip("split"), flip("fp32"), flip("fp32", optim_bits=8)],
    "seed": [flip(1), flip(1, param_rounding="kahan")],
    "trust_ratio": [flip("lamb", compat="bitsandbytes")],
    "adam_w_mode": [flip(False, compat="bitsandbytes", weight_decay=0.1)],
    "bias_correction": [flip(False, compat="bitsandbytes")],
    "skip_zeros": [flip(True, compat="bitsandbytes")],
    "nonfinite": [flip("skip_step", compat="bitsandbytes")],
    "cautious": [flip(True, compat="bitsandbytes", trust_ratio="clip")],
    "cautious_weight_decay": [flip(True, compat="bitsandbytes", trust_ratio="clip")],
}


def _flips(family: str) -> dict[str, Sequence[Flip]]:
    return {**FLIPS, **reference_of(family).facts.flips}


def _fields(family: str) -> list[str]:
    return list(family_class(FAMILIES[family]).model_fields)


def _cases() -> list[Any]:
    return [
        pytest.param(family, field, _beside(family, field, flip), id=f"{family}-{field}-{number}")
        for family in FAMILIES
        for field in _fields(family)
        if acts_on(family, field)
        for number, flip in enumerate(_flips(family).get(field, []))
        if flip.value != flip.base.get(field, _default(family, field))
    ]


def _default(family: str, field: str) -> Any:
    return get_optimizer_info(family).defaults.get(field)


def _beside(family: str, field: str, flip: Flip) -> Flip:
    more = BESIDE.get((family, field), {}) | (beside(family, field) or {})
    return replace(flip, base={**known_to(family, flip.base), **more})


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
    """Everything a user can see of some steps: parameters, states and where they live."""
    dtype = getattr(torch, flip.dtype if flip else "float32")
    paged = config.get("is_paged") or "is_paged" in (group or {})
    shapes = MATRICES if is_of_matrices(config["name"]) else SHAPES
    shapes = [*shapes, LARGE] if paged or config["name"].startswith("paged") else shapes
    params = [torch.linspace(-0.1, 0.2, torch.Size(s).numel()).view(s).clone() for s in shapes]
    params = [p.to(dtype).requires_grad_() for p in params]
    optimizer = build_optimizer(config, [{"params": params, **(group or {})}])
    for step in range(flip.steps if flip else 2):
        for i, p in enumerate(params):
            p.grad = 0.1 * gradient(tuple(p.shape), p.dtype, 10 * step + i)
        if flip and flip.spoiled and step == 1:
            params[0].grad.view(-1)[400] = float("nan")
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
def test_every_field_has_aflip(family: str) -> None:
    missing = set(_fields(family)) - set(_flips(family))
    assert not missing, f"no flip here or in {family}'s facts for the fields {sorted(missing)}"
    assert set(reference_of(family).facts.flips) <= set(_fields(family))
    for name in list_optimizers():
        info = get_optimizer_info(name)
        if info.family == family:
            # Rules for param groups have tests of their own, as has what trains no matrices.
            whole = {"param_groups", "others"} if is_of_matrices(name) else {"param_groups"}
            assert set(info.config_class.model_fields) == {*_fields(family), *whole}


def test_no_flip_is_left_over() -> None:
    assert set(FLIPS) <= {field for family in FAMILIES for field in _fields(family)}


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


def _refusals() -> list[Any]:
    return [
        pytest.param(family, field, flips, id=f"{family}-{field}")
        for family in FAMILIES
        for field, flips in {**WITHOUT_EFFECT, **reference_of(family).facts.refused}.items()
        if field in _fields(family)
    ]


@pytest.mark.parametrize(("family", "field", "flips"), _refusals())
def test_a_field_that_could_do_nothing_is_refused(
    family: str, field: str, flips: Sequence[Flip], tmp_path: Path
) -> None:
    params = [torch.zeros(4, 8, requires_grad=True)]
    for change in flips:
        value = _filled(change.value, family, tmp_path)
        known = known_to(family, change.base)
        with pytest.raises(ConfigError, match=field):
            build_optimizer({"name": family, **known, field: value}, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_of_states_that_are_not_kept_is_refused(family: str) -> None:
    params = [torch.zeros(8, requires_grad=True)]
    for field in (field for field in _fields(family) if not acts_on(family, field)):
        for change in _flips(family)[field]:
            with pytest.raises(ConfigError, match=f"{field}: .*; drop it"):
                build_optimizer({"name": family, **change.base, field: change.value}, params)


def test_the_first_families_lack_noflip() -> None:
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
