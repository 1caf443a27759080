"""Accurate products whichever of torch's two sets of switches somebody has used before."""

# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from pytest_lora.numerics.precision import accurate_products, set_switches, switches
from pytest_lora.probe import output_of

backends = torch.backends
NEWER = pytest.mark.skipif(
    not hasattr(backends, "fp32_precision"), reason="this torch has the older switches only"
)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    general = getattr(backends, "fp32_precision", None)
    before = switches()
    yield
    if general is not None:
        backends.fp32_precision = general
    set_switches(before)


def older() -> None:
    torch.set_float32_matmul_precision("medium")


def whole() -> None:
    """As transformers' ``TrainingArguments(tf32=True)`` does it."""
    backends.fp32_precision = "tf32"
    # What a new process has, and an earlier test may have set.
    for place in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
        place.fp32_precision = "none"


def products() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def convolutions() -> None:
    backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision = "ieee", "tf32"


def sums() -> None:
    backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


WAYS = [older, *(pytest.param(way, marks=NEWER) for way in (whole, products, convolutions)), sums]


def assert_accurate() -> None:
    matmul = backends.cuda.matmul
    assert torch.get_float32_matmul_precision() == "highest"
    assert not matmul.allow_tf32
    assert not backends.cudnn.allow_tf32
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not getattr(matmul, "allow_fp16_accumulation", False)
    if hasattr(backends, "fp32_precision"):
        places = (matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
        assert {place.fp32_precision for place in places} == {"ieee"}


@pytest.mark.parametrize("way", WAYS)
def test_products_are_accurate_for_a_while(way: Callable[[], None]) -> None:
    way()
    before = switches()
    with contextlib.suppress(ZeroDivisionError), accurate_products():
        assert_accurate()
        _ = 1 / 0
    assert switches() == before


@pytest.mark.parametrize(("first", "then"), [(older, sums), (sums, older)])
def test_they_nest(first: Callable[[], None], then: Callable[[], None]) -> None:
    first()
    with accurate_products():
        then()
        within = switches()
        with accurate_products():
            assert_accurate()
        assert switches() == within


@pytest.mark.parametrize("way", WAYS)
def test_the_probe_is_run_with_them(way: Callable[[], None]) -> None:
    class Net(nn.Module):
        def forward(self, x: Any) -> Any:
            assert_accurate()
            return x

    way()
    x = torch.ones(2, 2)
    assert torch.equal(output_of(Net(), {"x": x}), x)


@pytest.mark.parametrize("way", WAYS)
def test_switches_can_be_taken_to_another_process(way: Callable[[], None]) -> None:
    fresh = switches()
    way()
    state = switches()
    set_switches(fresh)
    set_switches(state)
    assert switches() == state
