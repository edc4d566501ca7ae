"""What crosses the border between two processes: events, and at the end a result, an error of the tree, or a crash.

One line of ASCII each: the control character RS (as in RFC 7464), one JSON object, a newline. A line without the RS is something that the
other side printed. Errors are rebuilt by name from `phinetune.errors` alone; nothing that arrives is executed or unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, TextIO

from phinetune import errors
from phinetune.errors import PhinetuneError
from phinetune.events import Event, Note, Progress

MARK = "\x1e"
"""What every line of ours begins with; it stands nowhere else in one."""
_ERRORS = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, PhinetuneError)}


@dataclass(frozen=True)
class Outcome:
    """How the other side ended: with `result`, with `error`, or with a bug whose traceback's last line is `crash`."""

    result: dict[str, Any] | None = None
    error: PhinetuneError | None = None
    crash: str = ""


def write_event(stream: TextIO, event: Event) -> None:
    """Write `event` as one line, at once."""
    if isinstance(event, Note):
        _write(stream, {"note": event.text, "warning": event.warning})
    else:
        figures = {name: float(value) for name, value in event.figures.items()}
        _write(stream, {"stage": event.stage, "done": event.done, "total": event.total, "figures": figures})


def write_outcome(stream: TextIO, outcome: Outcome) -> None:
    """Write how it ended. Raises TypeError for a result that is no dictionary of JSON's values (paths become text)."""
    if outcome.error is not None:
        name = next(c.__name__ for c in type(outcome.error).__mro__ if _ERRORS.get(c.__name__) is c)
        _write(stream, {"error": name, "problems": outcome.error.problems, "hint": outcome.error.hint})
    elif outcome.crash:
        _write(stream, {"crash": outcome.crash})
    elif isinstance(outcome.result, dict):
        _write(stream, {"result": outcome.result})
    else:
        raise TypeError(f"a result must be a dictionary, found {type(outcome.result).__name__}")


def read_event(line: str) -> Event | Outcome | None:
    """The event or outcome in `line`; None if the line is neither."""
    if not line.startswith(MARK):
        return None
    try:
        return _read(json.loads(line[1:]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def to_json(value: Any) -> str:
    """`value` as one line of ASCII JSON; paths become text. Raises TypeError for anything else that JSON does not have."""
    return json.dumps(value, default=_path_text)


def _write(stream: TextIO, value: dict[str, Any]) -> None:
    stream.write(MARK + to_json(value) + "\n")
    stream.flush()


def _read(value: dict[str, Any]) -> Event | Outcome | None:
    if "note" in value:
        return Note(str(value["note"]), bool(value["warning"]))
    if "stage" in value:
        total = value["total"]
        figures = {str(k): float(v) for k, v in value["figures"].items()}
        return Progress(str(value["stage"]), int(value["done"]), None if total is None else int(total), figures)
    if "error" in value:
        problems = [str(problem) for problem in value["problems"]]
        return Outcome(error=_ERRORS.get(str(value["error"]), PhinetuneError)(problems, str(value["hint"])))
    if "crash" in value:
        return Outcome(crash=str(value["crash"]))
    return Outcome(result=dict(value["result"]))


def _path_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise TypeError(f"{type(value).__name__} cannot be handed to another process: {value!r}")
