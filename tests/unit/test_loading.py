"""Finding a base model, choosing its class, loading it, and refusing what cannot be trusted."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_lora import loading
from pytest_lora.adapter import Adapter
from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.locate import AdapterLocation
from pytest_lora.probe import output_of, probe_inputs, trained_tokens
from pytest_lora.subject import BaseModel, Subject, load_base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tiny.gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


def described(path: Path, **config: Any) -> Adapter:
    """An adapter of which nothing exists but its configuration."""
    return Adapter(AdapterLocation(path=path, weights=None, name="a"), config)


# ---------------------------------------------------------------------------- finding


@pytest.mark.parametrize("start", ["cwd", "root", "adapter", "above the adapter"])
def test_a_recorded_path_is_looked_for_in_every_likely_place(
    start: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "repo" / "adapters" / "mine"
    home.mkdir(parents=True)
    place = {"cwd": tmp_path / "cwd", "root": tmp_path / "root", "adapter": home}.get(
        start, tmp_path / "repo"
    )
    shutil.copytree(llama, place / "fixtures" / "base")
    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    adapter = described(home, base_model_name_or_path="fixtures/base")
    found = loading.resolve_base(adapter, root=tmp_path / "root")
    assert found == (place / "fixtures" / "base").resolve()


def test_an_absolute_recorded_path(llama: Path, tmp_path: Path) -> None:
    adapter = described(tmp_path, base_model_name_or_path=str(llama))
    assert loading.resolve_base(adapter) == llama.resolve()


def test_an_explicit_base_wins(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    adapter = described(tmp_path, base_model_name_or_path=str(gpt2))
    assert loading.resolve_base(adapter, explicit=llama) == llama.resolve()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "no such directory"),
        ("{tmp}", "no config.json there"),
        ("./" + "x" * 300, "no such directory"),
        ("~nobody-of-that-name/base", "no such directory"),
    ],
)
def test_an_explicit_base_that_is_none(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loading.resolve_base(described(tmp_path), explicit=name.format(tmp=tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no base model"),
        ("../gone/base", "not on this machine"),
        ("org/" + "x" * 300, "nor to be had from the hub"),
        ("a\0b", "not on this machine"),
        ("~nobody-of-that-name/base", "not on this machine"),
    ],
)
def test_a_base_that_is_nowhere(tmp_path: Path, name: str | None, message: str) -> None:
    adapter = described(tmp_path, base_model_name_or_path=name)
    with pytest.raises(CannotRun, match=message) as caught:
        loading.resolve_base(adapter)
    assert not caught.value.missing
    assert "--lora-base-model=PATH" in str(caught.value)
    assert "--lora-checks=files" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/tiny at two revisions, and no network."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--org--tiny"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(llama, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    empty = tmp_path / "hub" / "models--org--empty"
    (empty / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (empty / "refs").mkdir()
    (empty / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


def test_a_hub_id_comes_from_the_cache_at_its_revision(hub: Path, tmp_path: Path) -> None:
    adapter = described(tmp_path, base_model_name_or_path="org/tiny")
    assert loading.resolve_base(adapter) == hub / "snapshots" / ("a" * 40)
    pinned = described(tmp_path, base_model_name_or_path="org/tiny", revision="b" * 40)
    assert loading.resolve_base(pinned) == hub / "snapshots" / ("b" * 40)
    asked = loading.resolve_base(pinned, explicit="org/tiny@" + "a" * 40)
    assert asked == hub / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("name", ["org/unknown", "org/empty"])
def test_a_hub_id_that_is_not_cached(hub: Path, tmp_path: Path, name: str) -> None:
    adapter = described(
        tmp_path, base_model_name_or_path=name, revision="v2" if "un" in name else None
    )
    with pytest.raises(CannotRun, match=name) as caught:
        loading.resolve_base(adapter)
    assert not caught.value.missing
    assert "--lora-base-model=PATH" in str(caught.value)


# ---------------------------------------------------------------------------- device and dtype


def test_dtypes() -> None:
    assert loading.parse_dtype("auto") is None
    assert loading.parse_dtype("bf16") is loading.parse_dtype("bfloat16") is torch.bfloat16
    assert loading.parse_dtype(torch.float16) is torch.float16
    with pytest.raises(UsageError, match="'int8' is none of auto"):
        loading.parse_dtype("int8")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.parse_device("cpu") == torch.device("cpu")
    assert loading.parse_device(torch.device("meta")) == torch.device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.parse_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.parse_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert loading.parse_device("cuda:0").index == 0
    with pytest.raises(CannotRun, match="1 CUDA devices") as caught:
        loading.parse_device("cuda:1")
    assert not caught.value.missing
    with pytest.raises(UsageError, match="'quantum' is not one torch knows"):
        loading.parse_device("quantum")


@pytest.mark.parametrize(
    ("asked", "got"),
    [("auto", torch.float16), ("fp32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_the_dtype_is_the_checkpoints_unless_asked(
    tmp_path: Path, asked: str, got: torch.dtype
) -> None:
    folder = tiny.save_base(tiny.llama().half(), tmp_path)
    base = load_base(folder, adapter=described(tmp_path, task_type="CAUSAL_LM"), dtype=asked,
                     device="cpu")  # fmt: skip
    assert base.dtype == got
    assert base.source == folder


# ---------------------------------------------------------------------------- class and head


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("CAUSAL_LM", "GPT2LMHeadModel"),
        ("SEQ_CLS", "GPT2ForSequenceClassification"),
        ("TOKEN_CLS", "GPT2ForTokenClassification"),
        ("QUESTION_ANS", "GPT2ForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "GPT2Model"),
        (None, "GPT2LMHeadModel"),
        ("SOMETHING_NEW", "GPT2LMHeadModel"),
    ],
)
def test_every_task_type_has_its_class(
    gpt2: Path, tmp_path: Path, task: str | None, name: str
) -> None:
    base = load_base(gpt2, adapter=described(tmp_path, task_type=task), device="cpu")
    assert type(base.module).__name__ == name
    subject = Subject(described(tmp_path), base)
    output = subject.base_output()
    assert output.shape[0] == 2
    assert output.isfinite().all()


def test_an_encoder_decoder(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.t5(), tmp_path / "base")
    adapter = tiny.save_adapter(
        tiny.t5(), tmp_path / "a", task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]
    )
    subject = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    assert set(subject.inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert not torch.equal(subject.output(), subject.base_output())


def test_without_a_task_type_the_configurations_say(tmp_path: Path, gpt2: Path) -> None:
    config = loading.base_config(gpt2)
    mapping = {"base_model_class": "GPT2ForTokenClassification", "parent_library": "transformers"}
    adapter = described(tmp_path, auto_mapping=mapping)
    assert loading.base_class(adapter, config) == "GPT2ForTokenClassification"
    foreign = described(tmp_path, auto_mapping={"base_model_class": "Evil"}, task_type=None)
    assert loading.base_class(foreign, config) == "GPT2LMHeadModel"
    config.architectures = ["Mystery", None]
    assert loading.base_class(foreign, config) == "AutoModel"


def classifier(path: Path, labels: int, **changes: Any) -> Adapter:
    model = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=labels
        )
    )
    return tiny.save_adapter(
        model, path, task_type="SEQ_CLS", target_modules=["c_attn"], fan_in_fan_out=True, **changes
    )


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_the_head_has_as_many_rows_as_the_adapters(gpt2: Path, tmp_path: Path, labels: int) -> None:
    adapter = classifier(tmp_path, labels)
    base = load_base(gpt2, adapter=adapter, device="cpu")
    assert base.spec is not None
    assert base.spec.num_labels == labels
    assert base.untrained == ("score.weight",)
    subject = Subject(adapter, base)
    assert subject.output().shape == (2, labels)


def test_a_head_adapted_by_lora_has_rows_too(tmp_path: Path) -> None:
    options = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**options)
    model = transformers.BertForTokenClassification(
        transformers.BertConfig(**options, num_labels=7)
    )
    adapter = tiny.save_adapter(model, tmp_path, target_modules=["query", "classifier"])
    found = loading._number_of_labels(adapter, config, "AutoModelForTokenClassification")
    assert found == 7


def test_without_a_head_the_bases_own_number_of_labels_counts(gpt2: Path, tmp_path: Path) -> None:
    adapter = classifier(tmp_path, 2)
    headless = replace(
        adapter, tensors={k: v for k, v in adapter.tensors.items() if "score" not in k}
    )
    assert loading.spec_for(gpt2, headless, device="cpu").num_labels is None


def test_a_fresh_head_is_the_same_in_every_process(gpt2: Path, tmp_path: Path) -> None:
    adapter = classifier(tmp_path, 5)
    torch.manual_seed(1)
    first = load_base(gpt2, adapter=adapter, device="cpu").module.score.weight
    torch.manual_seed(2)
    second = load_base(gpt2, adapter=adapter, device="cpu").module.score.weight
    assert torch.equal(first, second)
    assert first.std() > 0.01
    code = (
        "import sys; from pathlib import Path; from pytest_lora.adapter import read_adapter;"
        "from pytest_lora.subject import load_base;"
        "b = load_base(Path(sys.argv[1]), adapter=read_adapter(Path(sys.argv[2])), device='cpu');"
        "print(b.fingerprints['score.weight'].digest)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(gpt2), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = load_base(gpt2, adapter=adapter, device="cpu")
    assert result.stdout.strip() == here.fingerprints["score.weight"].digest


def test_a_head_of_another_size_in_the_checkpoint_is_replaced(tmp_path: Path) -> None:
    model = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, num_labels=3)
    )
    folder = tiny.save_base(model, tmp_path / "base")
    adapter = classifier(tmp_path / "a", 5)
    base = load_base(folder, adapter=adapter, device="cpu")
    assert base.untrained == ("score.weight",)
    assert Subject(adapter, base).output().shape == (2, 5)


def test_a_classifier_gets_a_padding_token_it_needs(gpt2: Path, tmp_path: Path) -> None:
    adapter = classifier(tmp_path, 2)
    config = load_base(gpt2, adapter=adapter, device="cpu").module.config
    assert config.pad_token_id == 0
    config.pad_token_id, config.eos_token_id = None, [3, 4]
    model = transformers.GPT2ForSequenceClassification(config)
    loading._allow_batches(model)
    assert config.pad_token_id == 3
    config.pad_token_id, config.eos_token_id = None, None
    loading._allow_batches(model)
    assert config.pad_token_id == 0


# ---------------------------------------------------------------------------- refusals


def refusal(folder: Path, **config: Any) -> str:
    adapter = described(folder, task_type="CAUSAL_LM", **config)
    with pytest.raises(CannotRun) as caught:
        load_base(folder, adapter=adapter, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_cut_off(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut off" in refusal(copied)


def test_no_weights_and_pickles_only(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "holds no weights" in refusal(copied)
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "a pickle, which is never opened" in refusal(copied)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.llama(), tmp_path, max_shard_size="20KB")
    assert load_base(folder, adapter=described(tmp_path, task_type="CAUSAL_LM"), device="cpu")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder)


def test_a_body_with_holes_is_no_base_model(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    message = refusal(copied)
    assert "lack 1 tensors" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_language_model_without_its_head(copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(copied)
    brings = tiny.save_adapter(
        tiny.llama(), tmp_path / "a", task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    )
    assert load_base(copied, adapter=brings, device="cpu").untrained == ("lm_head.weight",)


def test_a_pooler_may_be_fresh(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.bert(), tmp_path)
    adapter = described(tmp_path, task_type="FEATURE_EXTRACTION")
    base = load_base(folder, adapter=adapter, device="cpu")
    assert base.untrained == ("pooler.dense.weight", "pooler.dense.bias")
    assert base.module.pooler.dense.weight.std() > 0
    assert base.verify() == ()


def test_code_in_the_base_is_never_run(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config"}}
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "evil.py").write_text("raise SystemExit('executed')")
    assert "needs code shipped with the model" in refusal(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not a JSON object"),
        ('{"model_type": "nope"}', "cannot read"),
    ],
)
def test_a_broken_configuration(copied: Path, text: str, message: str) -> None:
    (copied / "config.json").write_text(text)
    assert message in refusal(copied)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match=r"config\.json: there is no such file$"):
        loading.base_config(tmp_path)


def test_a_class_the_model_type_has_not(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.t5(), tmp_path)
    assert "AutoModelForCausalLM" in refusal(folder)
    with pytest.raises(CannotRun, match="'t5' as AutoModelForCausalLM"):
        loading.meta_model("AutoModelForCausalLM", loading.base_config(folder))


def test_a_quantised_base_loads_as_configured_or_says_why(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copied / "config.json").write_text(json.dumps(config))
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "as AutoModelForCausalLM" in refusal(copied)
        return
    base = load_base(copied, adapter=described(copied, task_type="CAUSAL_LM"), device="cpu")
    kinds = {type(module).__name__ for module in base.module.modules()}
    assert "Linear4bit" in kinds


# ---------------------------------------------------------------------------- quiet


def test_other_libraries_logging_is_put_back() -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    with loading.quiet():
        assert theirs.get_verbosity() == logging.CRITICAL
        assert not theirs.is_progress_bar_enabled()
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    theirs.disable_progress_bar()
    with loading.quiet():
        pass
    assert not theirs.is_progress_bar_enabled()
    if before[1]:
        theirs.enable_progress_bar()


def test_loading_prints_nothing(
    gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = classifier(tmp_path, 5)
    capfd.readouterr()
    Subject(adapter, load_base(gpt2, adapter=adapter, device="cpu")).output()
    assert capfd.readouterr() == ("", "")


def test_long_messages_are_cut() -> None:
    assert loading.one_line(ValueError("a\n  b")) == "ValueError: a b"
    assert loading.one_line(ValueError()) == "ValueError"
    assert len(loading.one_line(ValueError("x" * 1000))) < 300


# ---------------------------------------------------------------------------- probe inputs


def test_probe_inputs_are_the_same_every_time_and_avoid_special_ids(llama: Path) -> None:
    model = tiny.llama()
    adapter = described(llama)
    first = probe_inputs(model, adapter, torch.device("cpu"))
    torch.manual_seed(9)
    again = probe_inputs(model, adapter, torch.device("cpu"))
    ids = first["input_ids"]
    assert torch.equal(ids, again["input_ids"])
    assert ids.shape == (2, 24)
    assert ids.dtype == torch.int64
    assert not set(ids.flatten().tolist()) & {1, 2}
    assert first["attention_mask"].all()


def test_probe_inputs_of_a_tiny_vocabulary_and_a_short_context() -> None:
    model = tiny.gpt2(vocab_size=1, n_positions=8)
    ids = probe_inputs(model, described(Path()), torch.device("cpu"))["input_ids"]
    assert ids.shape == (2, 8)
    assert not ids.any()


@pytest.mark.parametrize("declared", [[60, 61], {"embed_tokens": [60, 61]}])
def test_declared_token_rows_are_shown(declared: object, tmp_path: Path) -> None:
    adapter = described(tmp_path, trainable_token_indices=declared)
    assert trained_tokens(adapter, tiny.llama()) == [60, 61]
    ids = probe_inputs(tiny.llama(), adapter, torch.device("cpu"))["input_ids"]
    assert ids[0, 1] == 60
    assert ids[1, 1] == 61


def test_the_changed_rows_of_a_saved_embedding_are_shown(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.llama(), tmp_path, modules_to_save=["embed_tokens"])
    rows = tiny.llama().model.embed_tokens.weight.detach().clone()
    rows[63] += 1

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.embed_tokens.weight"] = rows

    adapter = tiny.rewrite_weights(adapter, change)
    assert trained_tokens(adapter, tiny.llama()) == [63]
    wide = tiny.llama(hidden_size=64)
    assert trained_tokens(adapter, wide) == []


def test_the_columns_of_an_embedding_factor_are_shown(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.llama(), tmp_path, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.lora_embedding_A"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros_like(tensors[key])
        tensors[key][:, 40] = 1

    assert trained_tokens(tiny.rewrite_weights(adapter, change), tiny.llama()) == [40]


def test_images() -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    with loading.quiet():
        model = transformers.ViTModel(config).bfloat16().eval()
    inputs = probe_inputs(model, described(Path()), torch.device("cpu"))
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert output_of(model, inputs).shape[0] == 2


class Returns(torch.nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> Any:
        return self.value


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), (None, torch.ones(2)), {"ids": torch.ones(2).int(), "x": torch.ones(2)}],
)
def test_plain_outputs(value: Any) -> None:
    model = Returns(value).train()
    x = {"x": torch.ones(1), "attention_mask": torch.ones(1)}
    assert torch.equal(output_of(model, x), torch.ones(2))
    assert model.training


def test_a_model_that_fails_on_its_inputs() -> None:
    with pytest.raises(CannotRun, match="Linear fails on the probe inputs: RuntimeError"):
        output_of(torch.nn.Linear(2, 2), {"input": torch.ones(1, 3)})


def test_an_output_without_a_tensor() -> None:
    with pytest.raises(CannotRun, match="returned NoneType"):
        output_of(Returns(None), {"x": torch.ones(1)})


def test_question_answering_gives_both_ends(tmp_path: Path) -> None:
    folder = tiny.save_base(tiny.bert(), tmp_path / "base")
    adapter = described(tmp_path, task_type="QUESTION_ANS")
    subject = Subject(adapter, load_base(folder, adapter=adapter, device="cpu"))
    assert subject.base_output().shape == (2, 48)


# ---------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_a_body_serves_a_task_model(tmp_path: Path) -> None:
    body = transformers.LlamaModel(tiny.llama().config)
    folder = tiny.save_base(body, tmp_path)
    checkpoint = loading.Checkpoint(folder)
    assert checkpoint.read("model.norm.weight", tiny.llama()) is not None
    assert checkpoint.read("lm_head.weight", tiny.llama()) is None


def test_on_disk_gives_only_what_can_be_compared(llama: Path) -> None:
    adapter = described(llama, task_type="CAUSAL_LM")
    base = load_base(llama, adapter=adapter, device="cpu", dtype="bf16")
    weight = base.module.lm_head.weight
    assert torch.equal(base.on_disk("lm_head.weight", weight), weight)  # type: ignore[arg-type]
    assert base.on_disk("lm_head.weight", weight[:3]) is None
    assert base.on_disk("model.rotary_emb.inv_freq", weight) is None
    assert BaseModel.from_module(tiny.cnn()).on_disk("head.weight", weight) is None


def test_a_tokenizer_that_is_there(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = tiny.save_base(tiny.llama(), tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    base = load_base(folder, adapter=described(tmp_path, task_type="CAUSAL_LM"), device="cpu")
    assert base.tokenizer is base.tokenizer
    assert base.tokenizer.convert_tokens_to_ids("b") == 1
