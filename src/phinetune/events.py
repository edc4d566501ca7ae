"""What a running stage says: small values handed to a callback. The loop reports, somebody else draws.

Every stage function takes `on_event`. The command line gives it a console; a program that gives nothing gets `log_event`, which
passes notes and warnings to Python's `logging` under the name "phinetune".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

_log = logging.getLogger("phinetune")


@dataclass(frozen=True)
class Note:
    """One line worth knowing once: a value that was derived, inherited, renamed, or replaced by what the machine has."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` are finished (`total` is None where it cannot be known); figures are for display."""

    stage: str
    done: int
    total: int | None = None
    figures: dict[str, float] = field(default_factory=dict)


Event = Note | Progress
OnEvent = Callable[[Event], None]


def log_event(event: Event) -> None:
    """The default listener: notes to the log, progress nowhere."""
    if isinstance(event, Note):
        _log.log(logging.WARNING if event.warning else logging.INFO, event.text)


def nobody(event: Event) -> None:
    """Listens to what has been said already, and says nothing."""
