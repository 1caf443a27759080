"""Inference, loads and merges: predicted equals run, to the byte; what cannot be is named."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
import tiny  # noqa: E402
from stack import since  # noqa: E402

from pytest_lora.adapter import read_adapter  # noqa: E402
from pytest_lora.attach import attach  # noqa: E402
from pytest_lora.errors import CannotRun, UsageError  # noqa: E402
from pytest_lora.loading import load_weights, quiet, spec_for  # noqa: E402
from pytest_lora.memory.kernels import CudaKernels  # noqa: E402
from pytest_lora.memory.livebytes import LiveBytes  # noqa: E402
from pytest_lora.memory.predict import predict_memory  # noqa: E402
from pytest_lora.memory.records import MemoryPeak, NotPredictable  # noqa: E402
from pytest_lora.memory.tracing import run_step, trace_on_cpu, trace_on_cuda  # noqa: E402
from pytest_lora.memory.workload import Workload, make_base, make_model  # noqa: E402

BF16 = torch.bfloat16


def workload(case: cases.Case, job: str, **options: Any) -> Workload:
    return dataclasses.replace(case.workload(), job=job, **options)


def same(predicted: MemoryPeak, real: MemoryPeak) -> None:
    assert predicted.live == real.live
    assert predicted.by_category == real.by_category
    assert (predicted.op, predicted.module) == (real.op, real.module)


YOUNG = since("cannot build it", transformers=(5, 0))
PLAIN = cases.Case()
HALF = cases.Case(options={"dtype": BF16, "padding": "none"})


# ---------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(
    ("case", "new_tokens"),
    [
        (PLAIN, 0),
        (PLAIN, 3),
        (HALF, 5),
        (cases.Case(options={"dtype": BF16, "attention": "eager"}), 2),
        (cases.Case(adapter="dora"), 2),
        (cases.Case(adapter="prompt tuning"), 2),
        (cases.Case(adapter="full training"), 2),
        pytest.param(cases.Case("gemma3", "all-linear"), 3, marks=YOUNG),
        pytest.param(cases.Case("t5", "all-linear", "SEQ_2_SEQ_LM"), 0, marks=YOUNG),
        pytest.param(cases.Case("t5", "all-linear", "SEQ_2_SEQ_LM"), 3, marks=YOUNG),
        (cases.Case("bert", "encoder", "TOKEN_CLS"), 0),
    ],
    ids=str,
)
def test_inference_is_predicted_to_the_byte(case: cases.Case, new_tokens: int) -> None:
    asked = workload(case, "inference", new_tokens=new_tokens)
    same(trace_on_cpu(asked).peak, run_step(asked).peak)


def test_the_cache_grows_with_what_is_generated() -> None:
    """Keys and values of every layer, in the model's format, for each token after the prompt."""
    layers, rows, heads, width = 3, 2, 2, 128 // 8
    each = 2 * layers * rows * heads * width * 4

    def at_the_end(tokens: int) -> int:
        asked = workload(PLAIN, "inference", new_tokens=tokens)
        moments = trace_on_cpu(asked, timeline=True).timeline
        assert moments is not None
        return sum(moments[-1].columns)

    grown = at_the_end(5) - at_the_end(4)
    # Beside the cache grow a few rows of token ids, masks and positions: int64.
    assert each < grown <= each + 8 * rows * 6


def test_a_model_that_does_not_generate_is_named() -> None:
    asked = workload(cases.Case("bert", "encoder", "TOKEN_CLS"), "inference", new_tokens=1)
    with pytest.raises(NotPredictable, match="BertForTokenClassification does not generate"):
        trace_on_cpu(asked)


# -------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        HALF,
        cases.Case(adapter="dora"),
        cases.Case(adapter="saved head"),
        cases.Case(adapter="ia3"),
        cases.Case("gpt2", "all-linear"),
    ],
    ids=str,
)
def test_a_merge_is_predicted_to_the_byte(case: cases.Case) -> None:
    asked = workload(case, "merge")
    same(trace_on_cpu(asked).peak, run_step(asked).peak)


@pytest.mark.parametrize("adapter", ["prompt tuning", "full training"])
def test_what_cannot_be_merged_is_named(adapter: str) -> None:
    with pytest.raises(NotPredictable, match="cannot be merged"):
        trace_on_cpu(workload(cases.Case(adapter=adapter), "merge"))


# --------------------------------------------------------------------------------------- load


def really_loaded(asked: Workload, folder: Path) -> tuple[MemoryPeak, Path]:
    """The peak of putting an adapter on a base with PEFT, from files as they were saved."""
    torch.manual_seed(0)
    with quiet():
        tiny.save_base(make_base(asked, "cpu"), folder / "base")
        model: Any = make_model(asked, "cpu")
        model.save_pretrained(folder / "adapter")
    adapter = read_adapter(folder / "adapter")
    spec = spec_for(folder / "base", adapter, device="cpu", dtype=asked.dtype)
    base = load_weights(spec, adapter).module
    gc.collect()
    counter = LiveBytes()
    counter.track_module(base)
    with counter:
        attach(adapter, base, device=torch.device("cpu"))
    return counter.peak, adapter.path


@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        HALF,
        cases.Case(adapter="dora"),
        cases.Case(adapter="dora", options={"dtype": BF16}),
        cases.Case(adapter="saved head"),
        cases.Case(adapter="embedding and head"),
        cases.Case(adapter="ia3"),
        cases.Case("gpt2", "all-linear"),
        cases.Case("bert", "encoder", "TOKEN_CLS"),
    ],
    ids=str,
)
@since("writes other files", peft=(0, 15))
def test_a_load_is_predicted_to_the_byte(case: cases.Case, tmp_path: Path) -> None:
    asked = workload(case, "load")
    real, _ = really_loaded(asked, tmp_path)
    predicted = trace_on_cpu(asked).peak
    assert predicted.live == real.live


def test_a_load_has_the_files_own_format(tmp_path: Path) -> None:
    """A file in half precision is half as large beside the weights it fills."""
    asked = workload(PLAIN, "load")
    _, folder = really_loaded(asked, tmp_path)
    whole = read_adapter(folder).tensors
    half = {name: dataclasses.replace(info, dtype="BF16") for name, info in whole.items()}
    full = trace_on_cpu(dataclasses.replace(asked, file=whole)).peak.live
    less = trace_on_cpu(dataclasses.replace(asked, file=half)).peak.live
    weights = sum(info.end - info.start for info in whole.values())
    assert full - less == weights // 2
    strange = {name: dataclasses.replace(info, dtype="F4") for name, info in whole.items()}
    with pytest.raises(NotPredictable, match="tensors in F4"):
        trace_on_cpu(dataclasses.replace(asked, file=strange))


def test_loads_that_compute_are_named() -> None:
    with pytest.raises(NotPredictable, match="the load of PROMPT_TUNING"):
        trace_on_cpu(workload(cases.Case(adapter="prompt tuning"), "load"))


def test_loads_on_quantised_bases_are_named() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(NotPredictable, match="a load on a base in 4 bits"):
        trace_on_cpu(workload(cases.Case(options={"quantisation": "nf4"}), "load"))


@pytest.mark.parametrize("case", cases.MERGES_IN_4_BITS, ids=str)
def test_a_merge_into_layers_in_4_bits_is_predicted_to_the_byte(case: cases.Case) -> None:
    pytest.importorskip("bitsandbytes")
    same(trace_on_cpu(case.workload()).peak, run_step(case.workload()).peak)


def test_on_a_card_the_merged_weight_comes_back_from_the_host() -> None:
    """One more copy of each layer in 4 bits, which on the CPU is the same storage."""
    pytest.importorskip("bitsandbytes")
    asked = cases.MERGES_IN_4_BITS[0].workload()
    on_card = trace_on_cuda(asked, CudaKernels(("math",)), timeline=True).timeline
    on_host = trace_on_cpu(asked, timeline=True).timeline
    assert on_card is not None
    assert on_host is not None
    layers = 3 * len(cases.EVERY)
    assert sum("clone" in moment.op for moment in on_card) == layers
    assert not any("clone" in moment.op for moment in on_host)
    assert not any(moment.columns[-1] for moment in on_host)


def test_bitsandbytes_is_left_as_it_was() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kind, codes = bitsandbytes.nn.Params4bit, dict(bitsandbytes.functional.name2qmap)
    before = kind.to, torch.Tensor.to
    trace_on_cpu(cases.MERGES_IN_4_BITS[0].workload())
    assert (kind.to, torch.Tensor.to) == before
    assert bitsandbytes.functional.name2qmap == codes


def test_a_method_that_merges_into_plain_layers_only_is_named() -> None:
    pytest.importorskip("bitsandbytes")
    case = cases.Case(adapter="ia3", options={"quantisation": "nf4"})
    with pytest.raises(NotPredictable, match="IA3 cannot be merged"):
        trace_on_cpu(workload(case, "merge"))


# ------------------------------------------------------------------------------ on a card


def test_jobs_differ_in_what_they_hold() -> None:
    step = {"batch": 2, "sequence": 64}
    found = {
        "train_step": predict_memory(cases.llama(), cases.lora(), **step),
        "inference": predict_memory(cases.llama(), cases.lora(), job="inference", **step),
        "load": predict_memory(cases.llama(), cases.lora(), job="load"),
        "merge": predict_memory(cases.llama(), cases.lora(), job="merge"),
    }
    held = {job: prediction.peak.by_category for job, prediction in found.items()}
    assert found["train_step"].peak.live > found["inference"].peak.live > held["merge"]["frozen"]
    assert held["inference"]["optimizer"] == held["merge"]["gradients"] == 0
    assert len({peak["frozen"] for peak in held.values()}) == 1
    # Forward and backward multiply in two threads; a plain adapter is loaded without multiplying.
    workspaces = {job: prediction.workspaces >> 20 for job, prediction in found.items()}
    assert workspaces == {"train_step": 64, "inference": 32, "load": 0, "merge": 32}


@pytest.mark.parametrize("job", ["train_step", "inference"])
def test_a_batch_has_a_size(job: str) -> None:
    with pytest.raises(UsageError, match=f"the memory of a {job} depends on batch and sequence"):
        predict_memory(cases.llama(), cases.lora(), job=job, batch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"job": "sleep"}, "job 'sleep' is none of"), ({"new_tokens": -1}, "new_tokens -1")],
)
def test_jobs_that_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predict_memory(cases.llama(), cases.lora(), batch=1, sequence=8, **options)


def test_a_trace_leaves_torch_and_peft_as_they_were() -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = torch.tensor, BaseTunerLayer._move_adapter_to_device_of_base_layer
    with pytest.raises(CannotRun):
        trace_on_cpu(workload(cases.Case(adapter="prompt tuning"), "load"))
    trace_on_cpu(workload(PLAIN, "load"))
    assert (torch.tensor, BaseTunerLayer._move_adapter_to_device_of_base_layer) == before
