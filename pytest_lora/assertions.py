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

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_lora.adapter import Adapter, read_adapter
from pytest_lora.catalog import find_check
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError
from pytest_lora.records import TO_DECIDE, Bound, CheckResult, Measurement, Outcome, emit
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
    "assert_delta_spectrum",
    "assert_disable_equals_base",
    "assert_dtype_stability",
    "assert_finite_weights",
    "assert_frozen_weights",
    "assert_generation_diversity",
    "assert_generation_health",
    "assert_merge_equivalence",
    "assert_merged_reload",
    "assert_padding_invariance",
    "assert_perplexity_drift",
    "assert_requires_grad",
    "assert_save_reload",
    "assert_serving_profile",
    "assert_task_accuracy",
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
    "perplexity_drift": "train fewer steps or at a lower learning rate, mix in texts of the source "
    "domain, or accept the loss with a larger bound",
    "task_accuracy": "look at the failing items in the details: a wrong prompt or answer format "
    "shows there; else train longer, or on data that is closer to the task",
    "generation_diversity": "train fewer steps or at a lower learning rate: sampled answers have "
    "collapsed into one",
    "delta_spectrum": "train for fewer steps or with a lower learning rate, or scale the adapter "
    "down; large updates forget more",
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


def assert_delta_spectrum(
    adapter: Subject | torch.nn.Module | Adapter | Path | str,
    *,
    least_effective_rank: float | None = None,
    find_intruders: bool = False,
    bound: Bound | float | None = None,
) -> Measurement:
    """Every update is a number, no larger beside its weight and of no lower rank than you allow.

    Without limits this is a report: only what is not finite fails.

    Args:
        adapter: a subject or PeftModel; or an adapter's files, which then give absolute norms.
        least_effective_rank: the least effective rank any module may have.
        find_intruders: count intruder dimensions, which takes dense decompositions.
        bound: the largest Frobenius norm of an update over that of its weight.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.spectrum import measure_delta_spectrum

    def measure(known: Subject | Adapter) -> Measurement:
        return measure_delta_spectrum(
            known, least_effective_rank=least_effective_rank, find_intruders=find_intruders
        )

    if isinstance(adapter, Adapter | Path | str):
        if bound is not None:
            raise UsageError("the bound is relative to the base's weights: give a subject")
        files = _adapter(adapter)
        return _decide("delta_spectrum", files.name, lambda: measure(files))
    return _on_subject("delta_spectrum", adapter, None, measure, bound)


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
    texts: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    max_tokens: int = 512,
    max_change: float | None = None,
    bound: Bound | float | None = None,
) -> Measurement:
    """What the adapter does to the likelihood is the same in bfloat16, float16 and float32.

    Args:
        subject: its base has to come from a folder, so that it can be read in other dtypes.
        texts: what to score, or one domain's by its name; None scores the probe inputs.
        max_tokens: tokens of the texts at most.
        max_change: the most the drift may change, in nats per token, instead of ``bound``.
        bound: the most, in multiples of the rounding bound (default: 1).
    """
    __tracebackhide__ = True
    from pytest_lora.checks.stability import measure_dtype_stability

    if max_change is not None and bound is not None:
        raise UsageError("dtype_stability takes max_change (nats per token) or bound, not both")
    part = _only_name(texts)
    if isinstance(texts, Mapping):
        if not part:
            raise UsageError("dtype_stability takes the texts of one domain at a time")
        texts = texts[part]
    with _on(subject) as known:
        return _judge(
            "dtype_stability",
            known.adapter.name,
            lambda: measure_dtype_stability(
                known, texts, max_tokens=max_tokens, in_nats=max_change is not None
            ),
            _bound("dtype_stability", bound if max_change is None else max_change),
            part=part,
        )


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


def assert_perplexity_drift(
    subject: Subject | torch.nn.Module,
    texts: Any,
    *,
    max_drift: Bound | float,
    tokenizer: Any = None,
    **options: Any,
) -> Measurement:
    """The adapter predicts the texts no worse than the base model does, but for ``max_drift``.

    Args:
        subject: a Subject, or a PeftModel of a causal language model together with ``tokenizer``.
        texts: a file, strings, or several of either by domain; each domain is held to the bound.
        max_drift: the most by which the mean negative log-likelihood may rise, nats per token;
            infinite for a report that only a drift that is no number fails.
        tokenizer: the base model's; None takes the one in its folder.
        options: as for :func:`~pytest_lora.checks.forgetting.measure_perplexity_drift`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.forgetting import measure_perplexity_drift

    limits = max_drift if isinstance(max_drift, Bound) else Bound.at_most(max_drift, "argument")
    if limits.high is None or limits.low is not None:
        raise UsageError("max_drift is an upper limit: a number of nats per token")
    limit = limits.high if math.isfinite(limits.high) else None  # an infinite one: report only
    with _on(subject) as known:
        return _judge(
            "perplexity_drift",
            known.adapter.name,
            lambda: measure_perplexity_drift(
                known, texts, tokenizer=tokenizer, max_drift=limit, **options
            ),
            limits,
            part=_only_name(texts),
        )


def _only_name(texts: Any) -> str:
    """The name of a single domain that was given by name."""
    return next(iter(texts)) if isinstance(texts, Mapping) and len(texts) == 1 else ""


def assert_task_accuracy(
    subject: Subject | torch.nn.Module,
    task: Any,
    *,
    min_accuracy: Bound | float | None = None,
    min_change: Bound | float | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Measurement:
    """The adapted model gets enough of a task right, or enough in comparison with the base.

    Exactly one of ``min_accuracy`` and ``min_change`` is judged.

    Args:
        subject: a Subject, or a PeftModel of a causal language model together with ``tokenizer``.
        task: a :class:`~pytest_lora.tasks.records.Task`, or a file of items.
        min_accuracy: the least mean score, 0 to 1; None takes the task's own.  A bound at minus
            infinity reports the accuracy without judging it.
        min_change: the least accuracy minus that of the base on the same items: -0.02 allows a
            loss of two points, 0.1 asks for a gain of ten.
        tokenizer: None takes the adapter folder's own, else the base model's.
        options: as for :func:`~pytest_lora.checks.learning.measure_task_accuracy`, or
            :func:`~pytest_lora.checks.learning.measure_task_change`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks import learning
    from pytest_lora.tasks.formats import read_task
    from pytest_lora.tasks.records import Task

    if not isinstance(task, Task):
        task = read_task(task)
    if min_accuracy is not None and min_change is not None:
        raise UsageError(
            "min_accuracy and min_change are two questions: assert one after the other"
        )
    if min_change is None:
        limits = _floor("min_accuracy", task.min_accuracy if min_accuracy is None else min_accuracy)
        options["min_accuracy"] = limits.low if math.isfinite(limits.low or 0.0) else None
        measure: Any = learning.measure_task_accuracy
    else:
        limits = _floor("min_change", min_change)
        options["min_change"] = limits.low
        measure = learning.measure_task_change
    with _on(subject) as known:
        return _judge(
            "task_accuracy",
            known.adapter.name,
            lambda: measure(known, task, tokenizer=tokenizer, **options),
            limits,
            part=task.name,
        )


def assert_generation_health(
    subject: Subject | torch.nn.Module,
    prompts: Any,
    *,
    tokenizer: Any = None,
    **options: Any,
) -> Measurement:
    """The adapted model ends its answers, does not loop, says something, and leaks no template.

    Args:
        subject: a Subject, or a PeftModel of a causal language model together with ``tokenizer``.
        prompts: a task, a file of items, or texts.
        tokenizer: None takes the adapter folder's own, else the base model's.
        options: as for :func:`~pytest_lora.checks.generation.measure_generation_health`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.generation import measure_generation_health

    with _on(subject) as known:
        return _judge(
            "generation_health",
            known.adapter.name,
            lambda: measure_generation_health(known, prompts, tokenizer=tokenizer, **options),
            Bound.at_most(0, _BY_DEFINITION),
            part=getattr(prompts, "name", ""),
        )


def assert_generation_diversity(
    subject: Subject | torch.nn.Module,
    prompts: Any,
    *,
    tokenizer: Any = None,
    bound: Bound | float | None = None,
    **options: Any,
) -> Measurement:
    """Sampled answers still differ from each other, as the base model's do.

    Args:
        subject: a Subject, or a PeftModel of a causal language model together with ``tokenizer``.
        prompts: a task, a file of items, or texts.
        tokenizer: None takes the adapter folder's own, else the base model's.
        bound: the least share of the base model's diversity (default: more than nothing).
        options: as for :func:`~pytest_lora.checks.generation.measure_generation_diversity`.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.generation import measure_generation_diversity

    limits = Bound.at_least(_NOTHING, "default") if bound is None else _floor("bound", bound)
    with _on(subject) as known:
        return _judge(
            "generation_diversity",
            known.adapter.name,
            lambda: measure_generation_diversity(known, prompts, tokenizer=tokenizer, **options),
            limits,
            part=getattr(prompts, "name", ""),
        )


def _floor(name: str, limit: Bound | float | None) -> Bound:
    """A lower limit, given as one or as a number."""
    if limit is None:
        raise UsageError(f"there is no floor to judge by: pass {name}=...")
    bound = limit if isinstance(limit, Bound) else Bound.at_least(limit, "argument")
    if bound.low is None or bound.high is not None:
        raise UsageError(f"{name} is a lower limit")
    return bound


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
    with _on(subject, inputs) as known:
        return _decide(check, known.adapter.name, lambda: measure(known), bound)


@contextlib.contextmanager
def _on(subject: Any, inputs: Mapping[str, torch.Tensor] | None = None) -> Iterator[Subject]:
    """The subject itself, or the one a live model is lent to for a while."""
    from pytest_lora.subject import Subject

    if isinstance(subject, Subject):
        yield subject
        return
    borrowed = Subject.from_model(subject, inputs=inputs)
    try:
        yield borrowed
    finally:
        borrowed.release()


def _decide(
    check: str,
    adapter: str,
    measure: Callable[[], Measurement],
    bound: Bound | float | None = None,
) -> Measurement:
    __tracebackhide__ = True
    return _judge(check, adapter, measure, _bound(check, bound))


def _judge(
    check: str, adapter: str, measure: Callable[[], Measurement], limits: Bound, *, part: str = ""
) -> Measurement:
    """Measure, judge, emit the result, and raise unless it passed."""
    __tracebackhide__ = True
    started = time.perf_counter()
    try:
        measurement = measure()
        outcome = limits.judge(measurement)
    except NotApplicable as reason:
        emit(_undecided(check, adapter, Outcome.SKIPPED, str(reason), started, part))
        raise
    except CannotRun as reason:
        outcome = Outcome.SKIPPED if reason.missing else Outcome.ERROR
        emit(_undecided(check, adapter, outcome, str(reason), started, part))
        raise
    result = CheckResult(
        check=check,
        adapter=adapter,
        outcome=outcome,
        advice="" if outcome is Outcome.PASSED else _advice(check, measurement, outcome),
        measurement=measurement,
        bound=Bound(limits.low, limits.high, limits.origin),  # without what it is relative to
        seconds=time.perf_counter() - started,
        part=part,
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
    if bound is not None:
        limit, origin = bound, "argument"
    else:
        limit, origin = spec.default, "default"
    if spec.limit == "at least":
        return Bound.at_least(limit or _NOTHING if bound is None else limit, origin)
    return Bound.at_most(limit, origin)


def _undecided(
    check: str, adapter: str, outcome: Outcome, reason: str, started: float, part: str
) -> CheckResult:
    return CheckResult(
        check=check,
        adapter=adapter,
        outcome=outcome,
        reason=reason,
        seconds=time.perf_counter() - started,
        part=part,
    )


def _advice(check: str, measurement: Measurement, outcome: Outcome) -> str:
    """What to do: more data where that decides, a problem's own remedy, else the check's."""
    if outcome is Outcome.INCONCLUSIVE and TO_DECIDE in measurement.details:
        needed = measurement.details[TO_DECIDE]
        if needed is None:
            return "move the bound: what was measured lies on it, and no number of items decides"
        return f"give more items: about {needed:,} would decide, if they come out like these"
    for problem in measurement.problems:
        if problem.fix:
            return problem.fix
    return _ADVICE.get(check, f"see docs/checks/{check}.md")
