"""The order in which a set is evaluated: random to the data, fixed for ever by a seed."""

from __future__ import annotations

from hashlib import sha256

__all__ = ["seeded_order"]


def seeded_order(size: int, seed: int, name: str = "") -> list[int]:
    """A random permutation of ``range(size)``, the same on every platform and in every release.

    Position ``i`` gets the key ``SHA-256("<seed>/<size>/<name>/<i>")`` in ASCII digits and UTF-8,
    and the positions are sorted by their keys.  No library's generator is involved, whose stream
    may change.  ``name`` (of a domain or task) makes the orders of several sets independent, so
    that one unlucky seed is not unlucky everywhere.

    Raises:
        ValueError: if ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"a set of {size} items has no order")
    stem = sha256(f"{seed}/{size}/{name}/".encode("utf-8", "surrogatepass"))

    def key(position: int) -> bytes:
        digest = stem.copy()
        digest.update(str(position).encode())
        return digest.digest()

    return sorted(range(size), key=key)
