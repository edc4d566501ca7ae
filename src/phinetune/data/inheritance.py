"""What a later data config takes over from an earlier one: evaluation from training, `eval_data` from `data`.

How a row becomes an example is taken over as far as the later config does not say otherwise; which rows of a file, only for the same file.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from phinetune.data.messages import DataConfig

_OF_FILE = {"rows", "max_rows", "draw", "subset", "split"}
_OF_TEMPLATE = {"system", "chat_template", "messages"}


def inherit(values: dict[str, Any], earlier: dict[str, Any], same_file: bool) -> dict[str, Any]:
    """The fields of `earlier` that `values` does not have and that do not contradict what it has. Both hold fields of `DataConfig`."""
    given = {key for key, value in values.items() if value is not None}
    skip = {"path", *values, *(() if same_file else _OF_FILE)}
    if "text" in given:
        skip |= {"prompt", "completion", "chat", "learn_prompt", *_OF_TEMPLATE}
    elif given & {"prompt", "completion"}:
        skip |= {"text", "messages"}
    elif "messages" in given:
        skip |= {
            "text",
            "prompt",
            "completion",
            *(("chat", "learn_prompt", "too_long") if not earlier.get("chat", True) else ()),
        }
    if values.get("chat") is True:
        skip |= {"too_long"}
    elif values.get("chat") is False:
        skip |= _OF_TEMPLATE
    if "strategy" in given:
        skip |= {"stride", "joiner", "attend_across"}
    if "max_rows" in given:
        skip |= {"draw"}
    return {
        f.name: earlier[f.name]
        for f in fields(DataConfig)
        if f.name not in skip and earlier.get(f.name) not in (None, f.default)
    }


def inherited_note(taken: dict[str, Any]) -> str:
    """`prompt '...', seed 3`, for people."""
    shown = {key: repr(value) for key, value in taken.items()}
    return ", ".join(f"{key} {text if len(text) <= 80 else text[:77] + '...'}" for key, text in shown.items())
