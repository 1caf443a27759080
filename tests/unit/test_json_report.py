"""The JSON report: valid, whole or not at all, and refused by name when it is something else."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_lora.errors import UsageError
from pytest_lora.records import Bound, CheckResult, Measurement, Outcome, Problem
from pytest_lora.report.json_report import (
    SCHEMA_ID,
    build_report,
    read_report,
    report_schema,
    write_report,
)

ENVIRONMENT: dict[str, Any] = {
    "versions": {"pytest": "9", "torch": None},
    "platform": "x",
    "adapters": {"a": "LORA"},
    "exit_status": 1,
}
RESULTS = [
    CheckResult("zeta", "b", Outcome.SKIPPED, reason="no base"),
    CheckResult(
        "alpha",
        "a",
        Outcome.FAILED,
        measurement=Measurement.of_problems([Problem("gr\u00f6\u00dfe", "nan")], count=2),
        bound=Bound.at_most(0, "definition"),
        seconds=0.5,
    ),
]


def report() -> dict[str, Any]:
    return build_report(RESULTS, ENVIRONMENT)  # type: ignore[return-value]


def test_results_come_back_in_the_order_given(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "report.json"
    write_report(path, report())
    assert read_report(path) == RESULTS
    data = json.loads(path.read_text("utf-8"))
    assert list(data) == ["schema", "environment", "results"]
    assert data["schema"] == SCHEMA_ID == "pytest-lora/report/1"
    assert "gr\u00f6\u00dfe" in path.read_text("utf-8")


def test_the_same_report_is_the_same_bytes(tmp_path: Path) -> None:
    write_report(tmp_path / "1.json", report())
    write_report(tmp_path / "2.json", report())
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_name_that_is_no_unicode_is_written_as_an_escape(tmp_path: Path) -> None:
    named = [CheckResult("c", "caf\udce9", Outcome.PASSED)]
    write_report(tmp_path / "r.json", build_report(named, ENVIRONMENT))
    assert b'"caf\\udce9"' in (tmp_path / "r.json").read_bytes()
    assert read_report(tmp_path / "r.json") == named


@pytest.mark.parametrize(
    ("function", "number"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("chmod", 9999)]
)
def test_a_failed_write_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UsageError) as caught:
        write_report(path, report())
    assert str(caught.value) == f"{path}: cannot write the report: {os.strerror(number)}"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_an_interrupted_write_leaves_the_old_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report.json", report())
    assert os.listdir(tmp_path) == []


def test_an_error_without_words_is_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="cannot write the report: disk on fire"):
        write_report(tmp_path / "report.json", report())


def test_a_folder_that_cannot_be_made_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        write_report(tmp_path / "file" / "report.json", report())


def test_a_report_is_readable_as_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_report(tmp_path / "report.json", report())
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "report.json")]
    assert modes[0] == modes[1]


GOOD = json.dumps(build_report(RESULTS, ENVIRONMENT))
RESULT: dict[str, Any] = RESULTS[1].to_dict()
MEASURED: dict[str, Any] = RESULT["measurement"]


def changed(**changes: Any) -> str:
    return json.dumps({"schema": SCHEMA_ID, "results": [{**RESULT, **changes}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a pytest-lora/report/1 report"),
        ("{", "not a pytest-lora/report/1 report"),
        ("[]", "not a pytest-lora/report/1 report"),
        ("null", "not a pytest-lora/report/1 report"),
        ("{}", "not a pytest-lora/report/1 report: KeyError('schema')"),
        ("[" * 100_000, "not a pytest-lora/report/1 report: RecursionError"),
        (
            GOOD.replace("report/1", "report/2"),
            "found schema 'pytest-lora/report/2', expected 'pytest-lora/report/1'",
        ),
        (json.dumps({"schema": SCHEMA_ID}), "KeyError('results')"),
        (json.dumps({"schema": SCHEMA_ID, "results": [1]}), "TypeError"),
        (changed(outcome="fine"), "'fine' is not a valid Outcome"),
        (changed(measurement={"value": 1}), "KeyError('low')"),
        (changed(measurement={**MEASURED, "value": "x"}), "no number"),
        (changed(reason=5), "reason is of type int, expected str"),
        (changed(check=None), "check is of type NoneType, expected str"),
        (changed(outcome=[]), "outcome is of type list, expected str"),
        (changed(seconds="soon"), "no number"),
        (changed(part=[]), "part is of type list, expected str"),
        (changed(measurement=[]), "TypeError"),
        (changed(measurement={**MEASURED, "details": []}), "details is of type list"),
        (changed(measurement={**MEASURED, "value": 10**400}), "value is larger than any float"),
        (changed(measurement={**MEASURED, "value": True}), "value is of type bool"),
        (changed(measurement={**MEASURED, "low": [], "high": 1}), "low is of type list"),
        (changed(measurement={**MEASURED, "count": 1.5}), "count is of type float, expected int"),
        (changed(measurement={**MEASURED, "where": 1}), "where is of type int, expected str"),
        (changed(measurement={**MEASURED, "unit": {}}), "unit is of type dict, expected str"),
        (
            changed(measurement={**MEASURED, "details": {"problems": [{"where": 1, "found": ""}]}}),
            "where is of type int, expected str",
        ),
        (changed(measurement={**MEASURED, "details": {"problems": [{"x": ""}]}}), "TypeError"),
        (changed(bound={"low": 0, "high": 1, "origin": 3}), "origin is of type int, expected str"),
        (changed(bound={"low": 0, "high": -(10**400), "origin": ""}), "high is larger than any"),
        (json.dumps({"schema": SCHEMA_ID, "environment": [], "results": []}), "environment is of"),
        (changed(bound={"low": None, "high": None, "origin": ""}), "lower or an upper"),
    ],
)
def test_what_is_no_report_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_report(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the report: No such file"):
        read_report(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a pytest-lora/report/1 report"):
        read_report(tmp_path / "bytes.json")


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid"), reason="POSIX modes")
def test_a_folder_without_permission_is_a_usage_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            write_report(tmp_path / "report.json", report())
    finally:
        tmp_path.chmod(0o700)


def test_the_schema_is_one_and_tells_wrong_from_right() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = json.loads(GOOD)
    validator.validate(good)
    for wrong in (
        {**good, "schema": "pytest-lora/report/2"},
        {**good, "extra": 1},
        {**good, "environment": {}},
        {**good, "results": [{**RESULT, "outcome": "fine"}]},
        {**good, "results": [{**RESULT, "seconds": -1}]},
        {**good, "results": [{**RESULT, "bound": {"low": "much", "high": 1, "origin": ""}}]},
    ):
        assert not validator.is_valid(wrong)


def test_the_schema_names_the_fields_the_records_write() -> None:
    definitions = report_schema()["$defs"]
    full = RESULTS[1].to_dict()
    for name, record in (
        ("result", full),
        ("measurement", full["measurement"]),
        ("bound", full["bound"]),
    ):
        assert isinstance(record, dict)
        assert set(definitions[name]["required"]) == set(record)
        assert set(definitions[name]["properties"]) == set(record)
    assert set(definitions["result"]["properties"]["outcome"]["enum"]) == set(Outcome)
