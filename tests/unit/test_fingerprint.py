# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question
from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from pytest_lora.errors import CannotRun
from pytest_lora.numerics import fingerprint as module
from pytest_lora.numerics.fingerprint import (
    WIDTH,
    Fingerprint,
    fingerprint,
    fingerprint_state,
    locate_difference,
    named_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.bool,
    torch.complex64,
]
SIZES = [0, 1, 2, 3, 5, 63, WIDTH - 1, WIDTH + 1, 9 * WIDTH + 7]


def tensor_of(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    octets = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
    return octets.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", SIZES)
def test_equal_bytes_have_equal_digests_and_one_changed_element_does_not(dtype, count):
    x = tensor_of(count, dtype)
    digest = fingerprint(x)
    assert fingerprint(x.clone()) == digest
    for place in {0, count // 2, count - 1} if count else ():
        y = x.clone()
        octets = y.view(torch.uint8)
        octets[place * dtype.itemsize] ^= 1
        assert fingerprint(y) != digest


def test_known_answer_so_that_the_keys_never_change_unnoticed():
    assert fingerprint(torch.arange(100, dtype=torch.int32)) == "f1633fe4a6dcc755cfe5714da391cc46"


def test_shape_and_dtype_belong_to_the_digest():
    x = torch.zeros(4, 6)
    same_bytes = [x, x.view(6, 4), x.view(torch.int32), torch.zeros(4, 12).half(), torch.zeros(24)]
    assert len({fingerprint(t) for t in same_bytes}) == len(same_bytes)
    assert len({fingerprint(torch.zeros(s)) for s in [(0,), (0, 3), (3, 0), ()]}) == 4


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "transposed": x.mT,
        "permuted": x.permute(2, 0, 1),
        "every second": x[:, ::2],
        "expanded": x[:1].expand(3, -1, -1),
        "offset by one element": x.view(-1)[1:],
        "tail column": x[..., 3],
        "scalar": x[0, 0, 0],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", views(torch.zeros(2, 2, 4)))
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 300, 4 * 301)])
def test_strides_and_offsets_do_not_matter(dtype, name, shape):
    x = tensor_of(math.prod(shape), dtype).view(shape)
    view = views(x)[name]
    assert fingerprint(view) == fingerprint(view.clone(memory_format=torch.contiguous_format))


def test_lazy_conjugation_is_resolved():
    x = torch.complex(torch.randn(3, 4), torch.randn(3, 4))
    assert fingerprint(x.conj()) == fingerprint(x.conj().resolve_conj()) != fingerprint(x)
    assert fingerprint(x.conj().imag) == fingerprint(x.imag.neg()) != fingerprint(x.imag)


def test_a_parameter_counts_as_its_data():
    x = torch.randn(5)
    assert fingerprint(torch.nn.Parameter(x)) == fingerprint(x)


def test_no_data_is_refused_with_the_reason():
    with pytest.raises(CannotRun, match="meta device"):
        fingerprint(torch.empty(3, device="meta"))
    with pytest.raises(CannotRun, match="sparse_coo"):
        fingerprint(torch.eye(3).to_sparse())


def test_wrapper_subclasses_are_taken_apart():
    class Pair:
        """Quantised weights look like this: a shell around plain tensors."""

        def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
            self.data, self.scale = data, scale

        def detach(self) -> Pair:
            return self

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["data", "scale"], None

    data, scale = torch.arange(6, dtype=torch.int8), torch.ones(2)
    digest = fingerprint(Pair(data, scale))
    assert digest == fingerprint(Pair(data.clone(), scale.clone()))
    assert digest != fingerprint(Pair(data, scale * 2))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 3)
        self.head = torch.nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.arange(4.0), persistent=False)


def test_state_covers_every_name_and_reads_shared_memory_once(monkeypatch):
    model, calls = Tied(), []
    real = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda t: calls.append(t) or real(t))
    state = fingerprint_state(model)
    assert set(state) == {name for name, _ in named_tensors(model)}
    assert {"head.weight", "embed.weight", "cache", "norm.num_batches_tracked"} <= set(state)
    assert state["head.weight"] == state["embed.weight"]
    assert len(calls) == len(state) - 1
    assert state["cache"] == Fingerprint("torch.float32", (4,), real(model.cache))


def test_state_sees_a_changed_buffer():
    model = Tied()
    before = fingerprint_state(dict(named_tensors(model)))
    model.norm.running_mean[1] += 1e-6
    after = fingerprint_state(named_tensors(model))
    assert {name for name in before if before[name] != after[name]} == {"norm.running_mean"}


def test_views_of_one_memory_with_other_strides_are_kept_apart():
    x = torch.arange(9.0).view(3, 3)
    state = fingerprint_state({"x": x, "xT": x.mT, "empty": x[:0]})
    assert state["x"] != state["xT"]
    assert state["empty"].shape == (0, 3)


def test_extra_memory_is_bounded(monkeypatch):
    made = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    fingerprint(torch.zeros(9 * 8 * WIDTH))
    assert sum(t.numel() * t.element_size() for t in made) <= 4 * 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differences_are_counted_and_located(dtype):
    x = tensor_of(60, dtype).view(3, 4, 5).clone()
    if dtype == torch.bool:
        y = x.clone()
        y[1, 2, 3] = ~y[1, 2, 3]
    else:
        x.fill_(1)
        y = x.clone()
        y[0, 0, 1], y[1, 2, 3] = 2, 4
    count, largest, index = locate_difference(x, y)
    assert (count, index) == ((1 if dtype == torch.bool else 2), (1, 2, 3))
    assert largest == (1 if dtype == torch.bool else 3)
    assert locate_difference(x, x.clone()) == (0, 0.0, None)


def test_difference_is_bitwise_nan_equals_itself_and_minus_zero_is_not_zero():
    x = torch.tensor([0.0, math.nan, 1.0, math.inf])
    assert locate_difference(x, x.clone()).changed == 0
    y = torch.tensor([-0.0, math.nan, 1.0, math.inf])
    assert locate_difference(x, y) == (1, 0.0, (0,))
    y[2] = math.nan
    assert locate_difference(x, y) == (2, math.inf, (2,))


def test_difference_across_strides_and_blocks():
    x = torch.zeros(1500, 1500)
    y = x.clone()
    y[1400, 7] = 5.0
    y[3, 1499] = -6.0
    assert locate_difference(x.mT, y.mT) == (2, 6.0, (1499, 3))


def test_difference_of_unlike_tensors_is_refused():
    with pytest.raises(ValueError, match=r"float32 \(2,\) with torch.float32 \(3,\)"):
        locate_difference(torch.zeros(2), torch.zeros(3))


def test_difference_of_scalars():
    assert locate_difference(torch.tensor(1.0), torch.tensor(3.0)) == (1, 2.0, ())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_cpu_agree(dtype):
    for count in (0, 3, 5 * WIDTH + 1, 600 * WIDTH + 3):
        x = tensor_of(count, dtype)
        assert fingerprint(x.cuda()) == fingerprint(x)
