"""What an adapter's files tell, in a few lines: no torch, nothing loaded, nothing judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pytest_lora.adapter import Adapter, lora_modules
from pytest_lora.report.text import clean, number

__all__ = ["describe"]


def describe(adapter: Adapter) -> str:
    """Type, base, rank, scalings per module, sizes and what could not be read, line by line."""
    return "\n".join(_lines(adapter))


def _lines(adapter: Adapter) -> Iterator[str]:
    yield clean(adapter.name)
    yield f"  type        {clean(adapter.peft_type or 'unknown')}"
    yield f"  base model  {clean(adapter.base_model or 'not named')}"
    if adapter.peft_version:
        yield f"  written by  PEFT {clean(adapter.peft_version)}"
    modules = lora_modules(adapter)
    if modules:
        ranks = Counter(module.rank for module in modules)
        scalings = Counter(module.scaling for module in modules)
        yield f"  modules     {len(modules)}"
        yield f"  rank        {_counted(ranks)}"
        yield f"  scaling     {_counted(scalings)}"
    tensors = adapter.tensors.values()
    dtypes = Counter(info.dtype for info in tensors)
    parameters = sum(info.numel for info in tensors)
    size = sum(info.nbytes for info in tensors)
    yield f"  parameters  {parameters:,} in {len(tensors)} tensors, {size:,} bytes"
    yield f"  dtypes      {', '.join(f'{clean(k)} x {n}' for k, n in dtypes.items()) or 'none'}"
    for problem in adapter.problems:
        yield f"  problem     {clean(str(problem))}"


def _counted(values: Counter[int] | Counter[float]) -> str:
    """``8`` where all agree, else ``8 (20 modules), 4 (8 modules)``."""
    if len(values) == 1:
        return number(next(iter(values)))
    return ", ".join(f"{number(v)} ({n} modules)" for v, n in values.most_common())
