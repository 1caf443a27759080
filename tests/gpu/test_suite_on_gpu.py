"""The whole suite on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

FIXTURES = Path(__file__).parents[2] / "fixtures"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention-lora", "all-linear-rslora", "dora", "saved-head"])
def test_a_sound_adapter_passes(pytester: pytest.Pytester, name: str, dtype: str) -> None:
    result = pytester.runpytest_inprocess(
        "-p",
        "no:randomly",
        f"--lora-adapter={FIXTURES / 'adapters' / name}",
        "--lora-device=cuda",
        f"--lora-dtype={dtype}",
    )
    assert result.ret == pytest.ExitCode.OK


def test_an_overflow_is_caught(pytester: pytest.Pytester) -> None:
    from mutants import MUTANTS, make

    [mutant] = [mutant for mutant in MUTANTS if mutant.name == "overflowing_factor"]
    folder = make(mutant, FIXTURES / "adapters", pytester.path / "mutant")
    result = pytester.runpytest_inprocess(
        "-p",
        "no:randomly",
        f"--lora-adapter={folder}",
        f"--lora-base-model={FIXTURES / 'base'}",
        "--lora-device=cuda",
        "--lora-dtype=float16",
        "--lora-checks=adapter_effect",
    )
    result.stdout.fnmatch_lines(["*adapter_effect FAILED*"])
