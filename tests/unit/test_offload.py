"""Bases larger than a device: with an artificial limit of memory, on a CPU and its disk."""
# ruff: noqa: E402 -- libraries may be absent, so everything else comes after the question

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

import sys
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
import transformers

from pytest_lora import offload
from pytest_lora._fresh_job import Job, describe_job, read_job
from pytest_lora.adapter import Adapter
from pytest_lora.checks.effect import measure_adapter_effect
from pytest_lora.checks.frozen import measure_frozen_weights
from pytest_lora.checks.merge import measure_merge_equivalence, measure_unmerge_restoration
from pytest_lora.checks.reload import measure_merged_reload, measure_save_reload
from pytest_lora.checks.spectrum import measure_delta_spectrum
from pytest_lora.checks.switching import measure_adapter_isolation, measure_disable_equals_base
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.loading import quiet, spec_for
from pytest_lora.settings import Layer, resolve
from pytest_lora.subject import BaseModel, Subject, load_base

LIMIT = ("cpu=110KB",)  # of the 142 that the model has
MODULES = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(num_hidden_layers=4), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Adapter:
    home = tmp_path_factory.mktemp("adapter")
    options = {"task_type": "CAUSAL_LM", "target_modules": MODULES}
    return tiny.save_adapter(tiny.llama(num_hidden_layers=4), home, **options)


@pytest.fixture
def subject(folder: Path, adapter: Adapter) -> Subject:
    base = load_base(folder, adapter=adapter, device="cpu", device_map="auto", max_memory=LIMIT)
    return Subject(adapter, base)


def by_accelerate(folder: Path, spare: Path) -> Any:
    """The same placement as accelerate leaves it."""
    with quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 110_000}, offload_folder=spare
        )


def test_the_limit_does_leave_weights_on_disk(folder: Path, tmp_path: Path) -> None:
    model = by_accelerate(folder, tmp_path)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert "model.layers.3.self_attn.q_proj.weight" in left
    assert "model.layers.0.self_attn.q_proj.weight" not in left


def test_every_weight_is_there_and_the_output_the_same_bits(
    subject: Subject, folder: Path, adapter: Adapter
) -> None:
    whole = load_base(folder, adapter=adapter, device="cpu")
    assert {name: item.digest for name, item in subject.base.fingerprints.items()} == {
        name: item.digest for name, item in whole.fingerprints.items()
    }
    assert torch.equal(subject.base_output(), Subject(adapter, whole).base_output())
    assert torch.equal(subject.output(), Subject(adapter, whole).output())
    assert not any(hasattr(m, "hf_device_map") for m in subject.base.module.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_what_is_left_on_disk_is_mapped_not_read(subject: Subject, folder: Path) -> None:
    weight = subject.base.module.get_parameter("model.layers.3.self_attn.q_proj.weight")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in maps]
    [file] = [file for low, high, file in spans if low <= weight.data_ptr() < high]
    assert Path(file) == folder / "model.safetensors"


CHECKS = [
    measure_adapter_effect,
    measure_delta_spectrum,
    measure_disable_equals_base,
    measure_frozen_weights,
    measure_adapter_isolation,
    measure_merge_equivalence,
    measure_unmerge_restoration,
]


@pytest.mark.parametrize("measure", CHECKS, ids=lambda check: check.__name__)
def test_every_check_says_what_it_says_of_a_whole_model(
    measure: Any, subject: Subject, folder: Path, adapter: Adapter
) -> None:
    whole = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    here, there = measure(subject), measure(whole)
    assert (here.value, here.count, here.where) == (there.value, there.count, there.where)
    assert not subject.base.verify()


@pytest.mark.parametrize("measure", [measure_save_reload, measure_merged_reload])
def test_fresh_processes_place_it_alike(measure: Any, subject: Subject) -> None:
    assert measure(subject).value <= 2


def test_a_fault_in_a_weight_left_on_disk_is_found(subject: Subject) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    with torch.no_grad():
        subject.base.module.get_parameter(name)[3, 5] += 1
    [problem] = subject.base.verify()
    assert problem.where == name
    assert "at [3, 5]" in problem.found
    subject.base.reload()
    assert not subject.base.verify()
    assert subject.base.spec is not None
    assert subject.base.spec.device_map == "auto"


def test_a_faulty_merge_of_a_layer_left_on_disk_is_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = peft.tuners.lora.layer.Linear
    delta = linear.get_delta_weight
    layer = subject.model.get_submodule("base_model.model.model.layers.3.self_attn.q_proj")
    monkeypatch.setattr(
        linear, "get_delta_weight", lambda s, a: delta(s, a) * (1.01 if s is layer else 1)
    )
    found = measure_merge_equivalence(subject)
    assert found.value > 1
    assert found.where is not None
    assert "layers.3.self_attn.q_proj" in found.where


def test_tied_weights_stay_tied(tmp_path: Path, adapter: Adapter) -> None:
    home = tiny.save_base(tiny.llama(num_hidden_layers=4, tie_word_embeddings=True), tmp_path)
    base = load_base(home, adapter=adapter, device="cpu", device_map="auto", max_memory=LIMIT)
    assert base.module.get_output_embeddings().weight is base.module.get_input_embeddings().weight


def test_a_model_that_accelerate_offloaded_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = by_accelerate(folder, tmp_path)
    with pytest.raises(CannotRun, match=r"tensors of the base model are offloaded, model"):
        BaseModel.from_module(model)


def test_a_model_that_does_not_load_leaves_nothing(
    folder: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CannotRun, match="as AutoModelForCausalLM: "):
        load_base(folder, adapter=adapter, device="cpu", device_map="nonsense")
    assert not list(tmp_path.iterdir())


def test_a_block_visits_the_device_for_its_own_length() -> None:
    block = torch.nn.Linear(3, 2)
    data, seen = block.weight.data_ptr(), []
    block.register_forward_hook(lambda m, *_: seen.append(m.weight.device))
    before = block.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(block.weight.dtype)
        return before(x)

    block.forward = forward
    # A device of the same memory and another name: what is shown is that data go and come back.
    offload._let_visit(block, torch.device("cpu", 0))
    block(torch.ones(1, 3))
    assert len(seen) == 2
    assert block.weight.data_ptr() == data


@pytest.mark.parametrize(
    "text", ["cpu", "cpu=2", "disk=2GB", "0=1GiB,0=2GiB", "-1=2GiB", "cpu=-2GB", "cuda=1GB"]
)
def test_shares_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="device=size for cpu or the numbers of GPUs"):
        resolve([Layer({"max_memory": text}, str)])


def test_shares_are_read_and_travel_to_other_processes(folder: Path, adapter: Adapter) -> None:
    text = "0=20GiB, cpu=1GB"
    shares = resolve([Layer({"max_memory": text, "device_map": "auto"}, str)]).max_memory
    placing = offload.Placing("auto", shares, torch.device("cuda"))
    placing.abandon()
    assert placing.options["max_memory"] == {0: 20 << 30, "cpu": 10**9}
    with pytest.raises(UsageError, match="is for a device_map, and there is none"):
        spec_for(folder, adapter, device="cpu", max_memory=shares)
    spec = spec_for(folder, adapter, device="cpu", device_map="balanced", max_memory=shares)
    assert read_job(describe_job(Job(spec))).spec == spec


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("measure", CHECKS, ids=lambda check: check.__name__)
def test_what_does_not_fit_a_gpu_visits_it(measure: Any, folder: Path, adapter: Adapter) -> None:
    base = load_base(
        folder, adapter=adapter, device="cuda", device_map="auto",
        max_memory=["0=110KB", "cpu=1GB"],
    )  # fmt: skip
    kinds = {tensor.device.type for _, tensor in base.structure.tensors()}
    assert kinds == {"cpu", "cuda"}
    subject = Subject(adapter, base)
    whole = Subject(adapter, load_base(folder, adapter=adapter, device="cuda"))
    assert torch.equal(subject.output().cpu(), whole.output().cpu())
    assert measure(subject).value == pytest.approx(measure(whole).value)
    assert not base.verify()
