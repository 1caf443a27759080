from __future__ import annotations

import math
import random
import struct
import tracemalloc
from pathlib import Path

import pytest
from adapter_maker import write_adapter
from raw_safetensors import Entry, write

from pytest_lora.adapter import read_adapter
from pytest_lora.checks import finite
from pytest_lora.checks.files import measure_finite_weights
from pytest_lora.errors import CannotRun
from pytest_lora.records import Measurement

SHARED = Path(__file__).parents[3] / "shared" / "data" / "adapters"
CODES = {"F64": "d", "F32": "f", "F16": "e", "C64": "f"}


def measure(folder: Path, *entries: Entry) -> Measurement:
    write_adapter(folder)
    write(folder / "adapter_model.safetensors", entries)
    return measure_finite_weights(read_adapter(folder))


def pack(dtype: str, values: list[float]) -> bytes:
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{CODES[dtype]}", *values)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_located(tmp_path: Path, dtype: str, bad: float) -> None:
    values = [0.0, -1.0, 0.5, bad, 2.0, -0.0]
    found = measure(tmp_path / "a", ("x", dtype, (2, 3), pack(dtype, values)))
    [problem] = found.problems
    assert problem.where == "tensor 'x'[1, 0]"
    assert problem.found == f"{bad} (1 of 6 numbers are not finite)"
    assert (found.value, found.count) == (1, 6)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F64", [1.7976931348623157e308, -1.7976931348623157e308, 5e-324, 2.0**1023]),
        ("F32", [3.4028234663852886e38, -3.4028234663852886e38, 1e-45, 2.0**127]),
        ("F16", [65504.0, -65504.0, 6e-8, 32768.0]),
        ("BF16", [3.3895313892515355e38, -3.3895313892515355e38, 1e-38, 2.0**127]),
        ("C64", [3.4028234663852886e38, -1.0, 0.0, 2.0]),
    ],
)
def test_the_largest_finite_numbers_are_finite(
    tmp_path: Path, dtype: str, values: list[float]
) -> None:
    shape = (2,) if dtype == "C64" else (4,)
    found = measure(tmp_path / "a", ("x", dtype, shape, pack(dtype, values)))
    assert found.value == 0


@pytest.mark.parametrize(
    ("dtype", "good", "bad", "value"),
    [
        ("F8_E4M3", b"\x7e\xfe", b"\x7f", "nan"),
        ("F8_E4M3", b"\x00\x80", b"\xff", "nan"),
        ("F8_E5M2", b"\x7b\xfb", b"\x7c", "inf"),
        ("F8_E5M2", b"\x00\x80", b"\xfc", "-inf"),
        ("F8_E5M2", b"\x00\x80", b"\x7d", "nan"),
        ("F8_E8M0", b"\x00\xfe", b"\xff", "nan"),
        ("F8_E4M3FNUZ", b"\x7f\xff", b"\x80", "nan"),
        ("F8_E5M2FNUZ", b"\x7f\xff", b"\x80", "nan"),
    ],
)
def test_small_floats_have_their_own_rules(
    tmp_path: Path, dtype: str, good: bytes, bad: bytes, value: str
) -> None:
    assert measure(tmp_path / "a", ("x", dtype, (2,), good)).value == 0
    [problem] = measure(tmp_path / "b", ("x", dtype, (3,), good + bad)).problems
    assert problem.where == "tensor 'x'[2]"
    assert problem.found.startswith(f"{value} (1 of 3")


@pytest.mark.parametrize("dtype", ["I8", "U8", "BOOL", "F4", "F6_E2M3"])
def test_types_without_nan_are_finite(tmp_path: Path, dtype: str) -> None:
    shape = (4,) if dtype.startswith("F6") else (6,)
    entry = ("x", dtype, shape, b"\xff" * 3 if dtype[0] == "F" else b"\xff" * 6)
    assert measure(tmp_path / "a", entry).value == 0


def test_complex_numbers_are_located_by_element(tmp_path: Path) -> None:
    entry = ("x", "C64", (2, 2), pack("C64", [0, 0, 0, 0, 0, math.nan, math.inf, 0]))
    [problem] = measure(tmp_path / "a", entry).problems
    assert problem.where == "tensor 'x'[1, 0]"
    assert problem.found == "nan (2 of 8 numbers are not finite)"


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    scalar = ("x", "F32", (), pack("F32", [math.inf]))
    [problem] = measure(tmp_path / "a", scalar, ("y", "F32", (0, 3), b"")).problems
    assert problem.where == "tensor 'x'"
    with pytest.raises(CannotRun, match="no readable numbers") as caught:
        measure(tmp_path / "b", ("y", "F32", (0, 3), b""))
    assert not caught.value.missing


def test_each_tensor_is_one_problem_and_blocks_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "_CHUNK", 16)
    values = [1.0] * 11
    values[5] = values[10] = math.nan
    entries = [(name, "F32", (11,), pack("F32", values)) for name in "xyz"]
    found = measure(tmp_path / "a", *entries)
    assert [problem.where for problem in found.problems] == [f"tensor {n!r}[5]" for n in "xyz"]
    assert found.problems[0].found == "nan (2 of 11 numbers are not finite)"
    assert found.count == 33


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_the_count_equals_a_slow_count(tmp_path: Path, dtype: str) -> None:
    size = {"F64": 8, "F32": 4}.get(dtype, 2)
    data = random.Random(0).randbytes(size * 4096)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    code = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}[dtype]
    padded = [b"\0\0" + part if dtype == "BF16" else part for part in parts]
    bad = [not math.isfinite(struct.unpack(code, part)[0]) for part in padded]
    [problem] = measure(tmp_path / "a", ("x", dtype, (64, 64), data)).problems
    assert f"({sum(bad)} of 4096 numbers" in problem.found
    first = bad.index(True)
    assert problem.where == f"tensor 'x'[{first // 64}, {first % 64}]"


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    count = 4_000_000
    write(folder / "adapter_model.safetensors", [("x", "F32", (count,), bytes(4 * count))])
    adapter = read_adapter(folder)
    tracemalloc.start()
    try:
        assert measure_finite_weights(adapter).count == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * finite._CHUNK  # the block, its high bytes, and a little


def test_a_file_that_shrinks_meanwhile_is_no_verdict(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    adapter = read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CannotRun, match="became shorter") as caught:
        measure_finite_weights(adapter)
    assert not caught.value.missing


# ------------------------------------------------------------------------------ wrong dtype label


def factors(label: str, values: list[float], *, as_: str) -> list[Entry]:
    data = pack(as_, values)
    shape = (8, len(values) // 8)
    return [
        ("base_model.model.q.lora_A.weight", label, shape, data),
        ("base_model.model.q.lora_B.weight", label, shape[::-1], data),
    ]


def weights(scale: float, count: int = 1024) -> list[float]:
    draw = random.Random(1)
    return [draw.uniform(-scale, scale) for _ in range(count)]


@pytest.mark.parametrize("scale", [0.5, 0.05, 1e-3, 1e-5])
def test_bfloat16_labelled_float16_is_told(tmp_path: Path, scale: float) -> None:
    [problem] = measure(tmp_path / "a", *factors("F16", weights(scale), as_="BF16")).problems
    assert "BF16 bytes labelled F16" in problem.found
    assert problem.where == "adapter_model.safetensors: the 2 F16 factors"


@pytest.mark.parametrize("scale", [0.1, 0.01, 1e-3])
def test_float16_labelled_bfloat16_is_told(tmp_path: Path, scale: float) -> None:
    [problem] = measure(tmp_path / "a", *factors("BF16", weights(scale), as_="F16")).problems
    assert "F16 bytes labelled BF16" in problem.found


@pytest.mark.parametrize("label", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("scale", [1.9, 0.1, 1e-3, 1e-7])
def test_rightly_labelled_weights_are_left_alone(tmp_path: Path, label: str, scale: float) -> None:
    assert measure(tmp_path / "a", *factors(label, weights(scale), as_=label)).value == 0


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 1024,
        [random.Random(2).choice((-1.0, 1.0)) for _ in range(1024)],
        [0.0] * 1024,
        weights(0.05, 256),
    ],
)
def test_what_is_too_regular_or_too_little_is_left_alone(
    tmp_path: Path, values: list[float]
) -> None:
    assert measure(tmp_path / "a", *factors("F16", values, as_="BF16")).value == 0
    assert measure(tmp_path / "b", *factors("F16", values, as_="F16")).value == 0


def test_gaussian_factors_with_a_zero_b_are_left_alone(tmp_path: Path) -> None:
    draw = random.Random(3)
    a = pack("BF16", [draw.gauss(0, 0.02) for _ in range(4096)])
    entries = [
        ("base_model.model.q.lora_A.weight", "BF16", (8, 512), a),
        ("base_model.model.q.lora_B.weight", "BF16", (512, 8), bytes(8192)),
    ]
    assert measure(tmp_path / "a", *entries).value == 0


@pytest.mark.parametrize(
    ("label", "scale", "told"),
    [("F16", 1e-6, True), ("F16", 1e-4, False), ("BF16", 1e-6, False), ("F16", 0.0, False)],
)
def test_factors_float16_cannot_hold_are_remarked(
    tmp_path: Path, label: str, scale: float, told: bool
) -> None:
    found = measure(tmp_path / "a", *factors(label, weights(scale), as_=label))
    assert found.value == 0
    assert [note.startswith("2 of 2 F16 factors are so small") for note in found.notes] == (
        [True] if told else []
    )


@pytest.mark.parametrize("scale", [1e-4, 1e-5, 2e-6])
def test_the_remark_comes_where_bfloat16_would_keep_more(tmp_path: Path, scale: float) -> None:
    values = weights(scale)
    told = bool(measure(tmp_path / "a", *factors("F16", values, as_="F16")).notes)
    in_float16 = sum((rounded("e", value) - value) ** 2 for value in values)
    in_bfloat16 = sum((to_bfloat16(value) - value) ** 2 for value in values)
    assert told == (scale < 4e-5)
    assert not told or in_float16 > in_bfloat16


def rounded(code: str, value: float) -> float:
    return float(struct.unpack(f"<{code}", struct.pack(f"<{code}", value))[0])


def to_bfloat16(value: float) -> float:
    """``value`` with eight bits of mantissa, to the nearest."""
    fraction, power = math.frexp(value)
    return math.ldexp(round(fraction * 256) / 256, power)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real adapters are not here")
def test_real_adapters_are_finite() -> None:
    for path in SHARED.iterdir():
        adapter = read_adapter(path)
        if adapter.tensors:
            found = measure_finite_weights(adapter)
            assert found.value == 0
            assert found.count > 800_000
            assert found.details["dtypes"] == {"F32": len(adapter.tensors)}
