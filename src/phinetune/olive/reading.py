"""A workflow from any file: phinetune's own as it is, one of Olive's translated, with every note said once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phinetune.config import apply_settings, locate, located, read_config_text
from phinetune.errors import ConfigError
from phinetune.events import Note, OnEvent, log_event
from phinetune.workflow.config import PassEntry, WorkflowConfig, parse_workflow

if TYPE_CHECKING:
    from phinetune.workflow.outcome import RunResult


def read_any(
    file: str | Path, settings: Sequence[str] = (), on_event: OnEvent = log_event
) -> tuple[WorkflowConfig, list[PassEntry]]:
    """(config, entries of the passes) of a native file or one of Olive's, `settings` (native keys) applied.

    Raises one ConfigError with every problem, each with the line of the user's file where it has one.
    """
    from phinetune.olive.translate import is_olive, translate

    path = Path(file)
    text, values = read_config_text(path)
    folder = path.absolute().parent
    try:
        if is_olive(values):
            translation = translate(values, folder)
            on_event(Note(f"{path}: a configuration of Olive {translation.era.versions}, read as phinetune's own"))
            for note in translation.notes:
                on_event(Note(f"{note.kind}: {note}"))
            values = translation.values
        return parse_workflow(apply_settings(values, settings), folder)
    except ConfigError as error:
        raise locate(error, text, path) from None


def run_file(
    file: str | Path,
    settings: Sequence[str] = (),
    only: str | None = None,
    until: str | None = None,
    on_event: OnEvent = log_event,
) -> RunResult:
    """Run the workflow in `file`, phinetune's own or one of Olive's, and deliver its result: what `phinetune run` does.

    settings: texts such as "passes.lora.r=8". Raises ConfigError with every problem before any work begins; see `run_workflow`.
    """
    from phinetune.workflow.plan import prepare
    from phinetune.workflow.run import run_workflow

    config, entries = read_any(file, settings, on_event)
    with located(file):
        workflow = prepare(config, entries, on_event)
    return run_workflow(workflow, only, until, on_event=on_event)
