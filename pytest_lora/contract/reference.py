"""What the outputs must be: ``x W^T + b`` and the adapters' ``s x A^T B^T``, in float64.

The model of the implementation is this one line.  It knows nothing of merging, wrapping, names or
order; those are the implementation's business, and must not show.

How far a sound output may be off follows from :mod:`pytest_lora.numerics.output_bound`: the
rounding of the products, and of the weight if it is a merged one.  Each merge and each unmerge
rounds the weight once more, so ``n`` of them in a row allow ``n + 1`` times that (triangle
inequality).  Several adapters at once count as one of the sum of their ranks: their outputs are
added one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pytest_lora.numerics.output_bound import LinearLengths, linear_bound

if TYPE_CHECKING:
    from pytest_lora.contract.dialects import Case

__all__ = ["Miss", "Reference", "Term"]


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's part in one layer: ``scaling * B @ A``, (d, r) and (r, k), on the CPU."""

    B: torch.Tensor
    A: torch.Tensor
    scaling: float

    def scaled(self, factor: float) -> Term:
        """The same ``factor`` times over."""
        return Term(self.B, self.A, self.scaling * factor)

    def delta(self) -> torch.Tensor:
        """The product, (d, k), in float64."""
        return self.scaling * (self.B.double() @ self.A.double())


@dataclass(frozen=True, slots=True)
class Miss:
    """Where an output is furthest outside its bound.

    Attributes:
        index: row and column of the output.
        found, expected, bound: the numbers there.
    """

    index: tuple[int, int]
    found: float
    expected: float
    bound: float

    def __str__(self) -> str:
        gap = abs(self.found - self.expected)
        return (
            f"output {list(self.index)} is {self.found:.9g}, {gap:.3g} from {self.expected:.9g}; "
            f"rounding allows {self.bound:.3g}"
        )

    def check(self) -> str:
        """A line of Python that fails for the same reason."""
        i, j = self.index
        return f"assert abs(y[{i}, {j}].item() - {self.expected!r}) <= {self.bound!r}, y[{i}, {j}]"


class Reference:
    """The exact outputs of a network of linear layers side by side.

    Keeps copies of the weights it was made from, on the CPU, so that nothing done to the network
    reaches it.
    """

    def __init__(self, net: torch.nn.Module, case: Case, x: torch.Tensor) -> None:
        self.names: Sequence[str] = case.net.linear
        self.x, self.dtype = x.to("cpu", copy=True), x.dtype
        self.transposed = {
            name for name in self.names if type(net.get_submodule(name)).__name__ == "Conv1D"
        }
        self.weights: dict[str, torch.Tensor] = {}
        self.biases: dict[str, torch.Tensor | None] = {}
        self.rebase(dict(net.named_parameters()))

    def rebase(self, own: Mapping[str, torch.Tensor]) -> None:
        """Take the base's weights as they are now; ``own`` are its parameters by name."""
        for name in self.names:
            weight = _exact(own[f"{name}.weight"])
            self.weights[name] = weight.T if name in self.transposed else weight
            bias = own.get(f"{name}.bias")
            self.biases[name] = None if bias is None else _exact(bias)

    def output(self, adapters: Iterable[Mapping[str, Term]]) -> torch.Tensor:
        """With these adapters at work, (rows, outputs) in float64."""
        active = list(adapters)
        parts = []
        for name in self.names:
            total = self.weights[name] + sum(
                (terms[name].delta() for terms in active if name in terms),
                torch.zeros_like(self.weights[name]),
            )
            bias = self.biases[name]
            part = self.x.double() @ total.T
            parts.append(part if bias is None else part + bias)
        return torch.cat(parts, -1)

    def reach(
        self, g: torch.Tensor, x: torch.Tensor, terms: Mapping[str, Term], stretch: float
    ) -> float:
        """The magnitudes of all products in ``<g, output>`` with one adapter, added up.

        ``stretch`` is what dropout multiplies the adapter's kept inputs by.
        """
        total = 0.0
        sizes = [len(self.weights[name]) for name in self.names]
        for name, part in zip(self.names, g.double().abs().split(sizes, -1), strict=True):
            size = x.double().abs() @ self.weights[name].abs().T
            bias, term = self.biases[name], terms[name]
            size += 0 if bias is None else bias.abs()
            low = stretch * x.double().abs() @ term.A.double().abs().T
            size += abs(term.scaling) * low @ term.B.double().abs().T
            total += float((part * size).sum())
        return total

    def bound(self, adapters: Iterable[Mapping[str, Term]], merges: int = 0) -> torch.Tensor:
        """How far a computed output may be from :meth:`output`, element by element."""
        active = list(adapters)
        parts = [
            linear_bound(self.x, self._lengths(name, [t[name] for t in active if name in t]))
            for name in self.names
        ]
        return (merges + 1) * torch.cat(parts, -1)

    def _lengths(self, name: str, terms: Sequence[Term]) -> LinearLengths:
        weight, bias = self.weights[name], self.biases[name]
        delta = torch.zeros(weight.shape[0], dtype=torch.float64)
        for term in terms:
            rows = term.B.double().norm(dim=1)
            delta += abs(term.scaling) * rows * float(term.A.double().norm())
        return LinearLengths(
            merged=weight.norm(dim=1) + delta,
            delta=delta,
            bias=torch.zeros_like(delta) if bias is None else bias.abs(),
            inputs=weight.shape[1],
            rank=sum(term.A.shape[0] for term in terms) + len(terms),
            weight=self.dtype,
            factors=terms[0].B.dtype if terms else self.dtype,
        )

    def miss(
        self,
        found: torch.Tensor,
        adapters: Iterable[Mapping[str, Term]],
        merges: int = 0,
        slack: Mapping[str, float] | None = None,
    ) -> Miss | None:
        """The worst element outside its bound, if there is one.

        ``slack`` is how far each layer's product may be off, in the Frobenius norm, before it is
        used: |x E^T| <= |x| |E|.
        """
        active = list(adapters)
        found = found.cpu()
        expected, bound = self.output(active), self.bound(active, merges)
        if slack is not None:
            widths = [(name, len(self.weights[name])) for name in self.names]
            each = [slack.get(name, 0.0) for name, width in widths for _ in range(width)]
            lengths = torch.linalg.vector_norm(self.x.double(), dim=1, keepdim=True)
            bound = bound + lengths * torch.tensor(each, dtype=torch.float64)
        ratio = ((found.double() - expected).abs() / bound).nan_to_num(torch.inf, torch.inf)
        worst = int(ratio.argmax())
        index = divmod(worst, ratio.shape[-1])
        if ratio[index] <= 1:
            return None
        return Miss(index, float(found[index]), float(expected[index]), float(bound[index]))


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True)
