"""An implementation on a tiny network, and what a law may do and ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_lora.checks.bits import how_different
from pytest_lora.contract.dialects import FIRST, Case, Dialect, Peft
from pytest_lora.contract.reference import Reference, Term
from pytest_lora.contract.trial import Refused, Trial
from pytest_lora.errors import CheckFailed, NotApplicable
from pytest_lora.loading import one_line

if TYPE_CHECKING:
    import torch

    from pytest_lora.subject import Subject

__all__ = ["Adapters", "Experiment", "is_refusal"]

Adapters = Sequence[Mapping[str, Term]]
"""The adapters at work, each with its terms by module."""

_BY_DESIGN = re.compile(
    r"not (?:yet )?(?:supported|implemented)|unsupported|only supports?|does(?:n't| not) support|"
    r"supports only|cannot|can't|can only|incompatible|not compatible|impossible|"
    r"has no bias|please run|"
    r"does not allow|undefined merging",
    re.IGNORECASE,
)


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

    # -------------------------------------------------------------------- doing

    def attach(self, *, fill: bool = True) -> None:
        """Attach the first adapter and, with ``fill``, give it values as after training.

        Raises:
            NotApplicable: PEFT will not have it on this network.
        """
        try:
            self.dialect.attach(self.trial, self.case)
        except Refused as refusal:
            if self.is_peft:
                raise NotApplicable(f"cannot be attached here: {refusal}") from None
            raise self.trial.broken(f"it raises: {refusal}") from None
        if self.is_peft:
            self._require_running()
        if fill:
            self.dialect.fill(self.trial, FIRST, self.case.seed + 7)

    def _require_running(self) -> None:
        try:
            self.trial.value("run()")
        except Exception as error:
            raise NotApplicable(f"does not run on these inputs: {one_line(error)}") from None

    def say(self, operation: str, *args: Any) -> None:
        """Carry out an operation; that it raises breaks the law, unless it is refused by design.

        Raises:
            NotApplicable: there is no such operation, or it is refused by design.
            ContractBroken: it raised.
        """
        try:
            self.dialect.say(self.trial, operation, *args)
        except Refused as refusal:
            if is_refusal(refusal.error):
                raise NotApplicable(f"refused by design: {refusal}") from None
            raise self.trial.broken(f"it raises: {refusal}") from None

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

    def output(self) -> torch.Tensor:
        """Run the model; that it raises breaks the law, unless it refuses by design."""
        try:
            return self.trial.output()
        except Refused as refusal:
            if is_refusal(refusal.error):
                raise NotApplicable(f"refused by design: {refusal}") from None
            raise self.trial.broken(f"it raises: {refusal}") from None

    # -------------------------------------------------------------------- expecting

    def require_plain(self) -> Reference:
        """The reference.

        Raises:
            NotApplicable: the method's layers do not compute ``W x + s B A x``.
        """
        if not self.dialect.plain or self.reference is None:
            raise NotApplicable("its layers compute something else than W x + s B A x")
        return self.reference

    def terms(self, name: str = FIRST, case: Case | None = None) -> dict[str, Term]:
        """Copies of what the adapter ``name`` holds now."""
        chosen = case or self.case
        found = self.dialect.factors(self.trial, name)
        known = chosen.alpha / chosen.r
        return {
            key: Term(B.clone(), A.clone(), scaling if scaling == scaling else known)
            for key, (B, A, scaling) in found.items()
        }

    def expect(self, adapters: Adapters, what: str, *, merges: int = 0) -> torch.Tensor:
        """The output has to be the exact one, up to rounding; returns it."""
        reference = self.require_plain()
        found = self.output()
        if found.shape != self.base.shape:
            raise self.trial.broken(
                f"{what}: the output has shape {list(found.shape)}, not {list(self.base.shape)}"
            )
        miss = reference.miss(found, adapters, merges)
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

        key = "input_ids" if self.case.network == "llama" else "x"
        subject = Subject.from_model(self.model, {key: self.x})
        try:
            self.judge(subject, judge, *demonstration)
        finally:
            subject.release()

    def judge(
        self, subject: Subject, judge: Callable[[Subject], object], *demonstration: str
    ) -> None:
        """Likewise for a subject at hand."""
        try:
            judge(subject)
        except CheckFailed as failure:
            measurement = failure.result.measurement
            found = (measurement.where if measurement else None) or str(failure)
            raise self.trial.broken(found, *demonstration) from None


def is_refusal(error: BaseException) -> bool:
    """Whether an exception says that something is not meant to be, rather than that it broke."""
    if isinstance(error, NotImplementedError):
        return True
    return isinstance(error, ValueError | RuntimeError) and bool(_BY_DESIGN.search(str(error)))
