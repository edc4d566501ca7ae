"""A module with a JSON job, run on a system; its events stream back, its result or its error comes out as if it had run here.

`run_module` is this side, `serve_job` the other one: the module ends with

    if __name__ == "__main__":
        raise SystemExit(serve_job(main, sys.argv[1:]))

What the work is, neither knows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from phinetune import __version__
from phinetune.errors import ConfigError, PhinetuneError, SystemRunError
from phinetune.events import Event, Note, OnEvent, log_event
from phinetune.systems.config import SystemConfig, environment_of, python_of
from phinetune.systems.log import LogFile, secrets_in, without_secrets
from phinetune.systems.process import PARENT_IS_HERE, Started, exit_text, start_process
from phinetune.systems.wire import MARK, Outcome, read_event, to_json, write_event, write_outcome

_LAST_WORDS = 5.0  # seconds that stderr may stay open, held by somebody else, after the process has ended


def run_module(
    system: SystemConfig,
    module: str,
    job: dict[str, Any],
    folders: Sequence[Path],
    log_file: Path,
    on_event: OnEvent = log_event,
) -> dict[str, Any]:
    """Run `python -m module JOBFILE` on `system` and return its result.

    `job` holds JSON's values (paths become text; give absolute ones). `folders` are what a container sees, under the same paths; other
    systems see everything. What the module prints is added to `log_file` as it comes. Raises the PhinetuneError that the module
    raised; SystemRunError for a bug or a death, with the last line of its traceback and the place of the log. When this call is
    interrupted, or `on_event` raises, the module is stopped with everything that it started.
    """
    if system.type == "azureml":
        raise ConfigError("azureml is not supported yet", "use a local system")
    secrets = [
        *secrets_in(job),
        *secrets_in(system.environment),
        *secrets_in(dict(os.environ)),
        *secrets_in(system.build_args),
    ]
    with LogFile(log_file, secrets) as log, tempfile.TemporaryDirectory(prefix="phinetune-job-") as scratch:
        job_file = Path(scratch) / "job.json"
        job_file.write_text(to_json({"phinetune": __version__, "job": job}), encoding="utf-8")
        log.say(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {module} on {_described(system)}")
        log.say(f"# job: {to_json(without_secrets(job))}")
        started = _start(system, module, job_file, folders, log, on_event)
        noise = threading.Thread(target=log.copy, args=(started.stderr,), name="phinetune-log", daemon=True)
        try:
            noise.start()
            outcome = _attend(started, log, on_event)
            code = started.wait()
        except BaseException:
            started.stop()
            raise
        finally:
            noise.join(_LAST_WORDS)
            started.close()
    if log.failure is not None:
        on_event(Note(f"{log.file}: the log is not complete: {log.failure.strerror or log.failure}", warning=True))
    return _result(outcome, code, f"{module} on {started.place}", log, on_event)


def serve_job(main: Callable[[dict[str, Any], OnEvent], dict[str, Any]], argv: Sequence[str]) -> int:
    """The other side: read the job file that `argv` names, call `main(job, on_event)`, write its events and its outcome; the exit code.

    While `main` runs, whatever it or a library prints goes to standard error. A request to end (SIGTERM) and the death of the process
    that asked for the work arrive in `main` as KeyboardInterrupt.
    """
    lock = threading.Lock()
    with _events_on_stdout() as stream, _interrupted_by_termination():

        def on_event(event: Event) -> None:
            with lock:
                write_event(stream, event)

        try:
            write_outcome(stream, Outcome(result=main(_read_job(argv), on_event)))
            return 0
        except PhinetuneError as error:
            write_outcome(stream, Outcome(error=error))
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            sys.stderr.flush()
            write_outcome(stream, Outcome(crash=_last_line(error)))
            return 1


def _start(
    system: SystemConfig, module: str, job_file: Path, folders: Sequence[Path], log: LogFile, on_event: OnEvent
) -> Started:
    if system.type == "docker":
        from phinetune.systems.container import start_container

        return start_container(system, module, job_file, folders, log, on_event)
    python = python_of(system) if system.type == "python" else Path(sys.executable)
    return start_process(python, module, job_file, environment_of(system, python))


def _described(system: SystemConfig) -> str:
    """The system in one line, variables by name only."""
    place = {"python": system.python, "docker": system.image or system.dockerfile or system.build_context}
    variables = f", variables: {', '.join(sorted(system.environment))}" if system.environment else ""
    return f"{system.type} {place.get(system.type) or ''}".strip() + variables


def _attend(started: Started, log: LogFile, on_event: OnEvent) -> Outcome | None:
    """Pass events on, and what else stands on standard output to the log, until it ends; the outcome, if one was handed over."""
    outcome = None
    for line in _lines(started.stdout):
        before, mark, after = line.rpartition(MARK.encode())  # what was printed last may lack its newline
        found = read_event((mark + after).decode("utf-8", "replace"))
        log.add(line if found is None else before)
        if found is None:
            continue
        if isinstance(found, Outcome):
            outcome = found
        else:
            on_event(found)
    return outcome


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines with their ends; a last one without its end comes as it is."""
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _result(outcome: Outcome | None, code: int, what: str, log: LogFile, on_event: OnEvent) -> dict[str, Any]:
    """The result in `outcome`, or the exception that says why there is none."""
    if outcome is not None and outcome.error is not None:
        raise outcome.error
    if outcome is not None and outcome.result is not None:
        if code != 0:
            on_event(Note(f"{what} ended with {exit_text(code)} after it had handed over its result", warning=True))
        return outcome.result
    if outcome is not None and outcome.crash:
        reason = log.clean(outcome.crash.encode("utf-8", "replace")).decode("utf-8", "replace")
    elif code == 0:
        reason = "ended without handing over a result"
    else:
        last = log.last_line()
        reason = f"ended with {exit_text(code)}" + (f": {last}" if last and not last.startswith("# ") else "")
    raise SystemRunError(f"{what}: {reason} (log: {log.file})", "the log holds everything that it printed")


def _read_job(argv: Sequence[str]) -> dict[str, Any]:
    """The job in the file that `argv` names. Raises ConfigError for no file, no job, and a job of another version."""
    if len(argv) != 1:
        raise ConfigError(f"one job file is needed, found {len(argv)} arguments")
    try:
        value = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
        version, job = str(value["phinetune"]), dict(value["job"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{argv[0]}: is no job file: {_last_line(error)}") from None
    if version != __version__:
        raise ConfigError(
            f"the job comes from phinetune {version}, here is {__version__}", f"install phinetune=={version} here"
        )
    return job


@contextlib.contextmanager
def _events_on_stdout() -> Iterator[TextIO]:
    """A stream to what is standard output now; until the end, file descriptor 1 leads where standard error does."""
    sys.stdout.flush()
    kept = os.dup(1)  # not handed to child processes
    os.dup2(2, 1)
    for printer in (sys.stdout, sys.stderr):
        printer.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        with os.fdopen(os.dup(kept), "w", encoding="ascii") as stream:
            yield stream
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """SIGTERM, and the end of standard input after the parent's greeting, as KeyboardInterrupt, so that files are left in order."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what clears up now must not be interrupted
        raise KeyboardInterrupt

    def watch() -> None:
        with contextlib.suppress(OSError):  # no standard input at all
            if os.read(0, len(PARENT_IS_HERE)) == PARENT_IS_HERE:  # else nobody promised to hold it open
                while os.read(0, 64):
                    pass
                if hasattr(os, "killpg"):
                    os.killpg(
                        os.getpgrp(), signal.SIGTERM
                    )  # who greets has made a group of this process and its children
                else:
                    os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(
        target=watch, name="phinetune-parent", daemon=True
    ).start()  # on a plain descriptor: it may stay blocked at exit
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_line(error: BaseException) -> str:
    """`ValueError: what it says`, its first line."""
    text = str(error).strip().splitlines()
    return type(error).__name__ + (f": {text[0]}" if text else "")
