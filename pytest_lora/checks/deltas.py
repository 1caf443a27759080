"""How large an adapter's change of each module is, from the factors, without the dense product.

For LoRA, ``||s B A||_F = |s| ||R_B R_A^T||_F`` with the triangular factors of thin QR
decompositions of ``B`` and ``A^T`` in float64, because multiplication by a matrix with orthonormal
columns keeps the norm: an (r, r) product instead of a (d, k) one, exactly zero where a factor is.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.adapter import BASE_PREFIX
from pytest_lora.attach import ADAPTER_NAME
from pytest_lora.checks.merge_layers import describe, is_token_layer
from pytest_lora.structure import on_clones

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_lora.checks.merge_layers import LowRankLayer

__all__ = ["Delta", "adapted_modules", "kind_of", "measure_delta"]

_BLOCK = 1 << 22
"""Elements of a weight looked at together: 32 MiB in float64."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter does to one module.

    Attributes:
        name: the module's name in the base model.
        kind: the name with layer numbers replaced by ``*``.
        norm: Frobenius norm of the change of its parameters; None where it cannot be told.
        weight: Frobenius norm of the parameters that are changed.
        zero: whether there is no change at all.
        zero_rows: longest run of consecutive output rows without any change, and the number of
            rows, where that run is too long to be chance.
        remark: anything else worth knowing.
    """

    name: str
    kind: str
    norm: float | None
    weight: float
    zero: bool
    zero_rows: tuple[int, int] | None = None
    remark: str = ""


def kind_of(name: str) -> str:
    """A module's name without what tells apart its copies: ``model.layers.*.mlp.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def adapted_modules(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every PEFT layer and saved module with the name the base model knows it by.

    A wrapper around trained token rows and the layer inside it come under the same name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in model.named_modules():
        inside = isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
        if inside or hasattr(module, "token_adapter"):
            yield name.removeprefix(BASE_PREFIX).removesuffix(".token_adapter"), module


def measure_delta(name: str, module: Any) -> Delta | None:
    """The change ``module`` (see :func:`adapted_modules`) makes; None for mere wrappers."""
    kind = kind_of(name)
    if hasattr(module, "modules_to_save"):
        return _of_saved_module(name, kind, module)
    if hasattr(module, "token_adapter"):
        return None
    if is_token_layer(module):
        return _of_token_rows(name, kind, module)
    layer = describe(module, ADAPTER_NAME, safe_merge=False)
    if layer is not None:
        return _of_low_rank(name, kind, layer, module.get_base_layer().weight.detach())
    return _of_anything(name, kind, module)


# ------------------------------------------------------------------------------ LoRA and DoRA


def _of_low_rank(name: str, kind: str, layer: LowRankLayer, weight: torch.Tensor) -> Delta:
    update = layer.update
    low_rank = low_rank_norm(update.B, update.A, update.scaling)
    matrix = layer.matrix(weight)
    length = _norm(matrix)
    biased = layer.bias is not None and bool(layer.bias.any())
    if update.magnitude is None:
        norm, zero = low_rank, low_rank == 0
    else:
        norm, rescaled = _dora_norm(matrix, update.B, update.A, update.scaling, update.magnitude)
        zero = low_rank == 0 and not rescaled
    untouched = None if zero else _unchanged_rows(layer, update.B, update.A)
    return Delta(name, kind, norm, length, zero and not biased, untouched)


def low_rank_norm(B: torch.Tensor, A: torch.Tensor, scaling: float) -> float:
    """``||scaling * B @ A||_F`` for ``B`` (d, r) and ``A`` (r, k), in float64."""
    left = torch.linalg.qr(B.double(), mode="r")[1]
    right = torch.linalg.qr(A.double().mT, mode="r")[1]
    return abs(scaling) * float(torch.linalg.matrix_norm(left @ right.mT))


def _dora_norm(
    W: torch.Tensor, B: torch.Tensor, A: torch.Tensor, s: float, m: torch.Tensor
) -> tuple[float, bool]:
    """``||g (W + s B A) - W||_F`` with ``g = m / ||W + s B A||`` by rows, and whether g acts.

    By rows, with ``c = <W, B A>`` and ``p = ||B A||^2``, the squared norm is
    ``(g-1)^2 ||W||^2 + 2 g (g-1) s c + g^2 s^2 p``.  An untouched magnitude is the rows' norm as
    computed, so ``g`` acts where it is further from 1 than the rounding of that norm: (k + 2) units
    in the last place of float32, or one of the storage format if that is coarser.
    """
    total, acts = 0.0, False
    gram = A.double() @ A.double().mT
    for rows in _row_blocks(W):
        w, b = W[rows].double(), B[rows].double()
        squares = w.square().sum(1)
        c = ((w @ A.double().mT) * b).sum(1)
        p = ((b @ gram) * b).sum(1)
        length = (squares + 2 * s * c + s * s * p).clamp_min(0).sqrt()
        g = m[rows].double() / length
        parts = (g - 1).square() * squares + 2 * g * (g - 1) * s * c + g.square() * s * s * p
        total += float(parts.nan_to_num(0.0, 0.0, 0.0).sum())
        acts = acts or bool(((g - 1).abs() > _norm_rounding(W, m)).any())
    return math.sqrt(max(total, 0.0)), acts


def _norm_rounding(W: torch.Tensor, m: torch.Tensor) -> float:
    coarse = max(torch.finfo(W.dtype).eps, torch.finfo(m.dtype).eps)
    return max((W.shape[1] + 2) * torch.finfo(torch.float32).eps, coarse)


def _unchanged_rows(
    layer: LowRankLayer, B: torch.Tensor, A: torch.Tensor
) -> tuple[int, int] | None:
    """A block of outputs whose row of B is exactly zero: part of a sharded save that got lost.

    Single dead outputs occur in sound adapters (a unit that never fires), blocks do not: a run
    counts from half of the rows, or from a sixteenth of them if that is at least 8.
    """
    stored_as_in_out = layer.kind in ("conv1d", "embedding") and layer.update.magnitude is None
    rows = (A.T if stored_as_in_out else B).abs().amax(1) == 0
    longest = _longest_run(rows.tolist())
    total = len(rows)
    return (longest, total) if longest >= min(max(total / 16, 8), total / 2) else None


def _longest_run(flags: Sequence[bool]) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


# ------------------------------------------------------------------------------ other changes


def _of_saved_module(name: str, kind: str, wrapper: Any) -> Delta | None:
    """A module stored whole, against the base's own."""
    if ADAPTER_NAME not in wrapper.modules_to_save:
        return None
    saved = dict(wrapper.modules_to_save[ADAPTER_NAME].named_parameters())
    original = dict(wrapper.original_module.named_parameters())
    pairs = [(saved[key].detach(), original[key].detach()) for key in saved if key in original]
    squares = sum(_distance(a, b) ** 2 for a, b in pairs)
    same = all(a.shape == b.shape and torch.equal(a.to(b.dtype), b) for a, b in pairs)
    weight = math.sqrt(sum(_norm(b.reshape(1, -1)) ** 2 for _, b in pairs))
    return Delta(name, kind, math.sqrt(squares), weight, same and bool(pairs))


def _of_token_rows(name: str, kind: str, layer: Any) -> Delta | None:
    """Embedding rows trained one by one, against the base's."""
    if ADAPTER_NAME not in layer.token_indices:
        return None
    rows = torch.as_tensor(layer.token_indices[ADAPTER_NAME])
    trained = layer.trainable_tokens_delta[ADAPTER_NAME].detach()
    original = layer.get_base_layer().weight.detach()[rows.to(trained.device)]
    changed = (trained.to(original.dtype) != original).any(1)
    idle = rows[~changed.cpu()].tolist()
    remark = f"{name}: the rows of tokens {idle[:8]} are the base model's own" if idle else ""
    norm = _distance(trained, original)
    return Delta(name, kind, norm, _norm(original), not changed.any(), remark=remark)


def _of_anything(name: str, kind: str, layer: Any) -> Delta:
    """Any other PEFT layer: what a merge in float32 does to a copy of its parameters."""
    weight = math.sqrt(sum(_norm(p.reshape(1, -1)) ** 2 for p in _parameters(layer).values()))
    norm = _merged_distance(layer)
    return Delta(name, kind, norm, weight, norm == 0)


def _merged_distance(layer: Any) -> float | None:
    with on_clones(layer):
        try:
            for parameter in layer.get_base_layer().parameters():
                parameter.data = parameter.data.float()
            before = {key: value.clone() for key, value in _parameters(layer).items()}
            layer.merge(adapter_names=[ADAPTER_NAME])
            after = _parameters(layer)
            return math.sqrt(sum(_distance(after[key], before[key]) ** 2 for key in before))
        except Exception:  # PEFT cannot merge it (or not this dtype): the output has to tell
            return None


def _parameters(layer: Any) -> dict[str, torch.Tensor]:
    own = layer.get_base_layer().named_parameters()
    return {name: value.detach() for name, value in own if value.is_floating_point()}


# ------------------------------------------------------------------------------ norms in blocks


def _row_blocks(matrix: torch.Tensor) -> Iterator[slice]:
    height = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], height):
        yield slice(start, start + height)


def _norm(matrix: torch.Tensor) -> float:
    """Frobenius norm in float64, in bounded memory."""
    if not matrix.is_floating_point():
        return math.nan
    flat = matrix.detach().reshape(-1, matrix.shape[-1] or 1)
    return math.sqrt(sum(float(flat[rows].double().square().sum()) for rows in _row_blocks(flat)))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """``||a - b||_F``, in bounded memory; of the rows both have, should the shapes differ."""
    if a.dim() != b.dim() or a.shape[1:] != b.shape[1:]:
        return math.inf
    rows = min(a.shape[0], b.shape[0]) if a.dim() else 1
    x, y = (t.detach().reshape(rows, -1) if t.dim() < 2 else t.detach()[:rows].flatten(1)
            for t in (a, b))  # fmt: skip
    total = sum(
        float((x[block].double() - y[block].double()).square().sum()) for block in _row_blocks(x)
    )
    return math.sqrt(total)
