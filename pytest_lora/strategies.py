"""Hypothesis strategies for adapters and what surrounds them (extra ``hypothesis``).

Everything here shrinks well, because tensors are never drawn number by number: a strategy draws a
*seed* and the tensors follow from it.  What is drawn is awkward by default: ``alpha`` differs from
``r`` (where they agree, a scaling left out does not show), matrices are not square (where they are,
a factor transposed or swapped does not show), and factors are not zero.

    from hypothesis import given
    from pytest_lora.strategies import lora_factors

    @given(lora_factors())
    def test_rank(factors):
        assert torch.linalg.matrix_rank(factors.delta()) <= factors.r
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st

from pytest_lora.errors import UsageError
from pytest_lora.folders import FAULTS, AdapterFolder, Fault
from pytest_lora.tiny_models import FAMILIES, adaptable_modules, build_model

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

__all__ = [
    "Factors",
    "TinyModel",
    "adapter_folders",
    "alphas",
    "biases",
    "dtypes",
    "faulty_adapter_folders",
    "initialisations",
    "lora_configs",
    "lora_factors",
    "patterns",
    "ranks",
    "scalings",
    "seeds",
    "shapes",
    "target_modules",
    "tensors",
    "tiny_models",
]

_REWRITING = ("pissa", "olora")


# ------------------------------------------------------------------------------ numbers


def seeds() -> st.SearchStrategy[int]:
    """Seeds for :class:`torch.Generator`; shrink towards 0."""
    return st.integers(0, 2**16 - 1)


def ranks(*, at_most: int = 6) -> st.SearchStrategy[int]:
    """Ranks from 1."""
    return st.integers(1, at_most)


def alphas(r: int, *, equal: bool = False) -> st.SearchStrategy[int]:
    """``lora_alpha`` for rank ``r``: whole numbers from 1, never ``r`` itself unless ``equal``."""
    if equal:
        return st.integers(1, 4 * r + 1)
    return st.integers(1, 4 * r).map(lambda alpha: alpha if alpha < r else alpha + 1)


def scalings() -> st.SearchStrategy[float]:
    """Scalings ``s`` other than 0 and 1: ``alpha / r`` of a drawn rank."""
    return ranks().flatmap(lambda r: alphas(r).map(lambda alpha: alpha / r))


def shapes(*, at_most: int = 12, square: bool = False) -> st.SearchStrategy[tuple[int, int]]:
    """Shapes (out, in) of a weight, from 1, not square unless ``square``."""
    sizes = st.integers(1, at_most)
    if square:
        return st.tuples(sizes, sizes)
    others = st.integers(1, at_most - 1)  # of which those from k on are moved up by one
    return st.tuples(others, sizes).map(lambda pair: (pair[0] + (pair[0] >= pair[1]), pair[1]))


def dtypes(*, half: bool = True) -> st.SearchStrategy[torch.dtype]:
    """float32 (what it shrinks to), float64 and, with ``half``, bfloat16 and float16."""
    return st.sampled_from(
        [torch.float32, torch.float64] + ([torch.bfloat16, torch.float16] if half else [])
    )


def tensors(
    shape: Sequence[int], *, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> st.SearchStrategy[torch.Tensor]:
    """Normal numbers of standard deviation ``scale``, all of them from one drawn seed."""
    return seeds().map(lambda seed: _normal(shape, seed, scale).to(dtype))


def _normal(shape: Sequence[int], seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one adapted weight.

    Attributes:
        B, A: (d, r) and (r, k).
        alpha: ``lora_alpha``.
    """

    B: torch.Tensor
    A: torch.Tensor
    alpha: int

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """``alpha / r``."""
        return self.alpha / self.r

    def delta(self) -> torch.Tensor:
        """``alpha / r B A``, (d, k), in float64."""
        return self.scaling * (self.B.double() @ self.A.double())


@st.composite
def lora_factors(
    draw: st.DrawFn,
    shape: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_rank: int = 6,
) -> Factors:
    """Factors for a weight of ``shape`` (out, in), drawn if None; none of them is zero."""
    d, k = draw(shapes()) if shape is None else shape
    r = draw(ranks(at_most=max_rank))
    alpha, seed = draw(alphas(r)), draw(seeds())
    B, A = _normal((d, r), seed, 0.5).to(dtype), _normal((r, k), seed + 1, 0.5).to(dtype)
    return Factors(B, A, alpha)


# ------------------------------------------------------------------------------ models


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A recipe for a model: building is left to the test, so that drawing and shrinking are cheap.

    Attributes:
        family: a key of :data:`pytest_lora.tiny_models.FAMILIES`.
        seed: what its weights are drawn from.
        dtype: of its weights.
    """

    family: str
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def build(self) -> nn.Module:
        """A new model, in eval mode."""
        return build_model(self.family, seed=self.seed, dtype=self.dtype)


@st.composite
def tiny_models(
    draw: st.DrawFn,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    dtype: st.SearchStrategy[torch.dtype] | None = None,
) -> TinyModel:
    """Recipes for tiny models of ``families``, in float32 unless ``dtype`` says otherwise."""
    chosen = draw(st.sampled_from(list(families)))
    return TinyModel(chosen, draw(seeds()), torch.float32 if dtype is None else draw(dtype))


# ------------------------------------------------------------------------------ configurations


def target_modules(
    model: nn.Module, *, kinds: Sequence[str] = ("linear", "conv1d", "convolution", "embedding")
) -> st.SearchStrategy[list[str]]:
    """One to three modules of ``model`` that LoRA can adapt, by full name, each once."""
    names = [name for name, kind in adaptable_modules(model).items() if kind in kinds]
    return st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)


def biases() -> st.SearchStrategy[str]:
    """Values of ``bias``."""
    return st.sampled_from(["none", "all", "lora_only"])


def initialisations(*, rewriting: bool = False) -> st.SearchStrategy[bool | str]:
    """Values of ``init_lora_weights``; with ``rewriting`` also those that move the base weight."""
    plain: list[bool | str] = [True, False, "gaussian"]
    return st.sampled_from(plain + (list(_REWRITING) if rewriting else []))


def patterns(names: Sequence[str], values: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """``rank_pattern`` or ``alpha_pattern`` for some of the modules ``names``: by full name, or by
    the last part of it.
    """
    keys = [name for full in names for name in {full, full.rpartition(".")[2]}]
    return st.dictionaries(st.sampled_from(sorted(set(keys))), values, max_size=2)


@st.composite
def lora_configs(
    draw: st.DrawFn, /, model: nn.Module, *, rewriting: bool = False, **fixed: Any
) -> LoraConfig:
    """Configurations PEFT accepts for ``model``.

    Args:
        draw: given by Hypothesis.
        model: the bare model; it is only looked at.
        rewriting: also draw initialisations that rewrite the base weights.
        fixed: keys that are not drawn.
    """
    from peft import LoraConfig

    modules = adaptable_modules(model)
    if fixed.get("target_modules"):
        targets = _targeted(modules, fixed["target_modules"])
    else:
        targets = draw(target_modules(model))
    kinds = {modules[name] for name in targets}
    r = fixed.get("r") or _rank_for(draw, model, targets)
    options: dict[str, Any] = {
        "r": r,
        "lora_alpha": draw(alphas(r)),
        "target_modules": list(targets),
        "bias": draw(biases()),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
        "init_lora_weights": draw(_initialisations_for(kinds, rewriting)),
        "alpha_pattern": draw(patterns(targets, st.integers(1, 9))),
        "fan_in_fan_out": kinds == {"conv1d"},
    }
    if "convolution" not in kinds:
        options["rank_pattern"] = draw(patterns(targets, ranks()))
    plain = options["init_lora_weights"] not in _REWRITING
    options["use_dora"] = plain and kinds <= {"linear", "conv1d"} and draw(st.booleans())
    options["use_rslora"] = plain and draw(st.booleans())  # else PEFT advises against patterns
    return LoraConfig(**{**options, **fixed})


def _targeted(modules: Mapping[str, str], wanted: str | Sequence[str]) -> list[str]:
    """Those of ``modules`` that PEFT would adapt for a value of ``target_modules``.

    Raises:
        UsageError: it would adapt none.
    """
    if wanted == "all-linear":
        found = [name for name, kind in modules.items() if kind in ("linear", "conv1d")]
    elif isinstance(wanted, str):
        found = [name for name in modules if re.fullmatch(wanted, name)]
    else:
        ends = tuple(f".{name}" for name in wanted)
        found = [name for name in modules if f".{name}".endswith(ends)]
    if not found:
        raise UsageError(
            f"target_modules={wanted!r} names none of the modules that LoRA can adapt here: "
            f"{', '.join(modules)}"
        )
    return found


def _initialisations_for(kinds: set[str], rewriting: bool) -> st.SearchStrategy[bool | str]:
    """Decompositions want a matrix stored as (out, in)."""
    return initialisations(rewriting=rewriting and kinds == {"linear"})


def _rank_for(draw: st.DrawFn, model: nn.Module, targets: Sequence[str]) -> int:
    """PEFT splits the rank among the groups of a grouped convolution."""
    groups = [getattr(model.get_submodule(name), "groups", 1) for name in targets]
    return draw(ranks()) if max(groups) == 1 else max(groups) * draw(ranks(at_most=2))


# ------------------------------------------------------------------------------ folders


@st.composite
def adapter_folders(
    draw: st.DrawFn, *, dtype: st.SearchStrategy[torch.dtype] | None = None
) -> AdapterFolder:
    """Sound LoRA adapters as PEFT would save them: a configuration and tensors, to be written
    with ``.write(folder)``.

    Modules are attention and feed-forward projections of one to three layers, of any size.
    """
    layers = draw(st.integers(1, 3))
    leaves = draw(
        st.lists(
            st.sampled_from(["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]),
            min_size=1,
            unique=True,
        )
    )
    r = draw(ranks())
    kept = torch.float32 if dtype is None else draw(dtype)
    sizes = {leaf: draw(shapes()) for leaf in leaves}
    seed = draw(seeds())
    tensors: dict[str, torch.Tensor] = {}
    for number, (layer, leaf) in enumerate((i, leaf) for i in range(layers) for leaf in leaves):
        d, k = sizes[leaf]
        prefix = f"base_model.model.model.layers.{layer}.{leaf}"
        tensors[f"{prefix}.lora_A.weight"] = _normal((r, k), seed + number, 0.5).to(kept)
        tensors[f"{prefix}.lora_B.weight"] = _normal((d, r), seed - number - 1, 0.5).to(kept)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": r,
        "lora_alpha": draw(alphas(r)),
        "target_modules": sorted(leaf.rpartition(".")[2] for leaf in leaves),
        "use_rslora": draw(st.booleans()),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    return AdapterFolder(config, tensors)


def faulty_adapter_folders(
    *, faults: Mapping[str, Fault] = FAULTS
) -> st.SearchStrategy[tuple[AdapterFolder, Fault]]:
    """A sound adapter with exactly one of ``faults`` in it, and that fault."""
    return st.tuples(adapter_folders(), st.sampled_from(list(faults.values()))).map(
        lambda pair: (pair[1].apply(pair[0]), pair[1])
    )
