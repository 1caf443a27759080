"""What a law is, and the tables that modules of laws enter theirs in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_lora.contract.dialects import Dialect
    from pytest_lora.contract.experiment import Experiment

__all__ = ["Law", "LawTable"]


@dataclass(frozen=True, slots=True)
class Law:
    """One row of the table.

    Attributes:
        id: its name.
        says: the law in one line.
        hold: tries it once.
        networks: networks it is tried on, where it matters which.
        half: whether half precision is drawn as well.
        any_half: whether that holds for methods whose layers have no known formula, too.
        otherwise: the network where it names none that will do, for a class of one's own as well;
            empty for the usual one, or none where it names some.
        excludes: why it has no meaning for an implementation, whatever is drawn; empty if it has.
    """

    id: str
    says: str
    hold: Callable[[Experiment], None]
    networks: tuple[str, ...] = ()
    half: bool = False
    any_half: bool = False
    otherwise: str = ""
    excludes: Callable[[Dialect], str] = lambda dialect: ""


class LawTable:
    """The laws of one module, in order; calling it makes a decorator that enters a function."""

    def __init__(self) -> None:
        self.laws: dict[str, Law] = {}

    def __call__(
        self, *networks: str, half: bool = False, any_half: bool = False, **more: Any
    ) -> Callable[[Callable[[Experiment], None]], Callable[[Experiment], None]]:
        """Enter the function below under its own name, with the first line of what it says."""

        def enter(hold: Callable[[Experiment], None]) -> Callable[[Experiment], None]:
            name = hold.__name__
            says = (hold.__doc__ or "").strip().partition("\n")[0]
            self.laws[name] = Law(name, says, hold, networks, half or any_half, any_half, **more)
            return hold

        return enter
