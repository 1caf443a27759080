"""The two programs that judge a completion, and what they say to each other.

Run in sandboxes, as text; ``humaneval`` reads this file and appends a call.  ``serve`` holds the
completion and answers calls of its function.  ``check`` holds the tests and never runs a line of
the completion: its ``candidate`` asks the other process.  So a completion cannot end the tests
early, patch what they compare with, read what they expect or return what equals everything.

Between them go lines of JSON, never pickles.  What can cross is plain data: None, truth values,
numbers, text, bytes, lists, tuples, dicts, sets, ranges, fractions, decimals, and iterators, which
arrive as iterators.  An object of any other class arrives as something that equals nothing.

Standard library only, and no import of ours.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

INCOMING, OUTGOING = 3, 4
LONGEST = 1 << 24
"""Characters one line may have."""

MOST_ITERATED = 100_000
"""Items taken from an iterator, which may be endless."""


class CannotCross(TypeError):
    """A value that is not plain data."""


class ProgramFailed(Exception):
    """The completion raised, ended or answered nonsense."""


class Opaque:
    """Stands for an object of a class the tests do not know."""

    def __init__(self, description: str) -> None:
        self.description = description

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.description


# ------------------------------------------------------------------------------------- values


def encode(value: Any, *, opaque: bool = False) -> Any:
    """``value`` as JSON: lists and scalars as themselves, all else as ``{kind: content}``.

    Raises:
        CannotCross: it holds something that is not plain data, and ``opaque`` is False.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else {"int": hex(value)}
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str.__str__(value)
    return _encode_other(value, opaque)


def _encode_other(value: Any, opaque: bool) -> Any:
    def each(items: Any) -> list[Any]:
        return [encode(item, opaque=opaque) for item in items]

    if isinstance(value, list):
        return each(value)
    if isinstance(value, Mapping):
        return {"dict": [each(pair) for pair in value.items()]}
    for kind, classes in (("tuple", tuple), ("frozenset", frozenset), ("set", AbstractSet)):
        if isinstance(value, classes):
            return {kind: each(value)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex | Fraction | Decimal):
        return {type(value).__name__: str(value)}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        return {"iterator": each(_first(value))}
    if isinstance(value, Sequence):
        return each(value)
    if opaque:
        return {"opaque": f"<{type(value).__name__} object>"}
    raise CannotCross(f"a {type(value).__name__} cannot be handed to the program")


def _first(items: Iterator[Any]) -> Iterator[Any]:
    for count, item in enumerate(items):
        if count == MOST_ITERATED:
            raise CannotCross("an iterator without end")
        yield item


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "dict": lambda pairs: dict(map(decode, pairs)),
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "bytes": bytes.fromhex,
    "complex": complex,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "range": lambda ends: range(*ends),
    "iterator": lambda items: iter(list(map(decode, items))),
    "opaque": Opaque,
}


def decode(data: Any) -> Any:
    """The inverse of :func:`encode`; raises what malformed data makes it raise."""
    if isinstance(data, list):
        return [decode(item) for item in data]
    if isinstance(data, dict):
        [(kind, content)] = data.items()
        return _DECODERS[kind](content)
    return data


def overwrite(target: Any, source: Any) -> None:
    """Give a list, dict or set the contents of another: what the completion did to an argument."""
    if isinstance(target, list) and isinstance(source, list):
        target[:] = source
    elif isinstance(target, dict | set) and isinstance(source, type(target)):
        target.clear()
        target.update(source)


# ------------------------------------------------------------------------------- the completion


def serve(source: str, name: str) -> None:
    """Run ``source`` and answer calls of its function ``name`` until nobody asks any more."""
    with os.fdopen(INCOMING, encoding="ascii") as asked, os.fdopen(OUTGOING, "wb", 0) as out:

        def say(answer: Any) -> None:
            out.write(json.dumps(answer).encode("ascii") + b"\n")

        module = types.ModuleType("solution")
        sys.modules["solution"] = module
        try:
            exec(compile(source, "solution.py", "exec"), module.__dict__)
            function = module.__dict__[name]
        except BaseException as error:
            say(_raised(error))
            return
        say({})
        for line in asked:
            say(_answer(function, decode(json.loads(line))))


def _answer(function: Callable[..., Any], call: Any) -> Any:
    arguments, named = call
    try:
        value = function(*arguments, **named)
        # Arguments come back, for the completion may have changed them.
        return {"value": encode(value, opaque=True), "arguments": encode(arguments, opaque=True)}
    except BaseException as error:
        return _raised(error)


def _raised(error: BaseException) -> Any:
    kind = type(error).__name__
    try:
        return {"raised": kind, "text": str(error)[:500]}
    except Exception:
        return {"raised": kind, "text": ""}


# ------------------------------------------------------------------------------------ the tests


class Candidate:
    """The function under test, in another process."""

    def __init__(self) -> None:
        self._asked = os.fdopen(OUTGOING, "wb", 0)
        self._answers = os.fdopen(INCOMING, encoding="ascii")
        self.trouble: CannotCross | None = None
        self._read()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            line = json.dumps(encode([list(arguments), named]))
        except CannotCross as error:
            self.trouble = error
            raise
        try:
            self._asked.write(line.encode("ascii") + b"\n")
        except BrokenPipeError:
            raise ProgramFailed("it ended before the tests did") from None
        answer = self._read()
        try:
            value, after = decode(answer["value"]), decode(answer["arguments"])
        except Exception:
            raise ProgramFailed("what it returned cannot be read") from None
        for given, now in zip(arguments, after, strict=False):
            overwrite(given, now)
        return value

    def _read(self) -> Mapping[str, Any]:
        line = self._answers.readline(LONGEST)
        if not line.endswith("\n"):
            raise ProgramFailed("it returned too much" if line else "it ended before it answered")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise ProgramFailed("what it returned cannot be read") from None
        if not isinstance(answer, dict):
            raise ProgramFailed("what it returned cannot be read")
        if "raised" in answer:
            _raise(str(answer["raised"]), str(answer.get("text", "")))
        return answer


def _raise(kind: str, text: str) -> NoReturn:
    """The built-in exception of that name, which a test may be waiting for."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            error = found(text)
        except TypeError:  # UnicodeDecodeError and the like want more than a text
            error = ProgramFailed(f"{kind}: {text}")
        raise error
    raise ProgramFailed(f"{kind}: {text}")


def check(prompt: str, test: str, name: str, token: str) -> None:
    """Run ``test``, whose ``check`` is given the candidate, and print the token and the verdict."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody may look inside
    candidate: Candidate | None = None
    verdict, reason = "failed", ""
    try:
        names: dict[str, Any] = {}
        exec(
            compile(prompt + "\n    pass\n", "prompt.py", "exec"), names
        )  # its helpers and imports
        candidate = Candidate()
        names[name] = candidate
        exec(compile(test, "test.py", "exec"), names)
        names["check"](candidate)
        verdict = "passed"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:500]
    if candidate is not None and candidate.trouble is not None:
        verdict, reason = "unsupported", str(candidate.trouble)
    print("\n" + json.dumps([token, verdict, reason]), flush=True)
