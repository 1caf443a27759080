"""The table of checks: its own order, and what the selection words mean."""

from __future__ import annotations

import pytest

from pytest_lora.catalog import CHECKS, CheckSpec, Need, expand_selection, find_check

IDS = [spec.id for spec in CHECKS]


def test_ids_are_unique_and_can_be_function_names() -> None:
    assert len(set(IDS)) == len(IDS)
    assert all(check.isidentifier() and check == check.lower() for check in IDS)


def test_groups_and_ids_do_not_clash() -> None:
    assert not {need.label for need in Need} & set(IDS)


@pytest.mark.parametrize("spec", CHECKS, ids=IDS)
def test_a_check_builds_on_earlier_ones_that_need_no_more_and_on_all_of_theirs(
    spec: CheckSpec,
) -> None:
    for name in spec.after:
        needed = find_check(name)
        assert CHECKS.index(needed) < CHECKS.index(spec)
        assert needed.need <= spec.need
        assert set(needed.after) <= set(spec.after), f"{spec.id} forgets what {name} builds on"


@pytest.mark.parametrize("spec", CHECKS, ids=IDS)
def test_facts_are_stated(spec: CheckSpec) -> None:
    assert spec.question.endswith("?")
    assert spec.cost
    assert spec.limit in ("", "at most", "at least")
    assert bool(spec.limit) == bool(spec.unit)
    assert spec.default == 0 or spec.limit


def test_finding() -> None:
    assert find_check("finite_weights").need is Need.FILES
    with pytest.raises(KeyError, match="finite_weight"):
        find_check("finite_weight")


def test_a_group_takes_in_all_that_needs_less() -> None:
    sizes = [len(expand_selection((need.label,))) for need in Need]
    assert sizes == sorted(set(sizes))
    assert expand_selection(("data",)) == set(IDS)
    assert expand_selection(("files",)) == {s.id for s in CHECKS if s.need is Need.FILES}


def test_words_add_up() -> None:
    assert expand_selection(()) == frozenset()
    chosen = expand_selection(("files", "merge_equivalence", "merge_equivalence"))
    assert chosen == expand_selection(("files",)) | {"merge_equivalence"}
    with pytest.raises(KeyError, match="'merge'"):
        expand_selection(("files", "merge"))
