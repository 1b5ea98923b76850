"""The names, their aliases, and what the registry says of each."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optfactory import OptimizerInfo, get_optimizer_info, list_optimizers, resolve
from optfactory.catalog.overrides import read_config
from optfactory.config.group_rules import WHOLE_FIELDS
from optfactory.config.schema import family_class
from optfactory.errors import ConfigError, UnknownOptimizerError
from optfactory.registry import canonical_name
from tests.families import FAMILIES, FIRST, NAMES

EIGHTEEN = [
    f"{paged}{family}{bits}"
    for paged in ("", "paged_")
    for family in FIRST
    for bits in ("", "8bit", "32bit")
]
DEFAULTS = {
    "adam": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "adam_w_mode": False},
    "adamw": {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01, "adam_w_mode": True},
    "lamb": {
        "lr": 1e-3, "eps": 1e-6, "weight_decay": 0.01, "adam_w_mode": True,
        "trust_ratio": "lamb", "max_unorm": None,
        "trust_ratio_bounds": None, "always_adapt": True,
    },
}  # fmt: skip
ADAMS = {"betas": (0.9, 0.999), "bias_correction": True, "amsgrad": False}
SHARED = {
    "page_dir": None,
    "page_memory": "auto", "capturable": False,
    "min_8bit_size": 4096, "block_size": 256, "block_wise": True, "signed_map": "dynamic",
    "maximize": False, "second_moment_floor": True, "state_rounding": "nearest",
    "state_format": "dynamic", "state_bits": None,
    "percentile_clipping": 100,
    "skip_zeros": False,
    "nonfinite": "propagate", "param_rounding": "nearest", "seed": None,
    "master_weights": None,
    "annotations": (), "compat": "none", "cautious": False, "cautious_weight_decay": False,
}  # fmt: skip


def plain(spelling: str) -> str:
    return spelling.lower().replace("_", "").replace("-", "")


# ---- names ---------------------------------------------------------------------------------


def test_the_first_names_exist_and_each_family_has_all() -> None:
    assert len(set(EIGHTEEN)) == 18
    assert set(EIGHTEEN) <= set(NAMES)
    assert sorted(NAMES) == sorted(
        f"{paged}{family}{width}"
        for paged in ("", "paged_")
        for family in FAMILIES
        for width in ("", "4bit", "8bit", "fp8", "16bit", "32bit")
        if (family, width) not in (("lion", "4bit"), ("muon", "4bit"))
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_what_it_says(name: str) -> None:
    info = get_optimizer_info(name)
    assert isinstance(info, OptimizerInfo)
    assert info.name == name
    family, width = re.fullmatch(r"(?:paged_)?([a-z]+?)((?:4|8|16|32)bit|fp8)?", name).groups()
    bits = {None: None, "4bit": 4, "8bit": 8, "fp8": 8, "16bit": 16, "32bit": 32}[width]
    assert (info.family, info.optim_bits) == (family, bits)
    assert info.is_paged == name.startswith("paged_")
    assert info.config_class is type(resolve(name))
    assert info.description.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_the_family_and_the_name(name: str) -> None:
    info = get_optimizer_info(name)
    form = "fp8" if name.endswith("fp8") else "dynamic"
    bits = info.optim_bits or 32
    stated = {"optim_bits": bits, "is_paged": info.is_paged, "state_format": form}
    if info.family in FIRST:
        assert info.defaults == {**SHARED, **ADAMS, **DEFAULTS[info.family], **stated}
    else:  # what a family says of its own, tests/numerics compares with its reference
        own = family_class(info.config_class).__annotations__.keys()
        shared = {key: value for key, value in SHARED.items() if key not in own}
        assert info.defaults == info.defaults | shared | stated
    assert resolve(name).model_dump(exclude={"name", *WHOLE_FIELDS}) == info.defaults


# ---- aliases -------------------------------------------------------------------------------

# The spellings of bitsandbytes' classes and of Hugging Face's `optim=` values.
SPELLINGS = {
    "Adam": "adam",
    "Adam8bit": "adam8bit",
    "Adam32bit": "adam32bit",
    "PagedAdam": "paged_adam",
    "PagedAdam8bit": "paged_adam8bit",
    "PagedAdam32bit": "paged_adam32bit",
    "AdamW": "adamw",
    "AdamW8bit": "adamw8bit",
    "AdamW32bit": "adamw32bit",
    "PagedAdamW": "paged_adamw",
    "PagedAdamW8bit": "paged_adamw8bit",
    "PagedAdamW32bit": "paged_adamw32bit",
    "LAMB": "lamb",
    "LAMB8bit": "lamb8bit",
    "LAMB32bit": "lamb32bit",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_32bit": "paged_adamw32bit",
    "paged_adamw_8bit": "paged_adamw8bit",
    "bnbadam8bit": "adam8bit",
    "bnb_paged_adam8bit": "paged_adam8bit",
    "bnb_paged_adamw32bit": "paged_adamw32bit",
    "bnb-adamw-8bit": "adamw8bit",
    " adam_8-bit ": "adam8bit",
    # Hugging Face's others
    "adamw_bnb": "adamw",
    "lion_8bit": "lion8bit",
    "lion_32bit": "lion32bit",
    "paged_lion_8bit": "paged_lion8bit",
    "paged_lion_32bit": "paged_lion32bit",
    "ademamix": "ademamix",
    "ademamix_8bit": "ademamix8bit",
    "paged_ademamix_8bit": "paged_ademamix8bit",
    "paged_ademamix_32bit": "paged_ademamix32bit",
    "rmsprop_bnb": "rmsprop",
    "rmsprop_bnb_8bit": "rmsprop8bit",
    "rmsprop_bnb_32bit": "rmsprop32bit",
    # bitsandbytes' classes of other families
    "PagedAdEMAMix8bit": "paged_ademamix8bit",
    "RMSprop32bit": "rmsprop32bit",
    "Adagrad8bit": "adagrad8bit",
    "SGD8bit": "sgd8bit",
    "LARS": "lars",
    "LARS8bit": "lars8bit",
    "LARS32bit": "lars32bit",
    # timm's
    "bnbsgd8bit": "sgd8bit",
    "bnblion": "lion",
    "bnblion8bit": "lion8bit",
    "bnbademamix8bit": "ademamix8bit",
    "bnblamb8bit": "lamb8bit",
    "momentum": "sgd",
    "lars": "lars",
    "lars_bnb_8bit": "lars8bit",
    "bnblars8bit": "lars8bit",
}


@pytest.mark.parametrize(("spelling", "name"), SPELLINGS.items())
def test_other_libraries_spellings_resolve(spelling: str, name: str) -> None:
    assert canonical_name(spelling) == name
    assert get_optimizer_info(spelling) is get_optimizer_info(name)
    assert resolve(spelling).name == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "spell",
    [
        str.upper,
        str.title,
        lambda name: name.replace("_", ""),
        lambda name: name.replace("_", "-"),
        lambda name: name.replace("8bit", "_8bit").replace("32bit", "_32bit"),
        lambda name: name.replace("bit", "-bit"),
        lambda name: f"bnb_{name}",
        lambda name: f"BNB{name}",
    ],
)
def test_case_dashes_and_bnb_do_not_matter(name: str, spell: Callable[[str], str]) -> None:
    assert canonical_name(spell(name)) == name


def get_family(name: str) -> str:
    return get_optimizer_info(name).family


def test_the_alias_table_is_exactly_this() -> None:
    table = {alias: name for name in NAMES for alias in get_optimizer_info(name).aliases}
    expected = {plain(name): name for name in NAMES}
    # ... with what timm calls it, and with "bnb" in front, or behind the family.
    momentum = {alias.replace("sgd", "momentum"): name for alias, name in expected.items()}
    expected |= {alias: name for alias, name in momentum.items() if get_family(name) == "sgd"}
    for alias, name in list(expected.items()):
        bits = get_optimizer_info(name).optim_bits
        width = "fp8" if name.endswith("fp8") else f"{bits}bit" if bits else ""
        expected[f"bnb{alias}"] = name
        expected[f"{alias.removesuffix(width)}bnb{width}"] = name
    assert table == expected


def test_no_alias_stands_for_two_names() -> None:
    aliases = [alias for name in NAMES for alias in get_optimizer_info(name).aliases]
    assert len(aliases) == len(set(aliases))
    assert all(alias == plain(alias) for alias in aliases)


def test_an_alias_keeps_its_bits_and_its_paging() -> None:
    seen = 0
    for name in NAMES:
        for alias in get_optimizer_info(name).aliases:
            config = resolve(alias)
            if "bit" in alias:
                assert alias.endswith(f"{config.optim_bits}bit"), alias
                seen += 1
            assert config.is_paged == ("paged" in alias), alias
    # Of a family eight names have bits, without "bnb" and with it at two places; sgd has another.
    # Two families have none of 4 bits.
    assert seen == 24 * (len(FAMILIES) + 1) - 2 * 6


@pytest.mark.parametrize(
    "text",
    [
        "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_hf", "adamw_apex_fused",
        "nosuch_8bit", "adopt_adamw", "stable_adamw", "galore_adamw_8bit", "schedule_free_sgd",
        "radamw", "nadamw", "adanw", "fusedlamb", "nesterov", "sgdw", "ao_adamw_8bit",
        "adam12bit", "adam2bit", "adamfp4", "bnb_adam_bnb", "adam8bitbnb", "8bit_adam", "adam8",
        "adam_paged", "paged", "bnb", "bnbbnbadam", "pagedpagedadam", "adam8bit8bit", "adam bit",
        "adam 8bit", "torch.optim.Adam", "", " ", "adam\n8bit", "аdam",
    ],
)  # fmt: skip
def test_other_spellings_are_refused(text: str) -> None:
    for refuse in (canonical_name, get_optimizer_info, resolve):
        with pytest.raises(UnknownOptimizerError):
            refuse(text)


# The names of transformers 5.24 (OptimizerNames), timm 1.0.31 (list_optimizers()) and axolotl 0.21
# that are none here, though most of them begin or end as one that is; lars is a family of its own.
ELSEWHERE = """
    adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adafactor adamw_anyprecision
    adamw_torch_4bit adamw_torch_8bit galore_adamw galore_adamw_8bit galore_adafactor
    galore_adamw_layerwise galore_adamw_8bit_layerwise galore_adafactor_layerwise lomo adalomo
    grokadamw schedule_free_radam schedule_free_adamw schedule_free_sgd apollo_adamw
    apollo_adamw_layerwise stable_adamw

    adadelta adafactorbv adafactorbvc adahessian adamax adamc adamp adamuon adamwlegacy adanw adoptc
    adoptw cadafactor cadafactorbv cadafactorbvc cadamc cadamp cadamw cadan cadanw cadopt cadoptc
    cadoptw clamb clambw claprop clion clionc cmars cnadamc cnadamw crmsproptf csgdc csgdp csgdw
    fusedadam fusedadamw fusedlamb fusednovograd fusedsgd kron kronc kronw lambc lambcd lambcw lambw
    laprop lapropc larc lionc madgrad madgradw mars nadamc nadamlegacy nadamuon nadamw nesterov
    nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief radamlegacy radamw rmsproptf
    rmsproptfc rmsproptfw sgdc sgdp sgdw

    optimi_adamw ao_adamw_4bit ao_adamw_8bit ao_adamw_fp8 adopt_adamw came_pytorch dion
    sinkgd polora flash_adamw flash_adam flash_sgd flash_sgdw flash_lion scao q_galore_adamw8bit
"""


def test_no_other_algorithm_is_suggested_for_names_of_other_libraries() -> None:
    for text in ELSEWHERE.split():
        with pytest.raises(UnknownOptimizerError) as refused:
            resolve(text)
        assert "Did you mean" not in str(refused.value)


def test_every_name_of_transformers_is_known_or_refused() -> None:
    """A name that comes with a later release is known, or belongs to the list above."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training_args = pytest.importorskip("transformers.training_args")
    for name in {item.value for item in training_args.OptimizerNames} - set(ELSEWHERE.split()):
        assert resolve(name).name


@pytest.mark.parametrize("name", ["bnbadam", "bnbadam8bit", "bnb_paged_adam32bit", "adam_bnb_8bit"])
def test_adam_of_bitsandbytes_decays_as_it_does_there(name: str) -> None:
    """Decoupled, whatever it is called: the name would else mean another rule."""
    assert resolve(name, weight_decay=0.1).model_dump()["adam_w_mode"]
    assert not resolve(name, adam_w_mode=False).model_dump()["adam_w_mode"]
    assert not resolve(canonical_name(name)).model_dump()["adam_w_mode"]
    rules = {"some": {"match": "*", "weight_decay": 0.1}}
    assert resolve({"name": name, "param_groups": rules}).model_dump()["adam_w_mode"]
    for overrides in ([], ["lr=0.1"]):
        assert resolve(read_config(name, overrides)).model_dump()["adam_w_mode"]


@given(st.text(alphabet="adbnmwlpge_-832it", max_size=20))
def test_a_name_is_never_guessed(text: str) -> None:
    known = {alias: name for name in NAMES for alias in get_optimizer_info(name).aliases}
    try:
        assert canonical_name(text) == known[plain(text)]
    except UnknownOptimizerError:
        assert plain(text) not in known


def test_a_bnb_name_is_logged_with_the_name_it_has_here(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "optfactory")
    assert canonical_name("bnb_adam8bit") == "adam8bit"
    assert "bnb_adam8bit" in caplog.text
    assert "'adam8bit'" in caplog.text
    caplog.clear()
    assert canonical_name("Adam8bit") == "adam8bit"
    assert not caplog.records


# ---- lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "unwanted", "count"),  # of the eighteen
    [
        ("", "", 18),
        ("*", "", 18),
        ("*8bit", "", 6),
        ("*32bit", "", 6),
        ("paged_*", "", 9),
        ("paged_*8bit", "", 3),
        ("adam", "", 1),
        ("adam*", "", 6),
        (["adam*", "lamb*"], "", 9),
        (["adam", "adam*"], "", 6),
        ([], "", 18),
        ("", "paged_*", 9),
        ("*8bit", ["paged_*", "lamb*"], 2),
        ("*", "*", 0),
        ("[ap]*", "", 15),
        ("nosuch*", "", 0),
        ("ADAM*", "", 0),
        (("*8bit", ""), "", 6),
    ],
)
def test_lists_are_filtered_by_globs(
    wanted: str | list[str], unwanted: str | list[str], count: int
) -> None:
    found = list_optimizers(wanted, unwanted)
    assert len(set(found) & set(EIGHTEEN)) == count
    assert found == sorted(set(found) & set(NAMES))
    globs, others = ([p] if isinstance(p, str) else p for p in (wanted, unwanted))
    for name in set(NAMES) - set(EIGHTEEN):
        chosen = not any(globs) or any(fnmatchcase(name, glob) for glob in globs)
        assert (name in found) == (chosen and not any(fnmatchcase(name, o) for o in others))
    assert list_optimizers(filter=wanted, exclude_filters=unwanted) == found


def test_a_filter_selects_by_the_whole_name() -> None:
    assert list_optimizers("*lamb8bit") == ["lamb8bit", "paged_lamb8bit"]
    assert list_optimizers("adam8bit") == ["adam8bit"]


def test_descriptions_are_those_of_the_names() -> None:
    pairs = list_optimizers("*adamw8bit", with_description=True)
    assert [name for name, _ in pairs] == ["adamw8bit", "paged_adamw8bit"]
    assert all(text == get_optimizer_info(name).description for name, text in pairs)
    assert all(text for _, text in list_optimizers(with_description=True))


@pytest.mark.parametrize("bad", [[1], [None], ["adam", 8]])
def test_a_filter_that_is_no_text_is_refused(bad: list[object]) -> None:
    with pytest.raises(ConfigError, match="glob"):
        list_optimizers(bad)  # type: ignore[arg-type]


def test_a_list_can_be_changed_by_its_owner_only() -> None:
    list_optimizers().clear()
    assert list_optimizers() == NAMES


def test_class_names_are_one_per_name() -> None:
    classes = [get_optimizer_info(name).config_class for name in NAMES]
    for one, other in itertools.combinations(classes, 2):
        assert one.__qualname__ != other.__qualname__


def test_defaults_of_the_registry_can_not_be_changed_from_outside() -> None:
    get_optimizer_info("adam").defaults["lr"] = 99.0
    try:
        assert resolve("adam").lr == 1e-3
    finally:
        get_optimizer_info("adam").defaults["lr"] = 1e-3
