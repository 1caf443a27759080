"""Position-dependent fingerprints of tensors, at about the speed of reading them, without a copy.

A tensor's bytes, in logical (row-major) order, are read as 32-bit words ``x_i`` and cut into chunks
of ``WIDTH`` words.  Each chunk is condensed to the multilinear sum

    h = sum_i k_i * x_i  mod 2^64,        k_i fixed, odd, 64 bits,

and the sums of all chunks, with dtype, shape and length, go through BLAKE2b (128 bits).

What is missed (see docs/numerics.md): a change confined to one word changes ``h`` for certain,
because ``k_i`` is odd and the word's change is not divisible by 2^64.  Any other fixed change
is missed with probability at most 2^(t-63) over the choice of the keys, where 2^t is the largest
power of two that divides the change of every changed word; t <= 31, so at most 2^-32.
(D. Lemire, O. Kaser, "Strongly universal string hashing is fast", 2014.)  BLAKE2b adds 2^-128.
It detects accidents, not an adversary who knows the keys.

Integers only: exact, independent of the order of summation, the same on CPU and CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pytest_lora.errors import CannotRun

__all__ = [
    "Difference",
    "Fingerprint",
    "fingerprint",
    "fingerprint_state",
    "locate_difference",
    "named_tensors",
]

WIDTH = 1 << 15
"""Words per chunk: the keys (256 KiB) stay in the cache of one core."""

_BATCH_ON_CPU = 8
"""Chunks condensed at a time on CPU: 1 MiB of tensor, 2 MiB of products."""

_BATCH_ELSEWHERE = 128
"""Likewise on an accelerator, where a kernel launch has to pay: 16 and 32 MiB."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a tensor was at one time; equal fingerprints mean equal dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


class Difference(NamedTuple):
    """Where two tensors of the same shape and dtype differ, bit for bit.

    ``changed`` counts the elements; ``largest`` is the largest absolute difference (``inf`` where
    one side is NaN or infinite) and ``place`` its index, ``None`` only if nothing differs.
    """

    changed: int
    largest: float
    place: tuple[int, ...] | None


def fingerprint(tensor: torch.Tensor) -> str:
    """The digest of a tensor's dtype, shape and bytes as 32 hexadecimal digits.

    Any dtype, device, stride and size will do; tensor subclasses made of inner tensors (quantised
    weights) are taken apart.  Two tensors that are equal element by element, bit for bit, have the
    same digest whatever their strides and device.  Extra memory: a few MiB.

    Raises:
        CannotRun: the tensor has no data (meta device, fake tensor) or is not strided.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _plain_parts(tensor.detach()):
        _refuse_dataless(part)
        digest.update(f"{part.dtype}{tuple(part.shape)};".encode())
        digest.update(_chunk_sums(part))
    return digest.hexdigest()


def fingerprint_state(
    named: torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> dict[str, Fingerprint]:
    """Fingerprints of a whole state by name; memory shared by several names is read once.

    A module stands for all its parameters and buffers, the non-persistent ones included.
    """
    if isinstance(named, torch.nn.Module):
        named = named_tensors(named)
    pairs = named.items() if isinstance(named, Mapping) else named
    seen: dict[tuple[object, ...], str] = {}
    state: dict[str, Fingerprint] = {}
    for name, tensor in pairs:
        key = _memory(tensor)
        digest = seen.get(key) if key else None
        if digest is None:
            digest = fingerprint(tensor)
        if key:
            seen[key] = digest
        state[name] = Fingerprint(str(tensor.dtype), tuple(tensor.shape), digest)
    return state


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under every name it has (tied tensors appear more than once)."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def locate_difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """Compare two tensors bit for bit, in bounded memory, and say where they differ most.

    Raises:
        ValueError: dtypes or shapes differ.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(
            f"cannot compare {a.dtype} {tuple(a.shape)} with {b.dtype} {tuple(b.shape)}"
        )
    count, largest, place = 0, -1.0, -1
    for start, x in _flat_blocks(a.detach(), 1 << 20):
        y = _flat_slice(b.detach(), start, start + x.numel()).to(x.device)
        where = _bits_differ(x, y).nonzero().flatten()
        if not where.numel():
            continue
        count += where.numel()
        gap = _distance(x[where], y[where])
        worst = int(gap.argmax())
        if gap[worst] > largest:
            largest, place = float(gap[worst]), start + int(where[worst])
    if not count:
        return Difference(0, 0.0, None)
    return Difference(count, largest, _unravel(place, a.shape))


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself, or the plain tensors a wrapper subclass is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _plain_parts(getattr(tensor, name))


def _refuse_dataless(tensor: torch.Tensor) -> None:
    if tensor.device.type == "meta":
        raise CannotRun(
            f"a {tensor.dtype} {tuple(tensor.shape)} tensor on the meta device has no data to"
            " fingerprint; load the base model's weights onto a real device"
        )
    if tensor.layout != torch.strided:
        raise CannotRun(f"fingerprints need a strided tensor, this one is {tensor.layout}")


def _memory(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What identifies the memory a tensor shows and how; ``None`` where that cannot be told."""
    plain = tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__")
    if not plain or not tensor.numel() or tensor.device.type == "meta":
        return None
    place = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


@functools.cache
def _keys(device: torch.device) -> torch.Tensor:
    """The odd 64-bit keys: fixed, from an extendable-output hash, the same on every machine."""
    stream = hashlib.shake_128(b"pytest-lora fingerprint keys, version 1").digest(8 * WIDTH)
    keys = torch.frombuffer(bytearray(stream), dtype=torch.int64) | 1
    return keys.to(device)


def _chunk_sums(tensor: torch.Tensor) -> bytes:
    """The 64-bit sums of successive chunks, as little-endian bytes; one transfer per tensor."""
    batch = _BATCH_ON_CPU if tensor.device.type == "cpu" else _BATCH_ELSEWHERE
    words = -(-tensor.numel() * tensor.element_size() // 4)
    # Both buffers are kept over all blocks.  Allocating results in between would leave holes too
    # small for the next block's temporary, and the heap would grow with the tensor.
    sums = torch.zeros(-(-words // WIDTH), dtype=torch.int64, device=tensor.device)
    rows = min(batch, sums.numel())
    products = torch.empty(rows, WIDTH, dtype=torch.int64, device=tensor.device)
    blocks = _flat_blocks(tensor, batch * WIDTH * 4 // tensor.element_size())
    for number, (_, block) in enumerate(blocks):
        _condense(_words(block), products, sums[number * batch : (number + 1) * batch])
    return b"".join(value.to_bytes(8, "little", signed=True) for value in sums.tolist())


def _condense(words: torch.Tensor, products: torch.Tensor, sums: torch.Tensor) -> None:
    """Write the sums of the chunks that ``words`` make up, the last of which may be short."""
    keys = _keys(words.device)
    count, rest = divmod(words.numel(), WIDTH)
    if count:
        whole = products[:count].copy_(words[: count * WIDTH].view(count, WIDTH)).mul_(keys)
        torch.sum(whole, 1, out=sums[:count])
    if rest:
        last = products[0, :rest].copy_(words[count * WIDTH :]).mul_(keys[:rest])
        sums[count] = last.sum()


def _words(flat: torch.Tensor) -> torch.Tensor:
    """The bytes of a flat contiguous tensor as int32 words, zeros added to fill the last one."""
    size = flat.element_size()
    misaligned = flat.storage_offset() * size % 4 or flat.data_ptr() % 4
    if misaligned or flat.stride(0) != 1:  # a single element counts as contiguous at any stride
        flat = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device).copy_(flat)
    octets = flat.view(torch.uint8)
    if octets.numel() % 4:
        octets = torch.nn.functional.pad(octets, (0, -octets.numel() % 4))
    return octets.view(torch.int32)


def _flat_blocks(tensor: torch.Tensor, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """``(start, elements start ... start + size)`` of the tensor in row-major order."""
    for start in range(0, tensor.numel(), size):
        yield start, _flat_slice(tensor, start, min(start + size, tensor.numel()))


def _flat_slice(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements ``start`` to ``stop`` in row-major order: a view where the strides allow it, else a
    copy of just these.
    """
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    row = tensor[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return _flat_slice(tensor[first], start - first * row, stop - first * row)
    if start % row == 0 and stop % row == 0:
        return tensor[first : last + 1].reshape(-1).contiguous()
    inner = -(-start // row), stop // row
    cuts = sorted({start, inner[0] * row, inner[1] * row, stop})
    pieces = [_flat_slice(tensor, a, b) for a, b in itertools.pairwise(cuts)]
    return torch.cat(pieces)


def _bits_differ(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Element by element, whether two flat tensors of one dtype differ in any bit."""
    if x.is_complex():
        x, y = torch.view_as_real(x), torch.view_as_real(y)
        return _bits_differ(x.reshape(-1), y.reshape(-1)).view(-1, 2).any(1)
    integer = _INTEGERS[x.element_size()]
    return x.view(integer) != y.view(integer)


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Absolute differences in float64; infinite wherever one side is not finite."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    return (x.to(wide) - y.to(wide)).abs().nan_to_num(torch.inf, torch.inf)


def _unravel(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        place, here = divmod(place, size)
        index.append(here)
    return tuple(reversed(index))
