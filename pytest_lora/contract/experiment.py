"""An implementation on a tiny network, and what a law may do and ask."""

from __future__ import annotations

import builtins
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.bits import how_different
from pytest_lora.checks.merge_layers import NotMergeable
from pytest_lora.contract.dialects import FIRST, Case, Dialect, Peft
from pytest_lora.contract.reference import Reference, Term
from pytest_lora.contract.trial import ContractBroken, Refused, Trial
from pytest_lora.errors import CannotRun, CheckFailed, NotApplicable
from pytest_lora.fresh import Script, run_side_by_side
from pytest_lora.records import Problem

if TYPE_CHECKING:
    import torch

    from pytest_lora.subject import Subject

__all__ = ["NOT_PLAIN", "Adapters", "Experiment", "is_refusal", "lacks_library", "says_refusal"]

NOT_PLAIN = "its layers compute something else than W x + s B A x"

Adapters = Sequence[Mapping[str, Term]]
"""The adapters at work, each with its terms by module."""

_BY_DESIGN = re.compile(
    r"not (?:yet )?(?:supported|implemented)|unsupported|only supports?|does(?:n't| not) support|"
    r"supports only|cannot|can't|can only|incompatible|not compatible|impossible|"
    r"has no bias|please run|"
    r"does not allow|only one .* is allowed|undefined merging|no layers? types compatible|"
    r"must be (?:saved|enabled) for all adapters or none",
    re.IGNORECASE,
)
# Where shapes and formats do not fit, torch raises RuntimeError and Python TypeError: of these only
# what PEFT itself says with them is a refusal.
_NO_MERGE = re.compile(
    r"(?:impossible to|cannot) (?:un)?merge|(?:only|not) supported|not support", re.IGNORECASE
)
_NO_SUCH = re.compile(
    r"^Please initialize |^Unsupported data type|^Target module .* is not supported|"
    r"must be saved for all adapters or none",
    re.DOTALL,
)
_OF_TORCH = re.compile(
    r"\" not implemented for '|^Could not run '|missing the required \"forward\""
)
"""What torch says with a NotImplementedError of its own."""


_NOT_INSTALLED = re.compile(r"(\w+) is not available, please install")
"""What PEFT says of a library that it has a use for and that is not there."""


class Experiment:
    """One case: the bare network has been built and run, nothing is attached yet.

    Attributes:
        dialect, case, trial: what is tried, on what, and the script of it.
        base: the bare network's output.
        reference: the exact outputs; None where the network's layers are not side by side.
        own: the network's own parameters and buffers by name, the very objects.
    """

    def __init__(self, law: str, dialect: Dialect, case: Case) -> None:
        self.dialect, self.case = dialect, case
        self.trial = Trial(law, dialect.name)
        dialect.begin(self.trial, case)
        self.trial.run("base = run()")
        self.base: torch.Tensor = self.trial.names["base"]
        net = self.trial.names["net"]
        x = self.trial.names["x"]
        self.reference = Reference(net, case, x) if case.net.linear else None
        self.own: dict[str, torch.Tensor] = {
            **dict(net.named_parameters()),
            **dict(net.named_buffers()),
        }

    @property
    def x(self) -> torch.Tensor:
        """The inputs."""
        inputs: torch.Tensor = self.trial.names["x"]
        return inputs

    @property
    def model(self) -> Any:
        """The adapted model."""
        return self.trial.names["model"]

    @property
    def is_peft(self) -> bool:
        """Whether PEFT is what is tried."""
        return isinstance(self.dialect, Peft)

    @property
    def has_to_run(self) -> bool:
        """Whether no refusal counts: of PEFT's LoRA with nothing added, and of one's own class."""
        return not self.is_peft or self.dialect.name == "LORA"

    # -------------------------------------------------------------------- doing

    def attach(self, *, fill: bool = True) -> None:
        """Attach the first adapter, run it and, with ``fill``, give it values as after training.

        Raises:
            NotApplicable: PEFT says that it does not support the method on this network.
            ContractBroken: it raised anything else; of LoRA itself, anything at all.
        """
        try:
            self.dialect.attach(self.trial, self.case)
            if self.is_peft:
                self._run_once()
        except Refused as refusal:
            raise self.outcome(refusal, always=self.has_to_run) from None
        if self.dialect.plain and (self.case.net.linear or not self.is_peft):
            self.terms()  # of every module that was asked for
        if fill:
            self.dialect.fill(self.trial, FIRST, self.case.seed + 7)

    def _run_once(self) -> None:
        """Run it; the script says so only where that fails."""
        try:
            self.trial.value("run()")
        except Exception:
            self.trial.run("run()")

    def outcome(self, refusal: Refused, *, always: bool = False) -> NotApplicable | ContractBroken:
        """What it means that a step raised: no verdict if it is refused by design, or if a library
        is not installed, else a failure.

        With ``always`` it has to work whatever is said.
        """
        if lacks_library(refusal.error) and not always:
            return NotApplicable(f"not installed here: {refusal}")
        if is_refusal(refusal.error) and not always:
            return NotApplicable(f"refused by design: {refusal}")
        return self.trial.broken(f"it raises: {refusal}")

    def say(self, operation: str, *args: Any) -> None:
        """Carry out an operation; that it raises breaks the law, unless it is refused by design.

        A class of one's own leaves out what it does not support, or raises NotImplementedError: the
        words of other exceptions are not known to mean that.

        Raises:
            NotApplicable: there is no such operation, or it is refused by design.
            ContractBroken: it raised.
        """
        try:
            self.dialect.say(self.trial, operation, *args)
        except Refused as refusal:
            raise self.outcome(refusal, always=self._only_words(refusal)) from None

    def _only_words(self, refusal: Refused) -> bool:
        return not self.is_peft and not isinstance(refusal.error, NotImplementedError)

    def may(self, operation: str, *args: Any) -> bool:
        """Carry out an operation that may as well be refused, with any exception; whether it was
        carried out.
        """
        try:
            self.dialect.say(self.trial, operation, *args)
        except Refused as refusal:
            self.trial.run(f"# refused: {refusal}")
            return False
        return True

    def add(self, name: str, case: Case) -> None:
        """Add an adapter, give it values, and leave it active."""
        self.say("add", name, case)
        self.say("activate", name)
        self.dialect.fill(self.trial, name, case.seed + 7)

    def must(self, code: str) -> None:
        """Run lines; that they raise breaks the law, as in :meth:`say`."""
        try:
            self.trial.run(code)
        except Refused as refusal:
            raise self.outcome(refusal, always=self._only_words(refusal)) from None

    def in_fresh_processes(
        self, code: str, gives: str, *, hash_seeds: Sequence[int]
    ) -> list[Mapping[str, torch.Tensor]]:
        """The tensors that ``gives`` is after ``code``, in processes that have done nothing else.

        Raises:
            NotApplicable: it cannot import the implementation.
            fresh.Refused: the code raised.
        """
        script = Script(code, gives, self.dialect.paths(), self.dialect.device)
        return [result.outputs for result in run_side_by_side(script, hash_seeds)]

    def output(self, code: str = "") -> torch.Tensor:
        """Run the model; that it raises breaks the law, unless PEFT refuses by design."""
        try:
            return self.trial.output(code)
        except Refused as refusal:
            raise self.outcome(refusal, always=self.has_to_run) from None

    # -------------------------------------------------------------------- expecting

    def require_plain(self) -> Reference:
        """The reference.

        Raises:
            NotApplicable: the method's layers do not compute ``W x + s B A x``.
        """
        if not self.dialect.plain or self.reference is None:
            raise NotApplicable(NOT_PLAIN)
        return self.reference

    def terms(self, name: str = FIRST, case: Case | None = None) -> dict[str, Term]:
        """Copies of what the adapter ``name`` holds now.

        Raises:
            ContractBroken: other modules are adapted than were asked for, or a factor does not fit.
        """
        chosen = case or self.case
        found = self.dialect.factors(self.trial, name)
        self._require_targets(name, found, chosen)
        known = chosen.alpha / chosen.r
        return {
            key: Term(
                B.to("cpu", copy=True),
                A.to("cpu", copy=True),
                scaling if scaling == scaling else known,
            )
            for key, (B, A, scaling) in found.items()
        }

    def _require_targets(
        self, name: str, found: Mapping[str, tuple[Any, Any, float]], case: Case
    ) -> None:
        """Exactly the modules asked for; for a class of one's own each A (r, in), B (out, r)."""
        asked = set(case.targets)
        for keys, what in (
            (asked - found.keys(), "is left out"),
            (found.keys() - asked, "is adapted, which nobody asked for"),
        ):
            if keys:
                raise self.trial.broken(
                    f"adapter {name!r}: {min(keys)} {what}", self.dialect.shown(name)
                )
        if self.is_peft:
            return  # some variants give each module a rank of its own
        for key, (b, a, _) in found.items():
            rows, columns = self.own[f"{key}.weight"].shape
            for factor, tensor, fit in (("A", a, [case.r, columns]), ("B", b, [rows, case.r])):
                if list(tensor.shape) != fit:
                    raise self.trial.broken(
                        f"adapter {name!r}: {factor} of {key} is {list(tensor.shape)}, not {fit}",
                        self.dialect.shown(name),
                    )

    def expect(
        self,
        adapters: Adapters,
        what: str,
        *,
        merges: int = 0,
        slack: Mapping[str, float] | None = None,
        code: str = "",
    ) -> torch.Tensor:
        """The output has to be the exact one, up to rounding; returns it.

        Args:
            adapters: those at work.
            what: the state, for the message.
            merges: merges and unmerges on the way.
            slack: what else each layer's product may be off.
            code: what gives the output, if it is not the plain run.
        """
        reference = self.require_plain()
        found = self.output(code)
        if found.shape != self.base.shape:
            raise self.trial.broken(
                f"{what}: the output has shape {list(found.shape)}, not {list(self.base.shape)}"
            )
        miss = reference.miss(found, adapters, merges, slack)
        if miss is not None:
            raise self.trial.broken(f"{what}: {miss}", f"# {what}", miss.check())
        return found

    def expect_bits(self, expected: torch.Tensor, name: str, what: str) -> None:
        """The output has to be ``expected``, which the script calls ``name``, bit for bit."""
        difference = how_different(self.output(), expected)
        if difference:
            raise self.trial.broken(
                f"{what}: {difference}",
                f"# {what}",
                f"assert torch.equal(y, {name}), (y - {name}).abs().max()",
            )

    # -------------------------------------------------------------------- the project's checks

    def check(self, judge: Callable[[Subject], object], *demonstration: str) -> None:
        """Hold the adapter, as saved and loaded again, against one of the project's checks.

        ``demonstration`` are lines that show in the script what the check looks at.
        """
        from pytest_lora.subject import Subject

        key = "input_ids" if self.case.net.reads_tokens else "x"
        subject = Subject.from_model(self.model, {key: self.x})
        try:
            self.judge(subject, judge, *demonstration)
        finally:
            subject.release()

    def judge(
        self, subject: Subject, judge: Callable[[Subject], object], *demonstration: str
    ) -> None:
        """Likewise for a subject at hand.

        A check that PEFT's exception keeps from a verdict is a failure as well, unless it is a
        refusal by design; the missing parts of this machine are none of PEFT's.
        """
        try:
            judge(subject)
        except (CannotRun, NotApplicable) as reason:
            error = reason.__cause__ or reason.__context__
            missing = isinstance(reason, CannotRun) and reason.missing
            by_itself = isinstance(reason, NotApplicable) and error is None
            excused = error is not None and (is_refusal(error) or lacks_library(error))
            if missing or by_itself or excused:
                raise NotApplicable(str(reason)) from None
            raise self.trial.broken(str(reason), *demonstration) from None
        except CheckFailed as failure:
            found, *also = _findings(failure)
            raise self.trial.broken(found, *demonstration, also=also) from None


def _findings(failure: CheckFailed) -> list[str]:
    """What a check found: its problems, where it counts them, else its worst place."""
    measurement = failure.result.measurement
    problems: Any = measurement.details.get("problems", ()) if measurement else ()
    worst = measurement.where if measurement else None
    return [str(Problem.from_dict(item)) for item in problems] or [worst or str(failure)]


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says that something is not meant to be, rather than that it broke."""
    if isinstance(error, NotMergeable):
        return error.__context__ is not None and is_refusal(error.__context__)
    if isinstance(error, NotImplementedError):
        return not _OF_TORCH.search(str(error))
    if isinstance(error, ValueError):
        return bool(_BY_DESIGN.search(str(error)))
    if isinstance(error, TypeError):
        return bool(_NO_SUCH.search(str(error)))
    return isinstance(error, RuntimeError) and bool(_NO_MERGE.search(str(error)))


def lacks_library(error: BaseException) -> bool:
    """Whether an exception says that a library is not installed, which is none of PEFT's faults."""
    if isinstance(error, ModuleNotFoundError):
        name = error.name or ""
    else:
        said = _NOT_INSTALLED.search(str(error))
        name = said[1] if said else ""
    # PEFT may look in the wrong place for a part of a library that is there, or for all of it.
    return name.isidentifier() and importlib.util.find_spec(name) is None


def says_refusal(text: str) -> bool:
    """The same of an exception in one line, its type and its message."""
    name, _, message = text.partition(": ")
    kind = getattr(builtins, name, Exception)
    return is_refusal(kind(message))
