"""Tasks of lm-eval as tasks of a profile: early verdicts, both models, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lm_eval")

from example import NEEDS_EXAMPLE
from test_lm_eval_bridge import configuration, data, subject, writing

from pytest_lora.checks.learning import measure_task_accuracy, measure_task_change
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.nll_cache import NllCache, Scores
from pytest_lora.profile import Profile
from pytest_lora.stats.order import seeded_order
from pytest_lora.tasks import lm_eval_bridge as bridge
from pytest_lora.tasks.configure import task_from_config
from pytest_lora.tasks.lm_eval_bridge import LmEvalRun, lm_eval_task, load_lm_eval_tasks

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["data", "subject"]  # fixtures
pytestmark = NEEDS_EXAMPLE


def test_a_task_scores_as_the_bridge_does_and_stops_when_the_verdict_is_known(
    subject: Subject, data: Path
) -> None:
    task = lm_eval_task("own", configuration(data))
    [known] = load_lm_eval_tasks(configuration(data))
    plain = LmEvalRun(subject, known).run()
    found = measure_task_accuracy(subject, task, full=True)
    assert found.value == sum(plain.adapter) / 12
    scores: Any = found.details["by_item"]
    assert scores == {str(i): score for i, score in enumerate(plain.adapter)}
    change = measure_task_change(subject, task, full=True)
    assert change.value == pytest.approx((sum(plain.adapter) - sum(plain.base)) / 12)
    early = measure_task_accuracy(subject, task, min_accuracy=1.0)
    order = seeded_order(12, 0, "own")
    until = 1 + next(i for i, index in enumerate(order) if not plain.adapter[index])
    assert (early.count, early.details["certain"]) == (until, True)
    rules: Any = found.details["rules"]
    assert rules["lm_eval"]["metric"] == "acc"
    assert "expected" in str(early.where)


def test_finished_items_are_not_asked_again(subject: Subject, data: Path, tmp_path: Path) -> None:
    for computed in (12, 0):
        store = Scores(NllCache(tmp_path), "own")
        found = measure_task_accuracy(
            subject, lm_eval_task("own", configuration(data)), store=store
        )
        assert found.details["computed"] == computed
    fewer = lm_eval_task("own", configuration(data), num_fewshot=0)
    again = measure_task_accuracy(subject, fewer, store=Scores(NllCache(tmp_path), "own"))
    assert again.details["computed"] == 12


def test_written_answers_and_the_first_items(subject: Subject, data: Path) -> None:
    task = lm_eval_task("own", writing(data), limit=5)
    assert len(task) == 5
    found = measure_task_accuracy(subject, task)
    assert found.count == 5
    failing: Any = found.details["failing"]
    assert all(isinstance(item["answer"], str) for item in failing)


def test_what_cannot_be_meant(
    subject: Subject, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no metric 'acc_nrom', expected one of acc, acc_norm"):
        lm_eval_task("own", configuration(data), metric="acc_nrom")
    [known] = load_lm_eval_tasks(configuration(data))
    monkeypatch.setattr(bridge, "load_lm_eval_tasks", lambda spec: (known, known))
    with pytest.raises(UsageError, match="is a group of 2 tasks; name them one by one: own"):
        lm_eval_task("own", "both")
    monkeypatch.undo()
    monkeypatch.setattr(LmEvalRun, "_score", lambda *_: 3.5)
    with pytest.raises(UsageError, match=r"is 3\.5; an accuracy takes scores from 0 to 1"):
        measure_task_accuracy(subject, lm_eval_task("own", configuration(data)))


def test_a_gate_does_not_open_where_lm_eval_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CannotRun, match=r"task arc: .*pip install") as caught:
        task_from_config("arc", {"lm_eval": "arc_easy"})
    assert not caught.value.missing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("min_accuracy = 0.5", r"\[tasks.t\] has no 'path' and no 'lm_eval'"),
        ('lm_eval = "x"\npath = "y"', "path in lora.toml:3: 'path' does not go with lm_eval"),
        ('lm_eval = "x"\nstop = "y"', "stop in lora.toml:3: 'stop' does not go with lm_eval"),
        ('path = "x"\nmetric = "acc"', "metric in lora.toml:3: 'metric' goes with lm_eval only"),
        ('lm_eval = "x"\nmetrik = "acc"', "did you mean 'metric'"),
        ('lm_eval = "x"\nlimit = 0', "limit in lora.toml:3: got 0, expected a whole number"),
    ],
)
def test_profiles_that_cannot_be_meant(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(f"[tasks.t]\n{text}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        Profile.read(path, shown="lora.toml")


def test_a_definition_beside_the_profile_is_found(tmp_path: Path, data: Path) -> None:
    (tmp_path / "own.yaml").write_text(json.dumps(configuration(data)), encoding="utf-8")
    path = tmp_path / "lora.toml"
    path.write_text('[tasks.own]\nlm_eval = "own.yaml"\nlimit = 3\nshots = 0\n', encoding="utf-8")
    [entry] = Profile.read(path).entries("tasks", "any")
    task = task_from_config("own", dict(entry.values))
    assert len(task) == 3
    assert task.harness is not None
    assert task.harness.num_fewshot == 0
    assert not task.is_written
