"""Pages in a real browser, without a screen: what scripts find there, and what goes wrong.

A page is shown in a frame of some width, a probe runs in it, and the browser prints the document
that the probe's answer was written into. Tests that need a browser are skipped where there is none.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")

# What a browser does by itself on a network, and what needs a screen or privileges.
_SILENT = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--virtual-time-budget=20000",
)
_LISTENER = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message || "a resource is missing"), true);
addEventListener("securitypolicyviolation", (event) => problems.push(event.violatedDirective));
</script>"""
_FRAME = """<!doctype html><meta charset="utf-8"><body>
<iframe width="{width}" height="800" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const page = frame.contentWindow, document = page.document;
  let answer;
  try {{ answer = ((page, document) => {{ {probe} }})(page, document); }}
  catch (error) {{ page.problems.push(String(error)); }}
  const told = window.document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify({{ answer, problems: page.problems }});
  frame.remove();
  window.document.body.append(told);
}});
</script>"""


def probed(page: str, probe: str, folder: Path, *, width: int = 1000, dark: bool = False) -> Any:
    """What a probe returns that runs in a page; problems of the page are an error.

    Args:
        page: the page's HTML.
        probe: the body of a JavaScript function of `page` (its window) and `document`.
        folder: for files.
        width: of the page, in CSS pixels.
        dark: whether the reader prefers dark pages.
    """
    assert BROWSER is not None
    heard = re.sub(r"<head>", lambda found: found[0] + _LISTENER, page, count=1)
    assert heard != page
    file = folder / "frame.html"
    text = _FRAME.format(width=width, page=html.escape(heard), probe=probe)
    file.write_text(text, encoding="utf-8")
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *_SILENT, *scheme, profile, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    assert found, f"the browser printed no answer: {done.stdout[-500:]} {done.stderr[-500:]}"
    told = json.loads(html.unescape(found[1]))
    assert told["problems"] == [], told["problems"]
    return told["answer"]
