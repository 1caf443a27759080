"""Assertions about what others make of an adapter: a server, an export, a metric of one's own.

docs/parity.md has examples, bounds and derivations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_lora.records import Bound, Measurement
from pytest_lora.training import decide, limit_of

if TYPE_CHECKING:
    import torch

    from pytest_lora.checks.export import Export
    from pytest_lora.checks.metric import Metric
    from pytest_lora.checks.parity import Mixed, Serve
    from pytest_lora.subject import Subject

__all__ = ["assert_export_parity", "assert_metric_sound", "assert_serving_parity"]

ROUNDING = 2.0
"""Default bound of :func:`assert_serving_parity`, that of the check ``merged_reload``."""


def assert_serving_parity(
    serve: Serve,
    adapters: Subject | Mapping[str, Subject],
    *,
    base: bool = False,
    mixed: Mixed | None = None,
    bound: float | Bound = ROUNDING,
) -> Measurement:
    """What is served under each adapter's name is that adapter's output, whoever came before.

    Args:
        serve: ``serve(name)``: the outputs for the subject's probe inputs with the adapter of that
            name, from a server, an export, a merged folder, a pipeline.
        adapters: an adapter, which is then called "default", or several by name.
        base: ask for the base model too, ``serve(None)``, before the adapters and after them.
        mixed: ``mixed(names)``: the outputs for the probe inputs in one batch, each row with the
            adapter of its name, or with none where ``base`` is asked for and the name is None.
        bound: the most, in multiples of the adapted model's own rounding error.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.parity import measure_serving_parity

    named = adapters if isinstance(adapters, Mapping) else {"default": adapters}
    limit = limit_of(bound, ROUNDING)
    allowed = ROUNDING if limit.high is None else limit.high
    return decide(
        "serving_parity",
        next(iter(named), None),
        lambda: measure_serving_parity(serve, named, base=base, mixed=mixed, allowed=allowed),
        limit,
        advice="compare the number of tensors applied with that in the file, the scaling, and"
        " what the server caches under the adapter's name",
    )


def assert_export_parity(
    export: Export, subject: Subject, *, bound: float | Bound = 1.0
) -> Measurement:
    """Every exported weight is the base's, with the adapter's delta where it has one.

    Args:
        export: a folder that transformers loads as the base model, a model, or weights by the base
            model's names.
        subject: the adapter on its base model.
        bound: the most, in multiples of what rounding explains.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.export import measure_export_parity

    return decide(
        "export_parity",
        subject.adapter.name,
        lambda: measure_export_parity(export, subject),
        limit_of(bound),
        advice="merge in the base's own format, and compare the names of what is merged with those"
        " in the adapter's file",
    )


def assert_metric_sound(
    metric: Metric,
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    *,
    declared: str = "adapted",
    bound: float | Bound = 1.0,
) -> Measurement:
    """A mean loss per token of one's own is what it says, however texts are padded and batched.

    Args:
        metric: ``metric(model, batch)``: nats per token over a batch of ``input_ids`` and
            ``attention_mask``.
        model: a causal language model.
        input_ids: texts of the same length, shape (rows, tokens), at least two rows.
        declared: whose loss it is: "adapted", or "base", a baseline with the adapter disabled.
        bound: the most, in multiples of the rounding bound.
    """
    __tracebackhide__ = True
    from pytest_lora.checks.metric import measure_metric

    return decide(
        "metric_sound",
        None,
        lambda: measure_metric(metric, model, input_ids, declared=declared),
        limit_of(bound),
        advice="shift the labels by one, leave padding out by its mask, and divide by the number of"
        " tokens, not of rows",
    )
