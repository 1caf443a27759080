"""``assert_*``: measure, judge, and raise with the evidence.  Usable in any test runner.

Each returns the measurement when the adapter passes, and raises

* :class:`~pytest_lora.errors.CheckFailed` (an ``AssertionError``) when it fails,
* :class:`~pytest_lora.errors.NotApplicable` when the question has no meaning for this adapter,
* :class:`~pytest_lora.errors.CannotRun` when the question could not be answered.

``subject`` is a :class:`~pytest_lora.subject.Subject` (the fixture ``lora_subject``) or a
``peft.PeftModel`` together with ``inputs`` for its forward pass.  ``bound`` replaces the default
bound: a number or a :class:`~pytest_lora.records.Bound`; see ``pytest --lora-list-checks`` for the
checks that have a bound to move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.adapter import Adapter, read_adapter
from pytest_lora.catalog import find_check
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, emit
from pytest_lora.report.text import explain

if TYPE_CHECKING:
    import torch

    from pytest_lora.subject import Subject

__all__ = [
    "assert_adapter_effect",
    "assert_adapter_files",
    "assert_adapter_isolation",
    "assert_base_compatibility",
    "assert_config_matches_weights",
    "assert_disable_equals_base",
    "assert_dtype_stability",
    "assert_finite_weights",
    "assert_frozen_weights",
    "assert_merge_equivalence",
    "assert_merged_reload",
    "assert_padding_invariance",
    "assert_requires_grad",
    "assert_save_reload",
    "assert_serving_profile",
    "assert_unmerge_restoration",
]

_BY_DEFINITION = "definition of the check"
_NOTHING = 5e-324  # the smallest positive float64: "more than nothing"

_ADVICE = {
    "adapter_effect": "train longer, or look for a frozen or unfilled lora_B: an adapter that "
    "changes nothing ships the base model",
    "merge_equivalence": "do not ship the merged weights; serve the adapter unmerged, merge with "
    "safe_merge or in float32, or change the PEFT version",
    "unmerge_restoration": "keep the base weights and load them again instead of unmerging, or "
    "merge a copy",
    "frozen_weights": "do not share this base between adapters in one process with this PEFT "
    "version; load it again after the step named above",
    "disable_equals_base": "do not use disable_adapter() as the reference model; load the base "
    "separately",
    "save_reload": "the files do not hold the model in memory: save again with save_pretrained of "
    "a current PEFT and compare the keys named above",
    "merged_reload": "do not publish the merged folder; check tied embeddings and saved modules",
    "adapter_isolation": "serve one adapter per base model with this PEFT version",
    "dtype_stability": "serve and evaluate the adapter in the dtype it was trained in, not in the "
    "one named above; very large weights or a large scaling are what overflows float16",
    "requires_grad": "set requires_grad by hand after the call named above, or change the PEFT "
    "version",
    "padding_invariance": "check attention_mask handling of the adapted modules; evaluate "
    "unpadded until it is mended",
    "base_compatibility": "give the base model the adapter was trained on: --lora-base-model=PATH",
}


def assert_adapter_files(
    adapter: Adapter | Path | str, *, newer_writer: str = "fail"
) -> Measurement:
    """The folder is complete, readable and free of anything that could run.

    Args:
        adapter: an adapter, or the path of its folder.
        newer_writer: "fail" or "note": what to make of a newer PEFT's files.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.files import measure_adapter_files

    known = _adapter(adapter)
    return _decide(
        "adapter_files",
        known.name,
        lambda: measure_adapter_files(known, newer_writer=newer_writer),
    )


def assert_config_matches_weights(
    adapter: Adapter | Path | str, *, scaling: float | None = None
) -> Measurement:
    """Every tensor follows from the configuration and every promise of it is kept.

    Args:
        adapter: an adapter, or the path of its folder.
        scaling: the scaling that modules outside the patterns must have; None reports it only.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.config import measure_config_matches_weights

    known = _adapter(adapter)
    return _decide(
        "config_matches_weights",
        known.name,
        lambda: measure_config_matches_weights(known, expected_scaling=scaling),
    )


def assert_finite_weights(adapter: Adapter | Path | str) -> Measurement:
    """No NaN and no infinity in the adapter's weights."""
    __tracebackhide__ = True
    from pytest_lora.checks.files import measure_finite_weights

    known = _adapter(adapter)
    return _decide("finite_weights", known.name, lambda: measure_finite_weights(known))


def assert_serving_profile(
    adapter: Adapter | Path | str, *, targets: Sequence[str] = ()
) -> Measurement:
    """The servers in ``targets`` (``"vllm:max_lora_rank=64"``) load the adapter at its scale.

    Without targets nothing can fail; what each known server would say is in the notes.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.serving import measure_serving_profile

    known = _adapter(adapter)
    return _decide(
        "serving_profile", known.name, lambda: measure_serving_profile(known, targets=targets)
    )


def assert_base_compatibility(
    adapter: Adapter | Path | str, base_model: Path | str | None = None
) -> Measurement:
    """Every tensor, target and pattern of the adapter lands on the base model.

    Args:
        adapter: an adapter, or the path of its folder.
        base_model: folder of the base; None takes the one the adapter names.  Only its
            configuration is read.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.base import measure_base_compatibility

    known = _adapter(adapter)
    return _decide(
        "base_compatibility", known.name, lambda: measure_base_compatibility(known, base_model)
    )


def assert_adapter_effect(
    subject: Subject | torch.nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    bound: Bound | float | None = None,
) -> Measurement:
    """The adapter changes every kind of module it targets, and the output.

    ``bound``: the least relative RMS change of the output (default: more than nothing).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.effect import measure_adapter_effect

    return _on_subject("adapter_effect", subject, inputs, measure_adapter_effect, bound)


def assert_disable_equals_base(
    subject: Subject | torch.nn.Module, inputs: Mapping[str, torch.Tensor] | None = None
) -> Measurement:
    """With the adapter disabled the outputs are the untouched base's, bit for bit."""
    __tracebackhide__ = True
    from pytest_lora.checks.switching import measure_disable_equals_base

    return _on_subject("disable_equals_base", subject, inputs, measure_disable_equals_base)


def assert_requires_grad(
    subject: Subject | torch.nn.Module, inputs: Mapping[str, torch.Tensor] | None = None
) -> Measurement:
    """Exactly what the configuration declares is trainable, after every call."""
    __tracebackhide__ = True
    from pytest_lora.checks.trainable import measure_requires_grad

    return _on_subject("requires_grad", subject, inputs, measure_requires_grad)


def assert_frozen_weights(
    subject: Subject | torch.nn.Module, inputs: Mapping[str, torch.Tensor] | None = None
) -> Measurement:
    """Every base parameter and buffer survives every operation bit for bit."""
    __tracebackhide__ = True
    from pytest_lora.checks.frozen import measure_frozen_weights

    return _on_subject("frozen_weights", subject, inputs, measure_frozen_weights)


def assert_adapter_isolation(
    subject: Subject | torch.nn.Module, inputs: Mapping[str, torch.Tensor] | None = None
) -> Measurement:
    """A second adapter added, switched to, deleted or swapped in leaves this one unchanged."""
    __tracebackhide__ = True
    from pytest_lora.checks.switching import measure_adapter_isolation

    return _on_subject("adapter_isolation", subject, inputs, measure_adapter_isolation)


def assert_padding_invariance(
    subject: Subject | torch.nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    bound: Bound | float | None = None,
) -> Measurement:
    """Padding side and batch size do not change the answers beyond rounding.

    ``bound``: the most, in multiples of the rounding bound (default: 1).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.padding import measure_padding_invariance

    return _on_subject("padding_invariance", subject, inputs, measure_padding_invariance, bound)


def assert_dtype_stability(
    subject: Subject,
    texts: Sequence[str] | None = None,
    *,
    max_tokens: int = 512,
    max_change: float | None = None,
    bound: Bound | float | None = None,
) -> Measurement:
    """What the adapter does to the likelihood is the same in bfloat16, float16 and float32.

    Args:
        subject: its base has to come from a folder, so that it can be read in other dtypes.
        texts: what to score; None scores the probe inputs.
        max_tokens: tokens of the texts at most.
        max_change: the most the drift may change, in nats per token, instead of ``bound``.
        bound: the most, in multiples of the rounding bound (default: 1).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.stability import measure_dtype_stability

    if max_change is not None and bound is not None:
        raise UsageError("dtype_stability takes max_change (nats per token) or bound, not both")

    def measure(known: Subject) -> Measurement:
        return measure_dtype_stability(
            known, texts, max_tokens=max_tokens, in_nats=max_change is not None
        )

    limit = bound if max_change is None else max_change
    return _on_subject("dtype_stability", subject, None, measure, limit)


def assert_merge_equivalence(
    subject: Subject | torch.nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    safe_merge: bool = False,
    bound: Bound | float | None = None,
) -> Measurement:
    """The merged model is the adapted model up to unavoidable rounding.

    ``bound``: the most, in multiples of the rounding bound (default: 1).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.merge import measure_merge_equivalence

    def measure(known: Subject) -> Measurement:
        return measure_merge_equivalence(known, safe_merge=safe_merge)

    return _on_subject("merge_equivalence", subject, inputs, measure, bound)


def assert_unmerge_restoration(
    subject: Subject | torch.nn.Module,
    inputs: Mapping[str, torch.Tensor] | None = None,
    *,
    cycles: int = 3,
    bound: Bound | float | None = None,
) -> Measurement:
    """Unmerging gives the base weights back, however often it is done.

    ``bound``: the most, in multiples of the rounding bound (default: 1).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.merge import measure_unmerge_restoration

    def measure(known: Subject) -> Measurement:
        return measure_unmerge_restoration(known, cycles=cycles)

    return _on_subject("unmerge_restoration", subject, inputs, measure, bound)


def assert_save_reload(
    subject: Subject, *, hash_seeds: Sequence[int] = (0,), timeout: float = 600.0
) -> Measurement:
    """Saved, and loaded on a fresh base in a fresh process, the outputs are the same bits.

    Args:
        subject: its base has to come from a folder, so that another process can load it.
        hash_seeds: values of PYTHONHASHSEED to load under.
        timeout: seconds one process may take.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.reload import measure_save_reload

    def measure(known: Subject) -> Measurement:
        return measure_save_reload(known, hash_seeds=tuple(hash_seeds), timeout=timeout)

    return _on_subject("save_reload", subject, None, measure)


def assert_merged_reload(
    subject: Subject, *, timeout: float = 600.0, bound: Bound | float | None = None
) -> Measurement:
    """Merged, saved and loaded in a fresh process, the model is still the adapted one.

    ``bound``: the most the merged model may be off a high-precision reference, in multiples of how
    far the unmerged model is off (default: 2).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.reload import measure_merged_reload

    def measure(known: Subject) -> Measurement:
        return measure_merged_reload(known, timeout=timeout)

    return _on_subject("merged_reload", subject, None, measure, bound)


def _adapter(adapter: Adapter | Path | str) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def _on_subject(
    check: str,
    subject: Any,
    inputs: Mapping[str, torch.Tensor] | None,
    measure: Callable[[Subject], Measurement],
    bound: Bound | float | None = None,
) -> Measurement:
    __tracebackhide__ = True
    from pytest_lora.subject import Subject

    if isinstance(subject, Subject):
        return _decide(check, subject.adapter.name, lambda: measure(subject), bound)
    borrowed = Subject.from_model(subject, inputs=inputs)
    try:
        return _decide(check, borrowed.adapter.name, lambda: measure(borrowed), bound)
    finally:
        borrowed.release()


def _decide(
    check: str,
    adapter: str,
    measure: Callable[[], Measurement],
    bound: Bound | float | None = None,
) -> Measurement:
    """Measure, judge, emit the result, and raise unless it passed."""
    __tracebackhide__ = True
    limits = _bound(check, bound)
    started = time.perf_counter()
    try:
        measurement = measure()
    except NotApplicable as reason:
        emit(_undecided(check, adapter, Outcome.SKIPPED, str(reason), started))
        raise
    except CannotRun as reason:
        outcome = Outcome.SKIPPED if reason.missing else Outcome.ERROR
        emit(_undecided(check, adapter, outcome, str(reason), started))
        raise
    outcome = limits.judge(measurement)
    result = CheckResult(
        check=check,
        adapter=adapter,
        outcome=outcome,
        advice="" if outcome is Outcome.PASSED else _advice(check, measurement),
        measurement=measurement,
        bound=limits,
        seconds=time.perf_counter() - started,
    )
    emit(result)
    if outcome is not Outcome.PASSED:
        raise CheckFailed(explain(result), result)
    return measurement


def _bound(check: str, bound: Bound | float | None) -> Bound:
    spec = find_check(check)
    if bound is not None and not spec.limit:
        raise UsageError(f"{check} has no bound to move: it counts faults, and allows none")
    if isinstance(bound, Bound):
        return bound
    if not spec.limit:
        return Bound.at_most(0, _BY_DEFINITION)
    limit, origin = (spec.default or _NOTHING, "default") if bound is None else (bound, "argument")
    if spec.limit == "at least":
        return Bound.at_least(limit, origin)
    return Bound.at_most(limit if bound is not None else spec.default, origin)


def _undecided(
    check: str, adapter: str, outcome: Outcome, reason: str, started: float
) -> CheckResult:
    return CheckResult(
        check=check,
        adapter=adapter,
        outcome=outcome,
        reason=reason,
        seconds=time.perf_counter() - started,
    )


def _advice(check: str, measurement: Measurement) -> str:
    """What to do: the first problem's own remedy, else the check's."""
    for problem in measurement.problems:
        if problem.fix:
            return problem.fix
    return _ADVICE.get(check, f"see docs/checks/{check}.md")
