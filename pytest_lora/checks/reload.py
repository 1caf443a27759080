"""Saved and loaded again: as an adapter, and merged into a model of its own.

What is compared with what was saved is what a process gets that never saw the model, so that
nothing kept in memory can stand in for what is missing from the files.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import BASE_PREFIX, read_adapter
from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.baseline import FACTS
from pytest_lora.checks.bits import how_different, is_routed, median_rms, output_problem, rms
from pytest_lora.checks.four_bit import four_bit_modules
from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.fresh import (
    TIMEOUT,
    FreshResult,
    Job,
    Refused,
    require_space,
    run_fresh,
    scratch,
)
from pytest_lora.loading import BaseSpec, Checkpoint, one_line, quiet
from pytest_lora.locate import CONFIG_NAME, AdapterLocation
from pytest_lora.numerics.rounding import dtype_name
from pytest_lora.records import Json, Measurement, Problem

if TYPE_CHECKING:
    from pytest_lora.adapter import Adapter
    from pytest_lora.safetensors_header import TensorInfo
    from pytest_lora.subject import Subject

__all__ = ["measure_merged_reload", "measure_save_reload"]

FEW = 32
"""Rows a probe is widened to where a row gives a handful of numbers only."""

_SPARE = 64 << 20
_MANY_TARGETS = 20  # from here on PEFT may condense the list (MIN_TARGET_MODULES_FOR_OPTIMIZATION)
_NOT_COMPARED = {
    "inference_mode",  # set by whoever loads and saves
    "base_model_name_or_path",  # replaced by the local folder while saving, see _save
    "peft_version",  # of the writer
    "auto_mapping",  # written from the class in hand where there is no task type
    "runtime_config",  # never saved
}
_HEADS = {"classifier", "score", "qa_outputs"}
_EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "embed_out",
)


# ------------------------------------------------------------------------------ save_reload


def measure_save_reload(
    subject: Subject, *, hash_seeds: Sequence[int] = (0,), timeout: float = TIMEOUT
) -> Measurement:
    """Count what ``save_pretrained`` and loading in a fresh process do not give back.

    The adapter is saved as loaded.  Every tensor of its file has to be in the new file with the
    same bits, nothing else may be there, the configuration has to read the same, and a process with
    each of ``hash_seeds`` as PYTHONHASHSEED has to compute the same output, bit for bit, from a
    fresh base and the new folder.

    Raises:
        NotApplicable: the base model was not loaded from a folder, so no other process can.
        CannotRun: a process could not be started, took over ``timeout`` seconds, or failed.
    """
    spec = _source(subject)
    expected = subject.output()
    with scratch("saved") as directory:
        try:
            _save(subject, directory)
        except Exception as error:  # whatever PEFT raises on an adapter it cannot save
            return _unsaved(subject, error)
        written = read_adapter(AdapterLocation(directory, None, subject.adapter.name))
        tensors, notes = _compare_files(subject.adapter, written, _renames(subject))
        problems = [*tensors, *_compare_configs(subject, written, notes)]
        for seed in hash_seeds:
            job = Job(spec, written.location, tensors=True)
            try:
                result = run_fresh(job, subject.inputs, hash_seed=seed, timeout=timeout)
            except Refused as refusal:
                problems.append(Problem(_reload(seed), str(refusal), "the saved adapter to load"))
                continue
            problems += _compare_loaded(written, result, expected)
    return Measurement.of_problems(
        problems,
        count=len(subject.adapter.tensors) + len(subject.adapter.config) + len(hash_seeds),
        notes=notes,
        hash_seeds=list(hash_seeds),
    )


def _source(subject: Subject) -> BaseSpec:
    if subject.base.spec is None:
        raise NotApplicable(
            "the base model was passed in, not loaded from a folder, so no other process can load"
            " it; give it with --lora-base-model=PATH"
        )
    return subject.base.spec


def _unsaved(subject: Subject, error: Exception) -> Measurement:
    problem = Problem("save_pretrained", f"raised {one_line(error)}", "the adapter to be saved")
    return Measurement.of_problems([problem], count=len(subject.adapter.tensors) or 1)


def _save(subject: Subject, directory: Path) -> None:
    """``save_pretrained``, embeddings included where the adapter's own file has them.

    The recorded base is the local folder meanwhile, should PEFT look into it: not the hub.
    """
    model: Any = subject.model
    config = model.peft_config[ADAPTER_NAME]
    recorded = config.base_model_name_or_path
    config.base_model_name_or_path = str(subject.base.source)
    try:
        with quiet():
            model.save_pretrained(
                directory,
                selected_adapters=[ADAPTER_NAME],
                save_embedding_layers=_has_embeddings(subject.adapter),
            )
    finally:
        config.base_model_name_or_path = recorded


def _has_embeddings(adapter: Adapter) -> bool:
    """Whether the file was saved with ``save_embedding_layers``, by PEFT's choice or the user's.

    It then holds an embedding or head that ``modules_to_save`` does not name, or, where it names
    it, also the original that PEFT keeps beside the trained copy.
    """
    for key in adapter.tensors:
        if key.endswith(".original_module.weight"):
            return True
        path = key.removeprefix(BASE_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        leaf = path.rpartition(".")[2]
        if leaf in _EMBEDDINGS and key.endswith(".weight") and leaf not in adapter.modules_to_save:
            return True
    return False


def _renames(subject: Subject) -> bool:
    """Whether transformers restructures this model's checkpoints on loading, and their keys."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5
        return False
    return bool(get_model_conversion_mapping(subject.base.module, add_legacy=False))


def _compare_files(
    ours: Adapter, written: Adapter, renamed: bool
) -> tuple[list[Problem], list[str]]:
    if renamed and set(ours.tensors) != set(written.tensors):
        return [], [
            "this transformers renames the model's modules, so the files have other keys; only"
            " outputs were compared"
        ]
    problems = list(written.problems)
    casts: dict[str, int] = {}
    for key in ours.tensors:
        if key not in written.tensors:
            problems.append(Problem(key, "in the adapter's file, but not saved again"))
            continue
        problems += _compare_tensor(key, ours.tensors[key], written.tensors[key], casts)
    problems += [
        Problem(key, "saved, but not in the adapter's file", fix="some other adapter's tensor?")
        for key in written.tensors
        if key not in ours.tensors
    ]
    return problems, [f"{count} tensors {what}" for what, count in casts.items()]


def _compare_tensor(
    key: str, ours: TensorInfo, written: TensorInfo, casts: dict[str, int]
) -> Iterator[Problem]:
    original, saved = _read(ours), _read(written)
    expected = original.to(saved.dtype)
    if original.dtype != saved.dtype:
        names = f"{dtype_name(original.dtype)} saved as {dtype_name(saved.dtype)}"
        exact = not how_different(expected.to(original.dtype), original)
        what = f"{names}, exactly" if exact else f"{names}, rounded: loading casts them"
        casts[what] = casts.get(what, 0) + 1
    difference = how_different(saved, expected)
    if difference:
        yield Problem(key, f"saved again: {difference}", "the bits of the adapter's file")


def _read(info: TensorInfo) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(info.file, framework="pt") as handle:
        tensor: torch.Tensor = handle.get_tensor(info.name)
    return tensor


# ------------------------------------------------------------------------------ configurations


def _compare_configs(subject: Subject, written: Adapter, notes: list[str]) -> Iterator[Problem]:
    """Disk against memory, memory against disk again."""
    model: Any = subject.model
    live = model.peft_config[ADAPTER_NAME].to_dict()
    memory = {key: _json(value) for key, value in live.items()}
    on_disk = subject.adapter.config
    dropped = sorted(set(on_disk) - set(memory) - _NOT_COMPARED)
    if dropped:
        notes.append(f"this PEFT does not know, and drops: {', '.join(dropped)}")
    for key in on_disk:
        if key not in dropped and not _kept(key, on_disk[key], memory.get(key), subject.adapter):
            yield _changed(key, memory.get(key), on_disk[key], "in memory", "on disk")
    for key in sorted((set(memory) | set(written.config)) - _NOT_COMPARED):
        if _sorted(written.config.get(key)) != _sorted(memory.get(key)):
            yield _changed(key, written.config.get(key), memory.get(key), "saved", "in memory")


def _changed(key: str, found: Any, expected: Any, here: str, there: str) -> Problem:
    return Problem(f"{CONFIG_NAME}: {key}", f"{found!r} {here}", f"{expected!r} as {there}")


def _json(value: Any) -> Any:
    """What ``value`` is once it has been through JSON, sets as sorted lists."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _sorted(value: Any) -> Any:
    """Order is no property of the lists PEFT keeps as sets."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _kept(key: str, disk: Any, memory: Any, adapter: Adapter) -> bool:
    """Whether ``memory`` is what loading documents to make of ``disk``."""
    if key in _NOT_COMPARED or _sorted(disk) == _sorted(memory):
        return True
    if key == "target_modules":  # resolved against the base; long lists are condensed
        names = adapter.target_modules
        many = isinstance(disk, list) and len(disk) >= _MANY_TARGETS
        return names in (None, "all-linear") or many
    if key == "modules_to_save":  # a classifier's head always counts
        ours, loaded = set(disk or ()), set(memory or ())
        return ours <= loaded <= ours | _HEADS
    if key == "loftq_config":  # of no effect without LoftQ initialisation, and emptied
        return adapter.config.get("init_lora_weights") != "loftq"
    if isinstance(disk, Mapping) and isinstance(memory, Mapping):  # defaults filled in
        return all(memory.get(name) == value for name, value in disk.items())
    return False


# ------------------------------------------------------------------------------ loaded elsewhere


def _reload(seed: int) -> str:
    return f"reload with PYTHONHASHSEED={seed}"


def _compare_loaded(
    written: Adapter, result: FreshResult, expected: torch.Tensor
) -> Iterator[Problem]:
    where = _reload(result.hash_seed)
    for key, tensor in result.tensors.items():
        if key not in written.tensors:
            continue
        difference = how_different(tensor, _read(written.tensors[key]).to(tensor.dtype))
        if difference:
            yield Problem(key, f"{where}: {difference}", "the bits of the saved file",
                          "loading gives it another tensor's values: rename the modules so that"
                          " no name contains another, or change the PEFT version")  # fmt: skip
    problem = output_problem(
        where,
        result.outputs["output"],
        expected.cpu(),
        meaning="the output before saving, bit for bit",
    )
    if problem:
        yield problem


# ------------------------------------------------------------------------------ merged_reload


def measure_merged_reload(subject: Subject, *, timeout: float = TIMEOUT) -> Measurement:
    """How much further off the truth the merged model is than the unmerged one, once reloaded.

    One fresh process merges and saves, another loads the merged folder as a plain model, a third
    computes the unmerged model in a wider format (float32 for half precision, else float64) from
    the same weights.  The value is

        RMS(merged - wide) / max(RMS(unmerged - wide), floor),

    infinite if the reloaded model's output is not that of the merged model in memory, bit for bit.
    The floor is the RMS of rounding exact outputs to the model's format, u / (2 sqrt 3) of their
    own RMS with unit roundoff u: no model can be asked to be closer.

    Raises:
        NotApplicable: the base was not loaded from a folder, or PEFT cannot merge this adapter.
        CannotRun: no room on disk for the merged model, or a process failed.
    """
    spec = _source(subject)
    _require_mergeable(subject)
    adapter, inputs = subject.adapter.location, _widened(subject)
    with scratch("merged") as directory:
        require_space(_size(subject), "saving the merged model")
        target = directory / "model"
        first = run_fresh(Job(spec, adapter, merge_to=target), inputs, timeout=timeout)
        merged, unmerged = first.outputs["merged"], first.outputs["output"]
        _require_finite(unmerged)
        plain = dataclasses.replace(spec, path=target, num_labels=None)
        problem = _reloaded(plain, inputs, merged, timeout)
        if problem:
            problem = dataclasses.replace(problem, fix=_cause(target, subject))
    wide = _wide_output(spec, adapter, inputs, merged.dtype, timeout)
    routed = is_routed(subject.base.module)
    facts = {"inputs": subject.inputs_fact}
    if wide is None:
        note = "float64: no wider format to judge rounding by"
        return _judged(None, merged, problem, note, facts)
    errors = Errors.of(merged, unmerged, wide, typical=routed)
    return _judged(errors, merged, problem, _ROUTED if routed else "", facts)


def _reloaded(
    spec: BaseSpec, inputs: Mapping[str, torch.Tensor], merged: torch.Tensor, timeout: float
) -> Problem | None:
    """What is wrong with the merged folder, unless it gives the output it gave in memory."""
    where = "merged, saved and loaded again"
    try:
        output = run_fresh(Job(spec), inputs, timeout=timeout).outputs["output"]
    except Refused as refusal:
        return Problem(where, str(refusal), "a model that loads and runs")
    return output_problem(
        where,
        output[..., : merged.shape[-1]],
        merged,
        meaning="the merged model's output in memory, bit for bit",
    )


def _require_mergeable(subject: Subject) -> None:
    model: Any = subject.model
    blocks = four_bit_modules(model)
    if blocks:
        raise NotApplicable(
            f"{len(blocks)} modules, {blocks[0]} the first, are held in 4-bit blocks: merged, they "
            "are quantised again, which is not rounding; merge into a base in a wider format"
        )
    config = model.peft_config[ADAPTER_NAME]
    if config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        raise NotApplicable(
            f"a {subject.adapter.peft_type} adapter has nothing that could be merged into weights"
        )


def _require_finite(unmerged: torch.Tensor) -> None:
    if not bool(unmerged.isfinite().all()):
        raise NotApplicable(
            f"the unmerged model's own output is not finite in {dtype_name(unmerged.dtype)}, so"
            " there is nothing to hold the merged one against; give another --lora-dtype"
        )


def _size(subject: Subject) -> int:
    """Bytes the merged model takes on disk, and some to spare."""
    tensors = {tensor.data_ptr(): tensor for _, tensor in subject.base.structure.tensors()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    own = sum(math.prod(info.shape) * 4 for info in subject.adapter.tensors.values())
    return weights + own + _SPARE


def _widened(subject: Subject) -> dict[str, torch.Tensor]:
    """The probe inputs, in more rows where each row yields only a few numbers (classification).

    A ratio of two RMS values over four numbers would exceed 2 by chance in one of ten runs.
    """
    inputs = subject.inputs
    rows = next(iter(inputs.values())).shape[0]
    if subject.base_output().dim() > 2 or rows >= FEW:
        return inputs
    return {name: _rolled(tensor, FEW) for name, tensor in inputs.items()}


def _rolled(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    turns = range(-(-rows // tensor.shape[0]))
    many = torch.cat([tensor.roll(turn, dims=-1) for turn in turns])
    return many[:rows].contiguous()


def _cause(folder: Path, subject: Subject) -> str:
    """What in the merged folder explains that loading it gives another model, and what to do."""
    if _says_tied(folder) and _adapts_embeddings(subject.adapter):
        return (
            "the merged config.json says tie_word_embeddings=true, so loading overwrites the head;"
            " set it to false there, or merge with PEFT 0.19.1 or later"
        )
    lost = _lost(folder, subject)
    if lost:
        more = ", ..." if len(lost) > 3 else ""
        return f"the merged folder lacks {', '.join(lost[:3])}{more}; save every tensor"
    return "every tensor is in the merged folder, so look for one saved or loaded altered"


def _lost(folder: Path, subject: Subject) -> list[str]:
    """Parameters the merged folder has no tensor for."""
    try:
        saved = Checkpoint(folder)
    except CannotRun:
        return ["whole safetensors weights"]
    with subject.base.bare() as module:
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        return [name for name in names if saved.find(name, module) is None]


def _adapts_embeddings(adapter: Adapter) -> bool:
    return any(f".{name}." in key for key in adapter.tensors for name in _EMBEDDINGS)


def _says_tied(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("tie_word_embeddings") is True


def _wide_output(
    spec: BaseSpec,
    adapter: AdapterLocation,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    timeout: float,
) -> torch.Tensor | None:
    """The unmerged model's output in a wider format; None where there is none."""
    if dtype == torch.float64:
        return None
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    result = run_fresh(Job(spec, adapter, upcast=wide), inputs, timeout=timeout)
    return result.outputs["output"]


_ROUTED = (
    "mixture of experts: rounding can tip a routing decision and move a position far, so the median"
    " position was judged"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """RMS distances from the output in the wider format, and the least one can ask for.

    ``worst`` is where the merged model is furthest off.
    """

    merged: float
    unmerged: float
    floor: float
    worst: tuple[int, ...]

    @classmethod
    def of(
        cls, merged: torch.Tensor, unmerged: torch.Tensor, wide: torch.Tensor, *, typical: bool
    ) -> Errors:
        """Over all values, or (``typical``) the median over positions."""
        exact = wide.double()
        error = merged.double() - exact
        spread = median_rms if typical else rms
        floor = torch.finfo(merged.dtype).eps / 2 / (2 * math.sqrt(3)) * spread(exact)
        largest = torch.unravel_index(error.abs().argmax(), error.shape)
        worst = tuple(int(index) for index in largest)
        return cls(spread(error), spread(unmerged.double() - exact), floor, worst)

    @property
    def ratio(self) -> float:
        """How much further off the merged model is."""
        return self.merged / max(self.unmerged, self.floor, sys.float_info.min)

    def __str__(self) -> str:
        return (
            f"the merged model's output is off the wider reference by {self.merged:.3g} (RMS), most"
            f" at {list(self.worst)}; the unmerged model's by {self.unmerged:.3g}"
        )


def _judged(
    errors: Errors | None,
    merged: torch.Tensor,
    problem: Problem | None,
    note: str,
    facts: Mapping[str, Json],
) -> Measurement:
    notes = [note] if note else []
    details: dict[str, Json] = {FACTS: facts}
    if errors is not None:
        details |= {"rms_merged": errors.merged, "rms_unmerged": errors.unmerged,
                   "rms_floor": errors.floor, "ratio": errors.ratio}  # fmt: skip
        if max(errors.merged, errors.unmerged) <= errors.floor:
            notes.append("both models are as close to the reference as their format allows")
    problem = problem or _not_finite(merged)
    return Measurement(
        value=math.inf if problem else errors.ratio if errors else 0.0,
        unit="times the unmerged model's own rounding error",
        count=merged.numel(),
        where=str(problem or errors or "") or None,
        details={**details, "problems": [problem.to_dict()] if problem else [], "notes": notes},
    )


def _not_finite(merged: torch.Tensor) -> Problem | None:
    finite = merged.isfinite()
    if bool(finite.all()):
        return None
    count = int((~finite).sum())
    return Problem(
        f"the merged model in {dtype_name(merged.dtype)}",
        f"{count} of {merged.numel()} outputs are not finite",
        "finite ones, as the unmerged model gives",
        "the merged weights overflow: merge in float32 or bfloat16",
    )
