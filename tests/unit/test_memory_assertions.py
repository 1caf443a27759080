"""Verdicts about memory, their words and their evidence."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: E402

from pytest_lora.errors import CannotRun, CheckFailed, UsageError  # noqa: E402
from pytest_lora.memory.advice import advice  # noqa: E402
from pytest_lora.memory.measured import (  # noqa: E402
    DeviceMemory,
    MeasuredMemory,
    is_out_of_memory,
    measure_cpu_memory,
    measure_gpu_memory,
    measure_memory_left,
)
from pytest_lora.memory.predict import predict_memory  # noqa: E402
from pytest_lora.memory.records import MemoryPrediction  # noqa: E402
from pytest_lora.memory_assertions import (  # noqa: E402
    assert_gpu_memory,
    assert_memory_unchanged,
    assert_no_memory_left,
    judge_measured,
    limit_memory,
    out_of_memory,
)
from pytest_lora.records import Outcome, collecting  # noqa: E402

MIB = 1 << 20
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here to measure on")


def predict(**options: Any) -> MemoryPrediction:
    adapter = options.pop("adapter", None) or cases.lora()
    return predict_memory(cases.llama(), adapter, **{"batch": 2, "sequence": 64, **options})


@pytest.fixture(scope="module")
def prediction() -> MemoryPrediction:
    return predict()


@NO_GPU
def test_a_prediction_that_fits_passes_and_says_predicted(prediction: MemoryPrediction) -> None:
    measured = assert_gpu_memory(lambda: None, max_memory="1 GiB", predicted=prediction)
    assert "predicted" in measured.unit
    assert measured.value == prediction.predicted / 2**30
    assert any("assumed kernels" in note for note in measured.notes)


@NO_GPU
def test_one_that_does_not_fit_fails_and_says_what_to_change(prediction: MemoryPrediction) -> None:
    with pytest.raises(CheckFailed, match="predicted not to fit") as failed:
        assert_gpu_memory(max_memory=prediction.predicted - 1, predicted=lambda: prediction)
    assert failed.value.result.outcome is Outcome.FAILED
    assert "logits take" in failed.value.result.advice
    assert "alive then" in str(failed.value)


@NO_GPU
def test_one_within_its_margin_is_no_promise(prediction: MemoryPrediction) -> None:
    with pytest.raises(CheckFailed, match="too close to call") as failed:
        assert_gpu_memory(max_memory=prediction.at_most - 1, predicted=prediction)
    assert failed.value.result.outcome is Outcome.INCONCLUSIVE


@NO_GPU
def test_nothing_to_measure_on_and_nothing_predicted_is_no_verdict() -> None:
    with pytest.raises(CannotRun, match="no CUDA device") as missing:
        assert_gpu_memory(lambda: None, max_memory="1 GiB")
    assert missing.value.missing
    with pytest.raises(CannotRun, match="torch sees none here"), measure_gpu_memory():
        pass


def test_a_size_that_is_none_is_a_usage_error(prediction: MemoryPrediction) -> None:
    with pytest.raises(UsageError, match="14 gigs"):
        assert_gpu_memory(max_memory="14 gigs", predicted=prediction)


# ------------------------------------------------------------------------------- measurements


def taken(allocated: int) -> MeasuredMemory:
    devices = (DeviceMemory("cuda:0", allocated, 2 * allocated, 3 * MIB, 4 * MIB),
               DeviceMemory("cuda:1", allocated // 2, allocated))  # fmt: skip
    return MeasuredMemory(devices, None, False)


def test_a_measurement_is_judged_by_its_fullest_device(prediction: MemoryPrediction) -> None:
    with collecting() as results:
        found = judge_measured(taken(100 * MIB), 100 * MIB, "step", prediction)
    assert [result.outcome for result in results] == [Outcome.PASSED]
    assert found.details["predicted"] == prediction.to_dict()
    assert any("above 3.00 MiB" in note for note in found.notes)
    with pytest.raises(CheckFailed, match="measured"):
        judge_measured(taken(100 * MIB), 100 * MIB - 1)


def test_running_out_of_memory_exceeds_any_ceiling() -> None:
    with pytest.raises(CheckFailed, match="ran out of memory: tried 5 GiB") as failed:
        out_of_memory(taken(10 * MIB), 2**40, "step", RuntimeError("tried 5 GiB"))
    assert failed.value.result.measurement is not None
    assert failed.value.result.measurement.value == math.inf


def test_out_of_memory_is_known_beneath_other_errors() -> None:
    error = ValueError("wrapped")
    error.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(error)
    # cuBLAS and the driver have errors of their own for it.
    for said in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                 "CUDA error: out of memory", "CUDA driver error: out of memory"):  # fmt: skip
        assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("another"))
    assert not is_out_of_memory(None)


def test_a_block_is_held_to_its_live_tensors() -> None:
    with limit_memory("4000 B") as block:
        kept = torch.empty(1000)
    assert (block.allocated, block.devices[0].allocated_after) == (4000, kept.nbytes)
    with pytest.raises(CheckFailed, match="live tensors"), limit_memory("3999 B"):
        kept = torch.empty(1000)


def test_an_open_block_has_no_number_yet() -> None:
    with measure_cpu_memory() as block, pytest.raises(CannotRun, match="after the block"):
        assert block.allocated
    assert block.allocated == 0


def test_an_error_in_the_block_is_the_blocks_own() -> None:
    with pytest.raises(ZeroDivisionError), limit_memory("1 GiB") as block:
        _ = 1 / 0
    assert block.allocated == 0


def test_a_block_names_logits_gradients_and_modules_and_what_helps() -> None:
    """Of a model that nobody has shown, as in a test of a trainer."""
    model = LlamaForCausalLM(cases.llama())
    ids = torch.arange(256).view(2, 128)
    with measure_cpu_memory() as block:
        for _ in range(2):  # the peak is in the loss, where the first pass has no gradient yet
            model(input_ids=ids, labels=ids).loss.backward()
    assert block.peak is not None
    assert block.peak.by_category["logits"] >= 256 * 4 * model.config.vocab_size
    assert block.peak.by_category["gradients"] > 0
    assert any(tensor.module.startswith("model.layers.") for tensor in block.peak.largest)
    model.zero_grad()
    with pytest.raises(CheckFailed, match="logits take"), limit_memory("1 KiB"):
        model(input_ids=ids, labels=ids).loss.backward()


def test_tensors_without_memory_are_not_counted() -> None:
    with limit_memory("8 B") as block:
        kept = (torch.empty(1000, device="meta") + 1, torch.ones(2))
    assert block.allocated == kept[1].nbytes


def test_tensors_made_from_python_and_numpy_are_counted() -> None:
    numpy = pytest.importorskip("numpy")
    with limit_memory("1000 B") as block:
        kept = (torch.tensor([1.0] * 100), torch.from_numpy(numpy.ones(75)))
    assert block.allocated == sum(tensor.nbytes for tensor in kept) == 1000


def test_sparse_tensors_are_their_parts_and_opaque_ones_are_named() -> None:
    dense = torch.eye(5)
    with limit_memory("1 MiB") as block:
        kept = dense.to_sparse()
    assert block.devices[0].allocated_after == kept.values().nbytes + kept.indices().nbytes
    with pytest.raises(CannotRun, match="layout _mkldnn"), limit_memory("1 MiB"):
        dense.to_mkldnn()


def elsewhere(make: Any) -> None:
    """Run in another thread, where no mode sees what is made, as loaders do."""
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()


def test_what_another_thread_left_is_counted_as_there_throughout() -> None:
    kept: list[Any] = []
    with limit_memory("420 B") as block:
        elsewhere(lambda: kept.append(torch.ones(100)))
        torch.ones(5)
    assert (block.allocated, block.unseen) == (420, 400)
    with pytest.raises(CheckFailed, match="no operator of the block's thread"):  # noqa: SIM117
        with limit_memory("399 B"):
            elsewhere(lambda: kept.append(torch.ones(100)))


def test_what_was_there_before_is_not_taken_for_left_by_another_thread() -> None:
    layer = torch.nn.Linear(3, 3)
    layer(torch.ones(1, 3)).sum().backward()
    before = torch.ones(4)
    with limit_memory("1 MiB") as block:
        looked_at = (layer.weight.grad, before.view(2, 2), torch.ones(1))
    assert block.unseen == 0
    assert block.devices[0].allocated_after == looked_at[2].nbytes


def test_a_block_without_tensors_is_not_judged() -> None:
    with pytest.raises(CannotRun, match="no operator"), limit_memory("1 GiB"):
        pass
    with pytest.raises(CannotRun, match="no operator"):
        assert_no_memory_left(lambda: None)


def test_a_step_that_takes_nothing_of_a_gpu_is_not_judged() -> None:
    taken = MeasuredMemory((DeviceMemory("cuda:0", 0, 0, 100, 200, 0),))
    taken._open = False
    with pytest.raises(CannotRun, match="nothing was allocated on any CUDA device"):
        judge_measured(taken, MIB)


@NO_GPU
@pytest.mark.parametrize("predicted", [3, "24gb", lambda: None])
def test_what_is_no_prediction_is_named(predicted: Any) -> None:
    with pytest.raises(UsageError, match="is no prediction"):
        assert_gpu_memory(max_memory="1 GiB", predicted=predicted)


class Cards:
    """Stands for two devices, of which only the first is in use by this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.allocated = [100, 0]
        for name, stand_in in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "init": lambda: self.done.append("init"),
            "empty_cache": lambda: self.done.append("empty_cache"),
            "synchronize": lambda index: self.done.append(f"wait {index}"),
            "reset_peak_memory_stats": lambda device: self.done.append(f"reset {device}"),
            "memory_allocated": lambda device: self.allocated[device.index],
            "memory_reserved": lambda device: 2 * self.allocated[device.index],
            "max_memory_allocated": lambda device: self.allocated[device.index] + 7,
            "max_memory_reserved": lambda device: 2 * self.allocated[device.index] + 9,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            torch._C, "_cuda_hasPrimaryContext", lambda index: index == 0, raising=False
        )


def test_a_device_that_is_not_in_use_gets_no_context_by_being_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards = Cards(monkeypatch)
    with measure_gpu_memory(breakdown=False) as found:
        cards.allocated[0] += 50
    assert cards.done == ["init", "wait 0", "empty_cache", "reset cuda:0", "reset cuda:1"]
    assert found.devices == (
        DeviceMemory("cuda:0", 57, 109, 100, 200, 50),
        DeviceMemory("cuda:1", 7, 9, 0, 0, 0),
    )


# ------------------------------------------------------------------------------------- leaks


def test_a_cycle_that_returns_to_the_start_leaves_nothing() -> None:
    """Also one with a reference cycle, and one that fills a cache the first time it is run."""
    cache: dict[str, Any] = {}

    def cycle() -> None:
        cache.setdefault("table", torch.ones(10))
        layer = torch.nn.Linear(100, 100)
        layer.itself = [layer]
        layer(torch.ones(2, 100)).sum().backward()

    assert assert_no_memory_left(cycle).value == 0


def test_a_tensor_kept_is_a_leak_with_its_maker() -> None:
    kept: list[Any] = []

    def cycle() -> None:
        model = torch.nn.Sequential(torch.nn.Linear(8, 300))
        kept.append(model(torch.ones(300, 8)))

    with pytest.raises(CheckFailed, match=r"addmm") as failure:
        assert_no_memory_left(cycle, cycles=2)
    result = failure.value.result
    # Each output, its weight and its bias: the graph holds them.
    assert result.measurement.value == 2 * 4 * (300 * 300 + 300 * 8 + 8 * 300 + 300)
    assert "2 x " in str(result.measurement.notes)


def test_what_takes_the_place_of_something_as_large_is_no_leak(tmp_path: Path) -> None:
    """The last answer that is kept, a cache of one entry, a weight that is replaced, a file read
    again.
    """
    kept: dict[str, Any] = {}
    layer = torch.nn.Linear(300, 300)
    LlamaForCausalLM(cases.llama()).save_pretrained(tmp_path)

    def cycle() -> None:
        kept["answer"] = layer(torch.ones(3, 300))
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
        kept["model"] = AutoModelForCausalLM.from_pretrained(tmp_path)

    found = assert_no_memory_left(cycle, cycles=2)
    assert found.value == 0
    assert not found.details["left"]


def test_what_was_there_before_and_is_let_go_hides_no_leak() -> None:
    early = [torch.ones(1000), torch.ones(500_000)]
    kept: list[Any] = []
    empty: list[Any] = []

    def cycle() -> None:
        if len(kept) == 1:
            early.clear()
        kept.append(torch.ones(30))

    with pytest.raises(CheckFailed, match="bytes of tensors left"):
        assert_no_memory_left(cycle, cycles=3)
    assert measure_memory_left(lambda: early.append(torch.ones(7)), cycles=4).value == 4 * 28
    assert measure_memory_left(lambda: early and early.pop() + 1, cycles=2).value == 0
    no_memory = measure_memory_left(lambda: empty.append(torch.ones(9, device="meta")), cycles=2)
    assert no_memory.value == 0


def test_a_model_kept_that_was_read_from_a_file_is_a_leak(tmp_path: Path) -> None:
    """No operator makes its weights: other threads map the file."""
    kept: list[Any] = []
    model = LlamaForCausalLM(cases.llama())
    model.save_pretrained(tmp_path)

    def cycle() -> None:
        kept.append(AutoModelForCausalLM.from_pretrained(tmp_path))

    with pytest.raises(CheckFailed, match="no operator of the block's thread"):
        assert_no_memory_left(cycle, cycles=2)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert measure_memory_left(cycle, cycles=2).value >= 2 * size
    assert assert_no_memory_left(lambda: AutoModelForCausalLM.from_pretrained(tmp_path)).value == 0


@pytest.mark.parametrize("cycles", [0, 1.5, True])
def test_cycles_are_counted(cycles: Any) -> None:
    with pytest.raises(UsageError, match="cycles"):
        assert_no_memory_left(lambda: None, cycles=cycles)


# ------------------------------------------------------------------------------------- advice


def first(**options: Any) -> str:
    found = predict(**{"padding": "none", **options})
    return " | ".join(advice(found.peak, found.request))


def test_advice_is_about_what_is_there_and_not_yet_done() -> None:
    assert "gradient checkpointing" in first()
    assert "gradient checkpointing" not in first(checkpointing=True)
    assert "sdpa" in first(attention="eager", sequence=256, batch=1)
    assert "sdpa" not in first(attention="sdpa")
    assert "float32 copies" in first(sequence=512)
    assert "float32 copies" not in first(sequence=512, adapter_dtype="bfloat16")
    small = {"dtype": "float32", "batch": 1, "sequence": 16}
    assert "load the base in that format" in first(**small, autocast="bfloat16")
    assert "casts" not in first(dtype="bfloat16", autocast="bfloat16")
    assert "casts" not in first(**small)


def test_advice_on_a_block_is_about_what_ran_in_it() -> None:
    def told(train: bool) -> str:
        layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())

        def step() -> None:
            out = layers(torch.ones(512, 64)).sum()
            if train:
                out.backward()

        with pytest.raises(CheckFailed) as failed, limit_memory(1024):
            step()
        return failed.value.result.advice

    assert "gradient checkpointing" in told(train=True)
    assert "fewer rows" in told(train=False)
    assert "gradient checkpointing" not in told(train=False)


# -------------------------------------------------------------------------------- golden bytes


def test_a_recorded_number_holds(tmp_path: Path, prediction: MemoryPrediction) -> None:
    file = tmp_path / "memory.json"
    assert_memory_unchanged(prediction, file, "llama", update=True)
    text = file.read_text()
    assert assert_memory_unchanged(predict(), file, "llama").value == 0
    assert_memory_unchanged(prediction, file, "llama", update=True)
    assert file.read_text() == text, "the file is the same for the same number"
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"checkpointing": True}, "request: checkpointing"),
        ({"adapter": cases.lora(target_modules=["q_proj"])}, "request: adapter"),
        ({"dtype": "float32"}, "request: dtype"),
        ({"batch": 3}, "request: batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_change_is_found_and_explained(
    tmp_path: Path, prediction: MemoryPrediction, options: dict[str, Any], cause: str
) -> None:
    file = tmp_path / "memory.json"
    assert_memory_unchanged(prediction, file, "llama", update=True)
    with pytest.raises(CheckFailed) as failed:
        assert_memory_unchanged(predict(**options), file, "llama")
    message = str(failed.value)
    assert cause in message
    assert "update=True" in message
    assert f"{prediction.peak.live:,}, as recorded" in message


def test_a_change_of_one_byte_is_one(tmp_path: Path, prediction: MemoryPrediction) -> None:
    file = tmp_path / "memory.json"
    peak = dataclasses.replace(prediction.peak, live=prediction.peak.live + 1)
    assert_memory_unchanged(prediction, file, "llama", update=True)
    with pytest.raises(CheckFailed, match="1 bytes more or less"):
        assert_memory_unchanged(dataclasses.replace(prediction, peak=peak), file, "llama")


def test_an_update_leaves_the_other_entries(tmp_path: Path, prediction: MemoryPrediction) -> None:
    file = tmp_path / "memory.json"
    for name in ("one", "two"):
        assert_memory_unchanged(prediction, file, name, update=True)
    assert set(json.loads(file.read_text())["entries"]) == {"one", "two"}


def test_what_is_not_recorded_or_no_baseline_is_named(
    tmp_path: Path, prediction: MemoryPrediction
) -> None:
    file = tmp_path / "memory.json"
    with pytest.raises(UsageError, match="records nothing under 'llama'"):
        assert_memory_unchanged(prediction, file, "llama")
    for text in ("[]", "{", '{"format": 9, "entries": {}}', '{"format": 1, "entries": {"a": 1}}'):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"memory\.json"):
            assert_memory_unchanged(prediction, file, "llama")
