"""One method and one law: the property test of it, and what came of it.

for cell in contract_cells(MyLora):
    print(try_cell(cell, examples=20))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from pytest_lora.contract.dialects import Case, Dialect, OwnClass, Peft, load_implementation
from pytest_lora.contract.experiment import Experiment
from pytest_lora.contract.known import Known, known_deviations
from pytest_lora.contract.laws import LAWS
from pytest_lora.contract.machine import LAW, SAYS, machine_for
from pytest_lora.contract.methods import discover
from pytest_lora.contract.networks import NETWORKS, ONLY_LORA
from pytest_lora.contract.trial import ContractBroken
from pytest_lora.errors import CannotRun, NotApplicable, UsageError
from pytest_lora.loading import one_line, parse_device, quiet
from pytest_lora.numerics.precision import accurate_products
from pytest_lora.strategies import alphas, seeds

__all__ = [
    "Cell",
    "Result",
    "Verdict",
    "assert_contract",
    "contract_cells",
    "law_ids",
    "law_texts",
    "sample_of",
    "try_cell",
]

_STEPS = 12
"""Operations in a sequence: enough for every pair of them, and for most threes."""

_SIZES = (16, 24, 32)
"""What the block sizes of PEFT's other methods divide."""
_WIDTHS = (*range(4, 13), 2, 3)
"""What is tried first has room for rank 2: rank 1 cannot tell alpha from alpha / r."""

_ONLY_PEFT = "it is about PEFT's models and settings, which a class of one's own has none of"


class Result(StrEnum):
    """What came of a law."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "n/a"
    KNOWN = "known"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one cell.

    Attributes:
        method, law: the cell.
        result: what came of it.
        reason: why it does not apply, or what was found.
        known: known deviations that showed.
        missed: those that did not.
        examples: how many were tried, up to the one that failed.
    """

    method: str
    law: str
    result: Result
    reason: str = ""
    known: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    examples: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain texts, to travel between processes."""
        return {**asdict(self), "result": self.result.value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of :meth:`to_dict`."""
        lists = {name: tuple(data[name]) for name in ("known", "missed")}
        return cls(**{**data, **lists, "result": Result(data["result"])})


@dataclass
class Cell:
    """A method and a law, and what was seen while trying.

    Attributes:
        dialect: of the method.
        law: id of the law.
        decided: how often the law was decided: examples, or steps of the sequences.
        tried: examples up to the first that failed, before any of them is made smaller.
        failed: whether one has failed.
        broken_down: what keeps it from being tried at all, such as a process that does not start.
    """

    dialect: Dialect
    law: str
    decided: int = 0
    tried: int = 0
    failed: bool = False
    broken_down: CannotRun | None = None
    reasons: list[str] = field(default_factory=list)
    seen: set[Known] = field(default_factory=set)

    @property
    def method(self) -> str:
        """Name of what is tried."""
        return self.dialect.name

    @property
    def is_main(self) -> bool:
        """Whether it is worth many examples: LoRA itself, or one's own class."""
        return not isinstance(self.dialect, Peft) or self.method == "LORA"

    def function(self, chosen: settings) -> Callable[[], None]:
        """The property test, a function without arguments that pytest and others can call."""
        reason = LAWS[self.law].excludes(self.dialect) if self.law in LAWS else ""
        if reason:  # there is nothing to draw
            return lambda: self.reasons.append(reason)
        options = settings(
            parent=chosen,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        cases = _cases(self.dialect, self.law).map(self._count)
        if self.law == LAW:
            steps = settings(parent=options, stateful_step_count=_STEPS)
            return lambda: self._run_machine(cases, steps)

        def test(case: Case) -> None:
            self._once(lambda: LAWS[self.law].hold(Experiment(self.law, self.dialect, case)))

        test.__name__ = test.__qualname__ = re.sub(r"\W", "_", f"{self.law}_{self.method}")
        # The name is part of the key under which Hypothesis keeps examples.
        wrapped: Callable[[], None] = options(given(case=cases)(test))
        return wrapped

    def _count(self, case: Case) -> Case:
        """Count an example, unless it is one of those that make a failure smaller."""
        self.tried += not self.failed
        return case

    def _once(self, attempt: Callable[[], None]) -> None:
        if self.broken_down is None:
            self._attempt(attempt)
        if self.broken_down is not None:  # at once: no smaller example will tell more of it
            raise self.broken_down

    def _attempt(self, attempt: Callable[[], None]) -> None:
        try:
            with quiet(), self._accurate():
                attempt()
            self.decided += 1
        except NotApplicable as reason:
            self.reasons.append(str(reason))
        except CannotRun as reason:
            if reason.missing:
                self.reasons.append(f"cannot run: {reason}")
            else:
                self.failed, self.broken_down = True, reason
        except ContractBroken as broken:
            if not self._excuse(broken):
                raise

    def _accurate(self) -> AbstractContextManager[None]:
        """On an accelerator the rounding that the laws assume has to be asked for."""
        return nullcontext() if self.dialect.device == "cpu" else accurate_products()

    def _run_machine(self, cases: st.SearchStrategy[Case], options: settings) -> None:
        case = Case(network=_networks(self.dialect, ())[0])
        self._once(lambda: Experiment(LAW, self.dialect, case).attach())
        if not self.decided:  # refused, or known to break
            return
        self.decided = 0  # what is attached is not yet judged
        machine = machine_for(self.dialect, cases, self._excuse, self._judged)
        with self._accurate():
            run_state_machine_as_test(machine, settings=options)

    def _judged(self) -> None:
        self.decided += 1

    def _excuse(self, broken: ContractBroken) -> bool:
        """Whether all that was found is a known deviation; what is known is noted.

        What is not comes first then.
        """
        expected = list(self._expected())
        for found in (broken.found, *broken.also):
            known = next((item for item in expected if item.explains(found)), None)
            if known is None:
                self.failed = True
                broken.blame(found)
                return False
            self.seen.add(known)
        return True

    def _expected(self) -> Iterator[Known]:
        if isinstance(self.dialect, Peft):
            import peft

            for item in known_deviations():
                if item.concerns(self.law, self.method, peft.__version__):
                    yield item

    def verdict(self, failure: Exception | None = None) -> Verdict:
        """What came of it, after the function ran, or raised ``failure``."""
        if failure is not None:
            text = failure.found if isinstance(failure, ContractBroken) else one_line(failure)
            return Verdict(self.method, self.law, Result.FAIL, text, examples=self.tried)
        if not self.decided and not self.seen:
            reason = self.reasons[0] if self.reasons else "it is not tried on this network"
            return Verdict(
                self.method, self.law, Result.NOT_APPLICABLE, reason, examples=self.tried
            )
        known = tuple(sorted(str(item) for item in self.seen))
        missed = tuple(str(item) for item in self._expected() if item not in self.seen)
        result = Result.KNOWN if known else Result.PASS
        return Verdict(
            self.method, self.law, result, known=known, missed=missed, examples=self.tried
        )


def law_ids() -> list[str]:
    """All laws, in order."""
    return list(law_texts())


def law_texts() -> dict[str, str]:
    """What each law says, by its id, in order."""
    return {**{law.id: law.says for law in LAWS.values()}, LAW: SAYS}


def contract_cells(implementation: str | type | None = None, *, device: str = "cpu") -> list[Cell]:
    """The cells of the installed PEFT, or of a class (itself, or ``package.module:Class``).

    Args:
        implementation: None for PEFT.
        device: where the networks and their inputs are, as torch names it.

    Raises:
        UsageError: there is no such class, or it lacks ``attach`` or ``factors``; torch knows no
            such device.
        CannotRun: the device is not there.
    """
    parse_device(device)
    dialects: Iterable[Dialect]
    if implementation is None:
        dialects = [Peft(method) for method in discover()]
    elif isinstance(implementation, str):
        dialects = [load_implementation(implementation)]
    else:
        place = f"{implementation.__module__}:{implementation.__qualname__}"
        dialects = [OwnClass(place, implementation)]
    dialects = list(dialects)
    for dialect in dialects:
        dialect.device = device
    return [
        Cell(dialect, law) for dialect in dialects for law in law_ids() if _networks(dialect, law)
    ]


_SAMPLED = 8


def sample_of(cells: Sequence[Cell]) -> list[Cell]:
    """The cells without most of those whose laws look at what PEFT's methods share.

    LoRA itself keeps all of them; of the others' every eighth is left, each method beginning with
    another law, so that each law is left with an eighth of them and each method with some laws.
    """
    turns = {method: turn for turn, method in enumerate(dict.fromkeys(c.method for c in cells))}

    def stays(cell: Cell) -> bool:
        if cell.is_main or cell.law not in LAWS or not LAWS[cell.law].sampled:
            return True
        turns[cell.method] += 1
        return turns[cell.method] % _SAMPLED == 0

    return [cell for cell in cells if stays(cell)]


def try_cell(cell: Cell, *, examples: int = 20, shrink: bool = True) -> Verdict:
    """Run one cell outside any test runner, on the same examples every time.

    Without ``shrink`` a failure is not made minimal.
    """
    phases = [phase for phase in Phase if shrink or phase is Phase.generate]
    chosen = settings(max_examples=examples, derandomize=True, database=None, phases=phases)
    try:
        cell.function(chosen)()
    except Exception as failure:
        return cell.verdict(failure)
    return cell.verdict()


def assert_contract(
    implementation: str | type,
    *,
    laws: Iterable[str] | None = None,
    examples: int = 50,
    device: str = "cpu",
) -> list[Verdict]:
    """Hold a class against the contract; returns a verdict for each law, in their order.

    A law that cannot be tried on a class has a verdict that says so.

    Args:
        implementation: the class, or ``package.module:Class``; docs/contract.md says what it
            needs.
        laws: ids of laws, one at least; all of them if None.
        examples: how many to try of each.
        device: where the networks and their inputs are, as torch names it.

    Raises:
        ContractBroken: the first law that does not hold, with a minimal script.
        UsageError: no such class, law or device, or no law at all.
        CannotRun: the device is not there.
    """
    wanted = list(laws) if laws is not None else law_ids()
    if not wanted:
        raise UsageError(f"laws names no law, so nothing would be held: {', '.join(law_ids())}")
    unknown = sorted(set(wanted) - set(law_ids()))
    if unknown:
        raise UsageError(f"no law {unknown[0]!r}; the laws are {', '.join(law_ids())}")
    cells = contract_cells(implementation, device=device)
    there = {cell.law: cell for cell in cells}
    verdicts = []
    for law in (law for law in law_ids() if law in wanted):
        cell = there.get(law) or Cell(cells[0].dialect, law, reasons=[_ONLY_PEFT])
        if law in there:
            cell.function(settings(max_examples=examples, database=None))()
        verdicts.append(cell.verdict())
    return verdicts


# ------------------------------------------------------------------------------ what is drawn


def _networks(dialect: Dialect, law: Any) -> tuple[str, ...]:
    """The networks the dialect is tried on under a law (an id, or the networks it asks for)."""
    asked = (LAWS[law].networks if law in LAWS else ()) if isinstance(law, str) else law
    other = LAWS[law].otherwise if isinstance(law, str) and law in LAWS else ""
    usual = other or "linear"
    if isinstance(dialect, OwnClass):
        known = tuple(name for name in asked if name in ("linear", "tied"))
        return known or ((usual,) if other or not asked else ())
    if isinstance(dialect, Peft):
        own = dialect.method.network
        if own != "linear":
            alike = tuple(name for name in asked if name in (own, f"scaled {own}"))
            return alike if asked else (own,)
        if not dialect.method.accepts("target_parameters"):
            asked = tuple(name for name in asked if not NETWORKS[name].parameters)
        if dialect.method.name != "LORA":
            asked = tuple(name for name in asked if name not in ONLY_LORA)
            if not asked and isinstance(law, str) and law in LAWS and LAWS[law].networks:
                return ()
        if not dialect.method.is_lora:
            if law == "chosen_layers" and not dialect.method.accepts("layers_to_transform"):
                return ("look-alikes",)
            fit = ("linear", "many", "llama", "tied", "tied head", "layers", "bare layers",
                   "kinds", "convolution", "odd names")  # fmt: skip
            return tuple(name for name in asked or (usual,) if name in fit)
    return asked or (usual,)


@st.composite
def _cases(draw: st.DrawFn, dialect: Dialect, law: str) -> Case:
    network = draw(st.sampled_from(_networks(dialect, law)))
    free = _takes_any_size(dialect) and network in ("linear", "many", "conv1d")
    sizes = _SIZES
    if free:
        k = draw(st.sampled_from(_WIDTHS))
        others = st.sampled_from([size for size in _WIDTHS if size != k])
        sizes = (k, draw(others), draw(others))
    ranks = [r for r in (2, 1, 3, 4) if r <= min(sizes) // 2] if free else [2, 4]
    r = draw(st.sampled_from(ranks))
    options = {}
    if isinstance(dialect, Peft) and dialect.method.is_lora and not NETWORKS[network].parameters:
        options["lora_dropout"] = repr(draw(st.sampled_from([0.5, 0.0])))
    if NETWORKS[network].reads_tokens and isinstance(dialect, Peft):
        options["task_type"] = "'CAUSAL_LM'"
    return Case(
        network=network,
        sizes=sizes,
        bias=not free or draw(st.booleans()),  # some methods work on the bias
        seed=draw(seeds()),
        r=r,
        alpha=draw(alphas(r)),
        dtype=draw(st.sampled_from(_dtypes(dialect, law))),
        dropout=draw(st.sampled_from([0.0, 0.5])) if not isinstance(dialect, Peft) else 0.0,
        options=options,
    )


def _takes_any_size(dialect: Dialect) -> bool:
    """Decompositions need enough rows and columns, orthogonal factors an even rank."""
    if isinstance(dialect, Peft):
        return dialect.plain and "init_lora_weights" not in dialect.method.options
    return True


def _dtypes(dialect: Dialect, law: str) -> list[str]:
    chosen = LAWS.get(law)
    if chosen is None or not chosen.half:
        return ["float32"]
    if not dialect.plain:
        return ["bfloat16", "float32"] if chosen.any_half else ["float32"]
    own = isinstance(dialect, OwnClass)
    return ["float32", "float64"] if own else ["float32", "float64", "bfloat16"]
