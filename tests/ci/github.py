"""Runs the scripts of ``ci/`` with the variables GitHub gives a step, and reads what they leave."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from example import QUICK, ROOT

CI = ROOT / "ci"
NEEDS_SHELL = pytest.mark.skipif(sys.platform == "win32", reason="a script for a POSIX shell")
Done = subprocess.CompletedProcess[str]


class Step:
    """A step in ``folder``, with the files by which GitHub and a step tell each other things."""

    def __init__(self, folder: Path, event_name: str = "push", event: Any = None) -> None:
        self.folder = folder
        self.files = folder.parent / f"{folder.name}-step"
        self.files.mkdir(exist_ok=True)
        (self.files / "event.json").write_text(json.dumps(event or {}), encoding="utf-8")
        named = ("GITHUB_OUTPUT", "GITHUB_ENV", "GITHUB_STEP_SUMMARY")
        self.variables = {
            **{name: str(self.files / name) for name in named},
            "GITHUB_ACTIONS": "true",
            "GITHUB_EVENT_NAME": event_name,
            "GITHUB_EVENT_PATH": str(self.files / "event.json"),
            "GITHUB_REPOSITORY": "our/adapters",
            "GITHUB_SHA": "0" * 40,
            "GITHUB_WORKSPACE": str(folder),
            "RUNNER_TEMP": str(self.files),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTEST_ADDOPTS": shlex.join(QUICK),
        }

    def run(self, *command: str | Path, **variables: str) -> Done:
        for name in ("GITHUB_OUTPUT", "GITHUB_ENV"):
            (self.files / name).unlink(missing_ok=True)
        words = list(map(str, command))
        if words[0].endswith(".py"):
            words.insert(0, sys.executable)
        return subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, **self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def outputs(self) -> Mapping[str, str]:
        path = self.files / "GITHUB_OUTPUT"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return {
            found["name"]: found["value"]
            for found in re.finditer(
                r"^(?P<name>\w+)<<(?P<frame>\w+)\n(?P<value>.*?)\n(?P=frame)$", text, re.M | re.S
            )
        }

    def left(self, name: str) -> str:
        path = self.files / name
        return path.read_text(encoding="utf-8") if path.exists() else ""
