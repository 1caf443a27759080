"""The scripts of docs/upstream.md show what the page says, under the PEFT it names."""

from __future__ import annotations

import builtins
import re
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
from example import ROOT

PAGE = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
SCRIPTS: dict[str, str] = dict(re.findall(r"^## (.*?)\n.*?^```py\n(.*?)^```$", PAGE, re.S | re.M))


def _error_of(script: str) -> type[Exception]:
    """What the script's last comment names, else that its assertion fails."""
    named = re.findall(r"  # (\w+Error)\b", script)
    found: type[Exception] = getattr(builtins, named[0]) if named else AssertionError
    return found


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_script_stops_with_an_error(title: str) -> None:
    [version] = re.findall(r"PEFT ([\d.]+) \(", PAGE)
    if peft.__version__ != version:
        pytest.skip(f"the page is about PEFT {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(_error_of(SCRIPTS[title])):
            exec(compile(SCRIPTS[title], title, "exec"), {"__name__": "upstream"})


def test_there_is_a_script_under_every_heading() -> None:
    assert len(SCRIPTS) == PAGE.count("\n## ") == PAGE.count("```py\n")
