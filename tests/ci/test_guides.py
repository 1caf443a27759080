"""The YAML of the guides is what GitHub and pre-commit take, and names only what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from example import ROOT
from pages import Block, blocks

yaml = pytest.importorskip("yaml")

OURS = re.compile(r"pytest-lora/pytest-lora(?P<place>/[\w./-]+)?@(?P<version>[\w.]+)")
RIGHTS = {"none": 0, "read": 1, "write": 2}


def declared(place: str) -> Mapping[str, Mapping[str, Any]]:
    """Inputs of our action (at the root or in a folder) or of a workflow that may be called."""
    file = ROOT / place.lstrip("/")
    file = file if file.suffix == ".yml" else file / "action.yml"
    data = yaml.safe_load(file.read_text("utf-8"))
    if "runs" in data:
        return data.get("inputs") or {}
    # YAML 1.1, which PyYAML reads, takes the key "on" for a truth value.
    return (data[True]["workflow_call"] or {}).get("inputs") or {}


def asked_rights(place: str) -> Iterator[tuple[str, str]]:
    """What the jobs of a workflow of ours ask of the token."""
    data = yaml.safe_load((ROOT / place.lstrip("/")).read_text("utf-8"))
    for job in (data, *data["jobs"].values()):
        yield from job.get("permissions", {}).items()


def faults(flow: Mapping[str, Any]) -> Iterator[str]:
    """What a workflow asks of ours that is not there, or does not give though it is needed."""
    for job in flow["jobs"].values():
        for use in (job, *job.get("steps", ())):
            found = OURS.fullmatch(use.get("uses", ""))
            if not found:
                continue
            place, given = found["place"] or "", use.get("with", {})
            inputs = declared(place)
            yield from (f"no input {name!r}" for name in given if name not in inputs)
            needed = [name for name, about in inputs.items() if about.get("required")]
            yield from (f"without {name!r}" for name in needed if name not in given)
            if place.endswith(".yml"):
                rights = job.get("permissions", flow.get("permissions", {}))
                for scope, right in asked_rights(place):
                    if RIGHTS[rights.get(scope, "none")] < RIGHTS[right]:
                        yield f"{scope}: {right} is not granted"


def schema(name: str) -> Any:
    """A schema that check-jsonschema brings along."""
    found = util.find_spec("check_jsonschema")
    if found is None or found.origin is None:
        pytest.skip("check-jsonschema has the schema")
    folder = Path(found.origin).parent / "builtin_schemas" / "vendor"
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def invalid(flow: Mapping[Any, Any]) -> list[str]:
    """How a workflow breaks GitHub's schema."""
    jsonschema = pytest.importorskip("jsonschema")
    text = {"on" if key is True else key: value for key, value in flow.items()}
    validator = jsonschema.Draft7Validator(schema("github-workflows"))
    return [error.message for error in validator.iter_errors(text)]


def parsed(block: Block) -> Any:
    return yaml.safe_load(block.code)


YAML = blocks("yaml", "yml")
WORKFLOWS = [block for block in YAML if re.search(r"^jobs:", block.code, re.M)]
HOOKS = [block for block in YAML if re.search(r"^repos:", block.code, re.M)]


def test_every_block_is_a_workflow_or_a_hook() -> None:
    assert len(WORKFLOWS) >= 3
    assert len(HOOKS) >= 1
    assert sorted(map(str, YAML)) == sorted(map(str, [*WORKFLOWS, *HOOKS]))


@pytest.mark.parametrize("block", WORKFLOWS, ids=str)
def test_a_workflow_names_only_what_is_there(block: Block) -> None:
    flow = parsed(block)
    assert list(faults(flow)) == []
    assert OURS.search(block.code), "what is it doing in our guide?"


@pytest.mark.parametrize("block", WORKFLOWS, ids=str)
def test_a_workflow_is_one_to_github(block: Block) -> None:
    assert invalid(parsed(block)) == []


@pytest.mark.parametrize("block", HOOKS, ids=str)
def test_a_hook_is_one_we_have(block: Block) -> None:
    ours = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    [repository] = parsed(block)["repos"]
    assert repository["repo"].endswith("/pytest-lora/pytest-lora")
    assert {hook["id"] for hook in repository["hooks"]} <= {hook["id"] for hook in ours}
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{repository["rev"].removeprefix("v")}"' in text


# What the tests above would find.

CALLS = """
on: [pull_request]
permissions: {contents: read}
jobs:
  one:
    uses: pytest-lora/pytest-lora/.github/workflows/lora-gpu.yml@v1
    with: {runners: "[]"}
  two:
    runs-on: ubuntu-latest
    steps:
      - uses: pytest-lora/pytest-lora@v1
        with: {profile: lora.toml, base_model: us/base}
"""


def test_what_is_not_there_is_found() -> None:
    assert list(faults(yaml.safe_load(CALLS))) == [
        "no input 'runners'",
        "pull-requests: write is not granted",
        "no input 'base_model'",
        "without 'adapter'",
    ]


def test_what_github_would_refuse_is_found() -> None:
    assert invalid(yaml.safe_load(CALLS)) == []
    assert invalid(yaml.safe_load(CALLS.replace("runs-on", "run-on")))
