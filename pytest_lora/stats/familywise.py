"""Several gates in one run: how often any of them may be wrong.

A gate has two null hypotheses, "the bound is broken" and "the bound is kept", of which one is true.
Two error rates are kept, each at ``alpha`` for the whole run: that any gate which should fail
passes, and that any gate which should pass fails.  Each is Holm's over one null hypothesis per
gate, and nothing is assumed about how the gates depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SequentialHolm", "holm"]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: those at most alpha stand at a familywise rate alpha.

    (S. Holm, *A simple sequentially rejective multiple test procedure*, 1979.)  The i-th smallest
    of k is multiplied by ``k - i + 1``, and the result is never below that of a smaller one.
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"{p} is no p-value")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


class SequentialHolm:
    """Which verdicts of several sequential gates stand, while they run.

    Takes anytime-valid p-values: where the null hypothesis is true, one is *ever* at most x with
    probability at most x.  So Holm's argument holds at all times at once: as long as no true null
    hypothesis of the k' true ones has ever had a p-value of ``alpha / k'`` or less, none is ever
    rejected, whichever gates have been decided, at whatever times.  P-values only fall, and so a
    verdict that stands keeps standing.  (J. Bartroff and J. Song, *Sequential tests of multiple
    hypotheses controlling type I and II familywise error rates*, 2014.)

    Args:
        gates: their names.
        alpha: the familywise error rate of wrong passes, and that of wrong failures.
    """

    def __init__(self, gates: Sequence[str], alpha: float) -> None:
        if len(set(gates)) != len(gates) or not gates:
            raise ValueError(f"{list(gates)} are no gates to tell apart")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, not {alpha}")
        self.alpha = alpha
        self._pass = dict.fromkeys(gates, 1.0)
        self._fail = dict.fromkeys(gates, 1.0)

    def update(self, gate: str, p_pass: float, p_fail: float) -> bool | None:
        """Take a gate's p-values as they are now; its verdict, as :meth:`verdict` gives it.

        ``p_pass`` is small where the bound is kept (``p_at_most`` of a drift, ``p_at_least`` of an
        accuracy), ``p_fail`` where it is broken (``p_above``, ``p_below``).  Certain ones are 0.
        """
        if gate not in self._pass:
            raise KeyError(f"{gate!r} is none of the gates {list(self._pass)}")
        if not (0 <= p_pass <= 1 and 0 <= p_fail <= 1):
            raise ValueError(f"{p_pass} and {p_fail} are no p-values")
        self._pass[gate] = min(self._pass[gate], p_pass)
        self._fail[gate] = min(self._fail[gate], p_fail)
        return self.verdict(gate)

    def verdict(self, gate: str) -> bool | None:
        """True if the gate passes, False if it fails, None while neither stands."""
        passes, fails = self.adjusted(gate)
        if min(passes, fails) > self.alpha:
            return None
        return passes <= fails

    def adjusted(self, gate: str) -> tuple[float, float]:
        """Adjusted p-values for passing and for failing."""
        at = list(self._pass).index(gate)
        return holm(list(self._pass.values()))[at], holm(list(self._fail.values()))[at]

    def alpha_for(self, gate: str) -> float:
        """The p-value at which this gate is decided either way, as things stand.

        ``alpha`` over the number of gates not yet decided the same way, this one included: a gate
        that runs alone with this ``alpha`` gives a verdict that stands.  It grows as others are
        decided.
        """
        return min(_threshold(p, gate, self.alpha) for p in (self._pass, self._fail))


def _threshold(p_values: dict[str, float], gate: str, alpha: float) -> float:
    # Those that are decided even if this gate never is; they stand before it in Holm's order.
    others = [p for name, p in p_values.items() if name != gate]
    decided = sum(adjusted <= alpha for adjusted in holm([*others, 1.0])[:-1])
    return alpha / (len(p_values) - decided)
