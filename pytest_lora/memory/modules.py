"""Which module is running, or whose backward is: names for operators seen below autograd.

In the forward pass hooks keep a stack.  In the backward pass there is none; but every node of the
graph carries the number it was created under, and numbers are handed out in order, so that the
module that was running when a number was next is the one that made the node.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["ModuleNames"]


class ModuleNames:
    """Follows modules while it is entered.  The hooks are process-wide; the stack is one thread's.

    A label, not a measurement: where autograd runs a checkpointed block again in a thread of its
    own (CUDA), numbers of two threads can coincide and the name may be another block's.

    Args:
        called: told of every model that nobody has shown, when it is first called; its modules are
            learned then.  Without it such modules go by their class.
    """

    def __init__(self, called: Callable[[torch.nn.Module], None] | None = None) -> None:
        self._called = called
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[torch.nn.Module] = []
        self._numbers: list[int] = []
        self._owners: list[str] = []
        self._hooks = ExitStack()

    def learn(self, root: torch.nn.Module) -> None:
        """Names as ``root`` has them; modules that were never shown go by their class."""
        for name, module in root.named_modules():
            self._names.setdefault(module, name or type(module).__name__)

    def current(self) -> str:
        """The innermost module at work, or the one whose backward is; empty for neither."""
        if self._stack:
            return self._name(self._stack[-1])
        node = torch._C._current_autograd_node()
        if node is None or not self._numbers:
            return ""
        place = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._owners[place] if place >= 0 else ""

    def _name(self, module: torch.nn.Module) -> str:
        return self._names.get(module) or type(module).__name__

    def _mark(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._numbers and number < self._numbers[-1]:
            return  # another thread's count
        self._numbers.append(number)
        self._owners.append(self._name(self._stack[-1]) if self._stack else "")

    def _enter(self, module: torch.nn.Module, _inputs: Any) -> None:
        if self._called is not None and not self._stack and module not in self._names:
            self.learn(module)
            self._called(module)
        self._stack.append(module)
        self._mark()

    def _leave(self, module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        while self._stack:  # a module left by an exception may not have been taken off
            if self._stack.pop() is module:
                break
        self._mark()

    def __enter__(self) -> Self:
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        self._stack.clear()
