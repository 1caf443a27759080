from __future__ import annotations

import pytest

from pytest_lora.patterns import (
    PatternError,
    compile_pattern,
    layer_index,
    matches_names,
    matching_key,
    names_match,
    resolver,
)

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)
"""The form of pattern a widely used trainer writes for models that see."""
Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("patterns", "name", "key"),
    [
        (["q_proj"], Q, "q_proj"),
        (["_proj"], Q, None),
        (["self_attn.q_proj"], Q, "self_attn.q_proj"),
        ([Q], Q, Q),
        (["^model.layers.1.self_attn.q_proj"], Q, "^model.layers.1.self_attn.q_proj"),
        (["k_proj", "q_proj", "layers.1.self_attn.q_proj"], Q, "q_proj"),
        (["layers.1.self_attn.q_proj", "q_proj"], Q, "layers.1.self_attn.q_proj"),
        ([r".*\.[01]\..*q_proj"], Q, r".*\.[01]\..*q_proj"),
        (["q_proj|k_proj"], Q, "q_proj|k_proj"),
        (["k_proj|q_proj"], Q.replace("q_proj", "k_proj"), "k_proj|q_proj"),
        (["layers.1"], Q, None),
        (["q.proj"], Q, "q.proj"),
        (["("], Q, None),
        ([], Q, None),
    ],
)
def test_a_pattern_key_matches_as_in_peft(patterns: list[str], name: str, key: str | None) -> None:
    assert matching_key(patterns, name) == key
    peft = pytest.importorskip("peft", minversion="0.15")
    if "(" not in patterns:
        theirs = peft.utils.other.get_pattern_key(patterns, name)
        assert theirs == (name if key is None else key)


def test_hundreds_of_patterns_are_resolved_quickly() -> None:
    names = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(64) for kind in "abcdefg"]
    find = resolver(dict.fromkeys(names, 1))
    assert [find(name) for name in names] == names


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+", "(a|a)*x", r"(?:\w+\.)+x", "((a+))+", "a" * 99_999]
)
def test_what_cannot_or_must_not_be_matched_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", [r"(.*\.)?(q|v)_proj$", r".*\.layers\.\d+\..*", "(a|b)?", "(ab)+", UNSLOTH]
)
def test_patterns_people_write_are_taken(pattern: str) -> None:
    assert compile_pattern(pattern)


def test_targets_match_by_whole_components_or_as_one_pattern() -> None:
    assert matches_names(["v_proj", "q_proj"], Q) == "q_proj"
    assert matches_names([Q], Q) == Q
    assert matches_names(["proj", "layers"], Q) is None
    assert names_match(["q_proj"], Q)
    assert names_match(r".*\.(q|v)_proj", Q)
    assert not names_match("q_proj", Q)
    with pytest.raises(PatternError):
        names_match("(", Q)


@pytest.mark.parametrize(
    ("module", "patterns", "index"),
    [
        (Q, (), 1),
        ("model.layers.3.mlp.experts.7.w1", (), 3),
        ("model.layers.3.mlp.experts.7.w1", ("experts",), 7),
        ("layers.3.q", ("layers",), 3),
        ("lm_head", (), None),
        (Q, ("h",), None),
        (Q, ("h", "layers"), 1),
    ],
)
def test_the_layer_is_the_first_number(
    module: str, patterns: tuple[str, ...], index: int | None
) -> None:
    assert layer_index(module, patterns) == index
