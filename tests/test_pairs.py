"""The sign test against known values, and what is counted for it."""

from __future__ import annotations

import math

import pytest

from phinetune.evaluation.pairs import Pairs, compare_pairs, sign_test


@pytest.mark.parametrize(
    ("won", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (6, 0, 2 / 64),
        (1, 7, 2 * (1 + 8) / 256),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (4, 4, 1.0),
        (4, 5, 1.0),
    ],
)
def test_the_sign_test_is_the_binomial_one(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == sign_test(lost, won) == pytest.approx(p)


def test_every_split_of_the_throws_has_the_probability_of_what_is_at_least_as_one_sided() -> None:
    for n in range(1, 15):
        shares = [math.comb(n, k) / 2**n for k in range(n + 1)]
        for won in range(n + 1):
            tail = sum(share for k, share in enumerate(shares) if abs(2 * k - n) >= abs(2 * won - n))
            assert sign_test(won, n - won) == pytest.approx(tail)


def test_many_examples_neither_overflow_nor_take_long() -> None:
    for won, lost in ((2400, 2600), (25_100, 24_900)):
        normal = math.erfc((abs(won - lost) - 1) / math.sqrt(2 * (won + lost)))  # de Moivre, continuity corrected
        assert sign_test(won, lost) == pytest.approx(normal, rel=0.01)
    assert sign_test(0, 5000) == 0.0  # less than the least number there is


def test_pairs_count_where_the_two_differ() -> None:
    assert compare_pairs([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == Pairs(2, 1, 1.0)
    assert compare_pairs([0.5, 0.2], [0.4, 0.2]) == Pairs(1, 0, 1.0)
    with pytest.raises(ValueError, match="zip"):
        compare_pairs([1.0], [1.0, 0.0])
