"""The counter itself, on steps small enough to count by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from pytest_lora.memory.allocator import round_up  # noqa: E402
from pytest_lora.memory.livebytes import LiveBytes  # noqa: E402
from pytest_lora.memory.records import NotPredictable  # noqa: E402
from pytest_lora.memory.shadows import Shadows  # noqa: E402

FLOATS = 1000 * 4


def test_the_peak_is_what_is_alive_at_once() -> None:
    with LiveBytes() as counter:
        first = torch.empty(1000)
        del first
        second, third = torch.empty(1000), torch.empty(500)
        del second
    assert third.numel() == 500
    assert counter.peak.live == FLOATS + FLOATS // 2
    assert counter.live == FLOATS // 2
    assert counter.peak.by_category["forward"] == counter.peak.live


def test_views_share_what_they_view() -> None:
    with LiveBytes() as counter:
        whole = torch.empty(1000)
        parts = [whole[:10], whole.view(10, 100), whole.t() if whole.dim() == 2 else whole[5:]]
    assert len(parts) == 3
    assert counter.peak.live == FLOATS


def test_a_copy_does_not() -> None:
    with LiveBytes() as counter:
        whole = torch.empty(1000)
        copy = whole.clone()
    assert copy.numel() == 1000
    assert counter.peak.live == 2 * FLOATS


def test_views_of_what_was_there_before_count_only_where_they_are_not_adopted() -> None:
    before = torch.empty(1000)
    with LiveBytes(adopt=True) as adopting:
        view = before[10:]
    with LiveBytes() as plain:
        view = before[20:]
    assert view.numel() == 980
    assert (adopting.peak.live, plain.peak.live) == (0, FLOATS)


def test_resizing_is_followed() -> None:
    with LiveBytes() as counter:
        tensor = torch.empty(10)
        tensor.resize_(1000)
    assert counter.live == counter.peak.live == FLOATS


def test_sizes_are_rounded_as_the_device_does() -> None:
    with LiveBytes(rounding=round_up) as counter:
        kept = torch.empty(1)
    assert kept.numel() == 1
    assert counter.peak.live == 512


def test_only_the_devices_asked_for_count() -> None:
    with LiveBytes(device="meta") as counter:
        kept = [torch.empty(1000), torch.empty(500, device="meta")]
    assert len(kept) == 2
    assert counter.peak.live == FLOATS // 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(100, 200, bias=False)
        self.outer = nn.Linear(200, 300, bias=False)
        self.inner.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return self.outer(self.inner(x).relu())


def test_every_byte_is_under_its_category() -> None:
    net, batch = Net(), torch.randn(10, 100)
    optimizer = torch.optim.SGD(net.outer.parameters(), lr=0.1)
    counter = LiveBytes()
    counter.track_module(net)
    counter.track(batch, "batch")
    with counter:
        net(batch).sum().backward()
        held = {
            key: counter._columns(0)[place] for place, key in enumerate(counter.peak.by_category)
        }
        optimizer.step()
    assert held["frozen"] == 100 * 200 * 4
    assert held["trainable"] == held["gradients"] == 200 * 300 * 4
    assert held["batch"] == 10 * 100 * 4
    assert sum(counter.peak.by_category.values()) == counter.peak.live


def test_phases_follow_autograd_and_the_optimizer() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.outer.parameters())
    with LiveBytes(timeline=True) as counter:
        net(torch.randn(10, 100)).sum().backward()
        optimizer.step()
    phases = [moment.phase for moment in counter.peak.timeline]
    assert list(dict.fromkeys(phases)) == ["forward", "backward", "optimizer"]
    assert max(counter.peak.phases.values()) == counter.peak.live


def test_large_tensors_are_named_by_the_module_that_made_them_in_both_directions() -> None:
    net = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 400))
    counter = LiveBytes()
    counter.track_module(net)
    batch = torch.randn(200, 300, requires_grad=True)
    seen = {}
    with counter:
        out = net(batch)
        seen["forward"] = {tensor.module for tensor in counter.peak.largest if tensor.module}
        out.sum().backward()
        seen["backward"] = {
            record.module for record in counter._alive.values() if record.category != 0
        }
    assert seen["forward"] >= {"1", "2"}, "the first output is gone: tanh saves its own"
    assert "0" in seen["backward"], "the gradient of the first layer's weight"


def test_equal_tensors_of_several_layers_are_listed_once() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(200, 200)) for _ in range(3)))
    counter = LiveBytes()
    counter.track_module(net)
    with counter:
        net(torch.randn(4, 200))
    [weights] = [tensor for tensor in counter.peak.largest if tensor.category == "trainable"]
    assert (weights.count, weights.bytes) == (3, 200 * 200 * 4)
    assert weights.op == "*.*.weight"


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    from torch.nn.modules import module

    before = len(module._global_forward_hooks), len(module._global_forward_pre_hooks)

    def fail() -> None:
        raise RuntimeError("here")

    counter = LiveBytes()
    with pytest.raises(RuntimeError, match="here"), counter:
        fail()
    assert (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)) == before


def test_live_bytes_return_to_the_start() -> None:
    """The leak check: what is made and let go in a loop leaves nothing."""
    with LiveBytes() as counter:
        ends = []
        for _ in range(3):
            net = Net()
            net(torch.randn(10, 100)).sum().backward()
            del net
            gc.collect()
            ends.append(counter.live)
    assert ends == [0, 0, 0]


# ------------------------------------------------------------------------------------- shadows


def _shadowed(run: Any, *tensors: Any) -> Any:
    shadows = Shadows()
    given = [shadows.to_meta(tensor) for tensor in tensors]
    with LiveBytes(shadows=shadows):
        return run(*given)


def test_questions_about_the_batch_are_answered() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert not _shadowed(lambda m: bool(m.bool().all()), mask)
    assert _shadowed(lambda m: bool(m[:, :2].bool().all()), mask)
    assert _shadowed(lambda m: int(m.cumsum(-1).max()), mask) == 2
    assert _shadowed(lambda m: int((m + torch.ones(3, device="meta")).sum()), mask) == 5


def test_questions_about_weights_are_refused_by_name() -> None:
    with pytest.raises(NotPredictable, match="float32 tensor of shape"):
        _shadowed(lambda x: float(x.sum()), torch.randn(3))
    with pytest.raises(NotPredictable, match="bool tensor"):
        _shadowed(lambda x: bool((x > 0).all()), torch.randn(3))


def test_chance_and_overwritten_values_are_not_known() -> None:
    with pytest.raises(NotPredictable):
        _shadowed(lambda m: int(torch.randint_like(m, 9).sum()), torch.ones(3, dtype=torch.long))
    with pytest.raises(NotPredictable):
        _shadowed(
            lambda m, x: int(m.copy_(x).sum()), torch.ones(3, dtype=torch.long), torch.randn(3)
        )
