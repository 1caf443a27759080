"""Laws of reading, normalising and reading numbers."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("torch")

from pytest_lora.baseline import Reference
from pytest_lora.checks.learning import _paired
from pytest_lora.data import _floor
from pytest_lora.profile import Entry
from pytest_lora.quantities import parse_floor
from pytest_lora.tasks import rows
from pytest_lora.tasks.formats import read_task
from pytest_lora.tasks.graders import best_choice, final_number, normalise
from pytest_lora.tasks.scoring import excerpt

TEXT = st.text(st.characters(codec="utf-8"))
WORDS = TEXT.filter(str.strip)


@given(st.lists(st.tuples(TEXT, WORDS), min_size=1, max_size=5), st.booleans(), st.integers(1, 40))
def test_lines_and_arrays_say_the_same_however_they_are_cut(
    pairs: list[tuple[str, str]], escaped: bool, chunk: int
) -> None:
    records = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    texts = {
        "x.jsonl": "\n".join(json.dumps(record, ensure_ascii=escaped) for record in records),
        "x.json": json.dumps(records, ensure_ascii=escaped, indent=1),
    }
    for name, text in texts.items():
        with TemporaryDirectory() as folder, patch.object(rows, "_CHUNK", chunk):
            path = Path(folder, name)
            path.write_bytes(text.encode())
            items = read_task(path).items
        assert [(item.prompt, item.answer) for item in items] == pairs


@given(st.text(st.characters(codec="ascii")))
def test_case_and_white_space_around_do_not_count(text: str) -> None:
    assert normalise(f" {text.upper()}\n") == normalise(text.lower())


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${}", "#### {}", "so {}.", "{} ."]))
def test_numbers_written_with_separators_are_read_back(number: int, form: str) -> None:
    for text in (f"{number}", f"{number:,}"):
        assert final_number(form.format(text)) == number


@given(st.decimals(-(10**6), 10**6, places=2))
def test_decimals_are_read_back(number: Decimal) -> None:
    assert final_number(f"it is {number:,}") == number


SHARES = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(SHARES, st.integers(0, 1000))
@example((10, 8), 100)
@example((100, 57), 40)
def test_exactly_the_loss_that_is_allowed_is_allowed(
    share: tuple[int, int], thousandths: int
) -> None:
    """Whatever floats make of it: the least count is that of exact arithmetic."""
    size, right = share
    floor = parse_floor(f"baseline - {thousandths // 10}.{thousandths % 10}%")
    needed = max(0, math.ceil(right - Fraction(thousandths * size, 1000)))

    entry = Entry("tasks", "t", {"min_accuracy": floor}, {"min_accuracy": "lora.toml:3"})
    reference = Reference(right / size, "accuracy", size, {})
    bound = _floor(entry, False, lambda _: reference)[0]["min_accuracy"]
    assert bound.admits(needed / size)
    assert not needed or not bound.admits((needed - 1) / size)

    def change(now: int) -> float:
        pairs = zip([1] * right + [0] * (size - right), [1] * now + [0] * (size - now), strict=True)
        return float(_paired(list(pairs), 0.0, 0.95)["change"])

    assert change(needed) >= floor.value
    assert not needed or change(needed - 1) < floor.value


@given(st.lists(st.floats(-1e6, 0), min_size=2, max_size=6), st.integers(1, 50))
def test_equal_lengths_change_no_choice(values: list[float], length: int) -> None:
    best = best_choice(values, [1.0] * len(values))
    assert best is not None
    assert values[best] == max(values)
    scaled = best_choice(values, [float(length)] * len(values))
    assert scaled is not None
    assert values[scaled] / length == max(values) / length


@given(TEXT)
def test_excerpts_are_printable_and_short(text: str) -> None:
    shown = excerpt(text)
    assert len(shown) <= 120
    assert shown.isprintable()
