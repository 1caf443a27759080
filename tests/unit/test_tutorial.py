"""The tutorial, followed to the letter: its files written, its gates run, its verdicts compared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from example import NEEDS_EXAMPLE, ROOT

pytest.importorskip("torch")
pytest.importorskip("peft")

BLOCK = re.compile(r"^```(sh|toml|text)\n(.*?)^```$", re.S | re.M)
VERDICT = re.compile(r"^  ([a-z_]+\[\w+\]) +(pass|FAIL|skip|ERROR)", re.M)
GATE = "--lora-profile=gate.toml"


def steps() -> Iterator[tuple[str, str]]:
    """The blocks of the page, in order, down to the part on CI."""
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for block in BLOCK.finditer(text.partition("## Put it into CI")[0]):
        yield block[1], block[2].replace("\\\n", " ")


@NEEDS_EXAMPLE
def test_whoever_follows_the_tutorial_sees_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "PYTEST_ADDOPTS": "-p no:randomly -p no:cacheprovider",
        "PYTEST_LORA_CACHE": str(tmp_path / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("CI", None)  # where a baseline is not recorded
    said, compared = "", 0
    for kind, text in steps():
        if kind == "toml":
            (tmp_path / "gate.toml").write_text(text, encoding="utf-8")
        elif kind == "sh":
            said = ""
            if GATE in text:
                command = shlex.split(text)
                assert command[:3] == ["python", "-m", "pytest"]
                done = subprocess.run(
                    [sys.executable, *command[1:]],
                    cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
                said = done.stdout
                assert done.returncode == ("FAIL" in said), said + done.stderr
                assert VERDICT.search(said), said
        elif said:  # the command before was run
            assert VERDICT.findall(text) == VERDICT.findall(said)
            compared += 1
    assert compared == 3
    assert (tmp_path / "lora-baseline.json").is_file()
