"""The shipped fixtures: what the manifest says about them holds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from example import FIXTURES, NEEDS_EXAMPLE

if TYPE_CHECKING:
    from types import ModuleType

GENERATED = ("base", "adapters", "data")
LIMIT = 8 * 2**20
ADAPTERS = ("all-linear-rslora", "attention-lora", "dora", "overtrained", "saved-head")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / "grammar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up while it is being run.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grammar() -> ModuleType:
    return _load("fixture_grammar")


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FIXTURES / "manifest.json").read_text())
    return content


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / "data" / name).read_text().splitlines()]


def _shipped() -> list[Path]:
    return [path for path in FIXTURES.rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_the_manifest_lists_every_generated_file_with_its_digest(manifest: dict[str, Any]) -> None:
    paths = [FIXTURES / "README.md"]
    for part in GENERATED:
        paths += [path for path in (FIXTURES / part).rglob("*") if path.is_file()]
    found = {
        path.relative_to(FIXTURES).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }
    assert found == manifest["files"]


def test_the_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in _shipped()) < LIMIT


def test_nothing_names_a_place_on_one_machine() -> None:
    absolute = re.compile(rb"(?<![\w.:/])/(?:home|tmp|root|work|usr|var|opt|mnt|Users)/|[A-Z]:\\\\")
    named = [path.name for path in _shipped() if absolute.search(_prose(path))]
    # The usage examples of the build script may name a temporary directory.
    assert named in ([], ["build.py"])


def _prose(path: Path) -> bytes:
    """The readable part of a file: of weights, only the header."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_the_grammar_is_deterministic(grammar: ModuleType) -> None:
    for make in (grammar.source_text, grammar.target_text, grammar.choice):
        once = [make(random.Random(seed)) for seed in range(20)]
        assert once == [make(random.Random(seed)) for seed in range(20)]
        assert len(set(once)) == len(once)


def test_the_held_out_data_is_what_the_grammar_makes(grammar: ModuleType) -> None:
    count = len(_rows("source_heldout.jsonl"))
    source, target, problems, choices = grammar.held_out(20, count)
    assert count >= 200
    assert [row["text"] for row in _rows("source_heldout.jsonl")] == source
    assert [row["text"] for row in _rows("target_heldout.jsonl")] == target
    assert [(row["prompt"], row["answer"]) for row in _rows("target_tasks.jsonl")] == [
        (item.prompt, str(item.answer)) for item in problems
    ]
    assert [(row["prompt"], tuple(row["choices"]), row["answer"]) for row in
            _rows("source_choices.jsonl")] == [
        (item.prompt, item.choices, item.answer) for item in choices
    ]  # fmt: skip


def test_training_texts_begin_with_nothing_held_out(grammar: ModuleType) -> None:
    source, target, problems, choices = grammar.held_out(20, 256)
    banned = [*source, *target, *(p.question for p in problems), *(c.prompt for c in choices)]
    starts = tuple(banned)
    for make, seed in (
        (grammar.source_text, "train source"),
        (grammar.target_text, "train target"),
    ):
        texts = grammar.training(make, seed, 1500, banned)
        assert len(set(texts)) == len(texts)
        assert not [text for text in texts if text.startswith(starts)]


def test_a_banned_text_is_left_out_of_the_training(grammar: ModuleType) -> None:
    texts = grammar.training(grammar.target_text, "x", 50, [])
    again = grammar.training(grammar.target_text, "x", 49, [texts[7][:40]])
    assert texts[7] not in again
    assert set(texts) - {texts[7]} == set(again)


def test_worked_answers_are_right(grammar: ModuleType) -> None:
    for seed in range(300):
        problem = grammar.problem(random.Random(seed))
        for step in problem.steps:
            left, sign, right, _, total = step.split()
            assert int(total) == int(left) + (int(right) if sign == "+" else -int(right))
            assert max(int(left), int(right), int(total)) <= grammar.LARGEST
        assert problem.steps[-1].endswith(f"= {problem.answer}")
        assert problem.text.endswith(f"\n#### {problem.answer}")


def test_every_choice_is_offered_once(grammar: ModuleType) -> None:
    for seed in range(300):
        item = grammar.choice(random.Random(seed))
        assert len(set(item.choices)) == len(item.choices) == 4


def test_every_adapter_names_the_base_in_the_repository(manifest: dict[str, Any]) -> None:
    assert sorted(manifest["adapters"]) == list(ADAPTERS)
    for name in ADAPTERS:
        config = json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "fixtures/base"


def test_the_measurements_show_learning_and_forgetting(manifest: dict[str, Any]) -> None:
    base = manifest["base"]["measured"]
    found = {name: entry["measured"] for name, entry in manifest["adapters"].items()}
    broken = found.pop("overtrained")
    assert base["source_choice_accuracy"] > 0.9
    assert base["target_exact_match"] < 0.1
    for sound in found.values():
        assert sound["target_perplexity"] < base["target_perplexity"] / 10
        assert sound["target_exact_match"] > base["target_exact_match"] + 0.3
        assert sound["source_perplexity"] < broken["source_perplexity"] / 5
    assert broken["source_perplexity"] > 20 * base["source_perplexity"]


@pytest.fixture(scope="module")
def source_perplexities() -> dict[str, float]:
    """The perplexity of the base and of every adapter on a slice of the held-out source."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from pytest_lora.loading import quiet

    tokenizer = transformers.AutoTokenizer.from_pretrained(FIXTURES / "base")
    texts = [row["text"] for row in _rows("source_heldout.jsonl")[:24]]
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]

    def perplexity(name: str) -> float:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
            if name != "base":
                model = peft.PeftModel.from_pretrained(model, str(FIXTURES / "adapters" / name))
        model.eval()
        total = 0.0
        with torch.inference_mode():
            for ids in rows:
                total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        return math.exp(total / sum(ids.shape[1] - 1 for ids in rows))

    return {name: perplexity(name) for name in ("base", *ADAPTERS)}


@NEEDS_EXAMPLE
def test_a_slice_reproduces_the_measured_forgetting(
    manifest: dict[str, Any], source_perplexities: dict[str, float]
) -> None:
    measured = {
        name: entry["measured"]["source_perplexity"]
        for name, entry in {"base": manifest["base"], **manifest["adapters"]}.items()
    }
    assert min(source_perplexities, key=source_perplexities.__getitem__) == "base"
    assert max(source_perplexities, key=source_perplexities.__getitem__) == "overtrained"
    for name, value in source_perplexities.items():
        # A slice of the texts: close on the scale of the differences, not equal.
        assert math.log(value) == pytest.approx(math.log(measured[name]), rel=0.25, abs=0.1)


@NEEDS_EXAMPLE
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_targeted_module_was_changed(name: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from pytest_lora.loading import quiet

    base = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "base")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with quiet():
        model = peft.PeftModel.from_pretrained(base, str(FIXTURES / "adapters" / name))
    after = model.merge_and_unload().state_dict()
    config = json.loads((FIXTURES / "adapters" / name / "adapter_config.json").read_text())
    changed = {
        key
        for key in before
        if float((after[key] - before[key]).norm() / before[key].norm()) > 0.01
    }
    suffixes = [f"{module}.weight" for module in config["target_modules"]]
    suffixes += [f"{module}.weight" for module in config["modules_to_save"] or []]
    suffixes += [f"{module}.weight" for module in config["trainable_token_indices"] or {}]
    assert changed == {key for key in before if key.endswith(tuple(suffixes))}
