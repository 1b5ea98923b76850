"""`.ci/run` runs what the README tells users to run."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def readme_command():
    """The one line of the code block behind the marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"<!-- test command -->\n```bash\n(.*?)\n```\n", text, re.DOTALL)
    assert "\n" not in block
    return block


def test_the_script_reads_the_readmes_test_command():
    (lookup,) = re.findall(r"^test_command=\$\((.*)\) \|\|$", SCRIPT, re.MULTILINE)
    done = subprocess.run(["bash", "-c", lookup], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == readme_command()
    assert SCRIPT.rstrip().endswith('bash -c "$test_command"')


def test_the_command_installs_the_test_extra_and_runs_pytest():
    words = readme_command().split()
    assert '".[test]"' in words
    assert ".venv/bin/pytest" in words


def test_the_script_and_the_readme_agree_on_the_version_of_torch():
    (in_script,) = set(re.findall(r"torch==[\d.]+\d", SCRIPT))
    assert in_script in readme_command().split()


def test_the_script_stops_at_the_first_failure():
    assert "\nset -euo pipefail\n" in SCRIPT
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
