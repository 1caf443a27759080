"""What a whole run writes into terminals, pipes and logs of all sorts, to the letter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_maker import lora_tensors, write_adapter
from example import QUICK

NAME = "caf\u00e9 \u2192 b"
_WATCHED = ("CI", "GITHUB_ACTIONS", "GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY", "GITLAB_CI")
_COLOUR = ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "PYTEST_ADDOPTS")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("terminals")
    (place / "pytest.ini").write_text("[pytest]\n")
    write_adapter(place / "good")
    bad = {**lora_tensors(), "base_model.model.x": ((2,), float("nan"))}
    write_adapter(place / NAME, tensors=bad)
    return place


def out(place: Path, *words: str, adapters: tuple[str, ...] = ("good",), **variables: str) -> str:
    """All that a run in a process of its own writes, not to a terminal unless variables say so."""
    kept = {k: v for k, v in os.environ.items() if k not in (*_WATCHED, *_COLOUR)}
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    command = [sys.executable, "-m", "pytest", *QUICK, "-p", "no:randomly"]
    command += ["-m", "lora", "--tb=no", "--lora-checks=adapter_files,finite_weights", *words]
    command += [f"--lora-adapter={name}" for name in adapters]
    done = subprocess.run(
        command,
        cwd=place,
        env={**kept, "COLUMNS": "80", "PYTHONIOENCODING": encoding, **variables},
        capture_output=True,
        check=False,
    )
    assert done.stderr == b""
    return done.stdout.decode(encoding).replace("\r\n", "\n")


def summary(text: str) -> list[str]:
    """The lines of our part: from its title to the next."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if " LoRA adapters " in line)
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("=="))
    return lines[start + 1 : end]


PLAIN = [
    "good  LORA, r=2, on nowhere/base",
    "  adapter_files   pass  0 problems (n=29)",
    "  finite_weights  pass  0 problems (n=96)",
    "",
]
BAD = [
    "{name}  LORA, r=2, on nowhere/base",
    "  adapter_files   pass  0 problems (n=30)",
    "  finite_weights  FAIL  1 problem (n=98), at most 0 (definition of the check);",
    "                        worst: tensor 'base_model.model.x'[0]: nan (2 of 2",
    "                        numbers are not finite) (expected finite numbers); go",
    "                        back to the last good checkpoint, or train again with a",
    "                        lower learning rate",
    "  -> finite_weights: go back to the last good checkpoint, or train again with a",
    "     lower learning rate",
    "",
]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
        {"CI": "true", "GITLAB_CI": "true"},
        {"CI": "true", "GITHUB_ACTIONS": "true"},
        {"TERM": "dumb", "COLUMNS": "80"},
    ],
    ids=["pipe", "no-color", "gitlab", "github", "dumb"],
)
def test_logs_have_the_table_and_nothing_that_a_terminal_would_obey(
    place: Path, variables: dict[str, str]
) -> None:
    text = out(place, **variables)
    assert summary(text) == PLAIN
    assert "\x1b" not in text
    assert "\r" not in text


def test_a_log_on_github_has_the_remarks_before_the_table(place: Path) -> None:
    text = out(place, adapters=("good", NAME), GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(place))
    [remark] = [line for line in text.splitlines() if line.startswith("::")]
    assert remark.startswith(f"::error file={NAME}/adapter_config.json,line=1,title=finite_weights")
    assert text.index(remark) < text.index(" LoRA adapters ")
    assert summary(text) == [*PLAIN, *(line.format(name=NAME) for line in BAD)]


def test_colours_change_no_letter(place: Path) -> None:
    text = out(place, "--color=yes")
    assert "\x1b[32m  adapter_files" in text
    assert summary(re.sub(r"\x1b\[[\d;]*m", "", text)) == PLAIN


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("cp1252", "caf\u00e9 -> b"), ("cp437", "caf\u00e9 -> b"), ("ascii", "caf\\xe9 -> b")],
)
def test_a_code_page_gets_what_it_can_show(place: Path, encoding: str, name: str) -> None:
    text = out(place, adapters=(NAME,), PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert summary(text) == [line.format(name=name) for line in BAD]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            "40",
            [
                "  pass  adapter_files",
                "      0 problems (n=29)",
                "  pass  finite_weights",
                "      0 problems (n=96)",
            ],
        ),
        ("60", PLAIN[1:3]),
        ("200", PLAIN[1:3]),
    ],
)
def test_any_width(place: Path, columns: str, lines: list[str]) -> None:
    text = out(place, COLUMNS=columns)
    assert summary(text)[1:-1] == lines
    ours = text[text.index(" LoRA adapters ") :]
    assert max(map(len, ours.splitlines())) <= int(columns)


def test_quiet_shows_what_did_not_pass(place: Path) -> None:
    text = out(place, "-q", adapters=("good", NAME))
    lines = [line.format(name=NAME) for line in BAD]
    start = text.splitlines().index(lines[0])
    assert text.splitlines()[start : start + len(lines) - 1] == [lines[0], *lines[2:]]
    assert "LoRA" not in out(place, "-q").replace("LORA", "")


def test_verbose_has_the_notes(place: Path) -> None:
    lines = summary(out(place, "-v"))
    assert lines[0] == PLAIN[0]
    assert [line for line in lines if line.startswith("  adapter_files")] == [PLAIN[1]]
