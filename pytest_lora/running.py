"""What happens around a test about an adapter: verdicts are gathered, reasons become skips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from pytest_lora.carried import hand_on
from pytest_lora.collection import part_of, spec_of
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable
from pytest_lora.fixtures import RUN
from pytest_lora.records import CheckResult, Outcome, collecting
from pytest_lora.report.junit import case_properties

__all__ = ["showing_progress", "skip_if_blocked", "watch"]


def skip_if_blocked(item: pytest.Item) -> None:
    """Skip a check of the suite that a failed one makes meaningless, and say which.

    Where the failed one is not among the tests of this run, a skip would leave the run without any
    failure: that is an error.
    """
    spec, adapter = spec_of(item), adapter_name(item)
    if spec is None or adapter is None:
        return
    blocker = item.config.stash[RUN].blocked_by(spec, adapter)
    if blocker is None:
        return
    if _is_run(item.session, blocker, adapter):
        raise _Blocked(f"{blocker} did not pass, so this has no meaning yet")
    raise CannotRun(
        f"{blocker} did not pass, so this has no meaning yet, and {blocker} is not part of this"
        " run; select it as well to see what is wrong"
    )


def _is_run(session: pytest.Session, check: str, adapter: str) -> bool:
    specs = ((spec_of(item), adapter_name(item)) for item in session.items)
    return any(spec is not None and (spec.id, name) == (check, adapter) for spec, name in specs)


class _Blocked(Exception):
    """A prerequisite failed: a skip that ``--lora-strict`` lets stand, as the run fails anyway."""


@contextmanager
def watch(item: pytest.Item, phase: str) -> Iterator[None]:
    """Gather the results of one phase and hand them on with the test's report.

    Reasons for not deciding become skips, or failures where the settings say so.
    """
    with collecting() as results:
        try:
            yield
        except Exception as error:
            _translate(item, error, results)
        except pytest.skip.Exception as skipped:
            _ensure_result(item, results, Outcome.SKIPPED, str(skipped.msg))
            raise
        except pytest.fail.Exception as failed:  # by a fixture, or pytest-timeout
            _ensure_result(item, results, Outcome.ERROR, str(failed.msg))
            raise
        finally:
            _hand_on(item, phase, results)


@contextmanager
def showing_progress(item: pytest.Item) -> Iterator[None]:
    """Let long evaluations of this test show how far they have come, where somebody watches."""
    from pytest_lora.progress import progress_line

    run = item.config.stash[RUN]
    line = run.progress = progress_line(item.config, item.name)
    try:
        yield
    finally:
        run.progress = None
        if line is not None:
            line.clear()


def _translate(item: pytest.Item, error: Exception, results: list[CheckResult]) -> None:
    run = item.config.stash[RUN]
    if isinstance(error, _Blocked):
        _ensure_result(item, results, Outcome.SKIPPED, str(error))
        raise pytest.skip.Exception(str(error)) from None
    if isinstance(error, NotApplicable) or (isinstance(error, CannotRun) and error.missing):
        _ensure_result(item, results, Outcome.SKIPPED, str(error))
        if run.settings.strict and spec_of(item) is not None:
            _fail_strictly(results, str(error))
        raise pytest.skip.Exception(str(error)) from None
    if isinstance(error, CheckFailed):
        if error.result.outcome is Outcome.INCONCLUSIVE and run.settings.inconclusive == "skip":
            raise pytest.skip.Exception(str(error)) from None
    elif spec_of(item) is not None:
        text = " ".join(str(error).split())
        known = isinstance(error, CannotRun)
        _ensure_result(
            item, results, Outcome.ERROR, text if known else f"{type(error).__name__}: {text}"
        )
    raise error


def _fail_strictly(results: list[CheckResult], reason: str) -> None:
    text = f"could not be decided, which --lora-strict does not allow: {reason}"
    results[-1] = replace(results[-1], outcome=Outcome.FAILED, reason=text)
    raise pytest.fail.Exception(f"{results[-1].check}: {text}", pytrace=False) from None


def _ensure_result(
    item: pytest.Item, results: list[CheckResult], outcome: Outcome, reason: str
) -> None:
    """A check of the suite always leaves a result, even if it never came to measuring."""
    spec, adapter = spec_of(item), adapter_name(item)
    if spec is None or adapter is None or any(result.check == spec.id for result in results):
        return
    assert isinstance(item, pytest.Function)  # as every test of the suite
    results.append(CheckResult(spec.id, adapter, outcome, reason, part=part_of(item)))


def _hand_on(item: pytest.Item, phase: str, results: list[CheckResult]) -> None:
    if not results:
        return
    run, adapter = item.config.stash[RUN], adapter_name(item)
    for result in results:
        run.outcomes[result.adapter, result.check] = result.outcome
    about = {adapter: run.about(adapter)} if adapter else {}
    told = [run.placed(result).to_dict() for result in results]
    hand_on(item, phase, {"about": about, "results": told})
    if _wants_properties(item):
        # A test that is run again starts with what it left the last time.
        old = [pair for pair in item.user_properties if not pair[0].startswith("lora_")]
        item.user_properties[:] = [*old, *(p for row in results for p in case_properties(row))]


def _wants_properties(item: pytest.Item) -> bool:
    """Whether JUnit files of this run are of the family that has properties of test cases."""
    config = item.config
    return config.pluginmanager.hasplugin("junitxml") and config.getini("junit_family") == "xunit1"


def adapter_name(item: pytest.Item) -> str | None:
    """The adapter a test is parametrised with, if it is."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("lora_adapter") if callspec is not None else None
