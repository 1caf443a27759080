"""HumanEval: what passes, what does not, and what only looks as if it did."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_lora.errors import CannotRun, UsageError
from pytest_lora.tasks import _referee as referee
from pytest_lora.tasks import humaneval
from pytest_lora.tasks.humaneval import (
    HumanEvalGrader,
    HumanEvalItem,
    ProgramVerdict,
    grade_completion,
    grade_completions,
    pass_at_k,
    read_humaneval,
    truncate,
)
from pytest_lora.tasks.sandbox import Limits

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "eval" / "HumanEval.jsonl.gz"
RUNS = pytest.mark.skipif(sys.platform == "win32", reason="there is no sandbox on Windows")

ITEM = HumanEvalItem(
    id="Own/0",
    prompt='''from typing import List


def double(number: int) -> int:
    return 2 * number


def doubled_in_order(numbers: List[int]) -> List[int]:
    """The numbers, sorted and doubled.
    >>> doubled_in_order([3, 1])
    [2, 6]
    """
''',
    entry_point="doubled_in_order",
    test="""
def check(candidate):
    assert candidate([3, 1]) == [2, 6]
    assert candidate([]) == []
    for number in range(5):
        assert candidate([number]) == [double(number)]
        assert tuple(doubled_in_order([number])) == (2 * number,)
""",
    canonical_solution="    return [double(number) for number in sorted(numbers)]\n",
)
RIGHT = ITEM.canonical_solution


def judge(completion: str, item: HumanEvalItem = ITEM, **limits: Any) -> ProgramVerdict:
    allowed = Limits(**{"cpu_seconds": 1, "wall_seconds": 10.0, **limits})
    return grade_completion(completion, item, allowed, allow_code_execution=True)


# --------------------------------------------------------------------------------------- verdicts


@RUNS
def test_the_canonical_solution_passes() -> None:
    verdict = judge(RIGHT)
    assert verdict.passed, verdict.reason
    assert verdict.reason == ""


@RUNS
@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("    return numbers\n", "AssertionError"),
        ("    return 1 / 0\n", "ZeroDivisionError"),
        ("    return [\n", "SyntaxError"),
        ("", "AssertionError"),  # a docstring is a body
        ("    while True: pass\n", "processor time"),
        ("    raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    ],
)
def test_wrong_programs_fail_with_a_reason(completion: str, reason: str) -> None:
    verdict = judge(completion)
    assert not verdict.passed
    assert reason in verdict.reason


CHEATS = {
    "exits at once": "    pass\nimport sys\nsys.exit(0)\n",
    "exits when called": "    import sys; sys.exit(0)\n",
    "exits hard": "    import os; os._exit(0)\n",
    "equals everything": """    class Yes:
        def __eq__(self, other): return True
        def __iter__(self): return iter([self])
        def __len__(self): return 1
    return Yes()
""",
    "a list that equals everything": """    class Yes(list):
        def __eq__(self, other): return True
        def __iter__(self): return iter([2, 6])
    return Yes()
""",
    "patches what tests use": """    import builtins, sys
    builtins.tuple = builtins.sorted = lambda *_: (2,)
    for frame in list(sys._current_frames().values()):
        while frame:
            frame.f_globals["check"] = lambda candidate: None
            frame.f_globals["double"] = lambda number: number
            frame = frame.f_back
    return numbers
""",
    "prints a verdict": """    import gc, os
    for found in gc.get_objects():
        if isinstance(found, str) and len(found) == 32:
            print([found, "passed", ""])
    for place in range(64):
        try: os.write(place, b'["0", "passed", ""]\\n')
        except OSError: pass
    os._exit(0)
""",
    "answers nonsense": "    import os; os.write(4, b'[' * 100000 + b'\\n'); return []\n",
    "answers without end": "    import os\n    while True: os.write(4, b'x' * 65536)\n",
    "ends every process": "    import os; os.kill(-1, 9); os.kill(os.getppid(), 9)\n",
    "hides the assertion": "    import sys; sys.flags.optimize = 2\n    return None\n",
}


@RUNS
@pytest.mark.parametrize("completion", CHEATS.values(), ids=CHEATS)
def test_nothing_passes_without_being_right(completion: str) -> None:
    assert not judge(completion).passed


@RUNS
def test_a_right_program_may_print_and_behave_oddly() -> None:
    noisy = "    print('x' * 200000)\n    import sys; sys.stderr.write('y' * 200000)\n" + RIGHT
    assert judge(noisy).passed


@RUNS
def test_the_tests_see_changed_arguments_and_expected_exceptions() -> None:
    test = """
def check(candidate):
    numbers, seen = [3, 1, 2], {"a": 1}
    assert candidate(numbers, seen=seen) is None
    assert numbers == [1, 2, 3]
    try:
        candidate(1)
    except AttributeError:
        return
    assert False, "no exception"
"""
    item = HumanEvalItem("Own/1", "def tidy(numbers, seen=None):\n", "tidy", test)
    assert judge("    numbers.sort()\n", item).passed
    assert not judge("    sorted(numbers)\n", item).passed


@RUNS
def test_a_test_that_hands_over_functions_is_no_verdict_on_the_program() -> None:
    test = "def check(candidate):\n    assert candidate(lambda: 1) == 1\n"
    item = HumanEvalItem("Own/2", "def call(function):\n", "call", test)
    with pytest.raises(CannotRun, match="Own/2: its test cannot be used here: a function"):
        judge("    return function()\n", item)


@RUNS
def test_a_test_that_ends_early_passes_nobody() -> None:
    test = "import os\ndef check(candidate):\n    os._exit(0)\n"
    item = HumanEvalItem("Own/3", "def f():\n", "f", test)
    verdict = judge("    return 1\n", item)
    assert not verdict.passed
    assert "without a verdict: exit code 0" in verdict.reason


@RUNS
def test_the_order_of_verdicts_is_that_of_the_completions() -> None:
    pairs = [(RIGHT, ITEM), ("    return 0\n", ITEM), (RIGHT, ITEM)]
    found = grade_completions(pairs, allow_code_execution=True, workers=3)
    assert [verdict.passed for verdict in found] == [True, False, True]


@RUNS
@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published file is not here")
def test_every_canonical_solution_passes() -> None:
    items = read_humaneval(PUBLISHED)
    assert len(items) == 164
    pairs = [(item.canonical_solution, item) for item in items]
    allowed = Limits(cpu_seconds=10, wall_seconds=120.0)
    verdicts = list(grade_completions(pairs, allowed, allow_code_execution=True))
    failed = {
        item.id: verdict.reason
        for item, verdict in zip(items, verdicts, strict=True)
        if not verdict.passed
    }
    assert not failed
    assert sum(pass_at_k(1, verdict.passed, 1) for verdict in verdicts) / len(items) == 1.0


# ------------------------------------------------------------------------------------- permission


@pytest.mark.parametrize(
    "use",
    [
        lambda: grade_completion(RIGHT, ITEM),
        lambda: list(grade_completions([(RIGHT, ITEM)])),
        lambda: HumanEvalGrader(),
    ],
)
def test_nothing_runs_without_permission(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "Process", None)
    with pytest.raises(UsageError, match="--lora-allow-code-execution"):
        use()


# ----------------------------------------------------------------------------------- the grader


class TaskItem:
    """What tasks hand to a grader."""

    id, prompt = ITEM.id, ITEM.prompt
    extra = {"entry_point": ITEM.entry_point, "test": ITEM.test}  # noqa: RUF012


@RUNS
def test_the_grader_takes_both_kinds_of_items() -> None:
    grader = HumanEvalGrader(allow_code_execution=True)
    assert grader(RIGHT, TaskItem()) is True
    assert grader("    return numbers\n", ITEM) is False
    assert grader.name == "humaneval"


def test_the_grader_names_what_an_item_lacks() -> None:
    item = TaskItem()
    item.extra = {"entry_point": "f"}
    with pytest.raises(UsageError, match=r"Own/0: no text 'test'"):
        HumanEvalGrader(allow_code_execution=True)(RIGHT, item)


@pytest.mark.parametrize(
    "end", ["\nclass B:", "\ndef g():", "\n# next", "\nif True:", "\nprint(1)"]
)
def test_completions_end_at_the_published_sequences(end: str) -> None:
    assert truncate("    x = 1\n    if x:\n        return x" + end) == (
        "    x = 1\n    if x:\n        return x"
    )


# -------------------------------------------------------------------------------------- pass@k


@given(st.integers(1, 60), st.data())
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one(n: int, data: Any) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    product = 1.0
    for drawn in range(k):  # the next one drawn is wrong as well
        product *= max(0, n - c - drawn) / (n - drawn)
    assert pass_at_k(n, c, k) == pytest.approx(1 - product, abs=1e-12)


def test_pass_at_k_by_counting() -> None:
    right = [True, False, False, True, False]
    draws = list(itertools.combinations(right, 2))
    assert pass_at_k(5, 2, 2) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert (pass_at_k(3, 0, 3), pass_at_k(3, 3, 1)) == (0.0, 1.0)


@pytest.mark.parametrize("arguments", [(3, 1, 0), (3, 1, 4), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_of_what_cannot_be(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="expected 1 to 3"):
        pass_at_k(*arguments)


# ---------------------------------------------------------------------------------------- files

ROW = {
    "task_id": ITEM.id,
    "prompt": ITEM.prompt,
    "entry_point": ITEM.entry_point,
    "test": ITEM.test,
    "canonical_solution": RIGHT,
}


def test_items_are_read_plain_and_packed(tmp_path: Path) -> None:
    text = json.dumps(ROW) + "\n\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    assert (
        read_humaneval(tmp_path / "a.jsonl") == read_humaneval(tmp_path / "a.jsonl.gz") == (ITEM,)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no items"),
        ("\n{", "line 2: not JSON"),
        ("[1]", "line 1: a list"),
        (json.dumps({**ROW, "test": None}), "line 1: no text 'test'"),
        (json.dumps({**ROW, "entry_point": "f(); g"}), "not a function's name"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as error:
        read_humaneval(path)
    assert str(path) in str(error.value)


def test_what_is_no_text_file_is_named(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b"\xff\xfe"), ("a.jsonl.gz", b"plain"), ("b.jsonl.gz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            read_humaneval(tmp_path / name)
    with pytest.raises(UsageError, match="No such file"):
        read_humaneval(tmp_path / "absent.jsonl")


def test_a_bomb_of_a_file_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humaneval, "MOST_READ", 1 << 20)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b" " * (2 << 20))
    with pytest.raises(UsageError, match="more than 1 MiB"):
        read_humaneval(tmp_path / "a.jsonl.gz")


# ---------------------------------------------------------------------------- between processes

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
EXACT = st.fractions() | st.decimals(allow_nan=False)
SCALARS = st.none() | st.booleans() | NUMBERS | EXACT | st.text() | st.binary()
HASHABLE = SCALARS | st.tuples(SCALARS) | st.frozensets(SCALARS, max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
    ),
    max_leaves=12,
)


def across(value: Any, **options: Any) -> Any:
    return referee.decode(json.loads(json.dumps(referee.encode(value, **options))))


@given(VALUES)
def test_plain_data_crosses_unchanged(value: Any) -> None:
    arrived = across(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_other_kinds_cross_as_what_they_equal() -> None:
    assert across(range(3, 9, 2)) == range(3, 9, 2)
    assert list(across(iter([1, 2]))) == [1, 2]
    assert across(iter([1])) != [1]
    assert across(10**5000) == 10**5000
    assert across(float("inf")) == float("inf")
    assert repr(across(-0.0)) == "-0.0"
    assert across([Fraction(1, 3), Decimal("0.1")]) == [Fraction(1, 3), Decimal("0.1")]


def test_an_unknown_object_equals_nothing_not_even_itself() -> None:
    arrived = across([object()], opaque=True)[0]
    assert arrived != arrived
    assert repr(arrived) == "<object object>"


@pytest.mark.parametrize("value", [object(), len, itertools.count()], ids=str)
def test_what_is_no_plain_data_does_not_cross(value: object) -> None:
    with pytest.raises(referee.CannotCross):
        referee.encode(value)


@pytest.mark.parametrize("data", [{}, {"a": 1, "b": 2}, {"eval": "1"}, {"int": []}, {"dict": [1]}])
def test_malformed_data_is_no_value(data: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        referee.decode(data)
