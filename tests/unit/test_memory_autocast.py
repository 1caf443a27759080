"""``torch.autocast`` on meta tensors: the casts of a real region, kept as long, and no others.

Steps under autocast are held to real runs, byte by byte, in test_memory_truth.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
torch = pytest.importorskip("torch")

import memory_cases as cases  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from stack import follows_autocast  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from pytest_lora.errors import UsageError  # noqa: E402
from pytest_lora.memory.autocast import _LAYERS, _LISTS, Autocast  # noqa: E402
from pytest_lora.memory.kernels import CudaKernels  # noqa: E402
from pytest_lora.memory.livebytes import LiveBytes  # noqa: E402
from pytest_lora.memory.records import NotPredictable  # noqa: E402
from pytest_lora.memory.tracing import run_step, trace_on_cpu, trace_on_cuda  # noqa: E402
from pytest_lora.memory.workload import make_model  # noqa: E402

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

pytestmark = follows_autocast()

OPERATORS: dict[str, Any] = {
    "mm": lambda a: a @ a,
    "bmm": lambda a: torch.einsum("bij,bjk->bik", a[None], a[None]),
    "linear": lambda a: F.linear(a, a, a[0]),
    "conv1d": lambda a: F.conv1d(a[None], a[:, :, None]),
    "attention": lambda a: F.scaled_dot_product_attention(*[a[None, None]] * 3),
    "add": lambda a: a + a,
    "exp": lambda a: a.exp(),
    "rsqrt": lambda a: a.square().rsqrt(),
    "softmax": lambda a: a.softmax(-1),
    "softmax in a format": lambda a: a.softmax(-1, dtype=a.dtype),
    "sum": lambda a: a.sum(),
    "sum of a dimension": lambda a: a.sum(0, keepdim=True),
    "norm": lambda a: torch.norm(a, 2),
    "layer norm": lambda a: F.layer_norm(a, (4,), a[0]),
    "mse": lambda a: F.mse_loss(a, a.sin()),
    "cross entropy": lambda a: F.cross_entropy(a, torch.arange(4, device=a.device)),
    "cat": lambda a: torch.cat([a, a.to(BF16)]),
    "stack": lambda a: torch.stack([a.to(BF16), a.to(BF16)]),
    "prod": lambda a: a.prod(0),
    "double": lambda a: a.double() @ a.double(),
}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", OPERATORS)
def test_every_list_of_the_cpu_does_what_the_cpu_does(name: str, dtype: Any) -> None:
    real, empty = torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype, device="meta")
    with torch.autocast("cpu", dtype=BF16):
        found = OPERATORS[name](real).dtype
    with Autocast("cpu"), torch.autocast("cpu", dtype=BF16):
        assert OPERATORS[name](empty).dtype == found


@pytest.mark.parametrize(
    ("name", "dtype"),
    {
        **dict.fromkeys(["mm", "bmm", "linear", "conv1d", "attention", "stack"], BF16),
        **dict.fromkeys(["exp", "rsqrt", "softmax", "layer norm", "mse", "cross entropy"], FP32),
        **dict.fromkeys(["sum", "sum of a dimension", "norm", "prod", "cat"], FP32),
        "softmax in a format": BF16,
        "add": BF16,
        "double": FP64,
    }.items(),
)
def test_the_lists_of_cuda_are_its_own(name: str, dtype: Any) -> None:
    """As torch documents them ("Autocast Op Reference"); ``cat`` of equal formats keeps them."""
    empty = torch.ones(4, 4, dtype=FP32 if name == "cat" else BF16, device="meta")
    with Autocast("cuda"), torch.autocast("cuda", dtype=BF16):
        assert OPERATORS[name](empty).dtype == dtype


@pytest.mark.parametrize("device", _LISTS)
def test_an_operator_has_one_list_and_torch_lists_it_too(device: str) -> None:
    listed = [name for names in _LISTS[device].values() for name in names.split()]
    assert len(listed) == len(set(listed))
    of_torch = torch._C._dispatch_get_registrations_for_dispatch_key(_LAYERS[device])
    assert not {f"aten::{name}" for name in listed} - set(of_torch)


def test_what_torch_lists_and_nobody_here_knows_is_refused_by_name() -> None:
    one = torch.ones(4, device="meta")
    with Autocast("cuda"), torch.autocast("cuda"), pytest.raises(NotPredictable, match="entropy"):
        F.binary_cross_entropy(one, one)
    with Autocast("cuda"):
        F.binary_cross_entropy(one, one)


# ------------------------------------------------------------------------------- the casts kept


@pytest.fixture(params=["cpu", "meta"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every law below holds for a real region, and for ours."""
    if request.param == "cpu":
        yield "cpu"
        return
    with Autocast("cpu"):
        yield "meta"


def _casts(device: str, weight: Any, *, times: int = 2, **options: Any) -> int:
    """How many casts ``times`` products with one weight take."""
    given = torch.ones(4, 4, dtype=BF16, device=device)
    with LiveBytes(timeline=True) as counter, torch.autocast("cpu", dtype=BF16, **options):
        for _ in range(times):
            F.linear(given, weight)
    assert counter.timeline is not None
    return sum(moment.op.startswith("aten._to_copy") for moment in counter.timeline)


def _weight(device: str, **options: Any) -> Any:
    return torch.ones(4, 4, device=device, **options)


def test_a_weight_that_learns_is_cast_once(device: str) -> None:
    assert _casts(device, _weight(device, requires_grad=True)) == 1


def test_and_again_in_the_next_region(device: str) -> None:
    weight = _weight(device, requires_grad=True)
    assert _casts(device, weight) + _casts(device, weight) == 2


def test_what_is_frozen_no_leaf_a_view_or_wider_is_cast_each_time(device: str) -> None:
    assert _casts(device, _weight(device)) == 2
    assert _casts(device, _weight(device, requires_grad=True) * 1) == 2
    assert _casts(device, _weight(device, requires_grad=True)[:2]) == 2
    assert _casts(device, _weight(device, requires_grad=True, dtype=FP16)) == 2
    assert _casts(device, _weight(device, dtype=BF16)) == 0


def test_a_region_may_keep_nothing(device: str) -> None:
    assert _casts(device, _weight(device, requires_grad=True), cache_enabled=False) == 2


def test_casts_live_until_the_outermost_region_ends(device: str) -> None:
    weight, given = _weight(device, requires_grad=True), _weight(device)
    with LiveBytes(), torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        with torch.autocast("cpu", dtype=BF16):
            first = F.linear(given, weight)
        with torch.autocast("cpu", enabled=False):
            assert F.linear(given, weight).dtype == FP32
        assert F.linear(given, weight).dtype == first.dtype == BF16
    assert F.linear(given, weight).dtype == FP32


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_opens_its_region_again(device: str, reentrant: bool) -> None:
    seen = []

    def block(given: Any) -> Any:
        seen.append(F.linear(given, weight).dtype)
        return F.linear(given, weight).float().sum()

    weight = _weight(device, requires_grad=True)
    given = _weight(device, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        out = checkpoint(block, given, use_reentrant=reentrant)
    out.backward()
    assert seen == [BF16, BF16]
    assert weight.grad.dtype == FP32


# ------------------------------------------------------------------------------- around a trace


def test_regions_of_another_device_are_refused_and_those_switched_off_are_nothing() -> None:
    one = torch.ones(4, 4, device="meta")
    with Autocast("cuda"):
        with pytest.raises(NotPredictable, match=r"torch\.autocast\('cpu'\), and is predicted for"):
            torch.autocast("cpu")
        with torch.autocast("cuda", dtype=FP16), torch.autocast("cpu", enabled=False):
            assert (one @ one).dtype == FP16


def test_libraries_that_ask_for_the_region_are_answered() -> None:
    with Autocast("cuda"):
        assert not torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda"):  # of CUDA's own default format
            assert torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") == FP16
        with torch.autocast("cuda", dtype=BF16):
            assert torch.get_autocast_dtype("cuda") == BF16
        assert torch.get_autocast_dtype("cuda") == FP16


def test_a_format_that_is_not_half_is_refused() -> None:
    with Autocast("cuda"), pytest.raises(NotPredictable, match=r"torch\.float32, no half"):
        torch.autocast("cuda", dtype=FP32)
    with pytest.raises(UsageError, match="autocast 'float32' is neither"):
        cases.Case(options={"autocast": FP32}).workload()


def test_torch_is_left_as_it_was_even_by_what_fails() -> None:
    cls = torch.amp.autocast_mode.autocast
    before = [cls.__init__, cls.__enter__, cls.__exit__, F.scaled_dot_product_attention]
    one = torch.ones(4, 4, device="meta")

    def fail() -> None:
        with Autocast("cuda"), torch.autocast("cuda", dtype=BF16):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [cls.__init__, cls.__enter__, cls.__exit__, F.scaled_dot_product_attention] == before
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cuda")
    assert torch.get_autocast_dtype("cuda") == FP16
    assert (one @ one).dtype == FP32


# ------------------------------------------------------------------------------- whole steps


def test_a_step_as_accelerate_prepares_it_is_the_same_step() -> None:
    """What ``transformers.Trainer(bf16=True)`` runs: predicted as it stands, to the byte, and by
    the option but for the four bytes of a loss that accelerate divides once more.
    """
    accelerate = pytest.importorskip("accelerate")

    def step(model: Any, optimizer: Any, batches: Any) -> None:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        prepared = accelerator.prepare_model(model, device_placement=False)
        for batch in batches:
            accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    plain = cases.Case(options={"autocast": BF16}).workload()
    trainer = dataclasses.replace(plain, autocast=None, step=step)
    real = run_step(trainer).peak
    assert trace_on_cpu(trainer).peak == real
    assert abs(trace_on_cpu(plain).peak.live - real.live) <= 4


def test_on_cuda_a_frozen_base_in_float32_gets_dearer_by_its_casts() -> None:
    """Products with frozen weights save those weights' casts for backward (but for the first of
    all, whose input needs no gradient); a base that is in half precision already has none.
    """

    def forward(dtype: Any) -> int:
        workload = cases.Case(options={"autocast": BF16, "dtype": dtype}).workload()
        peak = trace_on_cuda(workload, CudaKernels(("flash", "efficient", "math"))).peak
        return peak.by_category["forward"]

    model = make_model(cases.Case().workload(), "meta")
    layers = [
        layer
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear and ".layers.0.self_attn." not in name
    ]
    casts = sum(2 * layer.weight.numel() for layer in layers if not layer.weight.requires_grad)
    assert forward(FP32) - forward(BF16) > casts
