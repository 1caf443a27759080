"""perplexity_drift: the number, the early verdict, the cache, and the faults it must notice."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import tiny_text
import torch
from example import FIXTURES, NEEDS_EXAMPLE, ROOT
from tiny_text import plain_nll, spoken_by

from pytest_lora.adapter import read_adapter
from pytest_lora.assertions import assert_perplexity_drift
from pytest_lora.baseline import Baseline, Reference
from pytest_lora.checks import forgetting
from pytest_lora.checks.forgetting import measure_perplexity_drift
from pytest_lora.errors import CannotRun, CheckFailed, UsageError
from pytest_lora.nll_cache import NllCache
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, collecting
from pytest_lora.subject import BaseModel, Subject, load_base
from pytest_lora.tasks.likelihood import Likelihoods

TOKENIZER = tiny_text.tokenizer()
TEXTS = spoken_by(tiny.llama(), 60)
HELDOUT = FIXTURES / "data" / "source_heldout.jsonl"


def subject(path: Path, **adapter: Any) -> Subject:
    """A tiny Llama, and an adapter that is worse at what it writes by 0.85 nats per token."""
    known = tiny.save_adapter(tiny.llama(), path, **adapter)
    known = tiny.rewrite_weights(
        known, lambda tensors: {n: t * (5 if "lora_B" in n else 1) for n, t in tensors.items()}
    )
    return Subject(known, BaseModel.from_module(tiny.llama(), tokenizer=TOKENIZER))


@pytest.fixture
def worse(tmp_path: Path) -> Subject:
    return subject(tmp_path / "adapter")


def measure(known: Subject, texts: Any = TEXTS, **options: Any) -> Measurement:
    return measure_perplexity_drift(known, texts, batch_tokens=80, **options)


def details(found: Measurement, domain: str = "texts") -> dict[str, Any]:
    return json.loads(json.dumps(found.details["domains"]))[domain]  # type: ignore[no-any-return]


def drifts(known: Subject, texts: list[str] = TEXTS) -> list[tuple[float, int]]:
    """Each document's drift in nats and its tokens, the plain way."""
    found = []
    for text in texts:
        ids = [1, *TOKENIZER.encode(text, add_special_tokens=False)]
        adapted = plain_nll(known.model, ids)
        with known.base.bare() as module:
            found.append((adapted - plain_nll(module, ids), len(ids) - 1))
    return found


def mean(parts: list[tuple[float, int]]) -> float:
    return sum(drift for drift, _ in parts) / sum(tokens for _, tokens in parts)


# ----------------------------------------------------------------------------- the number


def test_drift_is_the_mean_per_token_over_all_documents(worse: Subject) -> None:
    found = measure(worse)
    expected = mean(drifts(worse))
    assert found.value == pytest.approx(expected, abs=1e-6)
    assert (found.unit, found.count, found.low) == ("nats per token", 60, None)
    inside = details(found)
    assert inside["drift"] == found.value
    assert inside["perplexity_ratio"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert inside["adapted_nll"] - inside["base_nll"] == pytest.approx(expected, abs=1e-6)
    assert inside["documents"] == {"seen": 60, "all": 60}
    assert found.details["certain"] is True
    assert inside["kl"] > 0
    assert 0 < inside["same_top_token"] < 1


def test_the_worst_documents_are_named_with_where_they_stand(
    worse: Subject, tmp_path: Path
) -> None:
    path = tmp_path / "words.jsonl"
    lines = [json.dumps({"text": text}) for text in [*TEXTS, "w3\x1b[31m w4"]]
    path.write_text("\n".join(lines))
    found = measure(worse, path)
    parts = [drift / tokens for drift, tokens in drifts(worse, [*TEXTS, "w3\x1b[31m w4"])]
    worst = max(range(len(parts)), key=parts.__getitem__)
    listed = details(found, "words.jsonl")["worst"]
    assert [item["drift"] for item in listed] == sorted(
        (item["drift"] for item in listed), reverse=True
    )
    assert listed[0]["document"] == f"words.jsonl:{worst + 1}"
    assert listed[0]["drift"] == pytest.approx(parts[worst], abs=1e-5)
    assert found.where == (
        f"words.jsonl, words.jsonl:{worst + 1}: {listed[0]['drift']:+.4g} nats per token"
    )
    assert all(item["excerpt"].isprintable() for item in listed)


def test_an_excerpt_cannot_steer_a_terminal() -> None:
    assert forgetting._excerpt("a\x1b[31m\n\u202eb é") == "a\\x1b[31m\\n\\u202eb é"
    assert len(forgetting._excerpt("x" * 200)) == 80


def test_an_adapter_that_does_nothing_drifts_by_exactly_nothing(tmp_path: Path) -> None:
    known = subject(tmp_path)
    adapter = tiny.rewrite_weights(
        known.adapter,
        lambda tensors: {
            name: torch.zeros_like(tensor) if "lora_B" in name else tensor
            for name, tensor in tensors.items()
        },
    )
    same = Subject(adapter, known.base)
    found = assert_perplexity_drift(same, TEXTS, max_drift=0.0, batch_tokens=80)
    assert (found.value, found.count) == (0.0, 60)
    inside = details(measure(same))
    assert (inside["kl"], inside["same_top_token"]) == (pytest.approx(0, abs=1e-6), 1.0)
    with pytest.raises(CheckFailed):
        assert_perplexity_drift(same, TEXTS, max_drift=-1e-12, batch_tokens=80)


def test_several_domains_stand_beside_each_other_and_the_worst_counts(worse: Subject) -> None:
    halves = {"first": TEXTS[:30], "second": TEXTS[30:]}
    parts = {"first": mean(drifts(worse, TEXTS[:30])), "second": mean(drifts(worse, TEXTS[30:]))}
    found = measure(worse, halves)
    assert found.value == pytest.approx(max(parts.values()), abs=1e-6)
    assert found.count == 60
    for name, expected in parts.items():
        assert details(found, name)["drift"] == pytest.approx(expected, abs=1e-6)
    pooled = found.details["pooled"]
    assert pooled["drift"] == pytest.approx(mean(drifts(worse)), abs=1e-6)  # type: ignore[index, call-overload]
    assert str(found.where).startswith(max(parts, key=parts.__getitem__))


def test_documents_without_a_token_are_left_out_and_counted(worse: Subject) -> None:
    found = measure(worse, [*TEXTS[:5], "", "w7"], prefix=None)
    assert found.count == 5
    assert details(found)["without_a_token"] == 2
    with pytest.raises(UsageError, match="no document has a token to score"):
        measure(worse, ["", ""])


def test_the_standard_error_is_that_of_a_ratio(worse: Subject) -> None:
    parts = drifts(worse)
    tokens = sum(t for _, t in parts)
    r = mean(parts)
    squares = sum((y - r * t) ** 2 for y, t in parts)
    expected = math.sqrt(60 / 59 * squares) / tokens
    assert details(measure(worse))["standard_error"] == pytest.approx(expected, rel=1e-3)
    low, high = details(measure(worse))["for_the_domain"]
    assert high - r == pytest.approx(2.001 * expected, rel=1e-3)  # t with 59 degrees of freedom
    assert r - low == pytest.approx(high - r)
    alone = details(measure(worse, TEXTS[:1]))
    assert (alone["standard_error"], alone["for_the_domain"]) == (None, None)


def test_too_few_documents_to_speak_for_their_domain_is_said_with_how_many_it_takes(
    worse: Subject,
) -> None:
    begins = "texts: the verdict is about these documents; for the domain they come from"
    [note] = [note for note in measure(worse, max_drift=0.9).notes if begins in note]
    needed = int(note.split("about ")[-1].split()[0].replace(",", ""))
    assert 60 < needed < 1000
    assert not [note for note in measure(worse, max_drift=5.0).notes if begins in note]
    even = measure(worse, max_drift=measure(worse).value).notes
    assert any("ever more" in note for note in even)


# ----------------------------------------------------------------------------- verdicts

LIMITS = [-5.0, 0.0, 0.5, 0.8, 0.845, 0.85, 0.9, 1.5, 5.0]


@pytest.mark.parametrize("texts", ["one domain", "two domains"])
def test_early_verdicts_are_those_of_the_whole_set_and_intervals_agree(
    texts: str, worse: Subject
) -> None:
    source: Any = TEXTS if texts == "one domain" else {"a": TEXTS[:30], "b": TEXTS[30:]}
    cache = NllCache(None)
    whole = measure(worse, source).value
    used = []
    for limit in LIMITS:
        found = measure(worse, source, max_drift=limit, cache=cache)
        verdict = Bound.at_most(limit, "test").judge(found)
        assert verdict is (Outcome.PASSED if whole <= limit else Outcome.FAILED)
        assert (found.low is None) == (found.count == 60)
        used.append(found.count)
    assert min(used) < 40
    assert max(used) == 60


def test_the_whole_set_is_evaluated_when_asked_for(worse: Subject) -> None:
    found = measure(worse, max_drift=5.0, full=True)
    assert (found.count, found.low) == (60, None)
    assert "sequential" not in details(found)


def test_a_verdict_says_what_it_rests_on(worse: Subject) -> None:
    found = measure(worse, max_drift=5.0, alpha=0.01)
    inside = details(found)
    rests = inside["sequential"]
    assert found.details["alpha"] == rests["alpha"] == 0.01
    assert rests["used"] == found.count == inside["documents"]["seen"] < 60
    assert (rests["cap_origin"], rests["floor_origin"]) == ("screened", "declared")
    assert 0 < rests["unseen_above_cap"] < 1
    assert found.details["certain"] is False
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high <= 5.0
    declared = measure(worse, max_drift=5.0, max_document_drift=6.0)
    assert details(declared)["sequential"]["cap_origin"] == "declared"
    assert details(declared)["sequential"]["unseen_above_cap"] == 0
    two = measure(worse, {"a": TEXTS[:30], "b": TEXTS[30:]}, max_drift=5.0, alpha=0.01)
    assert details(two, "a")["sequential"]["alpha"] == 0.005
    assert details(two, "b")["sequential"]["alpha"] == 0.005
    family = two.details["family"]
    assert (family["method"], family["gates"]) == ("Holm", 2)
    assert all(p <= 0.01 for p in family["adjusted_p"].values())
    careful = measure(worse, max_drift=5.0, max_unseen=0.1)
    assert details(careful)["sequential"]["unseen_above_cap"] <= 0.1
    assert careful.count > found.count


def test_the_base_bounds_what_the_unseen_could_improve(worse: Subject) -> None:
    """No document can do better than a likelihood of 1: a drift of minus the base's own."""
    texts = spoken_by(tiny.llama(), 60, low=20, high=20)
    found = measure(worse, texts, max_drift=-100.0)
    assert found.count == 1
    assert details(found)["sequential"]["certain"] is True
    least = -max(plain for plain in _base_nll(worse, texts)) / 20
    assert details(found)["sequential"]["floor"] == pytest.approx(least, rel=1e-5)


def _base_nll(known: Subject, texts: list[str]) -> list[float]:
    with known.base.bare() as module:
        return [
            plain_nll(module, [1, *TOKENIZER.encode(text, add_special_tokens=False)])
            for text in texts
        ]


def test_the_same_inputs_give_the_same_result_byte_for_byte(worse: Subject, tmp_path: Path) -> None:
    def run(cache: NllCache | None = None, **options: Any) -> str:
        found = measure(worse, max_drift=2.0, cache=cache, **options).to_dict()
        for domain in found["details"]["domains"].values():  # type: ignore[index, call-overload, union-attr]
            domain.pop("from_cache")
        return json.dumps(found)

    cold = run(NllCache(tmp_path / "cache"))
    assert run() == cold
    assert run(NllCache(tmp_path / "cache")) == cold
    assert run(seed=1) != cold


def test_an_adapter_that_computes_nonsense_fails(tmp_path: Path) -> None:
    known = subject(tmp_path)
    broken = tiny.rewrite_weights(
        known.adapter, lambda tensors: {n: t * float("inf") for n, t in tensors.items()}
    )
    for options in ({}, {"full": True}):
        with pytest.raises(CheckFailed) as caught:
            assert_perplexity_drift(Subject(broken, known.base), TEXTS, max_drift=9.0, **options)
        measured = caught.value.result.measurement
        assert measured is not None
        assert not math.isfinite(measured.value)
        assert measured.low is None


def test_a_base_that_computes_nonsense_is_not_the_adapters_fault(tmp_path: Path) -> None:
    known = subject(tmp_path)
    with torch.no_grad():
        known.base.module.lm_head.weight[0, 0] = math.inf  # type: ignore[union-attr, index, operator]
    with pytest.raises(CannotRun, match="the base model's own likelihood of document"):
        measure(known)


def test_a_failure_tells_the_whole_story(worse: Subject) -> None:
    with collecting() as results, pytest.raises(CheckFailed) as caught:
        assert_perplexity_drift(worse, TEXTS, max_drift=0.01, batch_tokens=80)
    [result] = results
    assert (result.check, result.outcome) == ("perplexity_drift", Outcome.FAILED)
    text = str(caught.value)
    assert "nats per token" in text
    assert "at most 0.01" in text
    assert "worst: texts, texts[" in text
    assert "train fewer steps" in text


def test_a_live_model_is_measured_with_the_tokenizer_it_is_given(worse: Subject) -> None:
    from peft import PeftModel

    with tiny.quiet():
        model = PeftModel.from_pretrained(tiny.llama(), str(worse.adapter.path))
    found = assert_perplexity_drift(
        model, TEXTS, tokenizer=TOKENIZER, max_drift=5.0, batch_tokens=80, full=True
    )
    assert found.value == measure(worse).value
    with pytest.raises(UsageError, match=r"pass tokenizer=..., the base model brings none"):
        assert_perplexity_drift(model, TEXTS, max_drift=5.0)
    with torch.no_grad():  # given back as it was lent
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drift": math.nan}, "max_drift=nan is no number of nats per token"),
        ({"max_document_drift": math.inf}, "max_document_drift=inf is no number"),
        ({"alpha": 0.0}, "alpha=0.0 is no error rate"),
        ({"max_unseen": 2.0}, "max_unseen=2.0 is no share of the documents"),
        ({"divergence": -1}, "divergence=-1 is no number of documents"),
        ({"texts": {}}, "there is no domain to look at"),
        ({"texts": "nowhere.txt"}, "nowhere.txt: there is no such file"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], message: str, worse: Subject) -> None:
    with pytest.raises(UsageError, match=message):
        measure(worse, **options)
    with pytest.raises(UsageError, match="max_drift is an upper limit"):
        assert_perplexity_drift(worse, TEXTS, max_drift=Bound.at_least(0, "test"))


# ----------------------------------------------------------------------------- controls


def test_a_baseline_with_the_adapter_on_would_be_noticed(
    worse: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift measured against itself is nothing; the base has to be the base."""
    from contextlib import nullcontext

    right = measure(worse).value
    monkeypatch.setattr(
        "pytest_lora.tasks.causal_lm.BaseModelAlone.active",
        lambda self: nullcontext(self.subject.model),
    )
    assert measure(worse).value == 0 < right - 0.1


def test_disabling_is_not_what_the_base_is_taken_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``bias="all"`` is trained in place: with the adapter disabled the trained biases stay."""
    base = tiny.llama(attention_bias=True)
    known = tiny.save_adapter(tiny.llama(attention_bias=True), tmp_path, bias="all")
    ours = Subject(known, BaseModel.from_module(base, tokenizer=TOKENIZER))
    expected = mean(drifts(ours))
    assert measure(ours).value == pytest.approx(expected, abs=1e-6)
    with tiny.quiet(), ours.model.disable_adapter():
        disabled = plain_nll(ours.model, [1, 5, 6, 7])
    with ours.base.bare() as module:
        assert abs(plain_nll(module, [1, 5, 6, 7]) - disabled) > 1e-3


# ----------------------------------------------------------------------------- cache, progress


class Counting:
    """Counts documents that go through the models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = self.adapted = 0
        real = Likelihoods.score

        def score(likelihoods: Likelihoods, texts: Any, **options: Any) -> Any:
            self.base += len(texts) * options.get("base", True)
            self.adapted += len(texts) * options.get("adapted", True)
            return real(likelihoods, texts, **options)

        monkeypatch.setattr(Likelihoods, "score", score)

    def take(self) -> tuple[int, int]:
        counts = self.base, self.adapted
        self.base = self.adapted = 0
        return counts


def test_only_what_is_new_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    first, second = subject(tmp_path / "a"), subject(tmp_path / "b", r=2)
    cache = tmp_path / "cache"
    cold = measure(first, cache=NllCache(cache), divergence=0)
    assert counting.take() == (60, 60)
    assert details(cold)["from_cache"] == {"base": 0, "adapted": 0}
    warm = measure(first, cache=NllCache(cache), divergence=0)
    assert counting.take() == (0, 0)
    assert details(warm)["from_cache"] == {"base": 60, "adapted": 60}
    assert warm.value == cold.value
    other = measure(second, cache=NllCache(cache), divergence=0)
    assert counting.take() == (0, 60)
    assert other.value != cold.value
    measure(first, cache=NllCache(cache), divergence=0, window=32)
    assert counting.take() == (60, 60)
    measure(first, [*TEXTS, "w5"], cache=NllCache(cache), divergence=0)
    assert counting.take() == (61, 61)


def test_another_base_is_another_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(monkeypatch)
    known = subject(tmp_path / "adapter")
    measure(known, cache=NllCache(tmp_path / "cache"), divergence=0)
    moved = tiny.llama()
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    rotated = tiny.llama(rope_theta=5000.0)
    counting.take()
    for base in (moved, rotated):
        other = Subject(known.adapter, BaseModel.from_module(base, tokenizer=TOKENIZER))
        measure(other, cache=NllCache(tmp_path / "cache"), divergence=0)
        assert counting.take() == (60, 60)


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: Subject
) -> None:
    counting = Counting(monkeypatch)

    def stop(done: int, total: int, estimate: float | None, seconds_left: float | None) -> None:
        if done > 40:
            raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        measure(worse, cache=NllCache(cache), progress=stop, divergence=0)
    before = counting.take()[0]
    assert 40 < before < 60
    resumed = measure(worse, cache=NllCache(cache), divergence=0)
    assert counting.take() == (60 - before, 60 - before)
    assert resumed.value == measure(worse, divergence=0).value


KILLED = """
import sys
sys.path.insert(0, "tests/unit")
import test_checks_forgetting as t
from pathlib import Path
from pytest_lora.nll_cache import NllCache
def say(done, total, estimate, left):
    print(done, flush=True)
t.measure(t.subject(Path(sys.argv[1]) / "a"), t.TEXTS * 20, cache=NllCache(sys.argv[1] + "/cache"),
          progress=say, divergence=0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed there by other means")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    assert process.stdout is not None
    done = 0
    for line in process.stdout:
        done = int(line)
        if done > 40:
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert 40 < done < 1200
    counting = Counting(monkeypatch)
    cache = NllCache(tmp_path / "cache")
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    steps: list[int] = []

    def stop(*news: Any) -> None:
        steps.append(news[0])
        if counting.base:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(subject(tmp_path / "b"), TEXTS * 20, cache=cache, progress=stop, divergence=0)
    assert max(steps) > done  # everything that was told was there
    assert counting.base <= 20
    assert not cache.notes


def test_progress_is_told_with_an_estimate_and_the_time_left(worse: Subject) -> None:
    news: list[tuple[int, int, float | None, float | None]] = []
    found = measure(worse, progress=lambda *step: news.append(step))
    assert [total for _, total, _, _ in news] == [60] * len(news)
    assert [done for done, *_ in news] == sorted({done for done, *_ in news})
    assert (news[-1][0], news[-1][2], news[-1][3]) == (60, found.value, 0.0)
    assert all(left is not None and left >= 0 for *_, left in news)
    early: list[tuple[int, int, float | None, float | None]] = []
    found = measure(worse, max_drift=5.0, progress=lambda *step: early.append(step))
    assert [estimate for *_, estimate, _ in early[:3]] == [None] * 3
    assert early[-1][0] < 120
    assert early[-1][2] == found.value


# ----------------------------------------------------------------------------- the real thing


def judged(name: str, **options: Any) -> Measurement:
    adapter = read_adapter(FIXTURES / "adapters" / name)
    base = load_base(FIXTURES / "base", adapter=adapter)
    return assert_perplexity_drift(Subject(adapter, base), HELDOUT, max_drift=5.0, **options)


@NEEDS_EXAMPLE
def test_the_over_trained_example_fails_with_few_documents_and_the_sound_ones_pass(
    tmp_path: Path,
) -> None:
    """The bound lies between: the manifest has ln(39.5) = 3.7 for the worst of the sound ones and
    ln(1119.8) = 7.0 for the over-trained one.
    """
    cache = NllCache(tmp_path)
    with pytest.raises(CheckFailed) as caught:
        judged("overtrained", cache=cache)
    measured = caught.value.result.measurement
    assert measured is not None
    assert measured.count < 256 / 4
    for name in ("dora", "attention-lora"):
        found = judged(name, cache=cache)
        assert found.count < 256 / 4
        assert details(found, HELDOUT.name)["from_cache"]["base"] == 256


@NEEDS_EXAMPLE
def test_the_drift_of_the_example_is_what_its_manifest_says() -> None:
    manifest = json.loads((FIXTURES / "manifest.json").read_text())
    expected = {
        "base": manifest["base"]["measured"]["source_perplexity"],
        "adapted": manifest["adapters"]["dora"]["measured"]["source_perplexity"],
    }
    found = details(judged("dora", full=True), HELDOUT.name)
    assert math.exp(found["base_nll"]) == pytest.approx(expected["base"], rel=1e-5)
    assert math.exp(found["adapted_nll"]) == pytest.approx(expected["adapted"], rel=1e-5)


# --------------------------------------------------------------------------- against a baseline


def recorded(known: Subject, **options: Any) -> Reference:
    """What a run that records keeps of a drift."""
    found = measure(known, {"texts": TEXTS}, full=True, **options)
    result = CheckResult(
        "perplexity_drift",
        "a",
        Outcome.PASSED,
        measurement=found,
        bound=Bound.at_most(math.inf, "test"),
    )
    return Baseline("b.json").updated([result]).reference("a", "perplexity_drift")


@pytest.fixture
def nudged(tmp_path: Path) -> Subject:
    """The same adapter, trained a little on: a trifle worse."""
    known = subject(tmp_path / "later")
    again = tiny.rewrite_weights(
        known.adapter,
        lambda tensors: {n: t * (1.02 if "lora_B" in n else 1) for n, t in tensors.items()},
    )
    return Subject(again, known.base)


def test_the_same_adapter_is_at_its_own_baseline_to_the_bit(worse: Subject) -> None:
    reference = recorded(worse)
    again = measure(
        worse, max_drift=reference.value, reference=reference, max_unseen=0.0, divergence=0
    )
    assert again.value == reference.value
    assert again.low is None
    assert Bound.at_most(reference.value, "test").judge(again) is Outcome.PASSED


def test_pairs_decide_with_fewer_documents_than_the_base_does(
    worse: Subject, nudged: Subject
) -> None:
    reference = recorded(worse)
    limit = reference.value + 0.1
    alone = measure(nudged, max_drift=limit, alpha=0.01)
    paired = measure(nudged, max_drift=limit, alpha=0.01, reference=reference)
    seen, seen_in_pairs = (details(found)["documents"]["seen"] for found in (alone, paired))
    assert seen_in_pairs < seen
    assert paired.high is not None
    assert paired.high <= limit
    whole = measure(nudged)
    assert paired.low is not None
    assert paired.low <= whole.value <= paired.high
    since = details(paired)["baseline"]
    assert since["paired"] is True
    assert since["change"] == pytest.approx(paired.value - reference.value)


def test_a_regression_since_the_baseline_fails(worse: Subject, nudged: Subject) -> None:
    reference = recorded(worse)
    true = measure(nudged).value - reference.value
    assert 0 < true < 0.1, "the fault has to be one that the base alone would not show"
    limit = Bound.at_most(reference.value + true / 4, "baseline")
    with pytest.raises(CheckFailed):
        assert_perplexity_drift(nudged, TEXTS, max_drift=limit, reference=reference)
    better = recorded(nudged)
    assert_perplexity_drift(
        worse, TEXTS, max_drift=Bound.at_most(better.value, "baseline"), reference=better
    )


def test_all_documents_give_the_drift_whatever_it_is_compared_with(
    worse: Subject, nudged: Subject
) -> None:
    reference = recorded(worse)
    whole = measure(nudged, full=True, max_drift=9.0, reference=reference)
    assert whole.value == measure(nudged).value
    change, (low, high) = (details(whole)["baseline"][key] for key in ("change", "for_the_domain"))
    assert low < change < high
    assert high - low < sum(details(whole)["for_the_domain"]) * 0.5, "pairs vary less"


def test_a_declared_limit_of_documents_is_about_the_base_and_so_not_paired(worse: Subject) -> None:
    reference = recorded(worse)
    found = measure(
        worse, max_drift=reference.value + 1, max_document_drift=50.0, reference=reference
    )
    assert details(found)["baseline"]["paired"] is False
    assert found.value <= reference.value + 1


def test_a_reference_without_likelihoods_still_bounds_the_drift(worse: Subject) -> None:
    reference = replace(recorded(worse), items={"0": 3.0})
    found = measure(worse, max_drift=reference.value + 1, reference=reference)
    assert details(found)["baseline"]["paired"] is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"texts": TEXTS[1:]}, "texts was"),
        ({"window": 16}, "definition.stride was .* and is 16"),
        ({"prefix": None}, "definition.prefix was 1 and is absent"),
    ],
)
def test_a_baseline_of_another_definition_is_refused(
    worse: Subject, options: dict[str, Any], named: str
) -> None:
    reference = recorded(worse)
    texts = {"texts": options.pop("texts", TEXTS)}
    with pytest.raises(CannotRun, match=f"not comparable: {named}"):
        measure(worse, texts, reference=reference, max_drift=9.0, **options)


def test_a_baseline_of_another_base_is_refused(worse: Subject, tmp_path: Path) -> None:
    reference = recorded(worse)
    known = tiny.save_adapter(tiny.llama(), tmp_path / "same")
    base = tiny.llama()
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    other = Subject(known, BaseModel.from_module(base, tokenizer=TOKENIZER))
    with pytest.raises(CannotRun, match="not comparable: base was"):
        measure(other, reference=reference, max_drift=9.0)


def test_a_reference_is_of_one_domain(worse: Subject) -> None:
    with pytest.raises(UsageError, match="one domain, and here are a, b"):
        measure(worse, {"a": TEXTS, "b": TEXTS[:9]}, reference=recorded(worse))
