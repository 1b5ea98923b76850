"""Who may import whom inside the package; every other import fails here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "optfactory"

# module or subpackage -> what it may import of ours; modules of one subpackage may import each
# other. A change here is a change of the architecture: keep the arrows pointing one way.
ALLOWED = {
    # configuration: no torch
    "errors": set(),
    "_resources": {"errors"},
    "naming": {"errors"},
    "options": set(),
    "rules": {"errors", "_resources", "options"},
    "field_types": set(),
    "group_rules": {"field_types"},
    "schema": {"errors", "field_types", "rules"},
    "validation": {"errors", "group_rules", "schema"},
    "optimizers": {"errors", "field_types", "rules", "schema"},
    "registry": {"errors", "group_rules", "naming", "optimizers", "rules", "schema"},
    # engine
    "quantmap": {"errors"},
    "codec": {"errors", "options", "quantmap"},
    "codegen": {"errors", "_resources", "options", "rules"},
    "processor": {"errors"},
    "compiler": {"errors", "processor"},
    "prebuilt": {"compiler", "processor"},
    "_cupy": {"errors"},
    "managed": {"errors", "_cupy"},
    "memory": {"errors", "managed"},
    "origins": set(),
    "layers": set(),
    "param_groups": {"errors", "origins", "validation"},
    "matching": {"group_rules", "layers", "origins"},
    "grouping": {"group_rules", "matching", "origins", "param_groups", "schema"},
    "state": {"errors", "codec", "memory", "options", "quantmap", "rules", "schema"},
    "facts": set(),
    "step_plan": {"errors", "facts", "options", "param_groups", "rules", "schema", "state"},
    "backends": {
        *("errors", "_resources", "_cupy", "rules"),
        *("codec", "codegen", "compiler", "step_plan", "prebuilt", "quantmap", "state"),
        *("memory", "managed", "options"),
    },
    "exchange": {
        *("errors", "field_types", "options", "registry", "rules", "schema", "validation"),
        *("codec", "step_plan", "quantmap", "state"),
    },
    "checkpoint": {"errors", "exchange", "step_plan", "registry", "schema", "validation"},
    "saving": {"errors"},
    "report": {"step_plan", "state"},
    "gradients": set(),
    "group_config": {
        *("errors", "group_rules", "schema", "validation"),
        *("backends", "grouping", "param_groups"),
    },
    "optimizer": {
        *("errors", "gradients", "group_rules", "schema"),
        *("backends", "checkpoint", "exchange", "memory"),
        *("group_config", "grouping", "param_groups", "report", "state", "step_plan"),
    },
    # what users call
    "extend": {"field_types", "optimizers", "registry", "rules", "schema"},
    "optim": {"errors", "factory", "optimizer", "param_groups"},
    "factory": {"errors", "optimizer", "param_groups", "registry", "schema", "validation"},
    "shipped_rules": {"_resources", "errors"},
    "config_files": {"_resources", "errors", "shipped_rules", "registry", "schema"},
    "json_schema": {"group_rules", "registry"},
    "config_input": {"errors", "registry"},
    "bench": {"__init__", "errors", "factory", "optimizer", "registry"},
    "planning": {
        *("errors", "factory", "group_rules", "registry", "schema"),
        *("group_config", "grouping", "managed", "memory", "param_groups", "report", "state"),
        "step_plan",
    },
    "doctor": {
        "__init__",
        "_cupy",
        "backends",
        "compiler",
        "errors",
        "factory",
        "prebuilt",
        "processor",
    },
    "cli": {
        *("__init__", "config_files", "config_input", "errors", "factory", "json_schema"),
        *("registry", "bench", "doctor", "planning"),
    },
    "__main__": {"cli"},
    "__init__": {
        *("_resources", "optim", "factory", "optimizer", "planning", "registry", "shipped_rules"),
        *("saving", "schema"),
    },  # lazily
    # builds what wheels carry, where neither torch nor an installed optfactory need be
    "_wheel": {
        *("errors", "optimizers", "registry", "rules", "schema"),
        *("codegen", "compiler", "prebuilt", "processor"),
    },
    # Hydra loads it in every app, so it stands alone; and nothing imports it
    "_hydra_plugin": set(),
}
TORCH_FREE = {
    *("errors", "_resources", "naming", "options", "rules", "schema", "optimizers", "registry"),
    *("field_types", "group_rules", "json_schema", "shipped_rules", "validation"),
    *("config_files", "config_input", "cli", "__main__", "__init__", "_hydra_plugin"),
    *("processor", "compiler", "prebuilt", "_wheel"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Absolute dotted names of everything a file imports, lazily or for types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "optfactory":
                yield from (f"optfactory.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def our_imports(path):
    """Units of the package that a file imports; a name of the package itself is `__init__`."""
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "optfactory":
            is_module = len(parts) > 1 and parts[1] in UNITS
            yield parts[1] if is_module else "__init__"


UNITS = {unit_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_in_the_allowed_direction(path):
    unit = unit_of(path)
    assert unit in ALLOWED, f"say in ALLOWED what the new module '{unit}' may import"
    assert set(our_imports(path)) <= ALLOWED[unit] | {unit}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if unit_of(path) in TORCH_FREE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_configuration_half_never_imports_torch(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "cupy", "numpy"}


def test_the_allowed_directions_have_no_cycle():
    # `__init__` is the exception: it defers its imports, and the CLI reads the version from it.
    rest = {unit: needs - {"__init__"} for unit, needs in ALLOWED.items() if unit != "__init__"}
    while rest:
        leaves = {unit for unit, needs in rest.items() if not needs & rest.keys()}
        assert leaves, f"a cycle among {sorted(rest)}"
        rest = {unit: needs for unit, needs in rest.items() if unit not in leaves}
