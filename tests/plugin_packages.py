"""Packages that add an optimizer, as pip leaves them."""

from __future__ import annotations

from pathlib import Path

_SOURCE = """
from typing import ClassVar
from optfactory.extend import OptimizerConfig, StateSpec, UpdateRule, register
{decorator}
class {cls}Config(OptimizerConfig):
    "Momentum."
    family: ClassVar[str] = {family!r}
    @classmethod
    def rule(cls, group):
        text = "m = fma(beta, m, g); u = m;"
        return UpdateRule("rule", (StateSpec("m", True),), ("beta",), text=text)
    @classmethod
    def scalars(cls, group, step):
        return {{"decay": 1.0, "step_size": group["lr"], "beta": 0.9}}
"""


def family_source(family: str, *, registered: bool = False) -> str:
    """A module with the class of a family, `BallConfig` for ``ball``, which may register itself."""
    decorator = "@register" if registered else ""
    return _SOURCE.format(decorator=decorator, cls=family.title(), family=family)


def install(site: Path, name: str, source: str, *values: str) -> None:
    """A package of one module, with its metadata and these entry points."""
    (site / f"{name}.py").write_text(source)
    info = site / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    lines = [f"entry{i} = {value}\n" for i, value in enumerate(values)]
    (info / "entry_points.txt").write_text("[optfactory.optimizers]\n" + "".join(lines))
