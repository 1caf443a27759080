"""The pictures of the README: what they show is what runs print."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest
from adapter_maker import lora_tensors, write_adapter
from example import NEEDS_EXAMPLE, ROOT

PICTURES = ROOT / "docs" / "pictures"
LOOKS = ("light", "dark")
_SPACE = "{http://www.w3.org/XML/1998/namespace}space"
_ANSI = re.compile(r"\x1b\[(\d+)m")

pytestmark = NEEDS_EXAMPLE


def maker() -> ModuleType:
    path = ROOT / "docs" / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(svg: str) -> list[tuple[str, str]]:
    """The lines of a picture, each with its colour."""
    root = ET.fromstring(svg)
    texts = [element for element in root if element.tag.endswith("}text")]
    assert all(element.get(_SPACE) == "preserve" for element in texts)
    return [(element.text or "", element.get("fill", "")) for element in texts]


@pytest.mark.parametrize("look", LOOKS)
def test_the_terminal_of_the_readme_is_drawn_as_it_stands_there(look: str) -> None:
    pictures = maker()
    svg = (PICTURES / f"terminal-{look}.svg").read_text("utf-8")
    text = pictures.readme_block(pictures.BLOCK)
    assert svg == pictures.terminal_svg(text, look), "run docs/make_pictures.py --terminal"
    assert [line for line, _ in shown(svg)] == text.splitlines()


@pytest.mark.parametrize("look", LOOKS)
def test_a_real_run_is_drawn_in_its_words_and_colours(tmp_path: Path, look: str) -> None:
    write_adapter(tmp_path / "good")
    stray = {**lora_tensors(), "base_model.model.stray": ((2,), float("nan"))}
    write_adapter(tmp_path / "<bad>", tensors=stray)
    words = [
        "-p",
        "no:cacheprovider",
        "--color=yes",
        "--tb=no",
        "-m",
        "lora",
        "--lora-checks=files",
    ]
    words += [f"--lora-adapter={name}" for name in ("good", "<bad>")]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    coloured = done.stdout[done.stdout.index("LoRA adapters") :].splitlines()[1:]
    pictures = maker()
    plain = [_ANSI.sub("", line) for line in coloured]
    drawn = shown(pictures.terminal_svg("\n".join(plain), look))
    assert [line for line, _ in drawn] == plain
    names = {"32": "good", "31": "bad", "33": "warn"}
    for line, (text, colour) in zip(coloured[:-2], drawn, strict=False):
        first = _ANSI.match(line)
        said = names[first[1]] if first and first[1] in names else "ink"
        assert colour == pictures.LOOKS[look][said], text


def test_the_readme_shows_pictures_that_are_there_small_and_in_both_looks() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r'(?:src|srcset)="(docs/pictures/[^"]+)"', text))
    assert {name.rpartition("-")[2].partition(".")[0] for name in named} == set(LOOKS)
    assert {ROOT / name for name in named} == set(PICTURES.iterdir())
    for name in named:
        data = (ROOT / name).read_bytes()
        assert len(data) < 300_000, name
        assert data.startswith(b"\x89PNG" if name.endswith(".png") else b"<svg"), name
    shows = re.findall(r"<picture>.*?</picture>", text, re.DOTALL)
    assert shows
    for picture in shows:
        assert 'media="(prefers-color-scheme: dark)"' in picture
        assert re.search(r'alt="[^"]{20,}"', picture), "who does not see it is told what it shows"
