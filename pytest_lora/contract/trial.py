"""One experiment on an implementation, carried out by running the very script it would print.

Every step is a line of Python, executed as it is written down.  So whatever fails, the lines up to
there reproduce it: a script that needs torch and the implementation, and nothing of ours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.loading import one_line

if TYPE_CHECKING:
    import torch

__all__ = ["ContractBroken", "Refused", "Trial"]


class ContractBroken(AssertionError):
    """A law does not hold.

    Attributes:
        law: its id.
        method: what broke it.
        found: what was seen, in one line.
        script: a program that shows it.
        also: what else was seen, where a law looks at several things.
    """

    def __init__(
        self, law: str, method: str, found: str, script: str, also: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.law, self.method, self.script, self.also = law, method, script, tuple(also)
        self.blame(found)

    def blame(self, found: str) -> None:
        """Say that ``found`` is what was seen."""
        self.found = found
        indented = textwrap.indent(self.script, "    ")
        self.args = (
            f"{self.method} breaks {self.law}: {found}\n\nTo see it by itself:\n\n{indented}",
        )


class Refused(Exception):
    """A step raised: the implementation will not, or cannot, do it.

    Attributes:
        error: what it raised.
        step: the line that did.
    """

    def __init__(self, error: Exception, step: str) -> None:
        super().__init__(f"{step.strip().splitlines()[-1].strip()}: {one_line(error)}")
        self.error, self.step = error, step


class Trial:
    """A script in the making and the names it has defined.

    Attributes:
        law, method: what is held against what, for messages.
        names: the script's global names.
    """

    def __init__(self, law: str = "", method: str = "") -> None:
        self.law, self.method = law, method
        self.names: dict[str, Any] = {"__name__": "contract"}
        self._lines: list[str] = []

    @property
    def script(self) -> str:
        """The lines so far."""
        return "\n".join(self._lines) + "\n"

    def run(self, code: str) -> None:
        """Execute ``code`` and write it down.

        Raises:
            Refused: it raised; the line stays in the script, behind a comment.
        """
        code = textwrap.dedent(code).strip("\n")
        try:
            exec(compile(code, "<contract>", "exec"), self.names)
        except Exception as error:
            self._lines += [f"# raises {one_line(error)}:", code]
            raise Refused(error, code) from error
        self._lines.append(code)

    def drop_refused(self) -> None:
        """Take the refused step out of the script: the trial goes on without it."""
        del self._lines[-2:]

    def value(self, expression: str) -> Any:
        """What ``expression`` is at this point; not written down."""
        return eval(expression, self.names)

    def output(self, code: str = "") -> torch.Tensor:
        """Run the model on the script's inputs, or ``code``, without gradients."""
        self.run(f"with torch.no_grad():\n    y = {code}" if code else "y = run()")
        output: torch.Tensor = self.names["y"]
        return output

    def broken(self, found: str, *check: str, also: Sequence[str] = ()) -> ContractBroken:
        """The law is broken: the exception to raise, its script ending in the lines ``check``."""
        script = self.script + "\n".join(check) + "\n"
        return ContractBroken(self.law, self.method, found, script, also)
