"""configs/optimizer/*.yaml: generated, complete, and read alike by every YAML reader."""

import pytest
import yaml
from omegaconf import OmegaConf

from optfactory import get_optimizer_info, list_optimizers, resolve
from optfactory.catalog.files import check_files, config_folder, render, write_files

NAMES = list_optimizers()


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path / "optimizer")
    return tmp_path / "optimizer"


def shipped(name):
    return config_folder() / f"{name}.yaml"


def test_the_shipped_files_match_the_schemas():
    assert check_files(config_folder()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_is_a_valid_config_and_holds_the_defaults(name):
    assert resolve(OmegaConf.load(shipped(name))) == resolve(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_file_lists_every_settable_key_in_the_schemas_order(name):
    keys = list(yaml.safe_load(shipped(name).read_text()))
    fields = list(get_optimizer_info(name).config_class.model_fields)
    assert keys == ["_target_", "_made_for_", *fields]
    assert fields[0] == "name"


@pytest.mark.parametrize("name", NAMES)
def test_yaml_readers_agree_on_values_and_types(name):
    defaults = resolve(name).model_dump(mode="json")
    for values in (
        yaml.safe_load(shipped(name).read_text()),
        OmegaConf.to_container(OmegaConf.load(shipped(name))),
    ):
        assert values.pop("_target_") == "optfactory.optimizer_factory"
        assert values.pop("_made_for_") == name
        assert values == defaults
        types = {key: type(value) for key, value in values.items()}
        assert types == {key: type(value) for key, value in defaults.items()}


@pytest.mark.parametrize("eps", [1e-8, 1e-300, 5e-324, 0.1, 1e16, 1e22, 1.5e-7, 0.0])
def test_a_float_of_any_size_is_read_back_as_that_float(eps):
    text = render(resolve("adam", eps=eps))
    for values in (yaml.safe_load(text), OmegaConf.create(text)):
        assert isinstance(values["eps"], float)
        assert values["eps"] == eps


@pytest.mark.parametrize("page_dir", ["/tmp/x: y", "# no comment", "null", "1e3", "a'b\"c", "é"])
def test_a_text_that_looks_like_something_else_is_read_back_as_that_text(page_dir):
    text = render(resolve("paged_adam", page_dir=page_dir))
    assert yaml.safe_load(text)["page_dir"] == page_dir


def test_an_edited_a_missing_and_a_strange_file_are_reported(folder):
    assert check_files(folder) == []
    edited = folder / "adam.yaml"
    edited.write_text(edited.read_text().replace("lr: 0.001", "lr: 0.002"))
    (folder / "lamb.yaml").unlink()
    (folder / "nosuch.yaml").write_text("name: nosuch\n")
    assert check_files(folder) == [
        "adam.yaml: differs from the schema",
        "lamb.yaml: missing",
        "nosuch.yaml: no optimizer of that name",
    ]


def test_writing_repairs_what_differs_and_leaves_the_rest_alone(folder):
    (folder / "adam.yaml").write_text("name: adam\n")
    (folder / "lamb.yaml").unlink()
    untouched = (folder / "adamw.yaml").stat().st_mtime_ns
    assert write_files(folder) == ["adam.yaml", "lamb.yaml"]
    assert check_files(folder) == []
    assert (folder / "adamw.yaml").stat().st_mtime_ns == untouched


def test_writing_removes_generated_files_of_names_that_are_gone_but_no_others(folder):
    (folder / "adam.yaml").rename(folder / "gone8bit.yaml")
    (folder / "mine.yaml").write_text("name: adam8bit\n")
    assert write_files(folder) == ["adam.yaml", "gone8bit.yaml"]
    assert (folder / "mine.yaml").is_file()
    assert not (folder / "gone8bit.yaml").exists()
