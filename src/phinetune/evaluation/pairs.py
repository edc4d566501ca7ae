"""Two models on the same examples, example by example: how many each wins, and whether chance alone makes such a difference.

Where both are right or both wrong, nothing is learned about which is better. Of the n examples where they differ, the better one wins
some number; if neither were better, each would be a coin's throw. The exact two-sided sign test, which for right and wrong is
McNemar's (1947), sums the probabilities of all outcomes at least as one-sided:

    p = min(1, 2 · sum of C(n, k) for k = 0 .. min(won, lost) / 2^n)

Intervals of the two models alone cannot tell this: they hold the spread over examples, which both share. Not here: which models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """One model against another: examples that it does better, examples that it does worse, and the sign test's p."""

    won: int
    lost: int
    p_value: float


def compare_pairs(scores: Sequence[float], reference: Sequence[float]) -> Pairs:
    """`scores` of one model against those of the `reference`, both of the same examples in the same order."""
    pairs = list(zip(scores, reference, strict=True))
    won, lost = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return Pairs(won, lost, sign_test(won, lost))


def sign_test(won: int, lost: int) -> float:
    """The exact two-sided p of `won` against `lost` throws of a fair coin; 1 for none. In whole numbers, so right for any count."""
    n = won + lost
    term, tail = 1, 1  # C(n, 0)
    for k in range(min(won, lost)):
        term = term * (n - k) // (k + 1)
        tail += term
    return 1.0 if 2 * tail >= 1 << n else 2 * tail / (1 << n)
