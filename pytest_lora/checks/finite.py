"""Is every number in the weights finite, and are the bytes of the type the header says?

Nothing but the standard library: a float is not finite exactly when its exponent bits are all
ones, so the high bytes decide, and ``bytes`` finds them at memory speed.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_lora.errors import CannotRun
from pytest_lora.records import Measurement, Problem
from pytest_lora.safetensors_header import HeaderError, iter_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_lora.adapter import Adapter
    from pytest_lora.safetensors_header import TensorInfo

__all__ = ["measure_finite_weights"]

_CHUNK = 1 << 20  # bytes; a multiple of every element size


def _table(matches: Callable[[int], bool]) -> bytes:
    """A ``bytes.translate`` table: 1 for byte values that match, else 0."""
    return bytes(matches(value) for value in range(256))


@dataclass(frozen=True, slots=True)
class _Format:
    """How non-finite numbers of one type look.

    Attributes:
        size: bytes per number.
        high: marks the top bytes that a non-finite number may have.
        low: marks the bytes below that it then also has; None where the top byte settles it.
    """

    size: int
    high: bytes
    low: bytes | None = None


_ALL_ONES = _table(lambda byte: byte & 0x7F == 0x7F)
_UPPER_HALF = _table(lambda byte: byte >= 0x80)
_FORMATS: Mapping[str, _Format] = {
    # 8 exponent bits: seven in the top byte, the last one heads the next byte.
    "F32": _Format(4, _ALL_ONES, _UPPER_HALF),
    "C64": _Format(4, _ALL_ONES, _UPPER_HALF),
    "BF16": _Format(2, _ALL_ONES, _UPPER_HALF),
    # 11 exponent bits: four of them head the next byte.
    "F64": _Format(8, _ALL_ONES, _table(lambda byte: byte >= 0xF0)),
    # 5 exponent bits, all in the top byte.
    "F16": _Format(2, _table(lambda byte: byte & 0x7C == 0x7C)),
    "F8_E5M2": _Format(1, _table(lambda byte: byte & 0x7C == 0x7C)),
    # No infinities; one NaN per sign, or one in all.
    "F8_E4M3": _Format(1, _ALL_ONES),
    "F8_E8M0": _Format(1, _table(lambda byte: byte == 0xFF)),
    "F8_E4M3FNUZ": _Format(1, _table(lambda byte: byte == 0x80)),
    "F8_E5M2FNUZ": _Format(1, _table(lambda byte: byte == 0x80)),
}
"""Types that have NaN or infinity; all others are finite by nature."""


def measure_finite_weights(adapter: Adapter) -> Measurement:
    """Count tensors that hold NaN or infinity, or whose bytes are of another type than declared.

    Streams every tensor in blocks of a mebibyte; memory does not grow with the adapter.

    Returns:
        The number of problems among all elements; the first is located by tensor and index.

    Raises:
        CannotRun: there are no weights to read, or they changed while being read.
    """
    numbers = sum(info.numel for info in adapter.tensors.values())
    if not numbers:
        raise CannotRun(f"{adapter.name} has no readable numbers")
    try:
        problems = [
            problem
            for info in adapter.tensors.values()
            for problem in _tensor_problems(info, _FORMATS.get(info.dtype))
        ]
        problems += _mislabelled(adapter)
        notes = list(_coarse(adapter))
    except HeaderError as error:
        raise CannotRun(str(error)) from error
    dtypes = Counter(info.dtype for info in adapter.tensors.values())
    return Measurement.of_problems(
        problems,
        count=numbers,
        notes=notes,
        tensors=len(adapter.tensors),
        dtypes=dict(sorted(dtypes.items())),
    )


def _tensor_problems(info: TensorInfo, form: _Format | None) -> Iterator[Problem]:
    if form is None:
        return
    bad, first, value, seen = 0, -1, "", 0
    for block in iter_bytes(info, chunk=_CHUNK):
        marks = _non_finite(block, form)
        if marks:
            if first < 0:
                place = marks.index(1)
                first = seen + place
                value = _name(block[place * form.size : (place + 1) * form.size], info.dtype)
            bad += marks.count(1)
        seen += len(block) // form.size
    if bad:
        total = info.nbytes // form.size
        yield Problem(
            f"tensor {info.name!r}{_index(first, info)}",
            f"{value} ({bad} of {total} numbers are not finite)",
            "finite numbers",
            "go back to the last good checkpoint, or train again with a lower learning rate",
        )


def _non_finite(block: bytes, form: _Format) -> bytes:
    """One byte per number, 1 where it is not finite; empty when all are finite."""
    high = block[form.size - 1 :: form.size].translate(form.high)
    if 1 not in high:
        return b""
    if form.low is None:
        return high
    low = block[form.size - 2 :: form.size].translate(form.low)
    both = int.from_bytes(high, "little") & int.from_bytes(low, "little")
    return both.to_bytes(len(high), "little") if both else b""


def _name(raw: bytes, dtype: str) -> str:
    """``nan``, ``inf`` or ``-inf`` for the bytes of one non-finite number."""
    if dtype == "F8_E5M2":
        raw = b"\0" + raw  # the upper half of an F16
        dtype = "F16"
    if dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of an F32
        dtype = "F32"
    code = {"F16": "<e", "F32": "<f", "C64": "<f", "F64": "<d"}.get(dtype)
    return str(struct.unpack(code, raw)[0]) if code else "nan"


def _index(flat: int, info: TensorInfo) -> str:
    """``[3, 17]``: the multi-index of element ``flat`` in row-major order."""
    if info.dtype == "C64":
        flat //= 2
    index: list[int] = []
    for size in reversed(info.shape):
        flat, place = divmod(flat, size)
        index.append(place)
    return str(index[::-1]) if index else ""


# -- bytes of another type than the header says --------------------------------------------------
#
# Weights trained from a smooth initialisation fill a range around zero: of numbers spread evenly
# up to 2, the widest range in question, 1/32 lie below 2**-4.  Both 16-bit floats are sign,
# exponent, mantissa, so reading one as the other replaces a number by a stepwise line in its
# logarithm.  bfloat16 numbers from 2**-39 to 2 read as float16 all land in [2**-4, 2): nothing near
# zero is left.  float16 numbers below 0.058 read as bfloat16 land below 2**-40, where no optimizer
# works.

_SAMPLE = 1024  # bytes per tensor
_ENOUGH = 1024  # numbers; none of 1024 smooth ones below 1/32 of the range: (31/32)**1024 < 1e-14


def _mislabelled(adapter: Adapter) -> Iterator[Problem]:
    """All LoRA factors together look like the other 16-bit float than the one declared."""
    for declared, actual, looks_wrong in (
        ("F16", "BF16", _nothing_near_zero),
        ("BF16", "F16", _vanishing),
    ):
        factors = [info for info in adapter.tensors.values() if _is_factor(info, declared)]
        words = [word for info in factors for word in _words(info)]
        if len(words) >= _ENOUGH and len(set(words)) >= 64 and looks_wrong(words):
            yield Problem(
                f"{factors[0].file.name}: the {len(factors)} {declared} factors",
                _describe(words, declared, actual),
                f"{actual} in the header, which makes them ordinary weights",
                "save the adapter again from the model in memory, without changing the dtype label",
            )


def _is_factor(info: TensorInfo, dtype: str) -> bool:
    return info.dtype == dtype and len(info.shape) == 2 and ".lora_" in info.name


def _words(info: TensorInfo) -> list[int]:
    """The first non-zero 16-bit patterns of a tensor, without their sign."""
    block = next(iter_bytes(info, chunk=_SAMPLE), b"")
    patterns = struct.unpack(f"<{len(block) // 2}H", block)
    return [word & 0x7FFF for word in patterns if word & 0x7FFF]


def _nothing_near_zero(words: list[int]) -> bool:
    """All but one in a thousand within [2**-4, 2) as float16, yet of many sizes as bfloat16."""
    outside = sum(not 0x2C00 <= word < 0x4000 for word in words)
    return 1000 * outside <= len(words) and max(words) - min(words) > 4 * 0x80


def _vanishing(words: list[int]) -> bool:
    """Half of the bfloat16 numbers below 2**-40 but none beyond 2; as float16 sensible weights."""
    small = sum(word < (127 - 40) << 7 for word in words)
    normal = sum(word >= 0x0400 for word in words)
    return 2 * small > len(words) and 2 * normal > len(words) and max(words) < 0x4000


def _describe(words: list[int], declared: str, actual: str) -> str:
    low, high = (_decode(word, declared) for word in (min(words), max(words)))
    there, where = (_decode(word, actual) for word in (min(words), max(words)))
    return (
        f"magnitudes from {low:.3g} to {high:.3g} in {len(words)} sampled numbers "
        f"({actual} would make them {there:.3g} to {where:.3g}): {actual} bytes labelled {declared}"
    )


# -- float16 that is coarser than bfloat16 -------------------------------------------------------
#
# Below 2**-14 float16 numbers are 2**-24 apart whatever their size, so rounding costs them
# 2**-24 / sqrt(12) in root mean square.  A bfloat16 number is off by 2**-9 of itself at most.
# Where the root mean square of a factor is below 2**-24 / sqrt(12) / 2**-9, float16 kept less of it
# than the coarsest format anyone trains in would have.

_COARSE = 2.0**-24 / math.sqrt(12) / 2.0**-9


def _coarse(adapter: Adapter) -> Iterator[str]:
    """One remark on all float16 factors whose numbers are so small that the format rounds them."""
    found: list[tuple[float, str]] = []
    factors = [info for info in adapter.tensors.values() if _is_factor(info, "F16")]
    for info in factors:
        block = next(iter_bytes(info, chunk=_SAMPLE), b"")
        numbers = struct.unpack(f"<{len(block) // 2}e", block)
        size = math.sqrt(math.fsum(number * number for number in numbers) / max(len(numbers), 1))
        if 0 < size < _COARSE:  # all zeros are an untrained factor; NaN compares false
            found.append((size, info.name))
    if found:
        size, name = min(found)
        error = min(2.0**-24 / math.sqrt(12) / size, 1.0)
        yield (
            f"{len(found)} of {len(factors)} F16 factors are so small that float16 rounds them by "
            f"more than bfloat16 would: {name!r} is of size {size:.2g}, where float16 is off by "
            f"{error:.0%}; save in float32 or bfloat16"
        )


def _decode(word: int, dtype: str) -> float:
    raw = struct.pack("<H", word)
    value = struct.unpack("<f", b"\0\0" + raw) if dtype == "BF16" else struct.unpack("<e", raw)
    return float(value[0]) if math.isfinite(value[0]) else math.inf
