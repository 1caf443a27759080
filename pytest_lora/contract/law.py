"""What a law is, and the tables that modules of laws enter theirs in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_lora.contract.dialects import Dialect, Peft
from pytest_lora.contract.experiment import NOT_PLAIN

if TYPE_CHECKING:
    from pytest_lora.contract.experiment import Experiment

__all__ = [
    "Law",
    "LawTable",
    "not_combined",
    "not_mixed",
    "not_plain",
    "not_usual_lora",
    "rewriting",
    "without",
]


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
        sampled: whether it looks at code that PEFT's methods have in common, or takes fresh
            processes, so that some of the methods will do where there is no time for all.
    """

    id: str
    says: str
    hold: Callable[[Experiment], None]
    networks: tuple[str, ...] = ()
    half: bool = False
    any_half: bool = False
    otherwise: str = ""
    excludes: Callable[[Dialect], str] = lambda dialect: ""
    sampled: bool = False


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


# ------------------------------------------------------------------------------ what has no meaning


def not_plain(dialect: Dialect) -> str:
    """Why a law about ``W x + s B A x`` says nothing of it."""
    return "" if dialect.plain else NOT_PLAIN


def not_combined(dialect: Dialect) -> str:
    """Why a law about combinations of adapters says nothing of it."""
    is_lora = isinstance(dialect, Peft) and dialect.method.is_lora
    return "" if is_lora else not_plain(dialect)


def rewriting(dialect: Dialect) -> str:
    """Why a law that needs the base untouched says nothing of it."""
    return "by design it moves part of the base weight into the adapter" if dialect.rewrites else ""


def not_mixed(dialect: Dialect) -> str:
    """Why a law about batches of several adapters says nothing of it."""
    return rewriting(dialect) or not_plain(dialect)


def not_usual_lora(dialect: Dialect) -> str:
    """Why a law about PEFT's tools for LoRA says nothing of it."""
    if not isinstance(dialect, Peft):
        return "it is PEFT's own"
    usual = dialect.plain and "init_lora_weights" not in dialect.method.options
    return "" if usual else "it is tried on LoRA that starts from the identity"


def without(option: str) -> Callable[[Dialect], str]:
    """For laws about a setting: why they say nothing of a method."""

    def excludes(dialect: Dialect) -> str:
        lacks = isinstance(dialect, Peft) and not dialect.method.accepts(option)
        return f"its configuration has no {option}" if lacks else ""

    return excludes
