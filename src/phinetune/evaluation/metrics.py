"""Metrics from text. A metric is a function (answer, reference) -> 0.0 to 1.0 in a table; a third party adds one to the table.

What depends on all answers together (precision, recall, F1 of labels) is a function of the list of pairs. More is better in all of them.
Intervals are Wilson's (1927) for a share of n: right for small n and near 0 and 1, where the usual one is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Metric = Callable[[str, str], float]


def exact_match(answer: str, reference: str) -> float:
    """1.0 if both are the same text, leading and trailing white space aside."""
    return float(answer.strip() == reference.strip())


def accuracy(answer: str, reference: str) -> float:
    """1.0 if both are the same label: the same text, upper and lower case and leading and trailing white space aside."""
    return float(label_of(answer) == label_of(reference))


METRICS: dict[str, Metric] = {"exact_match": exact_match, "accuracy": accuracy}


def label_of(text: str) -> str:
    """The label that a text stands for: without leading and trailing white space, in folded case. Nothing else is forgiven."""
    return text.strip().casefold()


def label_scores(pairs: Sequence[tuple[str, str]]) -> tuple[float, float, float]:
    """(precision, recall, F1) of (answer, reference) pairs, each the unweighted mean over the labels that occur as references (macro).

    Of a label: precision is the share of the answers with it that are right (0 if it is never answered), recall the share of the
    references with it that were answered so, F1 their harmonic mean (0 where both are 0). An answer that is no reference's label lowers
    the recall of its reference and nobody's precision. Raises ValueError for no pairs.
    """
    answered = [(label_of(a), label_of(r)) for a, r in pairs]
    labels = {reference for _, reference in answered}
    if not labels:
        raise ValueError("label_scores: no answers")
    given, right, wanted = (dict.fromkeys(labels, 0) for _ in range(3))
    for answer, reference in answered:
        wanted[reference] += 1
        right[reference] += answer == reference
        if answer in given:
            given[answer] += 1
    precision = sum(right[x] / given[x] if given[x] else 0.0 for x in labels)
    recall = sum(right[x] / wanted[x] for x in labels)
    f1 = sum(2 * right[x] / (given[x] + wanted[x]) for x in labels)
    return precision / len(labels), recall / len(labels), f1 / len(labels)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval (95 % by default) for a true share of which `share` was seen in n trials."""
    if n == 0:
        return 0.0, 1.0
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, center - half), min(1.0, center + half)
