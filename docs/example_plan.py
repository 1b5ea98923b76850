"""The plan of a real model as a page of the site, made by the command that the site shows."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path

URI = "how-to/plan-llama.html"
WORDS = (
    *(
        "plan",
        "paged_adamw8bit",
        "param_groups=no_decay_1d",
        "--model",
        "examples.plan_memory:llama",
    ),
    *("--device", "cuda", "--memory", "24GiB"),
)


def example_page() -> str:
    """The page that `optfactory plan --html` writes.

    Raises:
        RuntimeError: the command fails.
    """
    from optfactory.cli import main

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "plan.html")
        with contextlib.redirect_stdout(io.StringIO()):
            main([*WORDS, "--html", file])  # 1 where it does not fit
        if not os.path.exists(file):
            raise RuntimeError(f"no page was written by: optfactory {' '.join(WORDS)}")
        return Path(file).read_text(encoding="utf-8")


def example_link() -> str:
    """The sentence that leads there."""
    return (
        f"[The plan of a model of 7 billion parameters]({os.path.basename(URI)}) is what\n"
        f"`optfactory {' '.join(WORDS)} --html plan.html` writes."
    )
