"""Coverage-guided fuzzing of the file checks: ``nox -s atheris``.

Hypothesis hands its property tests to a fuzzer as functions of bytes; atheris chooses the bytes by
what they reach in the package.  Takes libFuzzer's options, ``-max_total_time=60`` for one.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["pytest_lora"]):
    import test_hostile_folders as tests

TESTS = (
    tests.test_bytes_of_the_weights_flipped,
    tests.test_configurations_of_every_wrong_shape,
    tests.test_configurations_that_are_none,
    tests.test_headers_that_lie,
    tests.test_odd_names_of_tensors_and_files,
)


def one_input(data: bytes) -> None:
    """The first byte chooses a test, the rest is what it draws from."""
    if data:
        test: object = TESTS[data[0] % len(TESTS)]
        test.hypothesis.fuzz_one_input(data[1:])  # type: ignore[attr-defined]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
