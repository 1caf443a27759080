"""The whole suite on a CUDA device: the example, data, workers, 4 bits, larger than the device."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

FIXTURES = Path(__file__).parents[2] / "fixtures"
DATA = "perplexity_drift,task_accuracy,generation_health,generation_diversity,dtype_stability"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(pytester: pytest.Pytester, name: str, *words: str) -> list[dict[str, Any]]:
    """Judge an example adapter on the device; the results, all of which have passed."""
    result = pytester.runpytest_subprocess(
        "-p",
        "no:cacheprovider",
        "-m",
        "lora",
        f"--lora-adapter={FIXTURES / 'adapters' / name}",
        "--lora-device=cuda",
        "--lora-report=out.json",
        *words,
    )
    assert result.ret == pytest.ExitCode.OK
    found: list[dict[str, Any]] = json.loads((pytester.path / "out.json").read_text())["results"]
    assert found
    return found


def without_times(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in results]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention-lora", "all-linear-rslora", "dora", "saved-head"])
def test_a_sound_adapter_passes(pytester: pytest.Pytester, name: str, dtype: str) -> None:
    run(pytester, name, f"--lora-dtype={dtype}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verdicts_and_numbers_are_the_same_twice(pytester: pytest.Pytester, dtype: str) -> None:
    words = (f"--lora-dtype={dtype}", f"--lora-profile={FIXTURES / 'lora.toml'}", "--lora-no-cache")
    first = without_times(run(pytester, "dora", *words))
    assert without_times(run(pytester, "dora", *words)) == first


def test_data_checks_decide_as_on_a_cpu(pytester: pytest.Pytester) -> None:
    words = (f"--lora-profile={FIXTURES / 'lora.toml'}", f"--lora-checks={DATA}")
    here = run(pytester, "dora", *words, f"--lora-cache-dir={pytester.path / 'cache'}")
    assert {row["check"] for row in here} == set(DATA.split(","))
    there = run(pytester, "dora", *words, "--lora-device=cpu", "--lora-no-cache")
    [drift], [other] = ([r["measurement"] for r in rows if r["check"] == "perplexity_drift"]
                        for rows in (here, there))  # fmt: skip
    # The same documents in the same order, in float32 with other orders of summation.
    assert drift["count"] == other["count"]
    assert drift["value"] == pytest.approx(other["value"], abs=1e-3)


def test_an_adapter_trained_too_long_fails(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(
        "-m",
        "lora",
        f"--lora-adapter={FIXTURES / 'adapters' / 'overtrained'}",
        f"--lora-profile={FIXTURES / 'lora.toml'}",
        "--lora-checks=perplexity_drift,task_accuracy",
        "--lora-device=cuda",
        "--lora-no-cache",
    )
    result.assert_outcomes(failed=3)


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


SAY = """
import json, os
from pathlib import Path

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        import torch
        name = session.config.workerinput["workerid"] + ".json"
        seen = [os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count()]
        (Path(__file__).parent / name).write_text(json.dumps(seen))
"""


def test_auto_takes_a_worker_per_gpu_within_the_outer_list(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist")
    from pytest_lora.devices import visible_devices

    devices = visible_devices(os.environ)
    assert len(devices) == torch.cuda.device_count()
    if len(devices) > 1:
        devices = devices[1:]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(devices))
    pytester.makeconftest(SAY)
    names = [f"--lora-adapter={FIXTURES / 'adapters' / n}" for n in ("dora", "saved-head")]
    run(pytester, "attention-lora", *names, "-n", "auto", "--lora-checks=forward")
    said = [json.loads(path.read_text()) for path in sorted(pytester.path.glob("gw*.json"))]
    assert said == [[device, 1] for device in devices]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_in_four_bits(pytester: pytest.Pytester, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import transformers

    from pytest_lora.loading import quiet

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(
            FIXTURES / "base", quantization_config=config, device_map={"": 0}
        )
        base.save_pretrained(pytester.path / "base")
    found = run(pytester, "attention-lora", f"--lora-base-model={pytester.path / 'base'}")
    outcomes = {row["check"]: row["outcome"] for row in found}
    assert outcomes["merge_equivalence"] == "passed"
    assert outcomes["frozen_weights"] == "passed"


def test_a_base_larger_than_the_device(pytester: pytest.Pytester) -> None:
    words = ("--lora-device-map=auto", "--lora-max-memory=0=2.5MB,cpu=1GB")
    found = run(pytester, "attention-lora", *words)
    assert {row["outcome"] for row in found} == {"passed"}
