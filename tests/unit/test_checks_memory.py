"""The memory checks: predicted without a GPU, measured with one, and always saying which.

The measuring side runs here with the CPU's exact counter in the place of the device's.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import tiny  # noqa: E402

from pytest_lora.checks import memory as checks  # noqa: E402
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable, UsageError  # noqa: E402
from pytest_lora.memory.measured import (  # noqa: E402
    DeviceMemory,
    MeasuredMemory,
    measure_cpu_memory,
)
from pytest_lora.memory.plan import MemoryPlan  # noqa: E402
from pytest_lora.memory.plot import curve_svg  # noqa: E402
from pytest_lora.memory.records import MemoryPrediction, NotPredictable  # noqa: E402
from pytest_lora.memory.tracing import trace_on_cpu  # noqa: E402
from pytest_lora.memory_assertions import (  # noqa: E402
    assert_memory_inference,
    assert_memory_load,
    assert_memory_merge,
    assert_memory_train_step,
)
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, collecting  # noqa: E402
from pytest_lora.subject import Subject, load_base  # noqa: E402

ASSERTIONS: dict[str, Callable[..., Measurement]] = {
    "load": assert_memory_load,
    "inference": assert_memory_inference,
    "train_step": assert_memory_train_step,
    "merge": assert_memory_merge,
}
MEASURE = {
    "load": checks.measure_memory_load,
    "inference": checks.measure_memory_inference,
    "train_step": checks.measure_memory_train_step,
    "merge": checks.measure_memory_merge,
}
WORK = {"batch": 2, "sequence": 32}
JOB = pytest.mark.parametrize("job", list(ASSERTIONS))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> MemoryPlan:
    home = tmp_path_factory.mktemp("plan")
    tiny.save_base(tiny.llama(), home / "base")
    adapter = tiny.save_adapter(tiny.llama(), home / "adapter", task_type="CAUSAL_LM")
    return MemoryPlan(adapter, home / "base", workload=WORK)


# ----------------------------------------------------------------------------------- predicted


@JOB
def test_a_prediction_that_fits_passes_and_says_what_it_assumes(plan: MemoryPlan, job: str) -> None:
    with collecting() as results:
        found = ASSERTIONS[job](plan, max_memory="1 GiB")
    [result] = results
    assert (result.check, result.outcome) == (f"memory_{job}", Outcome.PASSED)
    assert "predicted" in found.unit
    notes = "\n".join(found.notes)
    for fact in ("with margin 5%", "on h100-80gb", "assumed kernels", "at the peak", "peak at"):
        assert fact in notes
    assert CheckResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@JOB
def test_a_ceiling_has_three_outcomes(plan: MemoryPlan, job: str) -> None:
    predicted = plan.predict(job)
    assert ASSERTIONS[job](plan, max_memory=predicted.at_most)
    for ceiling, outcome in (
        (predicted.predicted, Outcome.INCONCLUSIVE),
        (predicted.predicted - 1, Outcome.FAILED),
    ):
        with pytest.raises(CheckFailed) as failed:
            ASSERTIONS[job](plan, max_memory=ceiling)
        assert failed.value.result.outcome is outcome
        assert failed.value.result.advice
        assert failed.value.result.measurement is not None
        assert failed.value.result.measurement.where


@JOB
def test_without_a_ceiling_there_is_no_verdict(plan: MemoryPlan, job: str) -> None:
    with pytest.raises(NotApplicable, match=rf"--lora-memory-{job.replace('_', '-')}='14 GiB'"):
        ASSERTIONS[job](plan, max_memory=None)


def test_a_bound_keeps_its_origin(plan: MemoryPlan) -> None:
    with pytest.raises(CheckFailed, match=r"lora\.toml:3"):
        assert_memory_load(plan, max_memory=Bound.at_most(0.0, "lora.toml:3"))


@JOB
def test_the_curve_is_part_of_the_evidence(plan: MemoryPlan, job: str) -> None:
    curve: Any = MEASURE[job](plan).details["curve"]
    assert len(json.dumps(curve)) < 20_000
    assert sum(count for _, count in curve["phases"]) == len(curve["columns"]) <= 120
    highest = max(map(sum, curve["columns"]))
    assert highest == plan.predict(job).peak.live
    assert "peak " in curve_svg(curve)


def test_advice_suits_the_job(plan: MemoryPlan) -> None:
    def said(job: str, **words: Any) -> str:
        asked = dataclasses.replace(plan, workload={**WORK, **words})
        with pytest.raises(CheckFailed) as failed:
            ASSERTIONS[job](asked, max_memory=1)
        return failed.value.result.advice

    assert "gradient checkpointing" in said("train_step")
    assert "gradient checkpointing" not in said("train_step", checkpointing="reentrant")
    assert "gradient checkpointing" not in said("inference")
    assert "fewer rows or tokens" in said("inference")


def test_the_workload_decides(plan: MemoryPlan) -> None:
    def live(job: str, **words: Any) -> int:
        asked = dataclasses.replace(plan, workload={**WORK, **words}).make(job)
        return trace_on_cpu(asked).peak.live

    assert live("train_step", batch=4) > live("train_step")
    assert live("train_step", optimizer="sgd") < live("train_step")
    assert live("inference", sequence=48) > live("inference")
    assert live("inference", new_tokens=4) != live("inference")
    assert live("merge", batch=4) == live("merge"), "a merge has no batch"
    with pytest.raises(UsageError, match="optimizer 'lion'"):
        live("train_step", optimizer="lion")


def test_the_adapters_own_labels_and_vocabulary_count(tmp_path: Path) -> None:
    tiny.save_base(tiny.llama(), tmp_path / "base")
    grown = tiny.llama()
    grown.resize_token_embeddings(96, mean_resizing=False)
    kept = ["embed_tokens", "lm_head"]
    adapter = tiny.save_adapter(grown, tmp_path / "a", task_type="CAUSAL_LM", modules_to_save=kept)
    asked = MemoryPlan(adapter, tmp_path / "base", workload=WORK).make("load")
    assert asked.config.vocab_size == 96


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_format_is_the_checkpoints_own(tmp_path: Path, dtype: str) -> None:
    """That of the configuration, else that of the weights; without either nothing is assumed."""
    model = tiny.llama().to(getattr(torch, dtype))
    tiny.save_base(model, tmp_path / "base")
    adapter = tiny.save_adapter(tiny.llama(), tmp_path / "a", task_type="CAUSAL_LM")
    asked = MemoryPlan(adapter, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    silent = {k: v for k, v in json.loads(file.read_text()).items() if "dtype" not in k}
    for text in (file.read_text(), json.dumps(silent)):
        file.write_text(text)
        assert asked.make("load").dtype == getattr(torch, dtype)
    assert dataclasses.replace(asked, dtype="float16").make("load").dtype == torch.float16
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(CannotRun, match="--lora-dtype"):
        asked.make("load")


def test_what_can_neither_be_predicted_nor_measured_is_a_skip_with_the_reason(
    plan: MemoryPlan,
) -> None:
    pytest.importorskip("bitsandbytes")
    asked = dataclasses.replace(plan, workload={**WORK, "quantisation": "nf4"})
    with pytest.raises(CannotRun, match=r"4 bits cannot be predicted.*no CUDA device") as reason:
        assert_memory_load(asked, max_memory="1 GiB")
    assert reason.value.missing


def test_a_base_stored_quantised_is_named(tmp_path: Path, plan: MemoryPlan) -> None:
    tiny.save_base(tiny.llama(), tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": stored}))
    asked = dataclasses.replace(plan, base=tmp_path / "base", dtype="float32")
    with pytest.raises(CannotRun, match="stored quantised"):
        assert_memory_load(asked, max_memory="1 GiB")


def test_what_cannot_be_merged_is_not_applicable(tmp_path: Path) -> None:
    tiny.save_base(tiny.llama(), tmp_path / "base")
    adapter = tiny.save_adapter(
        tiny.llama(), tmp_path / "a", cls="PromptTuningConfig", task_type="CAUSAL_LM",
        num_virtual_tokens=4,
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="PROMPT_TUNING cannot be merged"):
        assert_memory_merge(MemoryPlan(adapter, tmp_path / "base"), max_memory="1 GiB")


# ------------------------------------------------------------------------------------ measured


@contextmanager
def on_the_cpu(*, timeline: bool = False) -> Iterator[Any]:
    with measure_cpu_memory() as taken:
        yield taken


@pytest.fixture
def here(plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> MemoryPlan:
    """The plan with its adapter on the loaded base, measured as on a device."""
    monkeypatch.setattr(checks, "measure_gpu_memory", on_the_cpu)
    base = load_base(plan.base, adapter=plan.adapter, device="cpu")
    return dataclasses.replace(plan, subject=Subject(plan.adapter, base))


@pytest.mark.parametrize("job", ["inference", "train_step", "merge"])
@pytest.mark.parametrize("words", [{}, {"checkpointing": "reentrant"}, {"new_tokens": 3}], ids=str)
def test_what_is_measured_is_what_the_cpu_is_predicted_to_take(
    here: MemoryPlan, job: str, words: dict[str, Any]
) -> None:
    """The whole model included, which was there before; but for the rounding of its tensors."""
    asked = dataclasses.replace(here, workload={**WORK, **words})
    measured = MEASURE[job](asked)
    assert "measured" in measured.unit
    predicted = trace_on_cpu(asked.make(job)).peak.live
    tensors = len(list(here.subject.model.state_dict())) if here.subject else 0
    assert 0 <= measured.value * 2**30 - predicted <= 512 * tensors


@JOB
def test_a_measurement_has_two_outcomes_and_the_prediction_beside_it(
    here: MemoryPlan, job: str
) -> None:
    measured = ASSERTIONS[job](here, max_memory="1 GiB")
    assert MemoryPrediction.from_dict(dict(measured.details["predicted"]))  # type: ignore[arg-type]
    assert any(note.startswith("predicted ") for note in measured.notes)
    assert measured.details["own_before"]
    with pytest.raises(CheckFailed, match="measured") as failed:
        ASSERTIONS[job](here, max_memory=1000)
    assert failed.value.result.outcome is Outcome.FAILED


def test_of_a_model_that_is_spread_each_device_counts_its_own_part() -> None:
    devices = (
        DeviceMemory("cuda:0", 3 * 2**30, 3 * 2**30),
        DeviceMemory("cuda:1", 2**30, 2**30),
    )
    taken = MeasuredMemory(devices, _open=False)
    there = {"cuda:0": 2**30, "cuda:1": 4 * 2**30, "cpu": 8 * 2**30}
    measured = checks.of_measured(taken, there=there)
    assert measured.value == 5  # of the second device, in GiB; all of them together are 17
    assert measured.details["own_before"] == 4 * 2**30
    assert checks.of_measured(taken).value == 3
    exhausted = checks.exhausted(taken, RuntimeError("out"), there=there)
    assert exhausted.value == math.inf
    assert exhausted.details["own_before"] == 4 * 2**30


@JOB
def test_the_base_is_left_as_it_was(here: MemoryPlan, job: str) -> None:
    assert here.subject is not None
    MEASURE[job](here)
    assert here.subject.base.verify() == ()
    assert not any(p.requires_grad for p in here.subject.base.module.parameters())


def test_a_base_that_cannot_be_read_again_is_not_merged(here: MemoryPlan) -> None:
    from pytest_lora.subject import BaseModel

    subject = Subject(here.adapter, BaseModel.from_module(tiny.llama()))
    with pytest.raises(CannotRun, match="passed in") as reason:
        checks.measure_memory_merge(dataclasses.replace(here, subject=subject))
    assert reason.value.missing


def test_running_out_of_memory_exceeds_any_ceiling(
    here: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    monkeypatch.setattr(checks, "training_step", run)
    with pytest.raises(CheckFailed, match="Tried to allocate 5 GiB"):
        assert_memory_train_step(here, max_memory="1000 TiB")


def test_what_cannot_be_predicted_is_measured_all_the_same(
    here: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotPredictable("the step reads a value")

    monkeypatch.setattr(MemoryPlan, "predict", refuse)
    measured = checks.measure_memory_inference(here)
    assert "not predicted: the step reads a value" in measured.notes


def test_other_errors_are_the_jobs_own(here: MemoryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checks, "training_step", run)
    with pytest.raises(ZeroDivisionError):
        checks.measure_memory_train_step(here)


def test_load_and_delete_cycles_leave_nothing(plan: MemoryPlan) -> None:
    """Live bytes return to the start: what a leak of one tensor in the code under test would end.

    The control keeps one on purpose.
    """

    def cycle() -> Any:
        base = load_base(plan.base, adapter=plan.adapter, device="cpu")
        subject = Subject(plan.adapter, base)
        subject.output()
        subject.release()
        return base

    import gc

    with measure_cpu_memory() as block:
        for _ in range(3):
            cycle()
            gc.collect()
    assert block.devices[0].allocated_after == 0
    with measure_cpu_memory() as block:
        kept = cycle()
        gc.collect()
    assert block.devices[0].allocated_after > 0
    del kept
