"""A base model loaded once, adapters attached, and everything put back."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from typing import TYPE_CHECKING

import peft
import tiny
import torch
import transformers
from torch import nn

from pytest_lora import subject as subject_module
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.structure import Structure
from pytest_lora.subject import BaseModel, BasePool, Subject, load_base, lora_layers

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_lora.adapter import Adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    home = tmp_path_factory.mktemp("adapter")
    return tiny.save_adapter(tiny.llama(), home, task_type="CAUSAL_LM")


@pytest.fixture
def subject(folder: Path, adapter: Adapter) -> Subject:
    return Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))


def snapshot(module: nn.Module) -> dict[str, object]:
    """Everything about a module tree that an attachment could leave changed."""
    return {
        "modules": [(name, id(item), type(item)) for name, item in module.named_modules()],
        "tensors": [(n, id(t), t.data_ptr(), t.requires_grad, t.grad) for n, t in _tensors(module)],
        "training": [item.training for item in module.modules()],
        "hooks": [
            len(item._forward_hooks) + len(item._forward_pre_hooks) for item in module.modules()
        ],
        "attributes": [sorted(vars(item)) for item in module.modules()],
        "config": module.config.to_dict() if hasattr(module, "config") else None,
    }


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


# ---------------------------------------------------------------------------- loading


def test_a_base_is_loaded_frozen_and_in_eval_mode(subject: Subject, folder: Path) -> None:
    base = subject.base
    assert base.source == folder
    assert base.device == torch.device("cpu")
    assert base.dtype == torch.float32
    assert base.loads == 1
    assert not base.module.training
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    assert base.verify() == ()
    assert base.tokenizer is None


def test_the_pool_reads_each_base_once(folder: Path, adapter: Adapter) -> None:
    pool = BasePool()
    first = pool.get(folder, adapter, device="cpu")
    assert pool.get(folder, adapter, device="cpu", dtype="auto") is first
    assert pool.loads == 1
    other = pool.get(folder, adapter, device="cpu", dtype="bfloat16")
    assert other.dtype == torch.bfloat16
    assert pool.loads == 2
    pool.drop(first)
    assert pool.get(folder, adapter, device="cpu") is not first


def test_a_base_from_the_callers_module() -> None:
    base = BaseModel.from_module(tiny.cnn().train(), tokenizer="tokens")
    assert not base.module.training
    assert base.source is None
    assert base.tokenizer == "tokens"
    assert base.verify() == ()
    with pytest.raises(CannotRun, match="cannot be loaded again"):
        base.reload()


def test_a_module_without_weights_has_a_device_and_a_dtype() -> None:
    base = BaseModel.from_module(nn.Identity())
    assert base.device == torch.device("cpu")
    assert base.dtype == torch.float32


def test_a_base_is_digested_once_and_again_when_it_is_another(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    digest_of = subject_module._digest_of
    monkeypatch.setattr(
        subject_module,
        "_digest_of",
        lambda module, found: calls.append(module) or digest_of(module, found),
    )
    base = subject.base
    with subject.attached():
        first = base.digest
    assert base.digest == first
    assert len(calls) == 1
    base.reload(torch.bfloat16)
    assert base.digest != first
    base.reload()
    assert base.digest == first, "an adapter that was attached is no part of it"
    assert len(calls) == 3


def test_the_digest_is_of_weights_and_configuration(folder: Path, adapter: Adapter) -> None:
    digests = {load_base(folder, adapter=adapter, device="cpu").digest}
    for change in ("nothing", "weights", "configuration"):
        module = transformers.AutoModelForCausalLM.from_pretrained(folder)
        if change == "weights":
            module.lm_head.weight.data[0, 0] += 1
        elif change == "configuration":
            module.config.rms_norm_eps *= 2
        digests.add(BaseModel.from_module(module).digest)
    assert len(digests) == 3


# ---------------------------------------------------------------------------- proof


def test_one_changed_bit_is_located_against_the_file(subject: Subject) -> None:
    base = subject.base
    weight = base.module.model.layers[1].mlp.up_proj.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    [problem] = base.verify()
    assert problem.where == "model.layers.1.mlp.up_proj.weight"
    assert "1 of 1536 elements" in problem.found
    assert "[3, 5]" in problem.found
    base.reload()
    assert base.verify() == ()
    assert base.loads == 2


def test_what_is_read_again_does_not_stay_in_memory(subject: Subject) -> None:
    """A fixture's value and a frame of its generator hold the old object on."""
    held = subject.base.module
    weights = subject.base.module.get_input_embeddings().weight.clone()
    subject.base.reload()
    assert sum(part.numel() for part in (*held.parameters(), *held.buffers())) == 0
    assert torch.equal(subject.base.module.get_input_embeddings().weight, weights)


def test_a_changed_buffer_is_found(subject: Subject) -> None:
    buffer = subject.base.module.model.rotary_emb.inv_freq
    buffer[0] += 1
    [problem] = subject.base.verify()
    assert problem.where == "model.rotary_emb.inv_freq"
    assert "some of its" in problem.found


def test_tied_weights_are_reported_once(tmp_path: Path, adapter: Adapter) -> None:
    folder = tiny.save_base(tiny.llama(tie_word_embeddings=True), tmp_path)
    base = load_base(folder, adapter=adapter, device="cpu")
    base.module.lm_head.weight.data[7, 0] += 1
    [problem] = base.verify()
    assert problem.where == "model.embed_tokens.weight"
    assert "[7, 0]" in problem.found


def test_a_changed_dtype_and_a_lost_tensor_are_told_apart(subject: Subject) -> None:
    base = subject.base
    base.module.lm_head.half()
    before = {**base.fingerprints, "ghost.weight": base.fingerprints["lm_head.weight"]}
    cast, ghost = sorted(base.changes(before)[0], key=str, reverse=True)
    assert ghost.where == "ghost.weight"
    assert cast.found == "became torch.float16 [64, 32]"
    assert cast.expected == "torch.float32 [64, 32]"


def test_changes_are_seen_underneath_adapter_layers(subject: Subject) -> None:
    layer = subject.model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight[0, 0] += 1
    assert [p.where for p in subject.base.verify()] == ["model.layers.0.self_attn.q_proj.weight"]


# ---------------------------------------------------------------------------- attaching


def test_the_adapter_acts_and_the_base_comes_back(subject: Subject) -> None:
    before = snapshot(subject.base.module)
    plain = subject.base_output()
    adapted = subject.output()
    assert adapted.shape == plain.shape == (2, 24, 64)
    assert not torch.equal(adapted, plain)
    assert len(list(lora_layers(subject.model))) == 4
    assert not subject.model.training
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    subject.release()
    assert snapshot(subject.base.module) == before
    assert torch.equal(subject.output(subject.base.module), plain)


def test_attachments_are_fresh_and_equal(subject: Subject) -> None:
    with subject.attached() as first:
        one = subject.output(first)
        assert subject.model is first
    with subject.attached() as second:
        assert second is not first
        assert torch.equal(subject.output(second), one)


def test_a_trainable_attachment_trains(subject: Subject) -> None:
    before = snapshot(subject.base.module)
    with subject.attached(is_trainable=True) as model:
        assert model.training
        model(**subject.inputs).logits.sum().backward()
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert names
        assert all("lora_" in name for name in names)
    assert snapshot(subject.base.module) == before


@pytest.mark.parametrize(
    "harm",
    [
        lambda m: m.unload(),
        lambda m: m.half(),
        lambda m: m.base_model.model.requires_grad_(True),
        lambda m: setattr(m.base_model.model, "forward", lambda *a, **k: None),
        lambda m: setattr(m.base_model.model.model, "layers", nn.ModuleList()),
        lambda m: m.base_model.model.resize_token_embeddings(80, mean_resizing=False),
        lambda m: m.base_model.model.lm_head.register_forward_hook(lambda *a: None),
        lambda m: m.base_model.model.config.update({"vocab_size": 3, "extra": [1]}),
        lambda m: m.base_model.model.generation_config.update(max_length=5),
        lambda m: setattr(m.base_model.model.lm_head, "weight", nn.Parameter(torch.zeros(1))),
        lambda m: nn.utils.parametrizations.weight_norm(m.base_model.model.lm_head),
        lambda m: (_ for _ in ()).throw(RuntimeError("inside")),
    ],
)
def test_whatever_happens_inside_the_structure_comes_back(subject: Subject, harm: object) -> None:
    before = snapshot(subject.base.module)
    plain = subject.base_output()
    with contextlib.suppress(RuntimeError), subject.attached() as model:
        harm(model)  # type: ignore[operator]
    assert snapshot(subject.base.module) == before
    assert subject.base.verify() == ()
    assert torch.equal(subject.output(subject.base.module), plain)


def test_attached_does_not_nest(subject: Subject, adapter: Adapter) -> None:
    other = Subject(adapter, subject.base)
    with subject.attached():
        with pytest.raises(UsageError, match="cannot be nested"), subject.attached():
            pass
        with pytest.raises(UsageError, match="another subject"):
            _ = other.model


def test_another_subject_takes_the_base(subject: Subject, adapter: Adapter) -> None:
    other = Subject(adapter, subject.base)
    first = subject.model
    assert other.model is not first
    subject.release()
    assert len(list(lora_layers(subject.base.module))) == 4
    assert subject.model is not first


def test_the_base_output_does_not_disturb_an_attachment(subject: Subject) -> None:
    with subject.attached() as model:
        adapted = subject.output(model)
        assert not torch.equal(subject.base_output(), adapted)
        assert torch.equal(subject.output(model), adapted)


def test_the_callers_random_numbers_are_left_alone(subject: Subject) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    _ = subject.output()
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------------------- what PEFT is given


def test_an_adapter_without_safetensors_is_not_loaded(
    subject: Subject, adapter: Adapter, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter.path / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    broken = tiny.read_adapter(tmp_path)
    before = snapshot(subject.base.module)
    with pytest.raises(CannotRun, match="other formats are never opened"):
        _ = Subject(broken, subject.base).model
    assert snapshot(subject.base.module) == before


def test_an_adapter_peft_refuses_gives_one_line(subject: Subject, tmp_path: Path) -> None:
    wide = tiny.save_adapter(tiny.llama(hidden_size=64), tmp_path, task_type="CAUSAL_LM")
    before = snapshot(subject.base.module)
    with pytest.raises(CannotRun, match="PEFT cannot attach it") as caught:
        _ = Subject(wide, subject.base).model
    assert "\n" not in str(caught.value)
    assert not caught.value.missing
    assert snapshot(subject.base.module) == before


def test_a_weights_file_of_another_name(subject: Subject, adapter: Adapter, tmp_path: Path) -> None:
    from pytest_lora.locate import AdapterLocation

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter.path / name).read_bytes())
    renamed = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "step-9.safetensors")
    location = AdapterLocation(path=tmp_path, weights=renamed, name="step-9")
    other = Subject(tiny.read_adapter(location), subject.base)
    assert torch.equal(other.output(), subject.output())


def test_weights_in_shards(subject: Subject, adapter: Adapter, tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter.path / "adapter_model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"adapter_model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index.update(dict.fromkeys(part, file))
    (tmp_path / "adapter_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter.path / "adapter_config.json").read_bytes()
    )
    other = Subject(tiny.read_adapter(tmp_path), subject.base)
    assert torch.equal(other.output(), subject.output())


@pytest.mark.skipif(tiny.PEFT < (0, 14), reason="older PEFT says nothing")
def test_missing_keys_are_kept_as_warnings(subject: Subject, tmp_path: Path) -> None:
    partial = tiny.save_adapter(tiny.llama(), tmp_path, task_type="CAUSAL_LM")
    partial = tiny.rewrite_weights(
        partial, lambda tensors: {k: v for k, v in tensors.items() if "layers.1" not in k}
    )
    assert any(
        "missing adapter keys" in text for text in Subject(partial, subject.base).load_warnings
    )
    assert subject.load_warnings == ()


def test_a_resized_vocabulary_is_resized_and_put_back(subject: Subject, tmp_path: Path) -> None:
    model = tiny.llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    grown = tiny.save_adapter(
        model, tmp_path, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )
    before = snapshot(subject.base.module)
    other = Subject(grown, subject.base)
    assert other.resized_rows == 70
    assert other.output().shape == (2, 24, 64)
    assert other.model.get_input_embeddings().weight.shape[0] == 70
    other.release()
    assert snapshot(subject.base.module) == before
    assert subject.base.verify() == ()
    assert subject.resized_rows is None


# ---------------------------------------------------------------------------- other kinds of model


def test_a_model_of_the_callers_own_with_inputs(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(
        tiny.cnn(), tmp_path, target_modules=["conv"], modules_to_save=["head"]
    )
    base = BaseModel.from_module(tiny.cnn())
    subject = Subject(adapter, base, inputs=tiny.image())
    assert subject.base_output().shape == (2, 4)
    assert not torch.equal(subject.output(), subject.base_output())
    assert subject.resized_rows is None
    subject.release()
    assert base.verify() == ()


def test_a_model_without_inputs_says_what_to_do(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.cnn(), tmp_path, target_modules=["conv"])
    subject = Subject(adapter, BaseModel.from_module(tiny.cnn()))
    with pytest.raises(CannotRun, match=r"inputs=\{") as caught:
        subject.output()
    assert caught.value.missing


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_live_model_is_lent_and_given_back(name: str) -> None:
    model = tiny.wrap(
        tiny.llama(),
        peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        adapter_name=name,
    )
    tiny.fill(model)
    root = model.get_base_model()
    before = snapshot(root)
    subject = Subject.from_model(model)
    assert snapshot(root) == before
    assert subject.adapter.name == name
    with torch.no_grad():
        live = model.eval()(**subject.inputs).logits
    before = snapshot(root)
    assert torch.equal(subject.output(), live)
    assert not torch.equal(subject.base_output(), live)
    with subject.attached() as other:
        assert other is not model
    subject.release()
    assert snapshot(root) == before
    assert subject.base.verify() == ()
    with torch.no_grad():
        assert torch.equal(model(**subject.inputs).logits, live)


def test_a_live_model_has_to_be_one() -> None:
    with pytest.raises(UsageError, match=r"peft\.PeftModel"):
        Subject.from_model(tiny.cnn())  # type: ignore[arg-type]
    model = tiny.wrap(tiny.cnn(), peft.LoraConfig(target_modules=["conv"]))
    model.merge_adapter()
    with pytest.raises(UsageError, match="merged"):
        Subject.from_model(model)
    model.unmerge_adapter()
    model.add_adapter("two", peft.LoraConfig(target_modules=["conv"]))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(UsageError, match="one adapter has to be active"):
        Subject.from_model(model)


def test_what_a_layer_holds_beside_the_wrapped_module_goes_with_it() -> None:
    """DoRA's magnitudes are a module of PEFT that wraps nothing, inside one that does."""
    model = tiny.llama()
    names = [name for name, _ in model.named_modules()]
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    adapted = tiny.wrap(model, config)
    subject = Subject.from_model(adapted)
    assert [name for name, _ in subject.base.module.named_modules()] != names  # as it was lent
    with subject.base.bare() as bare:
        assert [name for name, _ in bare.named_modules()] == names
    subject.release()


def test_a_layer_that_wraps_nothing_cannot_be_taken_off() -> None:
    from peft.tuners.lora.layer import LoraLayer

    from pytest_lora.attach import strip

    class Hollow(nn.Module):
        __module__ = "peft.hollow"

    assert issubclass(LoraLayer, object)
    with pytest.raises(UsageError, match="wraps no module"):
        strip(nn.Sequential(Hollow()))


# ---------------------------------------------------------------------------- structure


def test_a_structure_survives_being_restored_twice() -> None:
    model = tiny.llama()
    structure = Structure(model)
    before = snapshot(model)
    for _ in range(2):
        model.model.layers.append(nn.Linear(2, 2))
        model.config.eos_token_id = [5]
        structure.restore()
        assert snapshot(model) == before


def test_a_structure_names_the_tensors_of_wrapped_modules() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    structure = Structure(model)
    names = [name for name, _ in structure.tensors()]
    tiny.wrap(model, peft.LoraConfig(target_modules="all-linear"))
    assert [name for name, _ in structure.tensors()] == names
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(names)
    assert structure.owner("lm_head.weight") == (model.lm_head, "weight")
    model.lm_head.weight = None
    assert dict(structure.tensors())["lm_head.weight"] is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["default", "policy"])
def test_other_adapters_of_a_live_model_are_not_there_while_one_is_judged(name: str) -> None:
    """Nor is the one that is judged, under its own name: PEFT would take it for another one."""
    config = peft.LoraConfig(target_modules=["0"], bias="all")  # of which PEFT allows one
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), config, adapter_name=name)
    subject = Subject.from_model(model, {"input": torch.ones(1, 4)})
    with subject.attached(is_trainable=True) as attached:
        assert list(attached.peft_config) == ["default"]
    subject.release()
    assert list(model.peft_config) == [name]
    model.base_model.set_adapter(name)
