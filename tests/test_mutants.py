"""Every mutant is caught by the check meant for it, and by no other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from example import NEEDS_EXAMPLE
from mutants import MUTANTS, Mutant, Verdicts, run_suite

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return run_suite(tmp_path_factory.mktemp("mutants"))


@NEEDS_EXAMPLE
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_caught_by_the_check_meant_for_it_and_no_other(mutant: Mutant, verdicts: Verdicts) -> None:
    results = verdicts[mutant.name]
    assert results[mutant.check]["outcome"] == "failed", results[mutant.check]
    others = {
        check: result["reason"] or result["measurement"]
        for check, result in results.items()
        if result["outcome"] not in ("passed", "skipped") and check != mutant.check
    }
    assert others == {}


@NEEDS_EXAMPLE
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_failure_says_where(mutant: Mutant, verdicts: Verdicts) -> None:
    result = verdicts[mutant.name][mutant.check]
    assert result["measurement"]["where"]
    assert result["advice"]


def test_there_are_enough_of_them_and_each_check_on_files_has_one() -> None:
    assert len(MUTANTS) >= 30
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {"adapter_files", "config_matches_weights", "finite_weights", "serving_profile"} <= {
        mutant.check for mutant in MUTANTS
    }


def test_the_table_in_the_docs_is_of_these_mutants() -> None:
    rows = [line for line in (DOCS / "mutants.md").read_text().splitlines() if "| `" in line]
    assert [row.split("`")[1] for row in rows] == [mutant.name for mutant in MUTANTS]
    assert [row.split("`")[3] for row in rows] == [mutant.check for mutant in MUTANTS]
