"""4-bit weights: which code an element must get when a merge is quantised again, and what is not.

The quantiser in this file is our own, so that the bound is tested where bitsandbytes is not.
"""
# ruff: noqa: E402 -- torch may be absent, so everything after it comes after the question

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_lora.numerics.four_bit import BlockFormat, Scales, dequantise, judge_requantised
from pytest_lora.numerics.merge_bound import LowRankUpdate

NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
FP4 = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
FP4 = torch.cat([FP4, -FP4])
EIGHT = torch.linspace(-0.9921875, 1, 256)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return (x[:, None] - code).abs().argmin(1)


def blocks_of(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % size)).reshape(-1, size)


class Stored:
    """A weight quantised in float32, as bitsandbytes does it."""

    def __init__(self, weight: torch.Tensor, code: torch.Tensor, size: int, nested: bool) -> None:
        self.shape, self.code, self.size, self.dtype = tuple(weight.shape), code, size, weight.dtype
        blocks = blocks_of(weight.float(), size)
        absmax = blocks.abs().amax(1)
        ratio = blocks * (1 / absmax.clamp_min(1e-38))[:, None]
        self.numbers = nearest(ratio.reshape(-1), code)[: weight.numel()]
        self.scales = Scales(absmax)
        if nested:
            offset = absmax.mean()
            apart = blocks_of(absmax - offset, 256)
            outer = apart.abs().amax(1)
            ratio = (apart / outer.clamp_min(1e-38)[:, None]).reshape(-1)[: absmax.numel()]
            self.scales = Scales(nearest(ratio, EIGHT), outer, EIGHT, offset)

    @property
    def form(self) -> BlockFormat:
        nested = self.scales.outer is not None
        outer = BlockFormat(EIGHT.double(), 256, torch.float32) if nested else None
        return BlockFormat(self.code.double().sort().values, self.size, self.dtype, outer)

    def read(self) -> torch.Tensor:
        numbers = torch.nn.functional.pad(self.numbers, (0, self.numbers.numel() % 2))
        pairs = numbers.reshape(-1, 2).to(torch.uint8)
        packed = (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
        return dequantise(
            packed, self.scales, self.code, shape=self.shape, size=self.size, dtype=self.dtype
        )


def a_case(
    shape: tuple[int, int], weight: Any, factors: Any, code: Any, nested: bool, seed: int = 0
) -> tuple[torch.Tensor, LowRankUpdate, Stored]:
    """A dequantised weight, an update of it, and the sum quantised again."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(s, generator=generator) for s in (shape, (shape[0], 4), (4, shape[1]))]
    before = Stored((normal[0] * 0.02).to(weight), code, 64, nested).read()
    update = LowRankUpdate((normal[1] * 0.02).to(factors), (normal[2] * 0.05).to(factors), 2.0)
    return before, update, Stored(added(before, update), code, 64, nested)


def added(before: torch.Tensor, update: LowRankUpdate) -> torch.Tensor:
    return before + (update.B @ update.A) * update.scaling


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("code", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("factors", FLOATS[:2], ids=str)
@pytest.mark.parametrize("weight", FLOATS, ids=str)
def test_a_sound_merge_is_inside_and_a_wrong_scaling_is_not(weight, factors, code, nested):
    before, update, stored = a_case((96, 192), weight, factors, code, nested)
    after = stored.read()
    sound = judge_requantised(before, after, update, stored.form)
    assert 0 < sound.worst <= 1
    assert sound.outside == 0
    assert sound.elements == before.numel()
    assert 0 < sound.noise_ratio < 1.5
    wrong = replace(update, scaling=2.1)
    assert judge_requantised(before, after, wrong, stored.form).outside > 20
    assert judge_requantised(before, before, update, stored.form).outside > 1000


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 150)),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([NF4, FP4]),
    st.booleans(),
    st.sampled_from(FLOATS[:2]),
    st.floats(-30, 30),
    st.integers(0, 2**31),
)
def test_quantising_again_never_leaves_the_bound(shape, size, code, nested, dtype, power, seed):
    """Ragged last blocks, zero blocks and any magnitude included."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 2.0**power
    weight[: shape[0] // 3] = 0
    before = Stored(weight.to(dtype), code, size, nested).read()
    B = torch.randn(shape[0], 2, generator=generator).to(dtype)
    A = (torch.randn(2, shape[1], generator=generator) * 2.0**power / 4).to(dtype)
    update = LowRankUpdate(B, A, 0.5)
    stored = Stored(added(before, update), code, size, nested)
    assert judge_requantised(before, stored.read(), update, stored.form).worst <= 1


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_small_faults_are_seen_and_placed(nested):
    before, update, stored = a_case((64, 192), torch.float32, torch.float32, NF4, nested)
    sound = stored.read()

    stored.numbers[5 * 192 + 7] += 1 if stored.numbers[5 * 192 + 7] < 15 else -1
    one = judge_requantised(before, stored.read(), update, stored.form)
    assert (one.outside, one.index) == (1, (5, 7))

    late = sound.clone()
    late[9, 64:128] *= 1.05
    block = judge_requantised(before, late, update, stored.form)
    assert block.index is not None
    assert block.index[0] == 9
    assert 64 <= block.index[1] < 128

    twice = Stored(added(added(before, update), update), NF4, 64, nested).read()
    assert judge_requantised(before, twice, update, stored.form).outside > 1000
    assert judge_requantised(before, twice, update, stored.form).applied == pytest.approx(
        2, abs=0.1
    )

    sound[3, 3] = torch.nan
    assert judge_requantised(before, sound, update, stored.form).worst == float("inf")


def test_the_way_back_is_judged_alike():
    before, update, stored = a_case((64, 192), torch.bfloat16, torch.float32, NF4, True)
    merged, back = stored.read(), replace(update, scaling=-update.scaling)
    restored = Stored(added(merged, back), NF4, 64, True)
    assert judge_requantised(merged, restored.read(), back, restored.form).worst <= 1
    assert judge_requantised(merged, merged, back, restored.form).outside > 1000
    assert not torch.equal(restored.read().to(before.dtype), before)


# -------------------------------------------------------------------------- with bitsandbytes


def quantised(seed: int = 0, config: Any = (), **options: Any) -> Any:
    """A PEFT model on two linear layers in 4 bits, one with a bias, and its inputs."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    options = {"quant_type": "nf4", "compress_statistics": True, **options}
    layers = [torch.nn.Linear(128, 192), torch.nn.Linear(192, 64, bias=False)]
    held = [
        bnb.nn.Linear4bit(x.in_features, x.out_features, bias=x.bias is not None, **options)
        for x in layers
    ]
    for layer, plain in zip(held, layers, strict=True):
        layer.load_state_dict(plain.state_dict())
    net = torch.nn.Sequential(*held).to("cpu").requires_grad_(False).eval()
    net.is_loaded_in_4bit = True  # as transformers says it, for PEFT to take its own 4-bit layers
    config = peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": ["0", "1"], **dict(config)})
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@contextlib.contextmanager
def subject_of(model: Any):
    from pytest_lora.subject import Subject

    subject = Subject.from_model(model, inputs={"input": torch.randn(5, 128)})
    try:
        yield subject
    finally:
        subject.release()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_read_back_is_what_bitsandbytes_reads(dtype, kind, nested):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from pytest_lora.checks.four_bit import block_format, doubt_about, read_back

    weight = torch.randn(48, 128).to(dtype) / 50
    held = bnb.nn.Params4bit(weight, quant_type=kind, compress_statistics=nested).to("cpu")
    assert not doubt_about(held)
    theirs = bnb.functional.dequantize_4bit(held.data, held.quant_state)
    assert torch.equal(read_back(held), theirs)
    code = sorted((NF4 if kind == "nf4" else FP4).tolist())
    assert block_format(held).code.tolist() == pytest.approx(code, abs=1e-6)

    update = LowRankUpdate(torch.randn(48, 4) / 50, torch.randn(4, 128) / 20, 2.0)
    merged = bnb.nn.Params4bit(
        added(theirs, update), quant_type=kind, compress_statistics=nested
    ).to("cpu")
    judge = (theirs, read_back(merged), update, block_format(merged))
    assert judge_requantised(*judge).worst <= 1
    assert judge_requantised(*judge[:2], replace(update, scaling=2.1), judge[3]).outside > 20


def test_rows_that_are_no_whole_blocks_are_doubted():
    """bitsandbytes 0.50 on a CPU begins a block with each row when it reads, not when it writes."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from pytest_lora.checks.four_bit import doubt_about

    held = bnb.nn.Params4bit(torch.randn(96, 80), quant_type="nf4").to("cpu")
    assert "rows of 80 are no whole blocks of 64" in doubt_about(held)
    assert not doubt_about(bnb.nn.Params4bit(torch.randn(96, 64), quant_type="nf4").to("cpu"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_merging_and_unmerging_pass_and_leave_the_base_as_it_was(kind):
    from pytest_lora.checks.merge import measure_merge_equivalence, measure_unmerge_restoration

    with subject_of(quantised(quant_type=kind)) as subject:
        merged = measure_merge_equivalence(subject)
        assert merged.value <= 1, merged.where
        assert merged.count == 2
        assert any("4-bit blocks takes" in note for note in merged.notes)
        back = measure_unmerge_restoration(subject, cycles=2)
        assert back.value <= 1, back.where
        assert any("does not come back" in note for note in back.notes)
        assert not subject.base.verify()


def fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    merge, delta = Linear4bit.merge, Linear4bit.get_delta_weight
    if name == "scaling":
        monkeypatch.setattr(Linear4bit, "get_delta_weight", lambda s, a: delta(s, a) * 1.1)
    elif name == "not added":
        monkeypatch.setattr(Linear4bit, "get_delta_weight", lambda s, a: delta(s, a) * 0)
    elif name == "other format":

        def merge_into_larger_blocks(self: Any, *args: Any, **kwargs: Any) -> None:
            self.get_base_layer().weight.blocksize = 128
            merge(self, *args, **kwargs)

        monkeypatch.setattr(Linear4bit, "merge", merge_into_larger_blocks)
    elif name == "not quantised":

        def merge_into_numbers(self: Any, *args: Any, **kwargs: Any) -> None:
            weight = self.get_base_layer().weight
            merge(self, *args, **kwargs)
            state = weight.quant_state
            weight.data = torch.zeros(tuple(state.shape))
            weight.quant_state = state
            self.get_base_layer().weight = weight

        monkeypatch.setattr(Linear4bit, "merge", merge_into_numbers)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("scaling", "bound"),
        ("not added", "bound"),
        ("other format", "the format of its 4-bit blocks"),
        ("not quantised", "float32 [192, 128] numbers with the constants of its 4-bit blocks"),
    ],
)
def test_a_faulty_merge_fails(name: str, says: str, monkeypatch: pytest.MonkeyPatch):
    from pytest_lora.checks.merge import measure_merge_equivalence

    with subject_of(quantised()) as subject:
        fault(name, monkeypatch)
        found = measure_merge_equivalence(subject)
        assert found.value > 1
        assert found.where
        assert any(says in str(problem) for problem in found.problems), found.problems


def test_a_faulty_unmerge_fails(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft.tuners.lora.bnb import Linear4bit

    from pytest_lora.checks.merge import measure_unmerge_restoration

    delta = Linear4bit.get_delta_weight
    calls = []

    def larger_every_other_time(self: Any, adapter: str) -> torch.Tensor:
        calls.append(adapter)
        return delta(self, adapter) * (1.1 if len(calls) % 2 == 0 else 1.0)

    with subject_of(quantised()) as subject:
        monkeypatch.setattr(Linear4bit, "get_delta_weight", larger_every_other_time)
        assert measure_unmerge_restoration(subject, cycles=1).value > 1


def test_a_scale_that_changes_is_a_changed_base_weight():
    with subject_of(quantised()) as subject:
        state = subject.base.module[0].weight.quant_state
        assert not subject.base.verify()
        state.state2.absmax.mul_(2)
        [problem] = subject.base.verify()
        assert problem.where == "0.weight.state2.absmax"
        state.state2.absmax.div_(2)
        subject.base.module[0].weight.data[3] ^= 1
        assert [problem.where for problem in subject.base.verify()] == ["0.weight"]


def test_other_methods_on_four_bits_are_left_out_by_name():
    from pytest_lora.checks.merge import measure_merge_equivalence
    from pytest_lora.errors import NotApplicable

    dora = quantised(config={"use_dora": True})
    with subject_of(dora) as subject, pytest.raises(NotApplicable, match="weight is a Params4bit"):
        measure_merge_equivalence(subject)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 80), (256, 512)], ids=str)
def test_on_a_cuda_device(kind, shape):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from pytest_lora.checks.four_bit import block_format, read_back

    for dtype in FLOATS:
        held = bnb.nn.Params4bit(torch.randn(shape).to(dtype) / 50, quant_type=kind).to("cuda")
        theirs = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        assert torch.equal(read_back(held), theirs)
        B, A = (torch.randn(s, device="cuda") / 30 for s in ((shape[0], 4), (4, shape[1])))
        update = LowRankUpdate(B, A, 2.0)
        merged = bnb.nn.Params4bit(added(theirs, update).cpu(), quant_type=kind).to("cuda")
        judge = (theirs, read_back(merged), update, block_format(merged))
        assert judge_requantised(*judge).worst <= 1
        assert judge_requantised(*judge[:2], replace(update, scaling=2.1), judge[3]).outside > 20
