"""Metrics from text. A metric is a function (answer, reference) -> 0.0 to 1.0 in a table; a third party adds one to the table.

Intervals are Wilson's (1927) for a share of n: right for small n and near 0 and 1, where the usual one is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Metric = Callable[[str, str], float]


def exact_match(answer: str, reference: str) -> float:
    """1.0 if both are the same text, leading and trailing white space aside."""
    return float(answer.strip() == reference.strip())


METRICS: dict[str, Metric] = {"exact_match": exact_match}


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval (95 % by default) for a true share of which `share` was seen in n trials."""
    if n == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)
