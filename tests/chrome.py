"""A real browser for tests of the HTML report: Debian's ``chromium``, without a window."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDS_CHROMIUM = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)
# Who asked, in Chromium's log, where it was the browser on its own account and no page.
_BROWSER = "not an origin"
_LOCAL = ("file:", "data:", "chrome:", "about:")


@dataclass(frozen=True)
class Seen:
    """What the browser did with a page.

    Attributes:
        dom: the document as it stands after loading.
        console: what it wrote to its console.
        requests: addresses it asked for, other than local ones.
    """

    dom: str
    console: list[str]
    requests: list[str]


def look_at(page: Path, folder: Path) -> Seen:
    """Load ``page`` from ``file://`` and watch the console and the network."""
    log = folder / "net.json"
    done = _run(folder, f"--log-net-log={log}", "--dump-dom", page.as_uri())
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(done.stdout, console, _requests(log))


def picture(
    page: Path,
    target: Path,
    folder: Path,
    *,
    dark: bool = False,
    width: int = 1200,
    height: int = 900,
) -> None:
    """Write a screenshot of the top of ``page``, as a reader with that colour scheme sees it."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(folder, scheme, f"--window-size={width},{height}", f"--screenshot={target}", page.as_uri())


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def _requests(log: Path) -> list[str]:
    """Addresses that a page asked for, in Chromium's own log of its network stack."""
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params", {}) for event in events]
    urls = {item["url"] for item in asked if item.get("initiator", _BROWSER) != _BROWSER}
    return sorted(url for url in urls if not url.startswith(_LOCAL))
