r"""PEFT's rules for matching module names, with patterns nobody vouches for.

``rank_pattern`` and ``alpha_pattern`` match as ``(.*\.)?(pattern)$`` (PEFT's ``get_pattern_key``
since 0.15), ``target_modules`` as a whole when it is a string and by last components when it is a
list, and the layer index is the first number in the path (since 0.20; the last one before).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "PatternError",
    "compile_pattern",
    "layer_index",
    "matches_names",
    "matching_key",
    "names_match",
    "resolver",
]

_MAX_PATTERN = 65536
_NESTED = re.compile(r"[*+}|][^()]*\)+(?:[*+]|\{\d*,)")
_PLAIN = re.compile(r"(?:[\w-]+\.)*([\w-]+)")


class PatternError(ValueError):
    """A pattern of a configuration that cannot be used as a regular expression."""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern that came out of an adapter.

    Raises:
        PatternError: not a regular expression, unreasonably long, or a repetition of repetitions or
            alternatives such as ``(a+)+``, on which Python's matcher may never end.
    """
    if len(pattern) > _MAX_PATTERN:
        raise PatternError(f"{len(pattern)} characters long")
    if _NESTED.search(pattern):
        raise PatternError("a repetition of repetitions or alternatives, which may never end")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"not a regular expression ({error})") from error


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """The first of ``patterns`` that PEFT would apply to the module ``name``, or None.

    Patterns that are no regular expressions match nothing.
    """
    return resolver(dict.fromkeys(patterns))(name)


def resolver(patterns: Mapping[str, Any]) -> Callable[[str], str | None]:
    """:func:`matching_key` for many names: a function from module name to pattern.

    An adapter initialised with EVA has one pattern per module, hundreds times hundreds of matches;
    a pattern that ends in a plain component can only match names that end in it.
    """
    buckets: dict[str, list[tuple[int, str, re.Pattern[str]]]] = {}
    for place, key in enumerate(patterns):
        try:
            compiled = compile_pattern(rf"(.*\.)?({key})$")
        except PatternError:
            continue
        plain = _PLAIN.fullmatch(key)
        buckets.setdefault(plain[1] if plain else "", []).append((place, key, compiled))

    def find(name: str) -> str | None:
        hits = [
            (place, key)
            for tail, entries in buckets.items()
            if name.endswith(tail)
            for place, key, compiled in entries
            if compiled.match(name)
        ]
        return min(hits)[1] if hits else None

    return find


def matches_names(names: Sequence[str], module: str) -> str | None:
    """The entry of a ``target_modules`` list that selects ``module``: itself or its last part."""
    for name in names:
        if module == name or module.endswith(f".{name}"):
            return name
    return None


def names_match(names: str | Sequence[str], module: str) -> bool:
    """Whether ``target_modules`` or ``exclude_modules`` selects ``module``; a string is a pattern.

    Raises:
        PatternError: the string is no pattern.
    """
    if isinstance(names, str):
        return compile_pattern(names).fullmatch(module) is not None
    return matches_names(names, module) is not None


def layer_index(module: str, layers_pattern: Sequence[str] = ()) -> int | None:
    """The layer that ``layers_to_transform`` would take ``module`` to be in.

    Raises:
        PatternError: an entry of ``layers_pattern`` is no pattern.
    """
    if not layers_pattern:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
    else:
        patterns = (
            compile_pattern(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in layers_pattern
        )
        match = next((found for found in (p.match(module) for p in patterns) if found), None)
    return int(match["idx"]) if match else None
