"""Who may import whom inside the package; every other import fails here."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "optfactory"

# Each room, a folder or a file of the package, and which others it may import, from the ground up;
# files of one folder may import each other. A change here is a change of the architecture: keep the
# arrows pointing one way.
ALLOWED = {
    "errors": set(),
    # configuration: no torch
    "rules": {"errors"},
    "config": {"errors", "rules"},
    "optimizers": {"config", "errors", "matrix", "rules"},
    "plugins": {"config"},
    "families": {"config", "errors", "optimizers", "plugins", "rules"},
    "registry": {"config", "errors", "families", "plugins"},
    "group_schema": {"config", "registry", "rules"},
    "rule_check": {"config", "errors", "group_schema", "registry"},
    "catalog": {"config", "errors", "group_schema", "registry", "rules"},
    "build": {"config", "errors", "optimizers", "registry", "rules"},
    # engine
    "memory": {"errors"},
    "sharding": {"errors"},
    "state": {"config", "errors", "matrix", "memory", "rules", "sharding"},
    "groups": {"config", "errors", "group_schema", "rules", "sharding"},
    "step": {
        *("config", "errors", "group_schema", "groups", "matrix", "memory", "rules"),
        *("sharding", "state"),
    },
    "backends": {"build", "errors", "memory", "rules", "sharding", "state", "step"},
    "checkpoints": {
        *("config", "errors", "group_schema", "groups", "memory", "registry", "rules"),
        *("sharding", "state", "step"),
    },
    "matrix": {"errors"},
    "overlooked": set(),
    "reminders": {"groups", "overlooked", "step"},
    "group_config": {
        *("backends", "config", "errors", "group_schema", "groups", "matrix", "rules"),
    },
    "optimizer": {
        *("backends", "checkpoints", "config", "errors", "group_config", "group_schema", "groups"),
        *("memory", "reminders", "sharding", "state", "step"),
    },
    # what users call
    "factory": {"config", "errors", "groups", "optimizer", "registry", "rule_check"},
    "extend": {"config", "families", "optimizers", "rules"},
    "optim": {"config", "errors", "factory", "groups", "optimizer", "registry"},
    "planning": {
        *("catalog", "config", "errors", "factory", "group_config", "group_schema", "groups"),
        *("memory", "registry", "sharding", "state", "step"),
    },
    "explaining": {
        *("catalog", "config", "errors", "factory", "group_schema", "groups", "overlooked"),
        *("planning", "registry", "reminders", "step"),
    },
    "doctor": {"__init__", "backends", "build", "errors", "factory", "families", "memory"},
    "bench": {"__init__", "errors", "factory", "optimizer", "registry", "sharding"},
    "cli": {
        *("__init__", "bench", "catalog", "config", "doctor", "errors", "explaining"),
        *("factory", "planning", "registry"),
    },
    "__main__": {"cli"},
    "__init__": {  # lazily
        *("checkpoints", "config", "explaining", "factory", "optim", "optimizer", "planning"),
        *("registry", "rules"),
    },
    # Hydra loads it in every app, so it stands alone until an app asks for a name of another
    # package; and nothing imports it
    "_hydra_plugin": {"catalog", "registry"},
}
TORCH_FREE = {
    *("errors", "rules", "config", "optimizers", "plugins", "families", "registry"),
    *("group_schema", "rule_check"),
    *("catalog", "build"),
    *("cli", "__main__", "__init__", "_hydra_plugin"),
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
    assert unit in ALLOWED, f"say in ALLOWED what the new room '{unit}' may import"
    assert set(our_imports(path)) <= ALLOWED[unit] | {unit}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if unit_of(path) in TORCH_FREE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_configuration_half_never_imports_torch(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"torch", "cupy", "numpy"}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(path):
    """Modules of the package that a file imports; a package's `__init__` only where it is named."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in below if name in MODULES]
            whole = [node.module] if node.module in MODULES and len(found) < len(below) else []
            yield from (*found, *whole)


MODULES = {module_of(path): path for path in FILES}


def refuse_cycles(needs):
    while needs:
        leaves = {name for name, others in needs.items() if not others & needs.keys()}
        assert leaves, f"a cycle among {sorted(needs)}"
        needs = {name: others for name, others in needs.items() if name not in leaves}


def test_the_allowed_directions_have_no_cycle():
    # `__init__` is the exception: it defers its imports, and the CLI reads the version from it.
    refuse_cycles(
        {room: needs - {"__init__"} for room, needs in ALLOWED.items() if room != "__init__"}
    )


def test_no_files_import_each_other_in_a_circle():
    refuse_cycles(
        {
            name: set(modules_imported(path)) - {name, "optfactory"}
            for name, path in MODULES.items()
            if name != "optfactory"
        }
    )
