"""A causal language model, run so that the logits of a document never exist.

A window goes through the model's body once; the model's own code between body and logits (norms,
an adapted head, soft caps, scalings) is then run on a few rows at a time.  Nothing here knows an
architecture.  Two things about a model are taken for granted only after it has shown them, on a
probe of some dozens of tokens:

* *split*: what the body returned, handed back to the model, gives its logits bit for bit; and the
  logits of one row do not depend on the others, bit for bit.
* *packed*: several windows in one row, with position ids that start over, do not see each other:
  other tokens in one leave the states of another unchanged, bit for bit, and these differ from the
  window's own by no more than rounding noise moves them (:mod:`pytest_lora.numerics.noise`).

A model that does not split is run over its own key-value cache, a few tokens at a time, if that
gives the plain logits up to rounding noise.  Windows of one that does not pack get a row each,
padded on the right, where the probe shows what that does: whatever stands at the padding, the
states differ from the window's own by no more than rounding noise moves them.  Else a window is run
at a time.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_lora.errors import CannotRun, NotApplicable
from pytest_lora.numerics.fingerprint import locate_difference
from pytest_lora.numerics.likelihood import token_nll
from pytest_lora.numerics.noise import rounding_noise
from pytest_lora.numerics.streaming import intercepted
from pytest_lora.probe import output_of
from pytest_lora.structure import Structure
from pytest_lora.tasks.definition import Window

if TYPE_CHECKING:
    from pytest_lora.subject import Subject

__all__ = ["AdaptedModel", "BaseModelAlone", "Batch", "CausalModel", "predicts_tokens"]

PROBE = 16
"""Tokens of each document of the probe."""
SEED = 4177


class Batch:
    """Windows in one row, with position ids that start over in each; or in a row each.

    Attributes:
        inputs: what the model is given; for a single window its token ids alone.
        scored: positions whose predictions count, (n,), in all rows one after the other.
        targets: the tokens to predict there, (n,).
    """

    def __init__(
        self, group: Sequence[Window], device: torch.device, *, padded: bool = False, pad: int = 0
    ) -> None:
        """``padded``: a row each, filled up on the right with the token ``pad``."""
        width = max(len(window.ids) for window in group) if padded else 0
        ids: list[int] = []
        positions: list[int] = []
        mask: list[int] = []
        scored: list[int] = []
        targets: list[int] = []
        for window in group:
            ids += window.ids
            positions += range(len(window.ids))
            scored += range(len(ids) - len(window.targets), len(ids))
            targets += window.targets
            spare = max(0, width - len(window.ids))
            mask += [1] * len(window.ids) + [0] * spare
            ids += [pad] * spare
        shape = (len(group) if padded else 1, -1)
        self.inputs = {"input_ids": torch.tensor(ids, device=device).view(shape)}
        if len(group) > 1 and padded:
            self.inputs["attention_mask"] = torch.tensor(mask, device=device).view(shape)
        elif len(group) > 1:
            self.inputs["position_ids"] = torch.tensor(positions, device=device).view(shape)
        self.scored = torch.tensor(scored, device=device)
        self.targets = torch.tensor(targets, device=device)
        self._counts = [len(window.targets) for window in group]

    def by_window(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Values per scored token, cut into those of each window."""
        return torch.split(values, self._counts)


class CausalModel:
    """One of the two models: what it has shown about itself, and how it is run.

    Attributes:
        body: the module whose output its head takes; None where the model does not split.
        packs: whether windows in one row do not see each other.
        rows: rows of logits to compute at a time.
    """

    body: Any
    packs: bool
    rows: int

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._kind: type[Any] = tuple
        known = inspect.signature(subject.base.module.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in known else {}

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Let the base's modules be this model's."""
        raise NotImplementedError

    @property
    def outer(self) -> Any:
        """What takes the inputs."""
        raise NotImplementedError

    # ---------------------------------------------------------------------- running it

    def nll(self, batch: Batch) -> torch.Tensor:
        """Negative log-likelihood of every target."""
        if self.body is None:
            return self._nll_over_cache(batch)
        return token_nll(self.states(batch), batch.targets, self.head, rows=self.rows)

    def states(self, batch: Batch) -> torch.Tensor:
        """What the head gets at the scored positions, (n, width)."""
        return self._states(batch.inputs)[batch.scored]

    def _states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def make(_: str, __: Any, forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                self._kind = type(output)
                kept.append(output[0])
                return _instead(output, output[0][:, -1:])  # a single row of logits

            return run

        with intercepted({"": self.body}, make):
            self.outer(**inputs, **self._options)
        [states] = kept  # virtual tokens come first
        return states[:, -inputs["input_ids"].shape[1] :].flatten(0, 1)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of states (n, width), by the model's own code."""
        module: Any = self.subject.base.module

        def make(_: str, __: Any, ___: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                return _of_kind(self._kind, states[None])

            return run

        ids = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
        with intercepted({"": self.body}, make):
            logits: torch.Tensor = _logits(module(input_ids=ids, **self._options))[0]
        return logits

    def switching_head(self, states: torch.Tensor) -> torch.Tensor:
        """:meth:`head` while the other model is the active one."""
        with self.active():
            return self.head(states)

    def _nll_over_cache(self, batch: Batch) -> torch.Tensor:
        pieces, first = [], len(batch.inputs["input_ids"][0]) - len(batch.scored)
        for start, logits in self._logits_over_cache(batch.inputs["input_ids"]):
            skip = max(0, first - start)
            if skip < len(logits):
                here = batch.targets[start + skip - first : start - first + len(logits)]
                pieces.append(token_nll(logits[skip:], here, lambda rows: rows, rows=self.rows))
        return torch.cat(pieces)

    def _logits_over_cache(self, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        cache = None
        for start in range(0, ids.shape[1], self.rows):
            piece = ids[:, start : start + self.rows]
            output = self.outer(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            yield start, _logits(output)[0, -piece.shape[1] :]

    # ---------------------------------------------------------------------- what it shows

    def learn(self, rows: Callable[[int], int]) -> None:
        """Find out whether the model splits and packs.

        Args:
            rows: how many rows of logits fit, given the size of the vocabulary.

        Raises:
            NotApplicable: what comes later in a text changes what it says of a token.
            CannotRun: it neither splits nor can be run over its cache.
        """
        plain = output_of(self.outer, {"input_ids": self._probe(0)})
        if not self._is_causal(plain):
            raise NotApplicable("the model sees the tokens it is to predict; it is not causal")
        self.rows = rows(plain.shape[-1])
        self.packs = False
        for body in self._candidates():
            self.body = body
            if self._splits(plain):
                self.packs = not self._learns_prompts() and self._keeps_apart()
                return
        self.body = None
        if not self._runs_over_cache(plain):
            raise CannotRun(
                f"the likelihoods of {type(self.subject.base.module).__name__} cannot be computed"
                " without all logits of a document at once",
                missing=True,
            )

    def _probe(self, which: int) -> torch.Tensor:
        vocabulary = self.subject.base.embedding[1] if self.subject.base.embedding else 2
        generator = torch.Generator().manual_seed(SEED + which)
        ids = torch.randint(vocabulary, (1, PROBE), generator=generator)
        return ids.to(self.subject.base.device)

    def _is_causal(self, plain: torch.Tensor) -> bool:
        """Whether later tokens leave earlier predictions alone: in every bit, or (where experts get
        other batches) up to rounding noise.
        """
        half = PROBE // 2
        other = torch.cat([self._probe(0)[:, :half], self._probe(1)[:, half:]], 1)
        until = plain.shape[1] - half
        changed = output_of(self.outer, {"input_ids": other})[:, :until]
        if _same(changed, plain[:, :until]):
            return True
        with rounding_noise(self.outer, SEED):
            noisy = output_of(self.outer, {"input_ids": self._probe(0)})
        return _rms(changed - plain[:, :until]) <= _rms((noisy - plain)[:, :until])

    def _candidates(self) -> list[Any]:
        """Modules the head may get its states from."""
        module: Any = self.subject.base.module
        found = []
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(module.get_decoder())
        found.append(getattr(module, getattr(module, "base_model_prefix", "") or "model", None))
        return [item for item in found if isinstance(item, torch.nn.Module) and item is not module]

    def _splits(self, plain: torch.Tensor) -> bool:
        try:
            states = self._states({"input_ids": self._probe(0)})
            logits = self.head(states)
            half = len(states) // 2
            other = torch.cat([states[:half], states[:half].flip(0)])
            apart = self.head(other)[:half]
        except Exception:  # whatever a model raises that is put together otherwise
            return False
        expected = plain[0, -len(states) :]
        return _same(logits, expected) and _same(apart, logits[:half])

    def _learns_prompts(self) -> bool:
        return False

    def _keeps_apart(self) -> bool:
        first, second, other = (self._probe(which) for which in range(3))
        try:
            packed = self._packed(first, second)
            changed = self._packed(other, second), self._packed(first, other)
            alone = self._states({"input_ids": second})
            with rounding_noise(self.outer, SEED):
                noisy = self._packed(first, second)
        except Exception:
            return False
        apart = _same(packed[PROBE:], changed[0][PROBE:])
        causal = _same(packed[:PROBE], changed[1][:PROBE])
        difference = _rms(packed[PROBE:] - alone)
        return apart and causal and difference <= _rms(packed[PROBE:] - noisy[PROBE:])

    def pads(self) -> bool:
        """Whether windows may stand side by side, padded on the right: only where it splits."""
        if self.body is None:
            return False
        long, short = (self._probe(which)[0].tolist() for which in range(2))
        windows = [Window(long, long), Window(short[: PROBE // 2], short[: PROBE // 2])]
        device = self.subject.base.device
        batches = [Batch(windows, device, padded=True, pad=pad) for pad in (long[0], short[-1])]
        try:
            alone = [self.states(Batch([window], device)) for window in windows]
            padded = [batch.by_window(self.states(batch)) for batch in batches]
            with rounding_noise(self.outer, SEED):
                noisy = batches[0].by_window(self.states(batches[0]))
        except Exception:  # a model that knows no mask
            return False
        return all(
            _rms(states - own) <= _rms(noise - found)
            for one in padded
            for states, own, noise, found in zip(one, alone, noisy, padded[0], strict=True)
        )

    def _packed(self, *parts: torch.Tensor) -> torch.Tensor:
        device = self.subject.base.device
        return self._states(Batch([Window(p[0].tolist(), []) for p in parts], device).inputs)

    def _runs_over_cache(self, plain: torch.Tensor) -> bool:
        rows, self.rows = self.rows, PROBE // 2
        try:
            pieces = [logits for _, logits in self._logits_over_cache(self._probe(0))]
            with rounding_noise(self.outer, SEED):
                noisy = output_of(self.outer, {"input_ids": self._probe(0)})
        except Exception:
            return False
        finally:
            self.rows = rows
        difference = _rms(torch.cat(pieces) - plain[0, -PROBE:])
        return difference <= _rms(noisy - plain)


class BaseModelAlone(CausalModel):
    """The untouched base model."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._attached: tuple[Any, Structure] | None = None

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Modules as they were loaded; those of the attached model are noted once."""
        model = self.subject.model
        if self._attached is None or self._attached[0] is not model:
            self._attached = model, Structure(self.subject.base.module)
        return self.subject.base.bare(self._attached[1])

    @property
    def outer(self) -> Any:
        """The base model itself."""
        return self.subject.base.module


class AdaptedModel(CausalModel):
    """The base model with its adapter attached."""

    def active(self) -> contextlib.AbstractContextManager[object]:
        """Modules with the adapter's layers, attached now if they were not."""
        return contextlib.nullcontext(self.subject.model)

    @property
    def outer(self) -> Any:
        """The PeftModel: it is what puts virtual tokens before the inputs."""
        return self.subject.model

    def _learns_prompts(self) -> bool:
        configs = self.subject.model.peft_config.values()
        return any(config.is_prompt_learning for config in configs)


def predicts_tokens(module: Any) -> bool:
    """Whether the model has an output embedding with a row per token."""
    try:
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    return head is not None and embedding is not None


def _instead(output: Any, states: torch.Tensor) -> Any:
    """A body's output with other states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, next(iter(output)): states})


def _of_kind(kind: type[Any], states: torch.Tensor) -> Any:
    return (states,) if kind is tuple else kind(last_hidden_state=states)


def _logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return locate_difference(found, expected).place is None


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())
