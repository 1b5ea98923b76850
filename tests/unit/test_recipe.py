"""A family that is added as CONTRIBUTING says is green in the whole suite, no test being touched.

Of the suite a sample runs, in a copy with that family: what lists names and fields, and, with
OPTFACTORY_ALL_TESTS=1, all that compares the new names with their reference, and some of each
folder. To run the rest there, too:

    python -c "from tests.recipe import follow; from pathlib import Path; follow(Path('copy'))"
    cd copy && OPTFACTORY_ALL_TESTS=1 python -m pytest -k qhm && python -m pytest
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipe import follow, run
from tests.sampling import runs_all

# Tests of all names or fields together, which do not bear a new name in theirs.
LISTS = (
    *("unit/test_registry.py", "unit/test_register.py", "unit/test_config_files.py"),
    "unit/test_docstrings.py",
)
# Others, which take longer.
LONG_LISTS = (
    *("unit/test_schema.py", "unit/test_json_schema.py"),
    *("unit/test_wheel_kernels.py", "unit/test_rejections.py", "planning/test_alternatives.py"),
    *("planning/test_text.py", "param_groups/test_config.py", "examples/test_plan_memory.py"),
)
# Tests with a case of their own for each name, family or rule.
EACH = (
    *("numerics/test_oracle_parity.py", "numerics/test_fields.py", "numerics/test_nonfinite.py"),
    *("options/test_compat.py", "options/test_maps_and_floor.py", "options/test_skipping.py"),
    *("options/test_tensor_wise.py", "options/test_combinations.py"),
    *("torch_api/test_state_dict.py", "torch_api/test_optimizer_api.py"),
    *("torch_api/test_paging.py", "checkpoints/test_widths.py", "planning/test_bytes.py"),
    *("robustness/test_invariants.py", "robustness/test_bounds.py"),
    *("conformance/test_long_runs.py", "param_groups/test_ready_rules.py"),
    *("emulation/test_kernels.py", "frameworks/test_torch_tools.py", "bench/test_traffic.py"),
)
# Without the longest runs, and with few kernels: those of all options take minutes to compile.
CHOSEN = (
    "qhm and not emulated and not 2000 and not paged_state_changes"
    " and (not cpu or (defaults_follow and fp32)) and (not native_backend or 8-fp32)"
)


def _passed(printed: str) -> int:
    """How many tests passed, none having failed."""
    found = re.search(r"^(\d+) passed", printed, re.M)
    assert found, printed[-2000:]
    return int(found[1])


@pytest.mark.slow
def test_a_family_added_by_the_recipe_is_green(tmp_path: Path, kernel_cache: Path) -> None:
    follow(tmp_path)
    pytest_ = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
    environment = {"OPTFACTORY_BACKEND": "reference", "OPTFACTORY_ALL_TESTS": "1"}
    lists = (*LISTS, *(LONG_LISTS if runs_all() else ()))
    assert _passed(run(tmp_path, *pytest_, *(f"tests/{name}" for name in lists))) > 50
    if not runs_all():
        return
    each = (f"tests/{name}" for name in EACH)
    assert _passed(run(tmp_path, *pytest_, "-k", CHOSEN, *each, **environment)) > 100
