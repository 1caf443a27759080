"""save_reload and merged_reload: sound adapters come back, and each planted fault is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stack import since

from pytest_lora import fresh
from pytest_lora.adapter import read_adapter
from pytest_lora.assertions import assert_merged_reload, assert_save_reload
from pytest_lora.checks import reload
from pytest_lora.checks.reload import Errors, measure_merged_reload, measure_save_reload
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable
from pytest_lora.subject import BaseModel, Subject, load_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_lora.records import Measurement

Tensors = dict[str, torch.Tensor]
HEAD = "base_model.model.lm_head.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_running() -> Iterator[None]:
    yield
    fresh.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny.save_base(tiny.llama(), home / "llama"),
        "tied": tiny.save_base(tiny.llama(tie_word_embeddings=True), home / "tied"),
        "gpt2": tiny.save_base(tiny.gpt2(), home / "gpt2"),
        "bert": tiny.save_base(tiny.bert(), home / "bert"),
        "t5": tiny.save_base(tiny.t5(), home / "t5"),
    }


def build(kind: str) -> Any:
    return tiny.llama(tie_word_embeddings=True) if kind == "tied" else getattr(tiny, kind)()


def on(
    folders: dict[str, Path], home: Path, kind: str = "llama", *, dtype: str = "auto", **config: Any
) -> Subject:
    options = {"task_type": "CAUSAL_LM", **config}
    adapter = tiny.save_adapter(build(kind), home / "a", **options)
    return Subject(adapter, load_base(folders[kind], adapter=adapter, device="cpu", dtype=dtype))


@pytest.fixture
def subject(folders: dict[str, Path], tmp_path: Path) -> Subject:
    return on(folders, tmp_path)


def where(measured: Measurement) -> list[str]:
    return [problem.where for problem in measured.problems]


def edit(file: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def after_saving(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], Any]) -> None:
    """What a faulty ``save_pretrained`` would leave: the files of the real one, altered."""
    save = peft.PeftModel.save_pretrained

    def faulty(self: Any, directory: Any, **options: Any) -> None:
        save(self, directory, **options)
        plant(Path(directory))

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", faulty)


def after_merging(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path], Any]) -> None:
    """The same for the merged folder, which another process writes."""
    run = reload.run_fresh

    def faulty(job: Any, *arguments: Any, **options: Any) -> Any:
        result = run(job, *arguments, **options)
        if job.merge_to is not None:
            plant(job.merge_to)
        return result

    monkeypatch.setattr(reload, "run_fresh", faulty)


# ---------------------------------------------------------------------------- sound

FLAVOURS = [
    ("llama", {}),
    ("llama", {"use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
    ("llama", {"use_dora": True, "modules_to_save": ["lm_head"]}),
    pytest.param(
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        marks=since("saves the head too where the embedding is targeted", peft=(0, 14)),
    ),
    ("llama", {"trainable_token_indices": {"embed_tokens": [5, 6]}}),
    pytest.param(
        "tied",
        {"modules_to_save": ["lm_head"]},
        marks=since("the merged configuration still ties a head of its own", peft=(0, 20)),
    ),
    ("tied", {}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("bert", {"target_modules": ["query", "value"], "task_type": None}),
    ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
]


@pytest.mark.parametrize(("kind", "config"), FLAVOURS)
def test_sound_adapters_come_back(
    folders: dict[str, Path], tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    subject = on(folders, tmp_path, kind, **config)
    saved = measure_save_reload(subject)
    assert saved.problems == ()
    assert saved.notes == ()
    assert saved.count > len(subject.adapter.tensors) + len(subject.adapter.config)
    merged = measure_merged_reload(subject)
    assert merged.problems == ()
    assert 0.3 < merged.value < 2
    assert merged.count == subject.output().numel()
    assert subject.base.verify() == ()


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param(
            {"use_dora": True, "modules_to_save": ["lm_head"]},
            marks=since("merges a saved module in another dtype than the model's", peft=(0, 14)),
        ),
    ],
)
def test_half_precision(folders: dict[str, Path], tmp_path: Path, config: dict[str, Any]) -> None:
    subject = on(folders, tmp_path, dtype="bfloat16", **config)
    saved = assert_save_reload(subject)
    assert any("float32 tensors saved" in note or "saved as" in note for note in saved.notes) or (
        saved.notes == ()
    )
    merged = assert_merged_reload(subject)
    assert 0.3 < merged.value < 2
    assert merged.details["rms_unmerged"] > 1e-3  # type: ignore[operator]


def test_float64_has_no_wider_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    measured = measure_merged_reload(on(folders, tmp_path, dtype="float64"))
    assert measured.value == 0
    assert measured.notes == ("float64: no wider format to judge rounding by",)


@pytest.mark.parametrize("everything", [False, True])
def test_a_resized_vocabulary_comes_back(
    folders: dict[str, Path], tmp_path: Path, everything: bool
) -> None:
    """Also as PEFT saves it by itself where it knows the base: the original embedding beside it."""
    model = tiny.llama()
    model.resize_token_embeddings(70, mean_resizing=False)
    adapter = tiny.save_adapter(
        model, tmp_path, task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"]
    )
    if everything:
        wrapped = Subject(adapter, load_base(folders["llama"], adapter=adapter, device="cpu")).model
        wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
        adapter = read_adapter(tmp_path)
        assert any("original_module" in key for key in adapter.tensors)
    subject = Subject(adapter, load_base(folders["llama"], adapter=adapter, device="cpu"))
    assert measure_save_reload(subject).problems == ()
    merged = measure_merged_reload(subject)
    assert merged.problems == ()
    assert merged.value < 2


def test_several_hash_seeds(subject: Subject) -> None:
    measured = measure_save_reload(subject, hash_seeds=(0, 1))
    assert measured.value == 0
    assert measured.details["hash_seeds"] == [0, 1]


# ---------------------------------------------------------------------------- not applicable


def test_a_base_without_files(tmp_path: Path) -> None:
    adapter = tiny.save_adapter(tiny.cnn(), tmp_path, target_modules=["conv"])
    subject = Subject(adapter, BaseModel.from_module(tiny.cnn()), inputs=tiny.image())
    for measure in (measure_save_reload, measure_merged_reload):
        with pytest.raises(
            NotApplicable, match=r"not loaded from a folder.*--lora-base-model=PATH"
        ):
            measure(subject)


def test_nothing_to_merge(folders: dict[str, Path], tmp_path: Path) -> None:
    subject = on(folders, tmp_path, cls="PromptTuningConfig", num_virtual_tokens=4)
    assert measure_save_reload(subject).problems == ()
    with pytest.raises(NotApplicable, match="PROMPT_TUNING adapter has nothing"):
        measure_merged_reload(subject)


def test_no_room_for_the_merged_model(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "_SPARE", 10**18)
    with pytest.raises(CannotRun, match=r"saving the merged model takes .* GB") as caught:
        measure_merged_reload(subject)
    assert caught.value.missing


def test_an_output_that_is_not_finite_to_begin_with(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    subject = on(folders, tmp_path)
    subject = Subject(
        tiny.rewrite_weights(subject.adapter, lambda t: {k: v * 1e30 for k, v in t.items()}),
        subject.base,
    )
    with pytest.raises(NotApplicable, match="own output is not finite in float32"):
        measure_merged_reload(subject)


# ---------------------------------------------------------------------------- saved files


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


def drop(tensors: Tensors) -> None:
    del tensors[first(tensors, "v_proj.lora_B")]


def nudge(tensors: Tensors) -> None:
    tensor = tensors[first(tensors, "v_proj.lora_B")]
    tensor[3, 1] = torch.nextafter(tensor[3, 1], torch.tensor(9.0))


def add(tensors: Tensors) -> None:
    tensors[first(tensors, "lora_B").replace("q_proj", "o_proj")] = torch.ones(32, 4)


B = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("plant", "place", "words"),
    [
        (drop, B, "in the adapter's file, but not saved again"),
        (nudge, B, "1 of 64 values differ"),
        (add, B.replace("v_proj", "o_proj"), "saved, but not in the adapter's file"),
    ],
)
def test_a_file_that_is_not_the_adapters(
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Tensors], None],
    place: str,
    words: str,
) -> None:
    after_saving(monkeypatch, lambda folder: edit(folder / WEIGHTS, plant))
    measured = measure_save_reload(subject)
    assert measured.problems[0].where == place
    assert words in measured.problems[0].found
    if plant is not add:
        assert where(measured)[-1] == "reload with PYTHONHASHSEED=0"
        assert "output: " in measured.problems[-1].found
    with pytest.raises(CheckFailed, match=place.replace(".", r"\.")):
        assert_save_reload(subject)


def test_a_rounded_copy_is_told(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: Tensors) -> Tensors:
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    after_saving(monkeypatch, lambda folder: edit(folder / WEIGHTS, half))
    measured = measure_save_reload(subject)
    assert measured.notes == ("8 tensors float32 saved as bfloat16, rounded: loading casts them",)
    assert "reload with PYTHONHASHSEED=0" in where(measured)


def test_an_exact_cast_is_no_fault(folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT loads factors in half precision as float32, and saves them so."""
    made = on(folders, tmp_path)
    halved = tiny.rewrite_weights(made.adapter, lambda t: {k: v.half() for k, v in t.items()})
    measured = measure_save_reload(Subject(halved, made.base))
    assert measured.problems == ()
    assert measured.notes == ("8 tensors float16 saved as float32, exactly",)


@pytest.mark.parametrize(
    ("change", "value"), [("lora_alpha", 16), ("use_rslora", True), ("target_modules", ["k_proj"])]
)
def test_a_changed_configuration(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, change: str, value: Any
) -> None:
    after_saving(monkeypatch, lambda folder: edit_json(folder / CONFIG, **{change: value}))
    measured = measure_save_reload(subject)
    assert measured.problems[0].where == f"{CONFIG}: {change}"
    assert "saved" in measured.problems[0].found
    assert "in memory" in measured.problems[0].expected
    assert where(measured)[-1] == "reload with PYTHONHASHSEED=0"


def test_a_configuration_that_loading_changes(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject.model.peft_config["default"].lora_alpha = 99
    measured = measure_save_reload(subject)
    assert where(measured) == [f"{CONFIG}: lora_alpha", "reload with PYTHONHASHSEED=0"]
    assert (
        str(measured.problems[0]) == f"{CONFIG}: lora_alpha: 99 in memory (expected 8 as on disk)"
    )


@since("refuses keys it does not know", peft=(0, 14))
def test_a_key_this_peft_drops_is_a_note(subject: Subject) -> None:
    adapter = tiny.rewrite_config(subject.adapter, from_the_future=1)
    measured = measure_save_reload(Subject(adapter, subject.base))
    assert measured.problems == ()
    assert measured.notes == ("this PEFT does not know, and drops: from_the_future",)


def test_an_adapter_that_cannot_be_saved(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **options: Any) -> None:
        raise ValueError("no saving here")

    recorded = subject.model.peft_config["default"].base_model_name_or_path
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", refuse)
    [problem] = measure_save_reload(subject).problems
    assert str(problem) == (
        "save_pretrained: raised ValueError: no saving here (expected the adapter to be saved)"
    )
    assert subject.model.peft_config["default"].base_model_name_or_path == recorded


def test_a_saved_folder_that_does_not_load(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(tensors: Tensors) -> None:
        tensors[B] = torch.ones(48, 4)

    after_saving(monkeypatch, lambda folder: edit(folder / WEIGHTS, widen))
    measured = measure_save_reload(subject)
    assert where(measured) == [B, "reload with PYTHONHASHSEED=0"]
    assert "float32 [48, 4] instead of float32 [16, 4]" in measured.problems[0].found
    assert "PEFT cannot attach it" in measured.problems[1].found


def test_keys_that_transformers_renames_are_not_compared(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_saving(monkeypatch, lambda folder: edit(folder / WEIGHTS, add))
    monkeypatch.setattr(reload, "_renames", lambda subject: True)
    measured = measure_save_reload(subject)
    assert measured.problems == ()
    assert "only outputs were compared" in measured.notes[0]


# ---------------------------------------------------------------------- what loading documents


def kept(key: str, disk: Any, memory: Any, subject: Subject, **config: Any) -> bool:
    adapter = tiny.rewrite_config(subject.adapter, **config) if config else subject.adapter
    return reload._kept(key, disk, memory, adapter)


def test_what_loading_may_make_of_a_configuration(subject: Subject) -> None:
    many = [f"layers.{i}.q_proj" for i in range(20)]
    assert kept("target_modules", ["a", "b"], ["b", "a"], subject)
    assert kept("target_modules", many, ["q_proj"], subject)
    assert not kept("target_modules", many[1:], ["q_proj"], subject)
    assert not kept("target_modules", r".*\.self_attn\.q_proj", ["q_proj"], subject)
    assert kept("modules_to_save", None, ["classifier", "score"], subject)
    assert kept("modules_to_save", ["lm_head"], ["score", "lm_head"], subject)
    assert not kept("modules_to_save", ["lm_head"], ["score"], subject)
    assert not kept("modules_to_save", None, ["lm_head"], subject)
    assert kept("some_config", {"a": 1}, {"a": 1, "b": 2}, subject)
    assert not kept("some_config", {"a": 1}, {"a": 2}, subject)
    assert kept("loftq_config", {"loftq_bits": 4}, {}, subject)
    assert not kept("r", 4, 8, subject)
    assert kept("target_modules", "all-linear", many, subject, target_modules="all-linear")
    assert not kept("loftq_config", {"loftq_bits": 4}, {}, subject, init_lora_weights="loftq")


# ---------------------------------------------------------------------------- merged


def without_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def test_a_head_that_is_tied_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers#45127: the merged folder says tied, so loading drops the trained head."""
    subject = on(folders, tmp_path, "tied", modules_to_save=["lm_head"])

    def tie(folder: Path) -> None:
        edit(folder / "model.safetensors", without_head)
        edit_json(folder / "config.json", tie_word_embeddings=True)

    after_merging(monkeypatch, tie)
    measured = measure_merged_reload(subject)
    assert measured.value == math.inf
    [problem] = measured.problems
    assert problem.where == "merged, saved and loaded again"
    assert "values differ" in problem.found
    assert "tie_word_embeddings=true" in problem.fix
    with pytest.raises(CheckFailed, match="set it to false there"):
        assert_merged_reload(subject, bound=1e9)


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_merge_that_is_lost_on_saving(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The folder holds the base's own weight where the merged one should be."""
    subject = on(folders, tmp_path, kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(folders[kind] / "model.safetensors")[name]
    after_merging(
        monkeypatch,
        lambda folder: edit(folder / "model.safetensors", lambda t: t.__setitem__(name, base)),
    )
    measured = measure_merged_reload(subject)
    assert measured.value == math.inf
    [problem] = measured.problems
    assert "bit for bit" in problem.expected
    if kind == "llama":
        assert problem.fix.startswith("every tensor is in the merged folder")


def test_a_merged_folder_that_does_not_load(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_merging(
        monkeypatch,
        lambda folder: edit(folder / "model.safetensors", without_head),
    )
    measured = measure_merged_reload(subject)
    assert measured.value == math.inf
    [problem] = measured.problems
    assert "the weights lack 1 tensors" in problem.found
    assert problem.expected == "a model that loads and runs"
    assert problem.fix == "the merged folder lacks lm_head.weight; save every tensor"


def test_a_merged_folder_without_weights(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    after_merging(monkeypatch, lambda folder: (folder / "model.safetensors").unlink())
    [problem] = measure_merged_reload(subject).problems
    assert "holds no weights" in problem.found
    assert "whole safetensors weights" in problem.fix


def test_a_merge_that_is_not_the_adapter(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merging process scales by half, consistently: only the reference can tell."""
    subject = on(folders, tmp_path)
    run = reload.run_fresh

    def faulty(job: Any, inputs: Any, **options: Any) -> Any:
        result = run(job, inputs, **options)
        if job.merge_to is None:
            return result
        half = result.outputs["output"].lerp(subject.base_output(), 0.5)
        return type(result)({**result.outputs, "merged": half}, {}, 0, 0, 0.0)

    monkeypatch.setattr(reload, "run_fresh", faulty)
    monkeypatch.setattr(reload, "output_problem", lambda *_, **__: None)
    measured = measure_merged_reload(subject)
    assert 1e3 < measured.value < math.inf
    assert measured.where is not None
    assert "off the wider reference" in measured.where
    with pytest.raises(CheckFailed):
        assert_merged_reload(subject)


# ---------------------------------------------------------------------------- the ratio

values = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6)


@given(values, values, values)
def test_the_ratio_is_one_for_equal_errors_and_never_fails(
    exact: list[float], off: list[float], more: list[float]
) -> None:
    wide, error, other = (torch.tensor(item, dtype=torch.float64) for item in (exact, off, more))
    same = Errors.of((wide + error).float(), (wide + error).float(), wide, typical=False)
    assert same.ratio <= 1
    errors = Errors.of((wide + other).float(), (wide + error).float(), wide, typical=False)
    assert errors.ratio >= 0
    assert math.isfinite(errors.ratio)


def test_the_floor_is_the_rounding_of_exact_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(4000, 8, generator=generator, dtype=torch.float64) + 1
    rounded = wide.bfloat16()
    errors = Errors.of(rounded, rounded, wide, typical=False)
    assert 0.5 < errors.merged / errors.floor < 2.5
    nothing = torch.zeros(2, 2)
    assert Errors.of(nothing, nothing, nothing.double(), typical=True).ratio == 0


def test_the_worst_place_is_named() -> None:
    wide = torch.zeros(2, 3, 4, dtype=torch.float64)
    merged = wide.float()
    merged[1, 2, 0] = 0.5
    errors = Errors.of(merged, wide.float(), wide, typical=False)
    assert errors.worst == (1, 2, 0)
    assert "most at [1, 2, 0]" in str(errors)


def test_overflow_in_the_merged_model_is_named() -> None:
    wide = torch.ones(2, 3, dtype=torch.float64)
    merged = wide.half()
    merged[0, 1] = math.inf
    errors = Errors.of(merged, wide.half(), wide, typical=False)
    measured = reload._judged(errors, merged, None, "", {})
    assert measured.value == math.inf
    assert str(measured.problems[0]).startswith(
        "the merged model in float16: 1 of 6 outputs are not finite"
    )


def test_few_outputs_are_judged_in_more_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification(tiny.llama(pad_token_id=0).config)
    adapter = tiny.save_adapter(model.eval(), tmp_path, task_type="SEQ_CLS")
    subject = Subject(adapter, load_base(folders["llama"], adapter=adapter, device="cpu"))
    assert measure_save_reload(subject).problems == ()
    assert subject.base_output().shape == (2, 2)
    measured = measure_merged_reload(subject)
    assert measured.problems == ()
    assert measured.value < 2
    assert measured.count == 2 * reload.FEW


def test_both_as_good_as_their_format_is_told() -> None:
    wide = torch.ones(2, 3, dtype=torch.float64)
    errors = Errors.of(wide.float(), wide.float(), wide, typical=False)
    measured = reload._judged(errors, wide.float(), None, "a remark", {})
    assert measured.value == 0
    assert measured.notes[0] == "a remark"
    assert "as close to the reference as their format allows" in measured.notes[1]


# ---------------------------------------------------------------------------- another process
# The last test, for it needs processes with another environment.


def test_loading_that_depends_on_the_process(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors swapped by whoever loads under another hash seed, as in peft#2334."""
    (tmp_path / "sitecustomize.py").write_text(FAULTY_LOADING)
    subject = on(folders, tmp_path)
    fresh.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        measured = measure_save_reload(subject, hash_seeds=(3,))
    finally:
        fresh.shutdown()
    a, b = B.replace("v_proj", "q_proj").replace("lora_B", "lora_A"), B.replace("lora_B", "lora_A")
    assert where(measured) == [a, b, "reload with PYTHONHASHSEED=3"]
    assert "another tensor's values: rename the modules" in measured.problems[0].fix
    assert "128 of 128 values differ" in measured.problems[0].found


FAULTY_LOADING = """
import sys, importlib.abc, importlib.util

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "peft.peft_model":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            load = module.set_peft_model_state_dict

            def faulty(model, tensors, *args, **options):
                a, b = (next(k for k in tensors if f"layers.0.self_attn.{p}.lora_A" in k)
                        for p in ("q_proj", "v_proj"))
                tensors[a], tensors[b] = tensors[b], tensors[a]
                return load(model, tensors, *args, **options)

            module.set_peft_model_state_dict = faulty

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Finder())
"""
