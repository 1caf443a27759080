"""The contract on a CUDA device: LoRA and its kin keep it there as on a CPU, a faulty layer not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("hypothesis")

PAGE = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
PAPER, *_ = re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    pytester.makeini("[pytest]\n")
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "--lora-device=cuda", *words)


@pytest.mark.parametrize("method", ["LORA", "LORA+rslora", "LORA+dora", "LOHA", "LOKR", "IA3"])
def test_a_method_of_the_installed_peft_keeps_it(pytester: pytest.Pytester, method: str) -> None:
    result = run(pytester, "--lora-contract", "-k", f"[{method}]")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["* 0 fail (F)*"])


def test_the_layer_from_the_paper_keeps_it_and_one_scaled_wrongly_does_not(
    pytester: pytest.Pytester,
) -> None:
    for name, text in (("sound", PAPER), ("scaled", PAPER.replace("= alpha / r,", "= alpha,"))):
        (pytester.path / f"{name}_layer.py").write_text(text)
    assert run(pytester, "--lora-contract=sound_layer:MyLora").ret == 0
    result = run(pytester, "--lora-contract=scaled_layer:MyLora", "-k", "forward")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*MyLora breaks forward*", "*.to('cuda')*"])


def test_on_the_cpu_of_a_machine_that_has_a_gpu_nothing_of_it_is_used(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\n")
    words = ("--lora-contract", "-k", "LORA] and (save_reload or merged_reload)")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *words)
    assert result.ret == 0
