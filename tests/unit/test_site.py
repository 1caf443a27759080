"""The documentation as a site: every page has its place, every public name its entry."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example import ROOT

import pytest_lora
from pytest_lora.catalog import CHECKS

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
ENTRY = re.compile(r"^::: ([\w.]+)$", re.M)


def entries(*pages: str) -> list[str]:
    """What the reference pages take from docstrings."""
    files = [DOCS / "reference" / page for page in pages] or sorted((DOCS / "reference").iterdir())
    return [name for file in files for name in ENTRY.findall(file.read_text("utf-8"))]


def configuration() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads mkdocs.yml")
    data: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    return data


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(part)


def test_every_page_stands_in_the_navigation_once() -> None:
    named = list(pages_of(configuration()["nav"]))
    assert sorted(named) == sorted(PAGES)


def test_the_site_asks_for_nothing_from_outside() -> None:
    data = configuration()
    assert data["strict"] is True
    assert data["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript", "extra_css", "extra"} & set(data)


def test_the_index_of_checks_is_the_catalogue() -> None:
    text = (DOCS / "checks" / "index.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert rows == [f"| [`{c.id}`]({c.id}.md) | {c.question} | {c.need.label} |" for c in CHECKS]


def test_the_reference_has_every_public_name_once() -> None:
    named = [name for name in entries() if re.fullmatch(r"pytest_lora\.\w+", name)]
    assert sorted(named) == sorted(f"pytest_lora.{name}" for name in pytest_lora.__all__)


def test_the_reference_has_every_fixture() -> None:
    text = (ROOT / "pytest_lora" / "fixtures.py").read_text("utf-8")
    made = re.findall(r"^@pytest\.fixture.*\ndef (\w+)", text, re.M)
    held = {name.rpartition(".")[2] for name in entries("fixtures.md")}
    assert held == set(made) - {"lora_run"}  # the one that is not for overriding


def test_the_reference_has_every_strategy_and_the_contract() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from pytest_lora import strategies
    from pytest_lora.contract import cells

    for page, module in {"strategies.md": strategies, "contract.md": cells}.items():
        assert set(entries(page)) == {f"{module.__name__}.{name}" for name in module.__all__}


# --------------------------------------------------------------------------------------- the hook


def hook() -> Any:
    spec = importlib.util.spec_from_file_location("site_roles", DOCS / "site_roles.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("role", "link"),
    [
        (":class:<code>~a.b.C</code>", '<autoref optional identifier="a.b.C"><code>C</code>'),
        (":func:<code>a.b</code>", '<autoref optional identifier="a.b"><code>a.b</code>'),
    ],
)
def test_roles_are_links(role: str, link: str) -> None:
    made = hook().on_page_content(f"<p>see {role}.</p>", page=None)
    assert made == f"<p>see {link}</autoref>.</p>"


def test_other_code_stays() -> None:
    text = "<p>:class: <code>a</code>, note:<code>b</code>, :class:<code>a b</code></p>"
    assert hook().on_page_content(text) == text


# -------------------------------------------------------------------------------------- the build

OUTSIDE = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\s(?:src|srcset)=[\"']?(?:https?:)?//"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon))[^>]*"
    r"\shref=[\"']?(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a page, link, anchor or name that does not resolve fails the build."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'pytest-lora[docs]'")
    folder: Path = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_every_page_and_no_program(site: Path) -> None:
    made = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert made - {"404.md"} == PAGES
    assert list(site.rglob("*.py")) == []


def test_no_page_asks_for_anything_from_outside(site: Path) -> None:
    asking = [page for page in site.rglob("*.html") if OUTSIDE.search(page.read_text("utf-8"))]
    assert asking == []
    outside = '<link rel="stylesheet" href="https://fonts.example/a.css">'
    assert OUTSIDE.search(outside), "a page that asks would be seen"


def test_the_reference_shows_docstrings_and_signatures(site: Path) -> None:
    for name in pytest_lora.__all__:
        pages = site.joinpath("reference").glob("*.html")
        assert any(f'id="pytest_lora.{name}"' in page.read_text("utf-8") for page in pages), name
    page = (site / "reference" / "assertions.html").read_text("utf-8")
    assert "The folder is complete, readable and free of anything that could run." in page
    assert not re.search(r":(?:class|func|meth):<code>", page)
