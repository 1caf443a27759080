# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import contextlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from pytest_lora.numerics import streaming
from pytest_lora.numerics.streaming import computing_in, intercepted, widened


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor(0.25))
        self.register_buffer("steps", torch.tensor(3))
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.body[0].weight

    def forward(self, x: torch.Tensor, extra: Any = None) -> torch.Tensor:
        return self.head(self.body(x)) * self.scale + self.shift


class Interruption(Exception):
    pass


@contextlib.contextmanager
def interrupted() -> Any:
    """The block has to be left by an exception, and everything put back nevertheless."""
    try:
        yield
    except Interruption:
        return
    pytest.fail("not interrupted")


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pointers(module: nn.Module) -> list[tuple[int, torch.dtype]]:
    return [(t.data_ptr(), t.dtype) for t in (*module.parameters(), *module.buffers())]


def test_widened_is_wide_inside_and_the_same_memory_afterwards():
    net = build()
    before = pointers(net)
    with interrupted(), widened(net, torch.float64):
        assert net.head.weight is net.body[0].weight
        assert {t.dtype for t in net.parameters()} == {torch.float64}
        assert net.steps.dtype == torch.int64
        raise Interruption
    assert pointers(net) == before
    with widened(net, torch.float64, recurse=False):
        assert net.scale.dtype == net.shift.dtype == torch.float64
        assert net.head.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_computing_in_gives_what_a_wide_copy_gives(dtype):
    net, x = build().to(dtype), torch.randn(4, 6).to(dtype)
    copy = build().to(dtype).double()
    before = pointers(net)
    with torch.inference_mode(), computing_in(net, torch.float64):
        found = net(x, extra=(x, [x], {"x": x, "n": 1}))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, copy(x.double()), rtol=1e-12, atol=1e-12)
    assert pointers(net) == before
    assert "forward" not in vars(net)
    assert net(x).dtype == dtype


def test_computing_in_takes_some_modules_as_a_whole():
    net, seen = build(), []
    body = net.body.forward

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(net.body[2].weight.dtype)
        return body(x)

    net.body.forward = watched
    with torch.inference_mode(), computing_in(net, torch.float64):
        net(torch.randn(2, 6))
    with computing_in(net, torch.float64, whole=lambda m: m is net.body), torch.inference_mode():
        net(torch.randn(2, 6))
    assert seen == [torch.float32, torch.float64]
    assert vars(net.body)["forward"] is watched


def test_cast_reaches_into_plain_containers():
    x, n = torch.ones(2), torch.ones(2, dtype=torch.int64)
    found = streaming._cast((x, [x, "text"], {"a": n}), torch.float64)
    assert found[0].dtype == found[1][0].dtype == torch.float64
    assert found[2]["a"].dtype == torch.int64


def test_intercepted_forwards_come_back():
    net = build()
    own = net.head.forward
    net.head.forward = own  # as some libraries hang their hooks in
    modules = {"head": net.head, "body": net.body}
    seen = []

    def make(name: str, module: nn.Module, forward: Any) -> Any:
        return lambda x: seen.append(name) or forward(x)

    x = torch.randn(2, 6)
    expected = net(x)
    with interrupted(), intercepted(modules, make):
        assert torch.equal(net(x), expected)
        raise Interruption
    assert seen == ["body", "head"]
    assert vars(net.head)["forward"] == own
    assert "forward" not in vars(net.body)
