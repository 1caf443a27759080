"""Laws of likelihoods, windows, texts and the cache."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.nll_cache import NllCache
from pytest_lora.numerics.likelihood import pair_scores, token_nll
from pytest_lora.tasks.definition import Definition, windows
from pytest_lora.tasks.texts import open_texts

SIZES = st.integers(1, 30)
SEEDS = st.integers(0, 10_000)
laws = settings(deadline=None, max_examples=60)


def drawn(seed: int, positions: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(positions, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (positions,), generator=generator)


def identity(logits: torch.Tensor) -> torch.Tensor:
    return logits.clone()


# ----------------------------------------------------------------------------- likelihoods


@laws
@given(SEEDS, SIZES, SIZES, SIZES)
def test_how_rows_are_cut_changes_nothing(seed: int, n: int, vocabulary: int, rows: int) -> None:
    logits, targets = drawn(seed, n, vocabulary)
    whole = token_nll(logits, targets, identity, rows=n)
    assert torch.equal(token_nll(logits, targets, identity, rows=rows), whole)
    assert bool((whole >= 0).all())


@laws
@given(SEEDS, SIZES, SIZES)
def test_the_chances_of_all_tokens_sum_to_one(seed: int, n: int, vocabulary: int) -> None:
    logits, _ = drawn(seed, n, vocabulary)
    each = [
        token_nll(logits, torch.full((n,), token), identity, rows=4).double().neg().exp()
        for token in range(vocabulary)
    ]
    torch.testing.assert_close(sum(each), torch.ones(n, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@laws
@given(SEEDS, SIZES, st.integers(2, 30), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(
    seed: int, n: int, vocabulary: int, constant: float
) -> None:
    logits, targets = drawn(seed, n, vocabulary)
    plain = token_nll(logits, targets, identity, rows=7)
    moved = token_nll(logits, targets, lambda z: z + constant, rows=7)
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-4)


@laws
@given(SEEDS, SIZES, st.integers(2, 30), st.floats(0, 3))
def test_divergence_is_never_negative_and_nothing_between_equals(
    seed: int, n: int, vocabulary: int, strength: float
) -> None:
    logits, targets = drawn(seed, n, vocabulary)
    noise, _ = drawn(seed + 1, n, vocabulary)
    found = pair_scores(logits, logits + strength * noise, targets, identity, identity, rows=5)
    assert bool((found.kl >= 0).all())
    same = pair_scores(logits, logits, targets, identity, identity, rows=5)
    assert bool((same.kl <= 1e-5).all())
    assert bool(same.agree.all())
    # Gibbs: what the base expects of the adapted model's loss exceeds its own by the divergence.
    p, q = logits.double().log_softmax(-1), (logits + strength * noise).double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found.kl.double(), expected, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- windows


@laws
@given(
    st.lists(st.integers(1, 99), max_size=60),
    st.integers(1, 12).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w))),
    st.sampled_from([0, None]),
)
def test_every_token_is_scored_once_with_what_stands_before_it(
    tokens: list[int], sizes: tuple[int, int], prefix: int | None
) -> None:
    window, stride = sizes
    definition = Definition("x", prefix, False, window, stride, "float32", True, 64)
    found = windows(tokens, definition)
    seen = tokens if prefix is None else [prefix, *tokens]
    assert [token for each in found for token in each.targets] == seen[1:]
    end = 0
    for number, each in enumerate(found):
        end += len(each.targets)
        assert each.ids == seen[max(0, end - window) : end]
        assert len(each.ids) <= window
        assert len(each.targets) <= (stride if number else window)
        assert len(each.ids) >= len(each.targets)


# ----------------------------------------------------------------------------- texts, cache

LINES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)


@laws
@given(st.lists(LINES, min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_texts_come_back_as_they_were_written(documents: list[str], end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
        path.write_bytes(end.join(lines).encode())
        found = open_texts(path)
        assert list(found) == documents
        assert [found[i] for i in reversed(range(len(found)))] == documents[::-1]
        assert found.digest == open_texts(documents).digest
        del found


ROWS = st.lists(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3), max_size=5
)


@laws
@given(st.dictionaries(st.integers(0, 9), ROWS, max_size=5), st.integers(0, 400))
def test_a_cache_that_was_cut_anywhere_gives_back_what_is_whole(
    batches: dict[int, list[list[float]]], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = NllCache(folder).ledger({"of": "base"})
        for number, rows in batches.items():
            ledger.put(number, rows)
        for path in Path(folder).glob("*.nll"):
            raw = path.read_bytes()
            path.write_bytes(raw[: max(0, len(raw) - cut)])
        cache = NllCache(folder)
        found = cache.ledger({"of": "base"})
        kept = [number for number in batches if found.get(number, len(batches[number])) is not None]
        assert kept == list(batches)[: len(kept)]
        for number in kept:
            known = found.get(number, len(batches[number]))
            assert [[math.copysign(1, x) for x in row] for row in known or []] == [
                [math.copysign(1, x) for x in row] for row in batches[number]
            ]
            assert known == batches[number]
        assert not cache.notes
