"""Merging and unmerging, judged layer by layer by what rounding allows.

The base model is never written to and never copied: each layer is lent clones of its own tensors
for the length of its own forward pass, is merged by PEFT's own call, judged, and has its tensors
back before the next layer runs.  What leaves the layer is the *merged* output, so that one pass
through the model gives every layer's verdict and the merged model's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from pytest_lora.baseline import FACTS
from pytest_lora.checks.four_bit import block_format, four_bit_modules, is_packed
from pytest_lora.checks.merge_layers import (
    NotMergeable,
    adapters_of,
    as_text,
    base_tensors,
    describe,
    is_token_layer,
    merge,
    mergeable_layers,
)
from pytest_lora.checks.merge_outputs import (
    attribute,
    first_tensor,
    forward_distance,
    from_weight,
    lengths_of,
    native_distance,
    wide_distance,
)
from pytest_lora.checks.unmerge import measure_unmerge_restoration
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.loading import one_line, quiet
from pytest_lora.numerics.fingerprint import locate_difference
from pytest_lora.numerics.four_bit import judge_requantised
from pytest_lora.numerics.merge_bound import WeightError, judge_merge, judge_sum
from pytest_lora.numerics.precision import accurate_products
from pytest_lora.numerics.rounding import Ball, dtype_name
from pytest_lora.numerics.streaming import intercepted
from pytest_lora.probe import computing_wide
from pytest_lora.records import Json, Measurement, Problem
from pytest_lora.structure import on_clones

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_lora.checks.merge_layers import LowRankLayer
    from pytest_lora.subject import Subject

__all__ = ["measure_merge_equivalence", "measure_unmerge_restoration"]

Args: TypeAlias = "tuple[Any, ...]"
Call: TypeAlias = "tuple[Args, dict[str, Any]]"

_UNIT = "times the rounding bound"
_NOTABLE = 0.1
"""Share of the adapter lost to rounding from which on it is worth a note."""

_LISTED = 20
"""Layers and problems listed in the details, worst first."""
_MAPPED = 1000
"""Layers whose rounding error alone is listed, worst first; experts can be many more."""


@dataclass(slots=True)
class _Verdict:
    """What was found about one layer."""

    name: str
    kind: str
    value: float = 0.0
    where: str = ""
    found: str = ""
    weight: WeightError = field(default_factory=WeightError)
    outputs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def worst(self, value: float, where: str, found: str) -> None:
        """Take over a finding if it is worse than what is known."""
        if value > self.value or not self.where:
            self.value, self.where, self.found = value, where, found

    def problem(self) -> Problem:
        return Problem(self.where, self.found, "at most 1 times the rounding bound")

    def to_dict(self) -> dict[str, Json]:
        return {
            "module": self.name,
            "kind": self.kind,
            "value": self.value,
            "ulps": self.weight.ulps,
            "outside": self.weight.outside,
            "elements": self.weight.elements,
            "changed_share": self.weight.changed / max(self.weight.elements, 1),
            "noise_to_effect": self.weight.noise_ratio,
            **self.outputs,
        }


# ------------------------------------------------------------------------- merge_equivalence


def measure_merge_equivalence(subject: Subject, *, safe_merge: bool = False) -> Measurement:
    """The merged model against the adapted one, at the weights, at every layer, at the output.

    The value is the worst of all layers, in multiples of the rounding bound (docs/numerics.md):

    * LoRA, rsLoRA and DoRA on linear, transposed linear, convolution and embedding layers: the
      merged weight and bias against ``W + s B A`` element by element; the layer's unmerged forward
      against the same formula in float64; its two outputs in the dtype in use.
    * Other methods: the merged weight against ``W`` plus PEFT's own delta where there is one, else
      against the same merge in float64; the layer merged against unmerged in float64.

    It is infinite where the merge writes into a tensor that another module uses (tied weights),
    changes a tensor or a dtype it has no business with, or fails.

    Args:
        subject: adapter and base model; neither is changed.
        safe_merge: merge as ``merge(safe_merge=True)`` does.

    Raises:
        NotApplicable: there is nothing to merge, or PEFT refuses to by design.
        CannotRun: no layer could be judged.
    """
    base_output = subject.base_output()
    layers = mergeable_layers(subject.model)
    unmerged = subject.output()
    with quiet(), accurate_products():
        run = _MergeRun(layers, safe_merge=safe_merge)
        try:
            with intercepted(layers, run.intercept):
                merged = subject.output()
            run.judge_the_rest()
        except NotMergeable as error:
            raise NotApplicable(f"PEFT does not merge this adapter: {error}") from None
        whole = _whole_model(subject, merged, unmerged, base_output)
    for name, other in _shared_storage(subject.model, layers):
        _blame_sharing(run.verdicts[name], name, other)
    verdicts = sorted(run.verdicts.values(), key=lambda item: item.value, reverse=True)
    facts: dict[str, Json] = {"safe_merge": safe_merge, "inputs": subject.inputs_fact}
    return _equivalence(verdicts, whole, _notes_on_merge(subject, verdicts, whole), facts)


class _MergeRun:
    """One pass over the layers: verdicts by name."""

    def __init__(self, layers: dict[str, Any], *, safe_merge: bool) -> None:
        self.layers, self.safe_merge = layers, safe_merge
        self.verdicts: dict[str, _Verdict] = {}

    def intercept(self, name: str, layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that merges the layer for its own length, and judges it the first time."""

        def merged_forward(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(False), torch.no_grad():
                return self._visit(name, layer, forward, (args, kwargs))

        return merged_forward

    def judge_the_rest(self) -> None:
        """Layers the probe inputs never reached, or that work without their forward."""
        for name, layer in self.layers.items():
            if name not in self.verdicts:
                with torch.no_grad():
                    self._visit(name, layer, layer.forward, None)

    def _visit(
        self,
        name: str,
        layer: Any,
        forward: Callable[..., Any],
        call: Call | None,
    ) -> Any:
        if name not in self.verdicts:
            visit = _Visit(name, layer, forward, call, self.safe_merge)
            self.verdicts[name] = visit.verdict  # first: a layer may call itself while merging
            return visit.judge()
        with on_clones(layer):
            merge(layer, safe_merge=self.safe_merge)
            return forward(*call[0], **call[1]) if call else None


class _Visit:
    """Merging and judging one layer."""

    def __init__(
        self,
        name: str,
        layer: Any,
        forward: Callable[..., Any],
        call: Call | None,
        safe_merge: bool,
    ) -> None:
        self.name, self.layer, self.forward, self.call = name, layer, forward, call
        self.safe_merge = safe_merge
        adapters = adapters_of(layer)
        self.adapter = adapters[0]
        single = len(adapters) == 1
        self.known = describe(layer, self.adapter, safe_merge=safe_merge) if single else None
        self.before = base_tensors(layer)
        self.format = block_format(self._base.weight) if self._is_four_bit else None
        self.delta = None if self.known else _own_delta(layer, self.adapter, self.before)
        kind = self.known.kind if self.known else type(layer).__name__
        self.verdict = _Verdict(name, kind)

    def judge(self) -> Any:
        """Judge the layer; returns its merged output, or the unmerged one if it will not merge."""
        with on_clones(self.layer):
            failure, output = self._merge(), None
            after = self._merged_tensors()
            if not failure:
                self._judge_weights(after)
                failure, output = self._try_to_run()
        if failure:
            self.verdict.worst(math.inf, self.name, failure)
            return self._run()
        if self.call and not _all_finite(self.call):
            self.verdict.notes.append("its inputs are not finite, so its output was not judged")
            self.call = None
        if self.call and self.known and not self._is_dora:
            merged = first_tensor(output)
            self._judge_known_outputs(self.known, merged, after["weight"], self.call[0])
        elif self.call or not (self.known or is_token_layer(self.layer)):
            self._judge_wide(after)
        return output

    def _run(self) -> Any:
        return self.forward(*self.call[0], **self.call[1]) if self.call else None

    def _try_to_run(self) -> tuple[str, Any]:
        try:
            return "", self._run()
        except (RuntimeError, ValueError, TypeError) as error:
            return f"the merged layer does not run: {one_line(error)}", None

    @property
    def _is_dora(self) -> bool:
        return self.known is not None and self.known.update.magnitude is not None

    @property
    def _is_four_bit(self) -> bool:
        return self.known is not None and self.known.four_bit

    @property
    def _base(self) -> Any:
        return self.layer.get_base_layer()

    def _merge(self) -> str:
        try:
            failure = merge(self.layer, safe_merge=self.safe_merge)
        except NotMergeable as error:
            raise NotMergeable(f"{self.name}: {error}") from None
        if failure:
            return f"the merge failed: {failure}"
        return "" if self.layer.merged_adapters else "the merge did nothing"

    def _merged_tensors(self) -> dict[str, torch.Tensor]:
        if self._is_four_bit:
            return base_tensors(self.layer)
        return {name: attribute(self._base, name) for name in self.before}

    # -- weights

    def _judge_weights(self, after: dict[str, torch.Tensor]) -> None:
        for name, old in self.before.items():
            new = after[name]
            where = f"{self.name}.{name}"
            if self._is_four_bit and name == "weight":
                self._judge_four_bit(where, old, new)
                continue
            if (old.dtype, old.shape) != (new.dtype, new.shape):
                text = f"became {as_text(new)} by merging, {as_text(old)} before"
                self.verdict.worst(math.inf, where, text)
                continue
            self._judge_tensor(name, where, old, new)

    def _judge_tensor(self, name: str, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
        if is_token_layer(self.layer):
            self._judge_tokens(where, old, new)
        elif self.known and name == "weight":
            matrices = self.known.matrix(old), self.known.matrix(new)
            error = judge_merge(*matrices, self.known.update)
            self._take(where, error, self.known.place(error.index) if error.index else ())
        elif self.known and name == "bias" and self.known.bias is not None:
            error = judge_sum(old, new, self.known.bias_ball(), self.known.bias.dtype)
            self._take(where, error, error.index or ())
        elif self.known:
            self._judge_untouched(where, old, new)
        elif self.delta is not None and name == "weight":
            self._judge_own_delta(where, old, new, self.delta)

    def _take(self, where: str, error: WeightError, index: tuple[int, ...]) -> None:
        """Record a weight's error; the noise of biases is left out of the layer's."""
        self.verdict.worst(error.worst, f"{where}{list(index)}", _weight_text(error))
        if where.endswith(".weight"):
            self.verdict.weight = error

    def _judge_four_bit(self, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Which code every element got; PEFT keeps the format, and may widen what it stands for."""
        assert self.known is not None
        assert self.format is not None
        held = self._base.weight
        if not is_packed(held):
            text = f"merging left {as_text(held)} numbers with the constants of its 4-bit blocks"
            self.verdict.worst(math.inf, where, f"{text}: the sum was not quantised again")
            return
        form = block_format(held)
        if not form.holds_like(self.format) or old.shape != new.shape:
            self.verdict.worst(math.inf, where, "merging changed the format of its 4-bit blocks")
            return
        error = judge_requantised(old, new, self.known.update, form)
        self._take(where, error, error.index or ())

    def _judge_untouched(self, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
        found = locate_difference(old, new)
        if found.changed:
            self.verdict.worst(
                math.inf,
                f"{where}{list(found.place or ())}",
                f"{found.changed} elements changed that the adapter does not adapt",
            )

    def _judge_tokens(self, where: str, old: torch.Tensor, new: torch.Tensor) -> None:
        expected = _with_tokens(self.layer, self.adapter, old)
        found = locate_difference(expected, new)
        self.verdict.weight = WeightError(elements=old.numel(), outside=found.changed)
        place = f"{where}{list(found.place or ())}"
        if found.changed:
            self.verdict.worst(math.inf, place, f"{found.changed} elements are not the adapter's")
        else:
            self.verdict.worst(0.0, where, "the adapter's rows, bit for bit")

    def _judge_own_delta(
        self, where: str, old: torch.Tensor, new: torch.Tensor, delta: torch.Tensor
    ) -> None:
        error = _judge_delta(old, new, delta)
        if error.worst <= 1:
            self._take(where, error, error.index or ())
            self.verdict.outputs["weights_against_own_delta"] = error.worst

    # -- outputs

    def _judge_known_outputs(
        self, known: LowRankLayer, merged: torch.Tensor, weight: torch.Tensor, args: Args
    ) -> None:
        if known.kind in ("linear", "conv1d"):
            text = "merged and unmerged output differ by {} the bound"
            if known.four_bit:
                # What quantising again takes away is no rounding: the merged weight alone counts.
                weight = weight.to(getattr(self._base, "compute_dtype", None) or args[0].dtype)
                unmerged = from_weight(args[0], weight, self._base.bias)
                text = "the merged output is not that of the merged weight: off by {} the bound"
            else:
                unmerged = first_tensor(self._run())
            lengths = lengths_of(known, weight, self._base)
            self._output("output", native_distance(args[0], merged, unmerged, lengths), text)
        try:
            distance = forward_distance(self.layer, known, self.forward, args, merged)
        except (RuntimeError, ValueError) as error:
            self.verdict.worst(math.inf, self.name, f"unmerged forward: {one_line(error)}")
            return
        text = "the unmerged forward is not x (s B A)^T: off by {} the bound, in float64"
        self._output("forward", distance, text)

    def _output(self, label: str, distance: float, text: str) -> None:
        self.verdict.outputs[label] = distance
        found = text.format(f"{distance:.3g} times")
        self.verdict.worst(distance, f"{self.name} ({label})", found)

    def _judge_wide(self, after: dict[str, torch.Tensor]) -> None:
        settled = (
            self.known is not None
            or is_token_layer(self.layer)
            or "weights_against_own_delta" in self.verdict.outputs
        )
        found = wide_distance(self.layer, self.forward, self.call, {} if settled else after)
        if found.unknown:
            self.verdict.notes.append(f"not run in float64: {found.unknown}")
            if not settled:
                self.verdict.kind = ""
            return
        self._output("wide", found.output, "merged and unmerged differ by {} the bound in float64")
        if not settled:
            self._output("wide_weights", found.weights, "merged weights are off by {} the bound")


def _all_finite(call: Call) -> bool:
    args, kwargs = call
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, torch.Tensor)]
    return all(bool(item.isfinite().all()) for item in tensors)


def _own_delta(layer: Any, adapter: str, before: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """What PEFT says it will add to the weight, if it says so."""
    if not hasattr(layer, "get_delta_weight") or "weight" not in before:
        return None
    try:
        delta = layer.get_delta_weight(adapter)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
        return None
    if not isinstance(delta, torch.Tensor) or delta.shape != before["weight"].shape:
        return None
    return delta.detach().to_dense() if delta.is_sparse else delta.detach()


def _judge_delta(old: torch.Tensor, new: torch.Tensor, delta: torch.Tensor) -> WeightError:
    """``W`` plus a delta given as numbers, a block of rows at a time."""
    rows = max(1, (1 << 18) // max(old[:1].numel(), 1))
    total = WeightError()
    for start in range(0, old.shape[0], rows):
        block = slice(start, start + rows)
        error = judge_sum(old[block], new[block], Ball.exact(delta[block]), delta.dtype)
        total = total.joined(error.moved(start))
    return total


def _with_tokens(layer: Any, adapter: str, weight: torch.Tensor) -> torch.Tensor:
    expected = weight.clone()
    rows = torch.tensor(layer.token_indices[adapter], device=weight.device)
    return expected.index_copy_(0, rows, layer.trainable_tokens_delta[adapter].detach().to(weight))


def _weight_text(error: WeightError) -> str:
    text = f"{error.worst:.3g} times the rounding bound, {error.ulps:.3g} ulps off the exact result"
    if error.outside:
        text += f"; {error.outside} of {error.elements} elements outside"
    if error.outside and math.isfinite(error.applied):
        text += f"; the merge added {error.applied:.4g} times the delta"
    return text


# ------------------------------------------------------------------------- shared tensors


def _shared_storage(model: torch.nn.Module, layers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """``(layer, other module's parameter)`` where merging the layer writes into both.

    Token rows are left out: PEFT ties those itself.  So are originals that a saved copy replaces.
    """
    users: dict[tuple[torch.device, int], list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.numel() and ".original_module." not in name:
            users.setdefault(_storage(parameter), []).append((name, parameter))
    for name, layer in layers.items():
        if is_token_layer(layer):
            continue
        weight = base_tensors(layer).get("weight")
        if weight is None:
            continue
        for other, tensor in users.get(_storage(weight), ()):
            if not other.startswith(f"{name}.") and _overlap(weight, tensor):
                yield name, other
                break


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    first, second = sorted((a, b), key=lambda tensor: tensor.data_ptr())
    return first.data_ptr() + first.numel() * first.element_size() > second.data_ptr()


def _blame_sharing(verdict: _Verdict, name: str, other: str) -> None:
    verdict.value, verdict.where = math.inf, f"{name}.weight"
    verdict.found = f"shares its memory with {other}: merging this module rewrites that one as well"


# ------------------------------------------------------------------------- the whole model


def _whole_model(
    subject: Subject, merged: torch.Tensor, unmerged: torch.Tensor, base: torch.Tensor
) -> dict[str, Json]:
    """Root mean square errors of the model's outputs against a wider format; for information."""
    low = unmerged.dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if low or subject.base.dtype != torch.float32 else torch.float64
    found: dict[str, Json] = {"reference": dtype_name(wide)}
    found["rms_effect"] = effect = _rms(unmerged, base)
    found["rms_merged_unmerged"] = _rms(merged, unmerged)
    if four_bit_modules(subject.model):  # no format is wide enough for what this rounds to
        ratio = {"noise_to_effect": _rms(merged, unmerged) / effect} if effect else {}
        return {**found, **ratio, "reference": None}
    if subject.base.dtype == torch.float64:
        return {**found, "reference": None}
    try:
        with computing_wide(subject.model, wide):
            exact = subject.output()
    except (RuntimeError, ValueError, TypeError) as error:
        return {**found, "reference": None, "reference_unknown": one_line(error)}
    found["rms_error_merged"], found["rms_error_unmerged"] = (
        _rms(merged, exact),
        _rms(unmerged, exact),
    )
    if effect:
        found["noise_to_effect"] = _rms(merged, exact) / effect
    return found


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


# ------------------------------------------------------------------------- putting it together


def _equivalence(
    verdicts: list[_Verdict],
    whole: dict[str, Json],
    notes: list[str],
    facts: Mapping[str, Json],
) -> Measurement:
    worst = verdicts[0]
    judged = [item for item in verdicts if item.kind]
    if not judged:
        raise CannotRun(f"no layer could be judged; {worst.name}: {worst.notes[0]}")
    outside = [item for item in verdicts if not item.value <= 1]
    return Measurement(
        value=worst.value,
        unit=_UNIT,
        count=len(judged),
        where=f"{worst.where}: {worst.found}",
        details={
            "problems": [item.problem().to_dict() for item in outside[:_LISTED]],
            "notes": notes,
            FACTS: facts,
            "model": whole,
            "layers": [item.to_dict() for item in verdicts[:_LISTED]],
            "ulps": {item.name: float(f"{item.weight.ulps:.3g}") for item in judged[:_MAPPED]},
            "elements": sum(item.weight.elements for item in verdicts),
            "evaluated": sum(item.weight.evaluated for item in verdicts),
        },
    )


def _notes_on_merge(
    subject: Subject, verdicts: list[_Verdict], whole: dict[str, Json]
) -> list[str]:
    return [
        *_noise_notes(subject, verdicts),
        *_output_notes(subject, whole),
        *(f"{item.name}: {note}" for item in verdicts for note in item.notes),
        *_saved_modules(subject.model),
    ]


def _noise_notes(subject: Subject, verdicts: list[_Verdict]) -> Iterator[str]:
    weights = [item.weight for item in verdicts if item.weight.effect]
    if not weights:
        return
    total = WeightError()
    for weight in weights:
        total = total.joined(weight)
    dtype = _format_name(subject)
    if not total.changed:
        yield (
            f"merging changes no weight: every delta is below half a unit in the last place of "
            f"{dtype}, so the merged model is the base model; merge in a wider format"
        )
    elif total.noise_ratio > _NOTABLE:
        yield (
            f"rounding the merged weights to {dtype} takes {total.noise_ratio:.0%} of the adapter "
            f"(root mean squares); merging changes {total.changed / total.elements:.1%} of the "
            "weights. Unavoidable in this format: merge in a wider one to keep the adapter whole"
        )


def _output_notes(subject: Subject, whole: dict[str, Json]) -> Iterator[str]:
    ratio = whole.get("noise_to_effect")
    if isinstance(ratio, float) and ratio > 1:
        dtype = _format_name(subject)
        yield (
            f"rounding to {dtype} moves the merged model's output {ratio:.2g} times as far as the "
            "adapter does"
        )
    if isinstance(ratio, float) and math.isnan(ratio):
        yield "the model's own output is not finite"


def _format_name(subject: Subject) -> str:
    if four_bit_modules(subject.model):
        return "4-bit blocks"
    return dtype_name(subject.base.dtype)


def _saved_modules(model: torch.nn.Module) -> list[str]:
    saved = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
    ]
    if not saved:
        return []
    return [f"{len(saved)} saved modules replace the base's as a whole, nothing is added to them"]
