"""A page in headless Chromium: what its scripts noted, and what the console said."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

# No traffic of its own, and a profile that is thrown away.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--enable-logging=stderr --window-size=1200,900""".split()

# A probe calls note(name, value).
NOTE = """<script>{
const note = (name, value) =>
  parent.document.documentElement.setAttribute("data-" + name, String(value));
%s
}</script></body>"""

needed = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@dataclass(frozen=True)
class Opened:
    """What a page's probe noted, and the lines of its console."""

    notes: dict[str, str]
    console: list[str]


def opened(page: str, probe: str, folder: Path, *, width: int, height: int = 844) -> Opened:
    """Open a page in a frame of this size, and run the probe in it when it is loaded.

    A frame, since a window is never narrower than 500 pixels.
    """
    inner = html.escape(page.replace("</body>", NOTE % probe))
    frame = folder / "frame.html"
    frame.write_text(
        "<!doctype html><html><body>"
        f'<iframe width="{width}" height="{height}" style="border:0" srcdoc="{inner}"></iframe>'
        "</body></html>"
    )
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    tag = re.search("<html([^>]*)>", done.stdout)
    notes = re.findall('data-([a-z]+)="([^"]*)"', tag[1] if tag else "")
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened({name: html.unescape(value) for name, value in notes}, console)
