"""Likelihoods: the plain way's and lm-eval's values, in bounded memory, on models of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

import peft
import tiny
import tiny_text
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from stack import since
from tiny_text import documents, plain_nll

from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.numerics.likelihood import pair_scores, rows_within, token_nll
from pytest_lora.subject import BaseModel, Subject
from pytest_lora.tasks import causal_lm
from pytest_lora.tasks.definition import Definition, Window, define, windows
from pytest_lora.tasks.likelihood import MOST_PADDING, Likelihoods, _groups, _Total

TOKENIZER = tiny_text.tokenizer()
TEXTS = documents(9)


def subject_on(base: Any, path: Path, **adapter: Any) -> Subject:
    import copy

    known = tiny.save_adapter(copy.deepcopy(base), path, **adapter)
    return Subject(known, BaseModel.from_module(base, tokenizer=TOKENIZER))


def scored(subject: Subject, texts: list[str] = TEXTS, **options: Any) -> Likelihoods:
    return Likelihoods(subject, TOKENIZER, define(subject, TOKENIZER, **options))


def ids_of(text: str) -> list[int]:
    return [1, *TOKENIZER.encode(text, add_special_tokens=False)]


# ----------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_pieces_give_the_plain_cross_entropy(rows: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(300, 16)
    targets = torch.randint(300, (50,))
    seen: list[int] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return states @ weight.T

    found = token_nll(hidden, targets, head, rows=rows)
    logits = hidden.double() @ weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert found.dtype == torch.float32
    assert max(seen) <= rows
    assert sum(seen) == 50


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_statistics_are_kept_in_single_precision_or_better(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(40, 16).to(dtype), torch.randn(500, 16).to(dtype)
    targets = torch.randint(500, (40,))
    found = token_nll(hidden, targets, lambda h: h @ weight.T, rows=9)
    assert found.dtype == kept
    logits = (hidden @ weight.T).double()  # as the head gives them
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_divergence_and_agreement_are_the_plain_ones() -> None:
    torch.manual_seed(2)
    hidden, first, second = torch.randn(50, 16), torch.randn(300, 16), torch.randn(300, 16)
    second = first + 0.2 * second
    targets = torch.randint(300, (50,))
    found = pair_scores(
        hidden, hidden, targets, lambda h: h @ first.T, lambda h: h @ second.T, rows=8
    )
    p = (hidden.double() @ first.double().T).log_softmax(-1)
    q = (hidden.double() @ second.double().T).log_softmax(-1)
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.agree, p.argmax(-1) == q.argmax(-1))
    assert 0 < found.agree.sum() < 50
    assert torch.equal(found.base, token_nll(hidden, targets, lambda h: h @ first.T, rows=8))
    assert torch.equal(found.adapted, token_nll(hidden, targets, lambda h: h @ second.T, rows=8))


def test_tokens_only_one_model_knows_are_left_out_of_the_divergence() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(20, 8), torch.randn(40, 8)
    larger = torch.cat([weight, torch.randn(3, 8)])
    targets = torch.randint(40, (20,))
    found = pair_scores(
        hidden, hidden, targets, lambda h: h @ weight.T, lambda h: h @ larger.T, rows=6
    )
    assert torch.all(found.kl < 1e-5)
    assert torch.all(found.adapted >= found.base)


@pytest.mark.parametrize("vocabulary", [100, 32_000, 256_000])
def test_rows_shrink_as_the_vocabulary_grows(vocabulary: int) -> None:
    budget = 16 << 20
    rows = rows_within(budget, vocabulary, torch.bfloat16)
    assert rows * vocabulary * 4 * 4 <= budget < (rows + 1) * vocabulary * 4 * 4
    assert rows_within(10, vocabulary, torch.float32) == 1


# ----------------------------------------------------------------------------- windows


def definition(**changes: Any) -> Definition:
    known = {"tokenizer": "x", "prefix": 0, "special_tokens": False, "window": 8, "stride": 8}
    return Definition(**{**known, "dtype": "float32", "packing": True, "tokens": 64, **changes})


def test_windows_are_those_of_the_rolling_log_likelihood() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.utils import get_rolling_token_windows

    for length in range(40):
        for window in (1, 5, 8):
            for stride in range(1, window + 1):
                tokens = list(range(100, 100 + length))
                expected = get_rolling_token_windows(tokens, 0, window, window - stride + 1)
                found = windows(tokens, definition(window=window, stride=stride))
                assert [(w.ids, w.targets) for w in found] == [(list(a), list(b))
                                                               for a, b in expected]  # fmt: skip


def test_without_a_prefix_the_first_token_is_given() -> None:
    found = windows([5, 6, 7], definition(prefix=None, window=2, stride=1))
    assert found == [Window([5, 6], [6, 7])]
    assert windows([5], definition(prefix=None)) == []
    assert windows([], definition(prefix=None)) == []
    assert windows([], definition()) == []


def test_the_definition_says_what_is_scored() -> None:
    assert definition().to_dict()["scored"] == "every token once; the prefix is not"
    assert definition(prefix=None).to_dict()["scored"] == "every token once; the first token is not"


def test_a_definition_follows_from_model_and_tokenizer(tmp_path: Path) -> None:
    subject = subject_on(tiny.llama(), tmp_path)
    found = define(subject, TOKENIZER)
    assert (found.prefix, found.window, found.stride, found.dtype) == (1, 64, 64, "float32")
    assert define(subject, TOKENIZER, prefix="eos").prefix == 2
    assert define(subject, TOKENIZER, prefix=None).prefix is None
    assert define(subject, TOKENIZER, prefix=7).prefix == 7
    no_bos = tiny_text.tokenizer(bos_token=None)
    assert define(subject, no_bos).prefix == 2
    others = [tiny_text.tokenizer(50), tiny_text.tokenizer(unk_token="w4")]
    digests = {define(subject, other).tokenizer for other in (TOKENIZER, no_bos, *others)}
    assert len(digests) >= 2
    padded = tiny_text.tokenizer()
    padded(["w3", "w3 w4"], padding=True, truncation=True, max_length=4)
    assert define(subject, padded).tokenizer == found.tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "a window of 65 tokens, but the model has positions for 64"),
        ({"window": 0}, "a window of 0 tokens cannot have a stride of 0"),
        ({"window": 8, "stride": 9}, "a window of 8 tokens cannot have a stride of 9"),
        ({"prefix": "cls"}, "prefix 'cls' is none of auto, bos, eos"),
    ],
)
def test_definitions_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        define(subject_on(tiny.llama(), tmp_path), TOKENIZER, **options)
    no_bos = tiny_text.tokenizer(bos_token=None)
    with pytest.raises(UsageError, match="the tokenizer has no such token"):
        define(subject_on(tiny.llama(), tmp_path), no_bos, prefix="bos")


# ----------------------------------------------------------------------------- the models


def small(name: str, **changes: Any) -> Any:
    """A model of another family, as small as the Llama of the other tests."""
    config = getattr(transformers, f"{name}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    options = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    with tiny.quiet():
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**options, **changes})).eval()


class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Its logits depend on more than the states its body returns."""

    def forward(self, input_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        assert input_ids is not None
        output.logits = output.logits * (1 + 0.01 * input_ids[..., None])
        return output


def odd() -> Any:
    torch.manual_seed(0)
    with tiny.quiet():
        return Odd(tiny.llama().config).eval()


QV = ["q_proj", "v_proj"]
FAMILIES: dict[str, tuple[Any, list[str], bool | None]] = {
    "llama": (lambda: tiny.llama(), QV, True),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), QV, True),
    "gpt2": (lambda: tiny.gpt2(), ["c_attn"], True),
    "soft caps": (
        lambda: small("Gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=8),
        QV,
        True,
    ),
    "scaled logits": (lambda: small("Granite", logits_scaling=3.0), QV, True),
    "multiplied logits": (lambda: small("Cohere", logit_scale=0.3), QV, True),
    "body in a body": (
        lambda: small("OPT", word_embed_proj_dim=32, ffn_dim=48, activation_function="relu"),
        QV,
        False,
    ),
    # Experts are given other batches; whether that changes bits is the processor's affair.
    "experts": (lambda: small("Mixtral", num_local_experts=4), QV, None),
    "no positions": (lambda: small("Bloom", n_layer=2, n_head=4), ["query_key_value"], False),
    "recurrent": (
        lambda: small("Mamba", state_size=4, expand=2, conv_kernel=3),
        ["in_proj"],
        False,
    ),
    "no split": (odd, QV, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_plain_way(family: str, tmp_path: Path) -> None:
    """Whatever a model does with its logits, and whether or not documents may share a row."""
    build, targets, packs = FAMILIES[family]
    subject = subject_on(build(), tmp_path, target_modules=targets)
    likelihoods = scored(subject, tokens=80, window=48)
    if packs is not None:
        assert likelihoods.definition.packing is packs or (packs and old_transformers())
    found = likelihoods.score(TEXTS)
    for text, scores in zip(TEXTS, found, strict=True):
        ids = ids_of(text)
        assert scores.tokens == len(ids) - 1
        assert scores.adapted == pytest.approx(plain_nll(subject.model, ids), rel=1e-6)
        with subject.base.bare() as module:
            assert scores.base == pytest.approx(plain_nll(module, ids), rel=1e-6)
    assert abs(sum(s.base - s.adapted for s in found)) > 5e-3  # type: ignore[operator]


def old_transformers() -> bool:
    """Masks that keep packed documents apart came with transformers 4.53."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return (major, minor) < (4, 53)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"cls": "PromptTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5},
        pytest.param(
            {"cls": "PrefixTuningConfig", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5},
            marks=since("hands the prefix on in a form transformers no longer takes", peft=(0, 14)),
        ),
    ],
    ids=lambda changes: next(iter(changes.values())) if "cls" in changes else str(changes),
)
def test_the_base_is_the_true_one_whatever_the_adapter_does_to_it(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    import copy

    base = tiny.llama()
    untouched = copy.deepcopy(base)
    if changes.get("init_lora_weights") == "pissa":
        pissa = peft.LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa")
        tiny.wrap(copy.deepcopy(base), pissa)  # takes what this PEFT needs for it
    subject = subject_on(base, tmp_path, **changes)
    found = scored(subject).score(TEXTS, divergence=True)
    for text, scores in zip(TEXTS, found, strict=True):
        assert scores.base == pytest.approx(plain_nll(untouched, ids_of(text)), rel=1e-6)
        assert scores.adapted == pytest.approx(plain_nll(subject.model, ids_of(text)), rel=1e-6)
        assert scores.kl is not None
        assert scores.kl > 0


def test_what_is_asked_for_does_not_change_the_bits(tmp_path: Path) -> None:
    likelihoods = scored(subject_on(tiny.llama(), tmp_path), tokens=80)
    both = likelihoods.score(TEXTS, divergence=True)
    alone = likelihoods.score(TEXTS, base=False)
    base = likelihoods.score(TEXTS, adapted=False)
    assert [s.adapted for s in both] == [s.adapted for s in alone]
    assert [s.base for s in both] == [s.base for s in base]
    assert {s.base for s in alone} == {s.adapted for s in base} == {s.kl for s in base} == {None}


def test_divergence_is_that_of_the_plain_logits(tmp_path: Path) -> None:
    subject = subject_on(tiny.llama(), tmp_path)
    for text, scores in zip(TEXTS, scored(subject).score(TEXTS, divergence=True), strict=True):
        ids = torch.tensor([ids_of(text)])
        with torch.no_grad():
            q = subject.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with subject.base.bare() as module:
                p = module(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        assert scores.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
        assert scores.agree == int((p.argmax(-1) == q.argmax(-1)).sum())


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (12, 1)])
def test_long_documents_are_cut_into_windows(window: int, stride: int, tmp_path: Path) -> None:
    subject = subject_on(tiny.llama(), tmp_path)
    found = scored(subject, window=window, stride=stride, tokens=40).score(TEXTS)
    for text, scores in zip(TEXTS, found, strict=True):
        tokens = ids_of(text)
        expected = 0.0
        for position in range(1, len(tokens)):
            # Token by token: the window that scores it, from the definition alone.
            if position <= window:
                end = min(window, len(tokens) - 1)
            else:
                end = min(window + -(-(position - window) // stride) * stride, len(tokens) - 1)
            start = max(0, end - window)
            with torch.no_grad():
                logits = subject.model(input_ids=torch.tensor([tokens[start:end]])).logits[0]
            row = logits[position - 1 - start].double().log_softmax(-1)
            expected -= float(row[tokens[position]])
        assert scores.adapted == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("max_length", "size"), [(16, 1), (64, 4)])
def test_values_are_those_of_lm_eval(max_length: int, size: int, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with tiny.quiet():
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

    subject = subject_on(tiny.llama(), tmp_path)
    found = scored(subject, window=max_length).score(TEXTS)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    with subject.base.bare() as module, tiny.quiet():
        plain = HFLM(pretrained=module, tokenizer=TOKENIZER, batch_size=size, device="cpu",
                     max_length=max_length)  # fmt: skip
        base = plain.loglikelihood_rolling(requests, disable_tqdm=True)
    with tiny.quiet():
        lora = HFLM(pretrained=subject.model, tokenizer=TOKENIZER, batch_size=size, device="cpu",
                    max_length=max_length)  # fmt: skip
        adapted = lora.loglikelihood_rolling(requests, disable_tqdm=True)
    assert [s.base for s in found] == pytest.approx([-value for value in base], rel=1e-6)
    assert [s.adapted for s in found] == pytest.approx([-value for value in adapted], rel=1e-6)


def test_full_logits_never_exist(tmp_path: Path) -> None:
    """However long the document: no head is ever given more rows than the budget has room for."""
    base = tiny.llama(vocab_size=5000, max_position_embeddings=512)
    seen: list[int] = []
    base.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape[-2]))
    adapter = tiny.save_adapter(tiny.llama(vocab_size=5000), tmp_path)
    subject = Subject(adapter, BaseModel.from_module(base, tokenizer=TOKENIZER))
    budget = 5000 * 4 * 4 * 6
    likelihoods = Likelihoods(subject, TOKENIZER, define(subject, TOKENIZER), budget=budget)
    seen.clear()
    found = likelihoods.score(documents(2, low=300, high=400), divergence=True)
    assert max(seen) <= likelihoods.rows == 6
    assert sum(seen) >= 2 * sum(scores.tokens for scores in found) > 1200


# ----------------------------------------------------------------------------- controls


def test_labels_that_are_not_shifted_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_on(tiny.llama(), tmp_path)
    right = scored(subject).score(TEXTS)
    monkeypatch.setattr(
        "pytest_lora.tasks.likelihood.windows",
        lambda tokens, _: [Window(list(tokens), list(tokens))],
    )
    wrong = scored(subject).score(TEXTS)
    assert all(abs(a.base - b.base) > 0.1 for a, b in zip(right, wrong, strict=True))  # type: ignore[operator]


@since("masks documents apart in another way", transformers=(5, 0))
def test_documents_that_see_each_other_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without positions attends to the documents before: the probe finds out."""
    build, targets, _ = FAMILIES["no positions"]
    subject = subject_on(build(), tmp_path, target_modules=targets)
    right = scored(subject).score(TEXTS)
    assert scored(subject).notes == [
        "the model does not keep documents in one row apart: a row each, padded"
    ]
    monkeypatch.setattr(causal_lm.CausalModel, "_keeps_apart", lambda self: True)
    wrong = scored(subject).score(TEXTS)
    assert any(abs(a.base - b.base) > 0.01 for a, b in zip(right, wrong, strict=True))  # type: ignore[operator]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the token ids that go through a model's body from now on."""
    seen: list[tuple[int, ...]] = []
    states = causal_lm.CausalModel._states

    def noted(self: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(tuple(inputs["input_ids"].shape))
        return states(self, inputs)

    monkeypatch.setattr(causal_lm.CausalModel, "_states", noted)
    return seen


@pytest.mark.parametrize("family", ["no positions", "body in a body", "experts", "recurrent"])
def test_documents_that_cannot_share_a_row_go_side_by_side(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, targets, _ = FAMILIES[family]
    subject = subject_on(build(), tmp_path, target_modules=targets)
    likelihoods = scored(subject, tokens=80, window=48)
    if likelihoods.definition.packing:
        pytest.skip("on this processor they can")
    texts = [*documents(6, low=15, high=18), *documents(2, low=30, high=31)]
    seen = passes(monkeypatch)
    found = likelihoods.score(texts, adapted=False)
    assert likelihoods.definition.padding
    assert len(seen) < len(texts)
    assert max(rows for rows, _ in seen) > 1
    assert max(rows * width for rows, width in seen) <= 80
    with subject.base.bare() as module:
        for text, scores in zip(texts, found, strict=True):
            assert scores.base == pytest.approx(plain_nll(module, ids_of(text)), rel=1e-6)
    both = likelihoods.score(texts, divergence=True)
    assert [scores.base for scores in both] == [scores.base for scores in found]


def test_rows_that_see_each_other_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal, and the same alone as ever, but a row takes something from those beside it."""
    build, targets, _ = FAMILIES["no positions"]
    base = build()
    subject = subject_on(base, tmp_path, target_modules=targets)
    layer = base.transformer.h[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **known: _mixed(forward(*args, **known)))
    right = scored(subject)
    assert not right.definition.padding
    assert right.notes == ["the model does not keep documents in one row apart: one at a time"]
    texts = documents(4, low=20, high=21)
    monkeypatch.setattr(causal_lm.CausalModel, "pads", lambda self: True)
    wrong = scored(subject)
    assert wrong.definition.padding
    pairs = zip(right.score(texts), wrong.score(texts), strict=True)
    assert all(abs(a.adapted - b.adapted) > 0.01 for a, b in pairs)  # type: ignore[operator]


def _mixed(output: Any) -> Any:
    states, *rest = output if isinstance(output, tuple) else (output,)
    states = states - 0.5 * states.mean(0, keepdim=True)
    return (states, *rest) if rest or isinstance(output, tuple) else states


@given(st.lists(st.integers(1, 90), max_size=30), st.integers(1, 200))
def test_groups_side_by_side_are_bounded_and_hardly_padded(lengths: list[int], tokens: int) -> None:
    owned = [(_Total(n), Window([0] * n, [i])) for i, n in enumerate(lengths)]
    rules = definition(packing=False, padding=True, tokens=tokens)
    groups = list(_groups(owned, rules))
    assert sorted(w.targets[0] for group in groups for _, w in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [len(window.ids) for _, window in group]
        positions = len(sizes) * max(sizes)
        assert len(sizes) == 1 or positions <= tokens
        assert positions - sum(sizes) <= positions * MOST_PADDING


def test_positions_that_do_not_start_over_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_on(tiny.gpt2(), tmp_path, target_modules=["c_attn"])
    assert scored(subject).definition.packing or old_transformers()
    embedding = subject.base.module.transformer.wpe  # type: ignore[union-attr]
    forward = embedding.forward  # type: ignore[union-attr]
    monkeypatch.setattr(embedding, "forward", lambda ids: forward(torch.arange(ids.shape[1])[None]))
    assert not scored(subject).definition.packing


# ----------------------------------------------------------------------------- refused


def test_only_causal_language_models_have_a_likelihood(tmp_path: Path) -> None:
    t5 = subject_on(tiny.t5(), tmp_path / "t5", target_modules=["q"])
    with pytest.raises(NotApplicable, match="no causal language model"):
        scored(t5, window=8)
    bert = subject_on(tiny.bert(), tmp_path / "bert", target_modules=["query"])
    with pytest.raises(NotApplicable, match="sees the tokens it is to predict"):
        scored(bert, window=8)


def test_a_model_whose_logits_cannot_be_had_in_pieces_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_on(odd(), tmp_path)
    monkeypatch.setattr(causal_lm.CausalModel, "_runs_over_cache", lambda *_: False)
    with pytest.raises(CannotRun, match="likelihoods of Odd cannot be computed without all"):
        scored(subject)


def test_a_cache_that_is_not_right_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_on(odd(), tmp_path)
    forward = Odd.forward

    def forgetful(self: Any, **kwargs: Any) -> Any:
        return forward(self, **{**kwargs, "past_key_values": None})

    monkeypatch.setattr(Odd, "forward", forgetful)
    with pytest.raises(CannotRun, match="cannot be computed without all logits"):
        scored(subject)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    subject = subject_on(tiny.llama(vocab_size=40), tmp_path)
    with pytest.raises(UsageError, match=r"token id 59, the base model only 40 tokens"):
        scored(subject).score(["w3 w59"])


def test_no_text_has_no_likelihood(tmp_path: Path) -> None:
    [found] = scored(subject_on(tiny.llama(), tmp_path)).score([""])
    assert found == (0, None, None, None, None)
