"""Laws of reading, normalising and reading numbers."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

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
