"""Live tensor bytes, counted where tensors are made: exact, on real tensors and on meta ones.

A dispatch mode sees every operator below autograd, in the forward pass, the backward pass and the
optimizer alike.  Each storage that an operator returns is counted once and weakly referenced; when
it dies, its bytes are subtracted.  The peak is the largest sum after any operator, plus what the
operator's kernel allocates for itself (``workspaces``).

Not seen: memory a kernel takes and gives back inside itself, unless that table knows it, and memory
outside tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from pytest_lora.errors import CannotRun
from pytest_lora.memory.allocator import CachingAllocator
from pytest_lora.memory.modules import ModuleNames
from pytest_lora.memory.records import CATEGORIES, LargeTensor, MemoryPeak, Moment, grouped

if TYPE_CHECKING:
    from pytest_lora.memory.shadows import Shadows

__all__ = ["LiveBytes", "Workspaces", "exact", "further_tensors", "storages", "vocabulary_of"]

Op = Any
"""A ``torch._ops.OpOverload``."""
Workspaces = Mapping[Op, Callable[[Sequence[Any], Any], int]]
"""Bytes an operator's kernel takes for itself, from its arguments and its result."""

_COLUMNS = tuple(CATEGORIES)
_INDEX = {name: place for place, name in enumerate(_COLUMNS)}
aten = torch.ops.aten
_PRODUCTS = frozenset(
    getattr(aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
)
"""Operators that CUDA gives to cuBLAS."""
_FRESH = aten.lift_fresh.default
"""What ``torch.tensor`` and ``torch.from_numpy`` say of a tensor they have just made."""
_SPARSE = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
_LARGE = 1 << 16
"""Storages below 64 KiB are counted, but never listed."""


def exact(count: int) -> int:
    """Sizes as they are, for the CPU; the CUDA allocator rounds (:func:`round_up`)."""
    return count


def storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages beneath a tensor, those of a wrapper subclass's parts included."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = [getattr(tensor, name) for name in flatten()[0]]
    elif tensor.layout in _SPARSE:
        parts = [getattr(tensor, name)() for name in _SPARSE[tensor.layout]]
    else:
        yield _storage(tensor)
        return
    for part in parts:
        if isinstance(part, torch.Tensor):
            yield from storages(part)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # its memory is its library's own affair
        raise CannotRun(
            f"the memory of a tensor of layout {str(tensor.layout).removeprefix('torch.')} cannot "
            "be counted: it has no storage that torch shows"
        ) from None


def vocabulary_of(config: Any) -> int | None:
    """Last dimension of a model's logits; None where they are not one number per token."""
    text = getattr(config, "get_text_config", lambda: config)()
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


@dataclass(slots=True, eq=False)
class _Record:
    """A storage: its bytes, its size in the books and what of it still counts there."""

    bytes: int
    size: int
    held: int
    category: int
    op: str
    module: str
    born: int
    block: Any = None
    watch: Any = None

    def told(self) -> LargeTensor:
        return LargeTensor(self.size, _COLUMNS[self.category], self.op, self.module)


@dataclass(slots=True)
class _Peak:
    live: int = 0
    by_category: tuple[int, ...] = (0,) * len(_COLUMNS)
    op: str = ""
    module: str = ""
    phase: str = ""
    at: int = 0
    dead: list[_Record] = field(default_factory=list)
    """Records that were alive then and have died since."""


class LiveBytes(TorchDispatchMode):
    """Counts while it is active; what was there before has to be shown to :meth:`track`.

    Args:
        device: type of the devices to count ("cuda", "meta", ...); None counts all.
        rounding: size of a storage in the books; :func:`exact` or :func:`round_up`.
        workspaces: what kernels take for themselves, by operator.
        allocator: replays the same requests, where given.
        shadows: answers questions about integers' values, where given.
        vocabulary: last dimension by which logits are known.
        timeline: keep the bytes per category after every operator.
        adopt: of a block of anybody's: count storages that were never shown as ``outside``, that
            is not at all, when an operator reads them, instead of when it returns a view of one;
            leave out meta tensors, which take no memory; and learn from the models that run there
            what their modules are called, what their logits are and what their gradients.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        rounding: Callable[[int], int] = exact,
        workspaces: Workspaces | None = None,
        allocator: CachingAllocator | None = None,
        shadows: Shadows | None = None,
        vocabulary: int | None = None,
        timeline: bool = False,
        adopt: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.rounding, self.adopt = device, rounding, adopt
        self.workspaces, self.allocator, self.shadows = workspaces or {}, allocator, shadows
        self.vocabulary = vocabulary
        self.modules = ModuleNames(self._learn if adopt else None)
        self.live = self.operators = self.left_out = 0
        self.multiplying: set[bool] = set()
        """Whether products of matrices were seen in backward (True), outside it (False)."""
        self.phases: dict[str, int] = {}
        self.timeline: list[Moment] | None = [] if timeline else None
        self._by_category = [0] * len(_COLUMNS)
        self._records: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._alive: dict[int, _Record] = {}
        self._outside: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._adopted: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._watched: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._peak = _Peak()
        self._optimizing = False
        self._hooks = ExitStack()

    # ---------------------------------------------------------------------------- what was there

    def track(self, tensor: torch.Tensor, category: str, name: str = "") -> None:
        """Count a tensor that exists already, under a key of :data:`CATEGORIES`."""
        if self._counts(tensor):
            for storage in storages(tensor):
                self._add(storage, _INDEX[category], name or category, "")

    def track_module(self, module: torch.nn.Module) -> None:
        """Count a module's parameters, buffers and other tensors, and watch for gradients."""
        self.modules.learn(module)
        for name, parameter in module.named_parameters():
            category = "trainable" if parameter.requires_grad else "frozen"
            self.track(parameter, category, name)
        self._watch_gradients(module)
        for name, tensor in further_tensors(module):
            self.track(tensor, "frozen", name)

    def _watch_gradients(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.is_leaf and parameter not in self._watched:
                self._watched[parameter] = True
                handle = parameter.register_post_accumulate_grad_hook(self._gradient)
                self._hooks.callback(handle.remove)

    def _learn(self, model: torch.nn.Module) -> None:
        """What the labels of a model nobody has shown should be, when it is first called."""
        self._watch_gradients(model)
        if self.vocabulary is None:
            self.vocabulary = vocabulary_of(getattr(model, "config", None))

    def track_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Count an optimizer's state, and the tables that those of bitsandbytes share."""
        for state in (*optimizer.state.values(), getattr(optimizer, "name2qmap", {})):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    self.track(value, "optimizer", name)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Never count a tensor, which lies in memory of another kind; :attr:`left_out` adds up."""
        self.pass_over(tensor)
        self.left_out += sum(storage.nbytes() for storage in storages(tensor))

    def pass_over(self, tree: Any) -> None:
        """Never count the storages of a tensor, or of those in a tree, that are not known yet."""
        for tensor in tree_iter(tree):
            if isinstance(tensor, torch.Tensor):
                for storage in storages(tensor):
                    if storage not in self._records:
                        self._outside[storage] = True

    @property
    def passed_over(self) -> int:
        """Bytes of what was passed over and is still there, meta tensors left out."""
        there = (storage for storage in self._outside if storage.device.type != "meta")
        return sum(self.rounding(storage.nbytes()) for storage in there)

    def _adopt(self, tree: Any) -> None:
        """Do not count what an operator reads and nobody has shown: it was made out of sight."""
        for tensor in tree_iter(tree):
            if isinstance(tensor, torch.Tensor):
                for storage in storages(tensor):
                    if storage not in self._records:
                        self._adopted[storage] = True

    def _gradient(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            for storage in storages(parameter.grad):
                record = self._records.get(storage)
                if record is not None:
                    self._move(record, _INDEX["gradients"])

    # ---------------------------------------------------------------------------- the books

    def _counts(self, tensor: torch.Tensor) -> bool:
        if self.device is None:
            return not (self.adopt and tensor.device.type == "meta")
        return tensor.device.type == self.device

    def unseen(self, tensor: torch.Tensor) -> int:
        """Bytes of a tensor's storages that are neither in the books nor known as outside."""
        if not self._counts(tensor):
            return 0
        parts = {id(part): part for part in storages(tensor)}.values()
        new = [p for p in parts if p not in self._records and p not in self._outside]
        return sum(self.rounding(part.nbytes()) for part in new)

    def _add(self, storage: torch.UntypedStorage, category: int, op: str, module: str) -> None:
        known = self._records.get(storage)
        count = storage.nbytes()
        if known is not None:
            if known.bytes == count:
                return
            self._drop(known)  # the storage was resized
        elif storage in self._outside or storage in self._adopted:
            return
        block = self.allocator.allocate(count) if self.allocator is not None else None
        size = self.rounding(count)
        record = _Record(count, size, size, category, op, module, self.operators, block)
        record.watch = weakref.ref(storage, partial(self._died, record))
        self._records[storage] = record
        if count >= _LARGE:
            self._alive[id(record)] = record
        self.live += size
        self._by_category[category] += size

    def _died(self, record: _Record, _watch: object) -> None:
        self._drop(record)

    def _drop(self, record: _Record) -> None:
        self.live -= record.held
        self._by_category[record.category] -= record.held
        if self._alive.pop(id(record), None) is not None and record.born <= self._peak.at:
            self._peak.dead.append(record)
        record.held = 0
        if self.allocator is not None:
            self.allocator.release(record.block)
            record.block = None

    def _move(self, record: _Record, category: int) -> None:
        self._by_category[record.category] -= record.held
        self._by_category[category] += record.held
        record.category = category

    def _note(self, op: str, extra: int) -> None:
        now = self.live + extra
        phase = self.phase
        if now > self.phases.get(phase, -1):
            self.phases[phase] = now
        if now > self._peak.live:
            place = self.modules.current()
            self._peak = _Peak(now, self._columns(extra), op, place, phase, self.operators)
        if self.timeline is not None:
            self.timeline.append(Moment(phase, op, self._columns(extra)))

    def _columns(self, extra: int) -> tuple[int, ...]:
        columns = list(self._by_category)
        columns[_INDEX["workspace"]] += extra
        return tuple(columns)

    def _large(self) -> list[LargeTensor]:
        """The large storages alive at the peak."""
        living = [record for record in self._alive.values() if record.born <= self._peak.at]
        return [record.told() for record in (*living, *self._peak.dead)]

    def left(self) -> tuple[LargeTensor, ...]:
        """The large storages alive now, largest first."""
        return grouped([record.told() for record in self._alive.values()])

    # ---------------------------------------------------------------------------- the operators

    @property
    def phase(self) -> str:
        """The part of the step: "optimizer" inside an optimizer's step, "backward" inside autograd,
        else "forward".
        """
        if self._optimizing:
            return "optimizer"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def __torch_dispatch__(
        self, func: Op, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.adopt and func is not _FRESH:
            self._adopt((args, kwargs))
        if self.shadows is None:
            out = func(*args, **kwargs)
        else:
            out = self.shadows.run(func, args, kwargs)
        self.operators += 1
        if func in _PRODUCTS:
            self.multiplying.add(self.phase == "backward")
        name = str(func)
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(tensor, torch.Tensor) and self._counts(tensor):
                self._made(tensor, name)
        extra = self.workspaces[func](args, out) if func in self.workspaces else 0
        if extra and self.allocator is not None:
            self.allocator.release(self.allocator.allocate(extra))
        self._note(name, extra)
        return out

    def _made(self, tensor: torch.Tensor, op: str) -> None:
        for storage in storages(tensor):
            known = self._records.get(storage)
            if known is None or known.bytes != storage.nbytes():
                place = self.modules.current() if storage.nbytes() >= _LARGE else ""
                self._add(storage, self._category(tensor), op, place)

    def _category(self, tensor: torch.Tensor) -> int:
        phase = self.phase
        if phase == "optimizer" or self.vocabulary is None:
            return _INDEX[phase]
        logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        return _INDEX["logits" if logits else phase]

    # ---------------------------------------------------------------------------- the block

    def __enter__(self) -> Self:
        self._hooks.enter_context(self.modules)
        for register, value in (
            (register_optimizer_step_pre_hook, True),
            (register_optimizer_step_post_hook, False),
        ):
            handle = register(lambda *_, value=value: setattr(self, "_optimizing", value))
            self._hooks.callback(handle.remove)
        self._note("before", 0)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._hooks.close()

    @property
    def peak(self) -> MemoryPeak:
        """The largest sum so far, and what made it up."""
        found = self._peak
        return MemoryPeak(
            live=found.live,
            by_category=dict(zip(_COLUMNS, found.by_category, strict=True)),
            op=found.op,
            module=found.module,
            phase=found.phase,
            phases=dict(self.phases),
            largest=grouped(self._large()),
            timeline=tuple(self.timeline or ()),
        )


def further_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers, tensors kept as plain attributes, and the parts of quantised weights."""
    yield from module.named_buffers()
    for name, item in module.named_modules():
        for key, value in vars(item).items():
            if isinstance(value, torch.Tensor):
                yield f"{name}.{key}", value
        state = getattr(getattr(item, "weight", None), "quant_state", None)
        if state is not None:
            yield from ((f"{name}.quant_state", tensor) for tensor in _quant_state(state))


def _quant_state(state: Any) -> Iterator[torch.Tensor]:
    """Tensors of a bitsandbytes ``QuantState``: neither parameters nor buffers."""
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    if getattr(state, "state2", None) is not None:
        yield from _quant_state(state.state2)
