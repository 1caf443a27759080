"""The result table: methods down, laws across, as text and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pytest_lora.contract.cells import Result, Verdict, law_texts

__all__ = ["markdown", "summary", "table_lines"]

_SIGNS = {
    Result.PASS: ".",
    Result.FAIL: "F",
    Result.NOT_APPLICABLE: "-",
    Result.KNOWN: "k",
}


def table_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A letter for each cell: ``.`` pass, ``F`` fail, ``k`` known deviation, ``-`` n/a."""
    laws = _laws(verdicts)
    return [*(f"{number:>2} {law}" for number, law in enumerate(laws, 1)), "", *_rows(verdicts)]


def _laws(verdicts: Sequence[Verdict]) -> list[str]:
    """Those that were tried, in order."""
    return [law for law in law_texts() if any(v.law == law for v in verdicts)]


def _rows(verdicts: Sequence[Verdict]) -> list[str]:
    laws = _laws(verdicts)
    cells = {(v.method, v.law): _SIGNS[v.result] for v in verdicts}
    methods = list(dict.fromkeys(v.method for v in verdicts))
    width = max(len(method) for method in methods)
    lines = [" " * width + "".join(f"{number:>3}" for number in range(1, len(laws) + 1))]
    for method in methods:
        row = "".join(f"{cells.get((method, law), ' '):>3}" for law in laws)
        lines.append(f"{method:<{width}}{row}")
    return lines


def summary(verdicts: Sequence[Verdict], *, quick: bool = False) -> Iterator[str]:
    """The numbers, the legend, every known deviation and every one that is gone.

    After a ``quick`` run one that did not show is no news: most laws were tried once.
    """
    counts = ", ".join(
        f"{sum(v.result is result for v in verdicts)} {result.value} ({_SIGNS[result]})"
        for result in Result
    )
    yield counts
    known: dict[str, list[str]] = {}
    missed: dict[str, list[str]] = {}
    tried: dict[str, int] = {}
    for verdict in verdicts:
        for reason in verdict.known:
            known.setdefault(reason, []).append(f"{verdict.law}[{verdict.method}]")
        for reason in verdict.missed:
            missed.setdefault(reason, []).append(f"{verdict.law}[{verdict.method}]")
            tried[reason] = tried.get(reason, 0) + verdict.examples
    for reason, places in known.items():
        yield f"known: {_few(places)}: {reason}"
    missed = {reason: places for reason, places in missed.items() if reason not in known}
    if missed and quick:
        yield f"known, but did not show: {len(missed)} more; ask with --lora-contract-depth=full"
        return
    for reason, places in missed.items():
        yield (
            f"known, but did not show in {_examples(tried[reason])}; is it mended? "
            f"{_few(places)}: {reason}"
        )


def _examples(count: int) -> str:
    return "1 example" if count == 1 else f"{count} examples"


def _few(places: Sequence[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def markdown(verdicts: Sequence[Verdict]) -> str:
    """For a page: the laws, the table, known deviations, and what does not apply."""
    lines = ["| | law | says |", "| --: | --- | --- |"]
    texts = law_texts()
    lines += [f"| {n} | `{law}` | {texts[law]} |" for n, law in enumerate(_laws(verdicts), 1)]
    lines += ["", "```text", *_rows(verdicts), "```", "", "Known deviations (k):", ""]
    known: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for verdict in verdicts:
        where = f"`{verdict.law}[{verdict.method}]`"
        for reason in verdict.known:
            known.setdefault(reason, []).append(where)
        if verdict.result is Result.NOT_APPLICABLE:
            reasons.setdefault(_short(verdict.reason), []).append(where)
    lines += [f"- {_few(places)}: {reason}" for reason, places in known.items()]
    lines += ["", "What does not apply (-), and why:", ""]
    lines += [f"- {_few(places)}: {reason}" for reason, places in reasons.items()]
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """The gist of a reason: what was done, and the beginning of what was said."""
    text = " ".join(reason.split()).replace("|", "\\|").replace("<", "\\<")
    text = re.sub(r"base_model\.model\.[\w.]+: ", "", text)
    text = re.sub(r"\w+ = peft\.get_peft_model\([^)]*\)\.eval\(\): |/tmp/\S+: ", "", text)
    return text if len(text) <= 140 else f"{text[:140]}..."
